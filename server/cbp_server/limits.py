"""How much memory one learner, and one message to it, may claim. Pure; asked wherever a spec or examples come in.

Without these bounds a request of a few bytes could ask for more memory than there is, and the engine process, with
every learner in it, would end for want of it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from cbp import BatchError, FieldViolation, LearnerSpec, SpecError
from cbp.architectures.profile import check_buildable, profile_of
from cbp.spec.network_spec import (
    AnyNetwork,
    ConvnetSpec,
    LinearSpec,
    MlpSpec,
    RegisteredSpec,
    ResnetSpec,
    TransformerSpec,
)
from cbp_proto import MAX_MESSAGE_BYTES

_FLOAT_BYTES = 4
#: Of an answer, for all in it that is no outputs.
_ANSWER_MARGIN = 2**16


@dataclass(frozen=True, kw_only=True)
class Limits:
    """See the settings of the same names."""

    max_parameters: int
    max_layers: int
    max_pending_bytes: int
    max_activation_bytes: int
    max_answer_bytes: int = MAX_MESSAGE_BYTES - _ANSWER_MARGIN
    """Of the outputs in one answer: no setting, since clients take no more."""

    @property
    def max_import_bytes(self) -> int:
        """Of a learner's file: with Adam four values a parameter, the examples that wait, the probe, and some text."""
        return 4 * _FLOAT_BYTES * self.max_parameters + 2 * self.max_pending_bytes + self.max_activation_bytes + 2**24


def check_spec(spec: LearnerSpec, limits: Limits) -> None:
    """Raises `SpecError` if a learner of this spec is larger than the server hosts, or cannot be built here."""
    check_buildable(spec)
    violations = list(_violations(spec, limits))
    if violations:
        raise SpecError(violations)


def check_training(spec: LearnerSpec, examples: int, limits: Limits, *, return_outputs: bool = False) -> None:
    """Raises `BatchError` if learning from this many examples takes more memory than one message may, or if the outputs
    that are to be returned are more than one answer may hold.

    Examples of a few bytes on the wire can take thousands in the learner: features become float32, and each example
    has its outputs and, while its step lasts, the layers' activations.
    """
    at_once = spec.batch_size or examples
    needed = examples * _outer_bytes(spec) + at_once * _hidden_bytes(spec)
    if needed > limits.max_activation_bytes:
        room = limits.max_activation_bytes - spec.batch_size * _hidden_bytes(spec)
        _refuse_examples(examples, needed, room // (_outer_bytes(spec) if spec.batch_size else _bytes(spec)), limits)
    if return_outputs:
        step = spec.batch_size or 1
        most = limits.max_answer_bytes // _answer_bytes(spec) // step * step
        if examples > most:
            waiting = step - 1  # examples of earlier batches, at most; they are learnt with these ones
            _refuse_answer(spec, (waiting + examples) // step * step, most, limits, optional=True)


def check_prediction(spec: LearnerSpec, examples: int, limits: Limits) -> None:
    """Raises `BatchError` if predicting this many examples takes more memory than one request may."""
    needed = examples * _outer_bytes(spec)  # hidden layers are gone through in passes of bounded size
    if needed > limits.max_activation_bytes:
        _refuse_examples(examples, needed, limits.max_activation_bytes // _outer_bytes(spec), limits)
    most = limits.max_answer_bytes // _answer_bytes(spec)
    if examples > most:
        _refuse_answer(spec, examples, most, limits, optional=False)


def _violations(spec: LearnerSpec, limits: Limits) -> Iterator[FieldViolation]:
    profile = profile_of(spec.network)
    layers = len(profile.hidden_units)
    if layers > limits.max_layers:
        description = f"has {layers} layers, at most {limits.max_layers} are allowed; use fewer, or raise --max-layers"
        yield FieldViolation(_depth(spec.network), description)
    if profile.parameters > limits.max_parameters:
        description = (
            f"makes a network of {profile.parameters} parameters, at most {limits.max_parameters} are allowed; "
            "make it narrower, or raise --max-parameters"
        )
        yield FieldViolation(_widest(spec.network), description)
    waiting, each = spec.batch_size, _outer_bytes(spec)
    if waiting * each > limits.max_pending_bytes:
        description = (
            f"lets {waiting} examples of {each} bytes wait for each other, {waiting * each} bytes where at most "
            f"{limits.max_pending_bytes} are allowed: {limits.max_pending_bytes // each} examples fit; lower it, or "
            "raise --max-pending-bytes"
        )
        yield FieldViolation("batch_size", description)
    each = _bytes(spec)
    for field, at_once in (("batch_size", spec.batch_size), ("monitoring.probe_size", spec.monitoring.probe_size)):
        if at_once * each > limits.max_activation_bytes:
            description = (
                f"sends {at_once} examples of {each} bytes through the network at once, {at_once * each} bytes where "
                f"at most {limits.max_activation_bytes} are allowed: {limits.max_activation_bytes // each} examples "
                "fit; lower it, or raise --max-activation-bytes"
            )
            yield FieldViolation(field, description)


def _refuse_examples(examples: int, needed: int, fitting: int, limits: Limits) -> None:
    description = (
        f"{examples} examples take {needed} bytes in this learner, at most {limits.max_activation_bytes} are allowed "
        f"for one message: send at most {max(fitting, 0)} at once, or raise --max-activation-bytes"
    )
    raise BatchError([FieldViolation("features", description)])


def _refuse_answer(spec: LearnerSpec, answered: int, fitting: int, limits: Limits, *, optional: bool) -> None:
    advice = [f"send at most {fitting} examples at once"] if fitting > 0 else []
    if optional:
        advice.append("do without return_outputs")
    description = (
        f"the outputs of {answered} examples take {answered * _answer_bytes(spec)} bytes, at most "
        f"{limits.max_answer_bytes} fit into one answer: {', or '.join(advice) or 'no example of this learner does'}"
    )
    raise BatchError([FieldViolation("features", description)])


def _answer_bytes(spec: LearnerSpec) -> int:
    """Of one example's outputs."""
    return spec.network.out_features * _FLOAT_BYTES


def _outer_bytes(spec: LearnerSpec) -> int:
    """Of one example's features and outputs."""
    return (spec.network.input_size + spec.network.out_features) * _FLOAT_BYTES


def _hidden_bytes(spec: LearnerSpec) -> int:
    """Of one example's activations in all layers but the last."""
    return profile_of(spec.network).activation_values * _FLOAT_BYTES


def _bytes(spec: LearnerSpec) -> int:
    return _outer_bytes(spec) + _hidden_bytes(spec)


def _depth(network: AnyNetwork) -> str:
    """The field that makes a network deep."""
    match network:
        case ConvnetSpec():
            return "network.channels"
        case ResnetSpec():
            return "network.blocks"
        case TransformerSpec():
            return "network.depth"
        case RegisteredSpec():
            return "network.settings"
        case _:
            return "network.hidden"


def _widest(network: AnyNetwork) -> str:
    """The field that makes a network large."""
    widths = {"out_features": network.out_features}
    match network:
        case MlpSpec():
            widths |= {"hidden": max(network.hidden), "in_features": network.inputs.width(network.in_features)}
        case LinearSpec():
            widths |= {"in_features": network.inputs.width(network.in_features)}
        case ConvnetSpec():
            flat = (
                network.channels[-1]
                * network.input_size
                // (network.in_channels * network.pooling ** (2 * len(network.channels)))
            )
            widths |= {"channels": max(flat, *network.channels), "hidden": max(network.hidden, default=0)}
        case ResnetSpec():
            widths |= {"channels": max(network.channels)}
        case TransformerSpec():
            widths |= {field: getattr(network, field) for field in ("width", "feed_forward", "vocabulary", "length")}
        case RegisteredSpec():
            widths |= {"settings": profile_of(network).parameters}
    return f"network.{max(widths, key=lambda field: widths[field])}"

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

_FLOAT_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Limits:
    """See the settings of the same names."""

    max_parameters: int
    max_layers: int
    max_pending_bytes: int
    max_activation_bytes: int

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


def check_training(spec: LearnerSpec, examples: int, limits: Limits) -> None:
    """Raises `BatchError` if learning from this many examples takes more memory than one message may.

    Examples of a few bytes on the wire can take thousands in the learner: features become float32, and each example
    has its outputs and, while its step lasts, the layers' activations.
    """
    at_once = spec.batch_size or examples
    needed = examples * _outer_bytes(spec) + at_once * _hidden_bytes(spec)
    if needed > limits.max_activation_bytes:
        room = limits.max_activation_bytes - spec.batch_size * _hidden_bytes(spec)
        _refuse_examples(examples, needed, room // (_outer_bytes(spec) if spec.batch_size else _bytes(spec)), limits)


def check_prediction(spec: LearnerSpec, examples: int, limits: Limits) -> None:
    """Raises `BatchError` if predicting this many examples takes more memory than one request may."""
    needed = examples * _outer_bytes(spec)  # hidden layers are gone through in passes of bounded size
    if needed > limits.max_activation_bytes:
        _refuse_examples(examples, needed, limits.max_activation_bytes // _outer_bytes(spec), limits)


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

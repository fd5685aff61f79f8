"""One learner's steps for any network: a module of PyTorch, trained by autograd and an optimizer of `torch.optim`.

Between two steps come the methods of `ModuleState`, such as `ContinualBackprop`. Nothing is read back from the device
within a step. Steps are deterministic on one machine and number of threads, and leave torch's own random generators as
they were. With bfloat16 there is no scaling of losses: its exponents are those of float32.

Shapes: B examples in a step, C outputs.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from cbp import losses
from cbp.architectures.building import Network, build, found_units, own_random_numbers, seeds_of
from cbp.architectures.profile import layer_names
from cbp.continual_backprop import ContinualBackprop
from cbp.engines.eager_engine import EagerWork, Work
from cbp.engines.names import EngineName
from cbp.errors import Diverged, FieldViolation, SnapshotError, shown
from cbp.examples.pending import Examples, Probe
from cbp.methods import PlasticityMethod, ReDo, SelfNormalizedResets, make_methods
from cbp.optimizers import STEPS_COUNTED
from cbp.plasticity.measures import GroupHistory, Seen, measure_groups
from cbp.plasticity.samples import LayerPlasticity
from cbp.saved.learner import SavedLearner, SavedModule
from cbp.saved.parts import LARGEST_COUNT
from cbp.serialization import FINITE, NOT_NEGATIVE, Numbers, counts, take_tensor
from cbp.spec.learner_spec import AdamSpec, AdamWSpec, Initializer, LearnerSpec, RmspropSpec, SgdSpec, goes_with_resets
from cbp.units.discovery import Discovery
from cbp.units.unit_groups import activity_rows

_PLAIN = "plain"
_TENSOR = "tensor"
_VARIANCES = ("variance", "running_var")
"""Buffers of `RunningNormalization` and of PyTorch's batch normalisation."""


class ModuleState:
    """One learner's network, its optimizer, and the methods at work on it. See `LearnerState`."""

    def __init__(self, spec: LearnerSpec, device: torch.device) -> None:
        first, self._later_seed = seeds_of(spec.seed)
        self.spec = spec
        self.device = device
        self.steps = [0]
        self.network: Network = build(spec.network, first).to(device)
        self._first = {f"initial_parameters.{name}": value.clone() for name, value in self._parameters.items()}
        self.optimizer = _optimizer(spec, self.network)
        _fill(self.optimizer)
        self._found: Discovery = found_units(spec.network, self.network)
        self._attach()

    def _attach(self) -> None:
        """Makes the resets, None without units or where a method takes their place, and the methods, the resets the
        first of them."""
        initializer: Initializer = getattr(self.spec.network, "initializer", "default")
        body, optimizer, seed = self.network.body, self.optimizer, self._later_seed
        self.resets: ContinualBackprop | None = None
        # Units that are not reset now have ages and utilities all the same, for an update may change that.
        if self._found.groups and goes_with_resets(self.spec.methods):
            self.resets = ContinualBackprop(
                body, optimizer, initializer=initializer, seed=seed, **dict(self.spec.resets)
            )
        others = make_methods(self.spec.methods, body, optimizer, initializer=initializer, seed=seed)
        self.methods: list[PlasticityMethod] = others if self.resets is None else [self.resets, *others]
        """In the order in which they take their steps."""

    def forward(self, inputs: Tensor) -> Tensor:
        """The network's outputs [B, C] float32, computed in the precision of the specification."""
        with self._autocast():
            outputs: Tensor = self.network(inputs)
        return outputs.float()

    def _autocast(self) -> AbstractContextManager[object]:
        if self.spec.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    @property
    def replacements(self) -> list[list[int]]:
        for method in self.methods:
            if isinstance(method, ContinualBackprop | ReDo | SelfNormalizedResets):
                return [list(method.replacements.values())]
        return [[0] * len(self._found.groups)]

    @property
    def _parameters(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.network.named_parameters()}

    def checked_numbers(self) -> list[tuple[Diverged, Tensor]]:
        buffers = [buffer for buffer in self.network.buffers() if buffer.is_floating_point()]
        moments = [
            value
            for kept in self.optimizer.state.values()
            for value in kept.values()
            if isinstance(value, Tensor) and value.dim()
        ]
        parameters: list[tuple[Diverged, Tensor]] = [("parameters", _flat([*self._parameters.values(), *buffers]))]
        return [*parameters, ("optimizer state", _flat(moments))] if moments else parameters

    # -- saving and restoring --

    def changing_tensors(self) -> dict[str, Tensor]:
        tensors = {f"parameters.{name}": value for name, value in self._parameters.items()}
        tensors |= {f"buffers.{name}": value for name, value in self._buffers().items()}
        for parameter, slots in self._slots().items():
            tensors |= {f"optimizer.{parameter}.{slot}": value for slot, value in slots.items()}
        for place, method in enumerate(self.methods):
            tensors |= _split(method.state_dict(), f"methods.{place}")[1]
        return tensors

    def first_tensors(self) -> dict[str, Tensor]:
        return self._first

    def _buffers(self) -> dict[str, Tensor]:
        """Those that are part of a state; not what follows from the specification."""
        return {name: value for name, value in self.network.state_dict().items() if name not in self._parameters}

    def _slots(self) -> dict[str, dict[str, Tensor]]:
        return {
            name: {slot: value for slot, value in self.optimizer.state[parameter].items() if isinstance(value, Tensor)}
            for name, parameter in self.network.named_parameters()
        }

    def to_plain(self) -> dict[str, Any]:
        plain = [_split(method.state_dict(), f"methods.{place}")[0] for place, method in enumerate(self.methods)]
        return {"step": self.steps[0], "methods": plain}

    @property
    def saved_as(self) -> type[SavedLearner]:
        return SavedModule

    def load(self, tensors: Mapping[str, Tensor], saved: SavedLearner) -> None:
        assert isinstance(saved, SavedModule)
        if len(saved.methods) != len(self.methods):
            text = f"Are the state of {len(saved.methods)} methods, where this learner has {len(self.methods)}"
            raise SnapshotError.of([FieldViolation("methods", text)])
        for name, target, numbers in self._expected(saved.step):
            target.copy_(take_tensor(tensors, name, target.shape, target.dtype, numbers))
        self.steps = [saved.step]
        for place, (method, skeleton) in enumerate(zip(self.methods, saved.methods, strict=True)):
            name = f"methods.{place}"
            state = _joined(skeleton, tensors, name, _split(method.state_dict(), name)[0])
            if state.get("step", saved.step) != saved.step:
                text = f"Expected {saved.step}, as the learner's; got {shown(state['step'])}"
                raise SnapshotError.of([FieldViolation(f"{name}.step", text)])
            try:
                method.load_state_dict(state)
            except SnapshotError as error:
                raise error.within(name) from error

    def _numbers_of_buffer(self, name: str, value: Tensor) -> Numbers | None:
        ours = self.spec.network.kind != "registered"  # what whole numbers mean elsewhere, nobody here knows
        if not value.is_floating_point():
            return counts(LARGEST_COUNT) if ours else None
        return NOT_NEGATIVE if ours and name.rpartition(".")[2] in _VARIANCES else FINITE

    def _expected(self, step: int) -> Iterator[tuple[str, Tensor, Numbers | None]]:
        """By name each tensor but those of the methods, and which numbers it may hold after so many steps."""
        for name, value in self._parameters.items():
            yield f"parameters.{name}", value, FINITE
        for name, value in self._buffers().items():
            yield f"buffers.{name}", value, self._numbers_of_buffer(name, value)
        for parameter, slots in self._slots().items():
            for slot, value in slots.items():
                yield f"optimizer.{parameter}.{slot}", value, _numbers_of_slot(slot, step)
        for name, value in self._first.items():
            yield name, value, FINITE

    def adopt(self, spec: LearnerSpec) -> None:
        self.spec = spec
        for group in self.optimizer.param_groups:
            group |= _settings(spec)
            _match_momentum(self.optimizer, group)
        states = [method.state_dict() for method in self.methods]
        for method in self.methods:
            method.remove()
        self._attach()
        for method, state in zip(self.methods, states, strict=True):
            method.load_state_dict(state)

    # -- measuring --

    def measure(self, probe: Probe, between_layers: Callable[[], None] | None) -> tuple[LayerPlasticity, ...]:
        seen = self._seen(probe)
        history = None
        if self.resets is not None:
            saved = self.resets.state_dict()
            history = GroupHistory(age=saved["age"][0], utility=saved["utility"][0], replacements=self.replacements[0])
        return measure_groups(
            layer_names(self.spec),
            self._found.groups,
            _output_layer(self.network),
            self.network,
            {name.removeprefix("initial_parameters."): value for name, value in self._first.items()},
            history,
            self.spec.resets.decay_rate,
            seen,
            self.spec.monitoring.dormant_threshold,
            between_layers,
        )

    def _seen(self, probe: Probe) -> Seen | None:
        """What the probe brings about; None without examples."""
        count = len(probe)
        if not count:
            return None
        loss, outputs = self.spec.loss, self.spec.network.out_features
        targets = losses.encode_targets(loss, torch.from_numpy(probe.targets).to(self.device), outputs)
        scale = torch.full((count, 1), losses.gradient_scale(loss, outputs) / count, device=self.device)
        inputs = torch.from_numpy(probe.features).to(self.device)
        with torch.inference_mode(False), torch.enable_grad(), _evaluating(self.network), self._tapped() as tapped:
            predicted = self.forward(inputs)
            parameters = dict(self.network.named_parameters())
            gradients = torch.autograd.grad(
                predicted,
                list(parameters.values()),
                losses.output_gradient(loss, predicted.detach(), targets, scale),
                allow_unused=True,
            )
        return Seen(
            activations=[
                activity_rows(tapped[group.readings[0].tap], group.readings[0]) for group in self._found.groups
            ],
            gradients={
                name: gradient for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None
            },
        )

    @contextmanager
    def _tapped(self) -> Iterator[dict[int, Tensor]]:
        """Where the groups' activations are, by tap, after a forward pass within."""
        found: dict[int, Tensor] = {}
        hooks = []
        for place, tap in enumerate(self._found.taps):

            def look(_layer: nn.Module, inputs: Any, output: Any, place: int = place, side: str = tap.side) -> None:
                value = output if side == "output" else inputs[0]
                found[place] = (value[0] if isinstance(value, tuple) else value).detach().float()

            hooks.append(tap.layer.register_forward_hook(look))
        try:
            yield found
        finally:
            for hook in hooks:
                hook.remove()


class ModuleEngine:
    """Takes the steps of one learner by autograd."""

    name: EngineName = "module"

    def __init__(self, spec: LearnerSpec, state: ModuleState) -> None:
        self.state = state
        self.device = state.device
        self.spec = spec
        state.network.train()

    def configure(self, specs: Sequence[LearnerSpec]) -> None:
        [self.spec] = specs

    @torch.inference_mode()
    def predict(self, inputs: Tensor) -> Tensor:
        with _evaluating(self.state.network):
            outputs = self.state.forward(inputs[0])
        return outputs.unsqueeze(0)

    def begin(self, examples: Examples, step_size: int, probe: Probe) -> Work:
        return EagerWork(self, examples, step_size, probe)

    def steps_between_calls(self, step_size: int, learners: int) -> int:
        del step_size, learners
        return 1

    def measure(self, probe: Probe, between_layers: Callable[[], None] | None) -> tuple[LayerPlasticity, ...]:
        return self.state.measure(probe, between_layers)

    def step(self, inputs: Tensor, targets: Tensor, scale: Tensor, outputs: Tensor) -> None:
        """One step; what was predicted before it is written to `outputs` [1, B, C].

        inputs [1, B, …]; targets [1, B, C] as encoded by the loss; scale [1, B, 1], each example's share in the
        gradient.
        """
        state = self.state
        optimizer = state.optimizer
        with _repeatable(state, self.device):
            optimizer.zero_grad()
            # A copy: where an example lies in memory must not decide how products round.
            predicted = state.forward(inputs[0].clone())
            outputs[0] = predicted.detach()
            gradient = losses.output_gradient(self.spec.loss, predicted.detach(), targets[0], scale[0])
            torch.autograd.backward(predicted, gradient)
            if (most := self.spec.optimizer.clip_norm) is not None:
                clip_grad_norm_(state.network.parameters(), most)
            optimizer.step()
            for method in state.methods:
                method.step()
        state.steps[0] += 1

    def reset_units(self, wanted: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
        resets = self.state.resets
        return [(0,) * len(wanted[0]) if resets is None else resets.reset_units(wanted[0])]


@contextmanager
def _repeatable(state: ModuleState, device: torch.device) -> Iterator[None]:
    """The same steps give the same numbers: convolutions on a GPU by deterministic algorithms, and a registered
    architecture's random layers from a seed of the step's own, of which nothing need be saved."""
    on_gpu = device.type == "cuda"
    with _deterministic_convolutions() if on_gpu else nullcontext():
        if state.spec.network.kind != "registered":
            yield
            return
        devices = (device,) if on_gpu else ()
        with own_random_numbers(seeds_of(state.spec.seed, state.steps[0])[1], devices):
            yield


def _deterministic_convolutions() -> AbstractContextManager[None]:
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    network.eval()
    try:
        yield
    finally:
        network.train()


def _optimizer(spec: LearnerSpec, network: nn.Module) -> Optimizer:
    parameters = list(network.parameters())
    settings = _settings(spec)
    match spec.optimizer:
        case SgdSpec():
            return SGD(parameters, **settings)
        case RmspropSpec():
            return RMSprop(parameters, **settings)
        case AdamSpec():
            return Adam(parameters, **settings)
        case AdamWSpec():
            return AdamW(parameters, **settings)


def _settings(spec: LearnerSpec) -> dict[str, Any]:
    """As `torch.optim` calls them."""
    match spec.optimizer:
        case SgdSpec() as sgd:
            return {
                "lr": sgd.lr,
                "momentum": sgd.momentum,
                "weight_decay": sgd.weight_decay,
                "nesterov": sgd.nesterov,
            }
        case RmspropSpec() as rmsprop:
            return {
                "lr": rmsprop.lr,
                "alpha": rmsprop.alpha,
                "eps": rmsprop.epsilon,
                "momentum": rmsprop.momentum,
                "weight_decay": rmsprop.weight_decay,
            }
        case AdamSpec() | AdamWSpec() as adam:
            return {
                "lr": adam.lr,
                "betas": (adam.beta1, adam.beta2),
                "eps": adam.epsilon,
                "weight_decay": adam.weight_decay,
            }


def _fill(optimizer: Optimizer) -> None:
    """Lets the optimizer make all that it keeps for its parameters, as it is before the first step: zeros.

    So a snapshot has the same tensors at any step, and one that is missing is noticed.
    """
    kept = [(group, group["lr"]) for group in optimizer.param_groups]
    for group, _ in kept:
        group["lr"] = 0.0  # nothing moves
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for group, lr in kept:
        group["lr"] = lr
    for slots in optimizer.state.values():
        for slot in slots.values():
            if isinstance(slot, Tensor):
                slot.zero_()


def _match_momentum(optimizer: Optimizer, group: dict[str, Any]) -> None:
    """Keeps a running update of each parameter just where there is momentum: what a newborn of these settings has, and
    so a snapshot. One of zeros is as good as none."""
    if "momentum" not in group:
        return
    for parameter in group["params"]:
        if not group["momentum"]:
            optimizer.state[parameter].pop("momentum_buffer", None)
        elif optimizer.state[parameter].get("momentum_buffer") is None:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def _output_layer(network: Network) -> str:
    """The layer that gives the outputs, by its name: that of the name `output`, or else the last one with weights."""
    names = [name.removesuffix(".weight") for name, _ in network.named_parameters() if name.endswith(".weight")]
    return "body.output" if "body.output" in names else names[-1]


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _split(value: Any, name: str) -> tuple[Any, dict[str, Tensor]]:
    """A state without its tensors, as JSON, and the tensors by name."""
    if isinstance(value, Tensor):
        return {_TENSOR: name}, {name: value}
    if isinstance(value, Mapping):
        entries = {key: _split(entry, f"{name}.{key}") for key, entry in value.items()}
        plain: Any = {_PLAIN: {key: entry[0] for key, entry in entries.items()}}
        parts = list(entries.values())
    elif isinstance(value, list | tuple):
        parts = [_split(entry, f"{name}.{place}") for place, entry in enumerate(value)]
        plain = [entry[0] for entry in parts]
    else:
        return value, {}
    return plain, {key: tensor for _, tensors in parts for key, tensor in tensors.items()}


def _joined(plain: Any, tensors: Mapping[str, Tensor], name: str, expected: Any) -> Any:
    """What `_split` was given, under this name; `expected` is what it makes of such a state.

    There may be more in a mapping that is empty in a newborn's: it is by parameter, and fills with the first step.
    Raises `SnapshotError`.
    """
    if not isinstance(expected, Mapping):
        return plain
    if _TENSOR in expected:
        if plain != {_TENSOR: name}:
            raise SnapshotError.of([FieldViolation(name, f"Expected the tensor of this name; got {shown(plain)}")])
        if name not in tensors:
            raise SnapshotError(f"The snapshot lacks the tensor {name!r}", [FieldViolation(name, "Field required")])
        return tensors[name]
    entries = plain.get(_PLAIN) if isinstance(plain, Mapping) and len(plain) == 1 else None
    if not isinstance(entries, Mapping):
        raise SnapshotError.of([FieldViolation(name, f"Expected an object; got {shown(plain)}")])
    if not (inner := expected[_PLAIN]):
        inner = {key: {_TENSOR: f"{name}.{key}"} for key in entries}
    if strangers := [key for key in entries if key not in inner]:
        raise SnapshotError.of([FieldViolation(f"{name}.{strangers[0]}", "Unknown field")])
    return {key: _joined(entry, tensors, f"{name}.{key}", inner[key]) for key, entry in entries.items()}


def _numbers_of_slot(slot: str, step: int) -> Numbers:
    match slot:
        case "step":
            return counts(min(step, STEPS_COUNTED))
        case "exp_avg_sq" | "max_exp_avg_sq" | "square_avg":
            return NOT_NEGATIVE
        case _:
            return FINITE

"""What a reset changes in modules of any architecture, and what it leaves as it was."""

import copy
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES
from hypothesis import given, settings
from hypothesis import strategies as st
from read_back import NoReadBack
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from cbp import Batch, ContinualBackprop, Learner, LearnerSpec
from cbp.export import to_module
from cbp.spec.learner_spec import Utility
from cbp.units.replacement import SelectedUnits
from cbp.units.unit_groups import _silence, replace_in_groups

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "momentum": lambda parameters: SGD(parameters, lr=0.05, momentum=0.9),
    "adam": lambda parameters: Adam(parameters, lr=0.01),
    "adamw": lambda parameters: AdamW(parameters, lr=0.01, amsgrad=True),
    "rmsprop": lambda parameters: RMSprop(parameters, lr=0.001, momentum=0.9, centered=True),
}
BUSY: dict[str, Any] = {"replacement_rate": 0.1, "maturity_threshold": 3, "decay_rate": 0.9}


def selected(resets: ContinualBackprop, group: int, units: list[int]) -> list[SelectedUnits | None]:
    zeros = torch.zeros(len(units), dtype=torch.int64)
    chosen = SelectedUnits(zeros, torch.tensor(units), ((0, len(units)),), zeros[:1])
    return [chosen if index == group else None for index in range(len(resets._module_units.names))]


@torch.no_grad()
def replace(resets: ContinualBackprop, group: int, units: list[int]) -> None:
    of_module = resets._module_units
    replace_in_groups(
        selected(resets, group, units),
        resets._units,
        resets._settings,
        of_module.grouping,
        of_module.slots,
        of_module.draws,
    )


def without_chance(module: nn.Module) -> nn.Module:
    for layer in module.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
        if isinstance(layer, nn.MultiheadAttention):
            layer.dropout = 0.0
    return module


def learn(module: nn.Module, optimizer: Optimizer, resets: ContinualBackprop, inputs: Tensor) -> None:
    optimizer.zero_grad()
    (module(inputs) - 1).square().mean().backward()
    optimizer.step()
    resets.step()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_units_that_nothing_reads_go_without_a_trace(name: str) -> None:
    torch.manual_seed(0)
    make, inputs = ARCHITECTURES[name]
    module = without_chance(make())
    optimizer = SGD(module.parameters(), lr=0.05)
    resets = ContinualBackprop(module, optimizer, replacement_rate=0.0)
    for _ in range(3):
        learn(module, optimizer, resets, inputs())
    module.eval()
    probe = inputs()
    for index, group in enumerate(resets._module_units.found.groups):
        with torch.no_grad():
            _silence(group, torch.tensor([1, 3]), resets._settings, resets._module_units.slots)
        before = module(probe)
        replace(resets, index, [1, 3])
        if group.notes:
            assert not torch.allclose(module(probe), before, rtol=0, atol=1e-6), "the table promises less than it could"
        else:
            torch.testing.assert_close(module(probe), before, rtol=1e-4, atol=1e-5)


CONSTANT_UNITS = {
    "resnet_bottleneck": {"hidden_0", "hidden_1", "hidden_3", "hidden_5", "hidden_6", "hidden_8", "hidden_10"},
    "mobilenet": {"hidden_0", "hidden_1", "hidden_2", "hidden_3"},
    "densenet": {"hidden_0", "hidden_2", "hidden_4", "hidden_6"},
    "vgg": {"hidden_1", "hidden_2"},
    "plain_conv": {"hidden_0", "hidden_1", "hidden_2"},
    "squeeze_excitation": {"hidden_1"},
    "lstm": {"hidden_0"},
    "transformer": {"hidden_0", "hidden_1"},
    "pre_norm_mlp": {"hidden_1"},
}


@pytest.mark.parametrize("compensated", [True, False])
@pytest.mark.parametrize("name", CONSTANT_UNITS)
def test_constant_units_go_without_a_trace_under_bias_compensation(name: str, compensated: bool) -> None:
    """Convolutions, flattened channels, batch normalisation before and behind the unit, residual streams."""
    torch.manual_seed(1)
    make, inputs = ARCHITECTURES[name]
    for index in sorted(int(group.removeprefix("hidden_")) for group in CONSTANT_UNITS[name]):
        module = without_chance(make())
        resets = ContinualBackprop(
            module, still := SGD(module.parameters(), lr=0.0), replacement_rate=0.0, bias_compensation=compensated
        )
        group = resets._module_units.found.groups[index]
        assert all(part.heir is not None and part.inexact is None for part in group.outgoing)
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.dim() == 1:
                    parameter.uniform_(0.5, 1.5)
            for part in group.incoming:
                getattr(part.layer, part.weight)[part.places[torch.tensor([1, 3])]] = 0.0
                if part.bias and group.attached:
                    getattr(part.layer, part.bias)[part.places[torch.tensor([1, 3])]] = (
                        0.0  # what the running mean starts from
                    )
        for _ in range(3):
            learn(module, still, resets, inputs())
        module.eval()
        probe = inputs()
        before = module(probe)
        replace(resets, index, [1, 3])
        if compensated:
            torch.testing.assert_close(module(probe), before, rtol=1e-4, atol=1e-4)
        else:
            assert (module(probe) - before).abs().max() > 1e-3


class Built(nn.Module):
    """A random network that knows by itself which elements belong to each unit of each group."""

    def __init__(self, widths: list[int], kinds: list[str], norm: bool, residual: bool) -> None:
        super().__init__()
        self.steps = nn.ModuleList()
        self.names: list[list[str]] = []
        inputs = 2
        for index, (width, kind) in enumerate(zip(widths, kinds, strict=True)):
            convolution = nn.Conv2d(inputs, width, 3 if kind == "conv3" else 1, padding=1 if kind == "conv3" else 0)
            block = nn.ModuleDict({"conv": convolution})
            names = [f"steps.{index}.conv"]
            if norm:
                block["norm"] = nn.BatchNorm2d(width)
                names.append(f"steps.{index}.norm")
            if kind == "depthwise":
                block["depthwise"] = nn.Conv2d(width, width, 3, padding=1, groups=width)
                names.append(f"steps.{index}.depthwise")
            if residual:
                block["skip"] = nn.Conv2d(inputs, width, 1, bias=False)
                names.append(f"steps.{index}.skip")
            self.steps.append(block)
            self.names.append(names)
            inputs = width
        self.hidden = nn.Linear(inputs * 9, 5)
        self.names.append(["hidden"])
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.steps:
            h = block["conv"](x)
            if "norm" in block:
                h = block["norm"](h)
            if "depthwise" in block:
                h = block["depthwise"](torch.tanh(h))
            if "skip" in block:
                h = h + block["skip"](x)
            x = torch.tanh(h)
        return self.head(torch.relu(self.hidden(x.flatten(1))))

    def expected(self, group: int, unit: int) -> dict[str, Any]:
        """Index of the elements that belong to a unit, by the name of their parameter or buffer."""
        elements: dict[str, Any] = {}
        tensors = self.state_dict()
        for name in self.names[group]:
            kinds = ("weight", "bias", "running_mean", "running_var")
            elements |= {f"{name}.{kind}": (unit,) for kind in kinds if f"{name}.{kind}" in tensors}
        last = len(self.steps) - 1
        if group < last:
            elements[f"steps.{group + 1}.conv.weight"] = (slice(None), unit)
            if f"steps.{group + 1}.skip.weight" in tensors:
                elements[f"steps.{group + 1}.skip.weight"] = (slice(None), unit)
        elif group == last:
            elements["hidden.weight"] = (slice(None), slice(9 * unit, 9 * unit + 9))
        else:
            elements["head.weight"] = (slice(None), unit)
        return elements


def everything(module: nn.Module, optimizer: Optimizer, resets: ContinualBackprop) -> dict[str, Tensor]:
    """Copies of all tensors, "name" or "name slot"."""
    found = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    for name, parameter in module.named_parameters():
        slots = {slot: kept for slot, kept in optimizer.state[parameter].items() if isinstance(kept, Tensor)}
        if parameter in resets._module_units.slots.adam_steps:
            slots["own steps"] = resets._module_units.slots.adam_steps[parameter]
        found |= {f"{name} {slot}": kept.clone() for slot, kept in slots.items()}
    return found


@given(
    widths=st.lists(st.integers(2, 5), min_size=1, max_size=3),
    kinds=st.lists(st.sampled_from(["conv1", "conv3", "depthwise"]), min_size=3, max_size=3),
    norm=st.booleans(),
    residual=st.booleans(),
    optimizer_kind=st.sampled_from(sorted(OPTIMIZERS)),
    chance=st.integers(0, 2**16),
)
@settings(max_examples=40, deadline=None)
def test_exactly_a_units_own_elements_change(
    widths: list[int], kinds: list[str], norm: bool, residual: bool, optimizer_kind: str, chance: int
) -> None:
    torch.manual_seed(chance)
    module = Built(widths, kinds[: len(widths)], norm, residual)
    optimizer = OPTIMIZERS[optimizer_kind](module.parameters())
    resets = ContinualBackprop(module, optimizer, replacement_rate=0.0, bias_compensation=False)
    for _ in range(2):
        learn(module, optimizer, resets, torch.randn(4, 2, 3, 3))
    assert len(resets._module_units.names) == len(module.names)
    group = chance % len(module.names)
    unit = chance % resets._module_units.found.groups[group].units
    before = everything(module, optimizer, resets)
    replace(resets, group, [unit])
    after = everything(module, optimizer, resets)

    elements = module.expected(group, unit)
    fresh = {"norm.weight": 1.0, "norm.bias": 0.0, "running_mean": 0.0, "running_var": 1.0}
    for name, old in before.items():
        parameter, _, slot = name.partition(" ")
        may_change = torch.zeros_like(old, dtype=torch.bool)
        if parameter in elements and slot != "step":
            at = elements[parameter]
            may_change[at] = True
            new = after[name][at]
            reads = isinstance(at[0], slice)
            [expected] = [value for end, value in fresh.items() if parameter.endswith(end)] or [0.0]
            if slot or reads or parameter.endswith("bias") or "norm" in parameter:
                assert (new == (0.0 if slot or reads else expected)).all(), name
            else:
                assert (new != old[at]).all(), f"{name} is redrawn"
        assert torch.equal(after[name][~may_change], old[~may_change]), name


@given(norm=st.booleans(), residual=st.booleans(), strength=st.sampled_from([0.1, 0.5, 0.9]), chance=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_a_reset_in_part_is_between_none_and_a_whole_one(
    norm: bool, residual: bool, strength: float, chance: int
) -> None:
    """Of all that belongs to a unit; and the optimizer forgets what it forgets at a whole one."""

    def after_reset(strength: float | None) -> dict[str, Tensor]:
        torch.manual_seed(chance)
        module = Built([3, 4], ["conv3", "depthwise"], norm, residual)
        optimizer = Adam(module.parameters(), lr=0.01)
        resets = ContinualBackprop(
            module, optimizer, replacement_rate=0.0, bias_compensation=False, strength=strength or 1.0
        )
        for _ in range(2):
            learn(module, optimizer, resets, torch.randn(4, 2, 3, 3))
        if strength:
            replace(resets, 0, [chance % 3])
        return everything(module, optimizer, resets)

    none, part, whole = after_reset(None), after_reset(strength), after_reset(1.0)
    for name, of_part in part.items():
        is_exact = " " in name or not of_part.is_floating_point()
        expected = whole[name] if is_exact else none[name].lerp(whole[name], strength)
        torch.testing.assert_close(of_part, expected, msg=name)


@pytest.mark.parametrize("limits", [{}, {"strength": 0.4}, {"max_replacements": 2, "replacement_window": 25}], ids=str)
@pytest.mark.parametrize("utility", get_args(Utility))
def test_a_multilayer_perceptron_is_reset_like_a_learner(
    utility: Utility,
    limits: dict[str, Any],
    make_spec: Callable[..., LearnerSpec],
    make_batch: Callable[..., Batch],
) -> None:
    """The same units at the same steps, from the same random numbers."""
    spec = make_spec(
        optimizer={"kind": "adam", "lr": 0.01},
        batch_size=3,
        resets={"replacement_rate": 0.05, "maturity_threshold": 5, "decay_rate": 0.9, "utility": utility} | limits,
    )
    learner = Learner(spec)
    module = to_module(learner.snapshot())
    resets = ContinualBackprop(
        module,
        optimizer := Adam(module.parameters(), lr=0.01),
        initializer=spec.network.initializer,
        **spec.resets.model_dump(exclude={"layers"}),
    )
    resets._module_units._generator.set_state(learner._state.generators[0].get_state())
    replaced = 0
    for step in range(120):
        batch = make_batch(spec, 3, seed=step)
        learner.train(batch)
        optimizer.zero_grad()
        outputs = module(torch.from_numpy(batch.features))
        nn.functional.cross_entropy(outputs, torch.from_numpy(batch.targets)).backward()
        optimizer.step()
        resets.step()
        assert torch.equal(resets._units.age, learner._state.units.age), f"step {step}"
        replaced += int((resets._units.age == 0).sum())
    assert 10 < replaced <= 20 if "max_replacements" in limits else replaced > 20
    torch.testing.assert_close(resets._units.utility, learner._state.units.utility, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["mobilenet", "densenet", "lstm", "transformer", "shared"])
@pytest.mark.parametrize("limits", [{}, {"strength": 0.5, "max_replacements": 2, "replacement_window": 6}], ids=str)
def test_a_saved_run_goes_on_bit_for_bit(name: str, limits: dict[str, Any]) -> None:
    make, inputs = ARCHITECTURES[name]

    def fresh() -> tuple[nn.Module, Optimizer, ContinualBackprop]:
        module = without_chance(make())
        optimizer = AdamW(module.parameters(), lr=0.01)
        return module, optimizer, ContinualBackprop(module, optimizer, **(BUSY | limits))

    torch.manual_seed(0)
    run = fresh()
    for _ in range(8):
        learn(*run, inputs())
    other = fresh()
    for part, saved in zip(other, run, strict=True):
        part.load_state_dict(copy.deepcopy(saved.state_dict()))
    for _ in range(8):
        batch = inputs()
        learn(*run, batch)
        learn(*other, batch)
    assert sum(run[2].replacements.values()) > (2 if limits else 8)
    assert run[2].replacements == other[2].replacements
    for one, two in zip(run[0].state_dict().values(), other[0].state_dict().values(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("utility", ["adaptable_contribution", "random"])
@pytest.mark.parametrize("name", ["mobilenet", "lstm"])
def test_no_step_reads_from_the_device(name: str, utility: Utility) -> None:
    make, inputs = ARCHITECTURES[name]
    module = make()
    optimizer = SGD(module.parameters(), lr=0.01, momentum=0.9)
    resets = ContinualBackprop(module, optimizer, utility=utility, **BUSY)
    for _ in range(12):
        module(inputs()).square().mean().backward()
        optimizer.step()
        with NoReadBack():
            resets.step()
    assert sum(resets.replacements.values()) > 4


@pytest.mark.gpu
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_step_waits_for_a_gpu(name: str) -> None:
    make, inputs = ARCHITECTURES[name]
    module = make().cuda()
    optimizer = Adam(module.parameters(), lr=0.01)
    resets = ContinualBackprop(module, optimizer, **BUSY)
    for step in range(12):
        batch = inputs().cuda()
        optimizer.zero_grad()
        module(batch).square().mean().backward()
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            optimizer.step()
            resets.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert sum(resets.replacements.values()) > 4


@pytest.mark.parametrize("name", ["resnet_basic", "vgg", "shared"])
@pytest.mark.parametrize("utility", get_args(Utility))
def test_utilities_are_finite_and_tell_units_apart(name: str, utility: Utility) -> None:
    torch.manual_seed(0)
    make, inputs = ARCHITECTURES[name]
    module = make()
    optimizer = SGD(module.parameters(), lr=0.01)
    resets = ContinualBackprop(module, optimizer, utility=utility, replacement_rate=0.0)
    for _ in range(3):
        learn(module, optimizer, resets, inputs())
    worth = resets._units.utility
    assert torch.isfinite(worth).all()
    assert (worth >= 0).all()
    assert len(set(worth[0].tolist())) > 0.9 * worth.shape[1]


def test_the_utility_of_a_channel_by_hand() -> None:
    """Positions are averaged, kernels summed, and a flattened channel is a block of columns."""
    torch.manual_seed(0)
    convolution, linear = nn.Conv2d(2, 3, 2), nn.Linear(3 * 4, 5)
    module = nn.Sequential(convolution, nn.ReLU(), nn.Flatten(), linear)
    optimizer = SGD(module.parameters(), lr=0.0)
    resets = ContinualBackprop(module, optimizer, utility="adaptable_contribution", decay_rate=0.5)
    example = torch.randn(6, 2, 3, 3)
    learn(module, optimizer, resets, example)
    h = torch.relu(convolution(example)).detach().double()
    mean = h.mean(dim=(0, 2, 3), keepdim=True)
    activity = (h - mean).abs().mean(dim=(0, 2, 3))
    outgoing = linear.weight.detach().double().abs().view(5, 3, 4).mean(dim=(0, 2))
    incoming = convolution.weight.detach().double().abs().mean(dim=(1, 2, 3))
    torch.testing.assert_close(resets._units.utility[0].double(), 0.5 * outgoing * activity / incoming)
    torch.testing.assert_close(resets._units.mean_activation[0].double(), 0.5 * mean.flatten())


def test_the_utility_of_a_unit_that_is_read_twice_is_the_sum() -> None:
    torch.manual_seed(0)
    make, inputs = ARCHITECTURES["densenet"]
    module = make()
    optimizer = SGD(module.parameters(), lr=0.0)
    resets = ContinualBackprop(module, optimizer, utility="contribution", decay_rate=0.0)
    example = inputs()
    seen: dict[str, Tensor] = {}
    for name, layer in module.named_modules():
        if name in ("layers.2.conv1", "classifier"):
            layer.register_forward_pre_hook(lambda _layer, given, name=name: seen.update({name: given[0].detach()}))
    learn(module, optimizer, resets, example)
    reader, head = module.get_submodule("layers.2.conv1"), module.get_submodule("classifier")
    units = slice(10, 14)  # behind 6 of the stem and 4 of the first layer
    by_reader = seen["layers.2.conv1"][:, units].abs().mean((0, 2, 3)) * reader.weight[:, units].abs().sum((0, 2, 3))
    by_head = seen["classifier"][:, units].abs().mean(0) * head.weight[:, units].abs().sum(0)
    expected = (by_reader + by_head) / (reader.out_channels + head.out_features)
    [group] = [place for place, row in enumerate(resets._module_units.found.rows) if row.layers == ("layers.1.conv2",)]
    columns = resets._module_units.grouping.layout.slices[group]
    torch.testing.assert_close(resets._units.utility[0, columns], expected.detach())


@pytest.mark.parametrize("name", ["lstm", "bidirectional_gru"])
def test_a_recurrent_unit_is_redrawn_in_every_gate(name: str) -> None:
    torch.manual_seed(0)
    make, inputs = ARCHITECTURES[name]
    module = make()
    optimizer = SGD(module.parameters(), lr=0.01)
    resets = ContinualBackprop(module, optimizer, replacement_rate=0.0)
    learn(module, optimizer, resets, inputs())
    before = {key: value.clone() for key, value in module.state_dict().items()}
    replace(resets, 1, [2])
    after = module.state_dict()
    gates = 4 if name == "lstm" else 3
    rows = [gate * 6 + 2 for gate in range(gates)]
    others = np.setdiff1d(np.arange(6 * gates), rows)
    columns = np.setdiff1d(np.arange(6), [2])
    assert (after["cell.weight_ih_l0"][rows] != before["cell.weight_ih_l0"][rows]).all()
    assert torch.equal(after["cell.weight_ih_l0"][others], before["cell.weight_ih_l0"][others])
    assert not after["cell.weight_hh_l0"][:, 2].any()
    assert not after["cell.bias_ih_l0"][rows].any()
    assert torch.equal(after["cell.weight_hh_l0"][others][:, columns], before["cell.weight_hh_l0"][others][:, columns])
    assert after["cell.weight_ih_l0"][rows].abs().max() <= 6**-0.5
    assert not after["head.weight"][:, 2].any()
    if name == "bidirectional_gru":
        assert torch.equal(after["cell.weight_hh_l0_reverse"], before["cell.weight_hh_l0_reverse"])
        assert torch.equal(after["head.weight"][:, 6:], before["head.weight"][:, 6:])


def test_packed_sequences_are_seen() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.GRU(5, 6)
            self.head = nn.Linear(6, 2)

        def forward(self, x: Any) -> Tensor:
            return self.head(self.cell(x)[1][-1])

    module = Packed()
    optimizer = SGD(module.parameters(), lr=0.01)
    resets = ContinualBackprop(module, optimizer, **BUSY)
    for _ in range(12):
        learn(module, optimizer, resets, nn.utils.rnn.pack_sequence([torch.randn(4, 5), torch.randn(2, 5)]))  # type: ignore[arg-type]
    assert resets.replacements["hidden_0"] > 0


def test_memory_format_plays_no_role() -> None:
    states = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        make, inputs = ARCHITECTURES["plain_conv"]
        module = make().to(memory_format=memory_format)
        optimizer = Adam(module.parameters(), lr=0.001)
        resets = ContinualBackprop(module, optimizer, **BUSY)
        for _ in range(8):
            learn(module, optimizer, resets, inputs().to(memory_format=memory_format))
        states.append(resets.state_dict())
    assert torch.equal(states[0]["age"], states[1]["age"])
    torch.testing.assert_close(states[0]["utility"], states[1]["utility"], rtol=1e-3, atol=1e-4)


def test_passes_of_several_sizes_count_by_their_positions() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    optimizer = SGD(module.parameters(), lr=0.0)
    resets = ContinualBackprop(module, optimizer, decay_rate=0.0)
    small, large = torch.randn(2, 1, 2, 2), torch.randn(3, 1, 4, 4)
    for example in (small, large):
        module(example).sum().backward()
    optimizer.step()
    resets.step()
    seen = torch.cat([torch.relu(module[0](example)).transpose(0, 1).flatten(1) for example in (small, large)], dim=1)
    torch.testing.assert_close(resets._units.mean_activation[0], seen.mean(dim=1).detach())


def test_under_autocast_the_state_stays_float32() -> None:
    torch.manual_seed(0)
    make, inputs = ARCHITECTURES["vgg"]
    module = make()
    optimizer = AdamW(module.parameters(), lr=0.001)
    resets = ContinualBackprop(module, optimizer, **BUSY)
    for _ in range(8):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = module(inputs()).float().square().mean()
        loss.backward()
        optimizer.step()
        resets.step()
    assert sum(resets.replacements.values()) > 4
    assert resets._units.utility.dtype == resets._units.mean_activation.dtype == torch.float32
    assert torch.isfinite(resets._units.utility).all()

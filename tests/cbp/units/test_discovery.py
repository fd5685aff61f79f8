"""Which units are found in a module, who computes and reads them, and what is left alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, BasicBlock, Bottleneck, Sequences, TransformerClassifier, Untraceable
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from cbp import ContinualBackprop, HiddenUnits, SpecError


def watched(module: nn.Module, **settings: Any) -> ContinualBackprop:
    return ContinualBackprop(module, torch.optim.SGD(module.parameters(), lr=0.05), **settings)


def groups(module: nn.Module, **settings: Any) -> list[tuple[str, int, str]]:
    """(computed by, units, read by) of every group that is reset."""
    rows = watched(module, **settings)._module_units.found.rows
    return [(" ".join(row.layers), row.units, " ".join(row.readers)) for row in rows]


def left_alone(module: nn.Module, **settings: Any) -> dict[str, str]:
    return {" ".join(row.layers): row.verdict for row in watched(module, **settings)._module_units.found.left_alone}


EXPECTED: dict[str, list[tuple[str, int, str]]] = {
    "resnet_basic": [
        (
            "conv1 layer1.0.conv2 layer1.1.conv2",
            8,
            "layer1.0.conv1 layer1.1.conv1 layer2.0.conv1 layer2.0.downsample.0",
        ),
        ("layer1.0.conv1", 8, "layer1.0.conv2"),
        ("layer1.1.conv1", 8, "layer1.1.conv2"),
        ("layer2.0.conv1", 12, "layer2.0.conv2"),
        ("layer2.0.conv2 layer2.0.downsample.0 layer2.1.conv2", 12, "layer2.1.conv1 fc"),
        ("layer2.1.conv1", 12, "layer2.1.conv2"),
    ],
    "mobilenet": [
        ("features.0 features.3.conv.6", 6, "features.3.conv.0 features.4.conv.0"),
        ("features.3.conv.0 features.3.conv.3", 12, "features.3.conv.6"),
        ("features.4.conv.0 features.4.conv.3", 12, "features.4.conv.6"),
        ("features.4.conv.6", 8, "classifier.1"),
    ],
    "densenet": [
        ("stem", 6, "layers.0.conv1 layers.1.conv1 layers.2.conv1 classifier"),
        ("layers.0.conv1", 8, "layers.0.conv2"),
        ("layers.0.conv2", 4, "layers.1.conv1 layers.2.conv1 classifier"),
        ("layers.1.conv1", 8, "layers.1.conv2"),
        ("layers.1.conv2", 4, "layers.2.conv1 classifier"),
        ("layers.2.conv1", 8, "layers.2.conv2"),
        ("layers.2.conv2", 4, "classifier"),
    ],
    "vgg": [
        ("features.0", 6, "features.4"),
        ("features.4", 8, "classifier.0"),
        ("classifier.0", 10, "classifier.3"),
    ],
    "plain_conv": [("conv1", 6, "grouped"), ("grouped", 8, "fc1"), ("fc1", 10, "fc2")],
    "squeeze_excitation": [("conv excite", 8, "squeeze head"), ("squeeze", 4, "excite")],
    "lstm": [("embed", 7, "cell"), ("cell", 6, "cell head")],
    "final_state": [("embed", 7, "cell"), ("cell", 6, "cell head")],
    "bidirectional_gru": [("embed", 7, "cell"), ("cell", 6, "cell head"), ("cell", 6, "cell head")],
    "transformer": [
        ("encoder.layers.0.linear1", 16, "encoder.layers.0.linear2"),
        ("encoder.layers.1.linear1", 16, "encoder.layers.1.linear2"),
    ],
    "shared": [("left right", 6, "both"), ("both again", 7, "again head")],
    "pre_norm_mlp": [("embed fc2", 8, "fc1 head"), ("fc1", 12, "fc2")],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_groups_of_an_architecture(name: str) -> None:
    make, _ = ARCHITECTURES[name]
    assert groups(make()) == EXPECTED[name]


def test_a_bottleneck_has_inner_units_and_a_stream() -> None:
    make, _ = ARCHITECTURES["resnet_bottleneck"]
    found = groups(make())
    assert len(found) == 11
    assert ("layer1.0.downsample.0 layer1.0.conv3 layer1.1.conv3", 16) in [row[:2] for row in found]
    assert (BasicBlock.expansion, Bottleneck.expansion) == (1, 2)


def test_the_table_says_who_reads_whom_and_why_not() -> None:
    resets = watched(ARCHITECTURES["vgg"][0](), layers=["features.0", 2])
    lines = resets.explain().splitlines()
    assert lines[0].split() == ["group", "computed", "by", "units", "read", "by", "verdict"]
    assert lines[1].split()[:4] == ["hidden_0", "features.0", "6", "features.4"]
    assert lines[1].endswith("reset; mean to features.4.bias, exact but at borders padded with zeros")
    assert "rate 0; reset" in lines[2]
    assert lines[3].endswith("reset; mean to classifier.3.bias")
    assert lines[4].split()[:3] == ["-", "classifier.3", "4"]
    assert lines[4].endswith("left alone: its values are outputs of the module")


def test_a_layer_may_be_called_by_its_name_in_the_module() -> None:
    make, _ = ARCHITECTURES["vgg"]
    resets = watched(make(), layers=["features.4"], layer_replacement_rates={"features.4": 0.5})
    assert resets._rates == (0.0, 0.5, 0.0)
    with pytest.raises(SpecError, match="layers"):
        watched(make(), layers=["features.7"])


def test_what_attention_and_layer_normalisation_mix_is_left_alone() -> None:
    reasons = left_alone(TransformerClassifier())
    assert reasons["embed"] == "left alone: feeds TransformerEncoder encoder, which mixes all units"
    assert "a layer normalisation mixes them" in reasons["encoder.layers.0.linear2"]


def test_layers_whose_units_are_not_known_are_listed() -> None:
    module = nn.Sequential(nn.Embedding(9, 5), nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4), nn.Bilinear(1, 1, 1))
    module[4] = nn.ConvTranspose1d(4, 2, 3)
    assert left_alone(module) == {
        "0": "left alone: what the units of Embedding are is not known",
        "3": "left alone: feeds ConvTranspose1d 4, which is not known to keep units apart",
        "4": "left alone: what the units of ConvTranspose1d are is not known",
    }
    assert left_alone(TransformerClassifier())["encoder.layers.0.self_attn.out_proj"] == (
        "left alone: not used, or only within a layer whose code is not followed"
    )


def test_without_bias_compensation_the_table_is_silent_about_means() -> None:
    text = watched(ARCHITECTURES["vgg"][0](), bias_compensation=False).explain()
    assert "mean to" not in text


@pytest.mark.parametrize("make", [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer])
def test_a_transformer_block_alone(make: Callable[..., nn.Module]) -> None:
    assert groups(make(8, 2, 16)) == [("linear1", 16, "linear2")]


def test_a_transformer_block_with_a_feed_forward_block_of_its_own_is_left_alone() -> None:
    class Gated(nn.TransformerEncoderLayer):
        def _ff_block(self, x: Tensor) -> Tensor:
            return self.linear2(self.linear1(x).softmax(-1))

    with pytest.raises(SpecError, match="linear1: left alone: not used, or only within a layer"):
        watched(Gated(8, 2, 16))


def test_a_layer_normalisation_between_is_said() -> None:
    text = watched(ARCHITECTURES["pre_norm_mlp"][0]()).explain()
    assert "norm mixes units, so outputs change a little" in text.splitlines()[1]


def test_inner_layers_of_a_recurrent_layer_are_left_alone() -> None:
    module = Sequences()
    module.cell = nn.LSTM(7, 6, num_layers=2, batch_first=True)
    found = watched(module)._module_units.found
    assert [row.units for row in found.rows] == [7, 6]
    assert "seen only inside a LSTM of several layers" in found.left_alone[0].verdict
    module.cell = nn.LSTM(7, 9, proj_size=6, batch_first=True)
    with pytest.raises(SpecError, match="its outputs are projections of its units"):
        watched(module)


def test_recurrent_layers_that_pass_their_state_on_are_left_alone() -> None:
    class Decoder(Sequences):
        def __init__(self) -> None:
            super().__init__()
            self.second = nn.LSTM(7, 6, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.embed(x))
            _, state = self.cell(x)
            return self.head(self.second(x, state)[0].mean(1))

    reasons = left_alone(Decoder())
    assert reasons["cell"] == "left alone: is more than the first input of LSTM second"
    assert reasons["second"] == "left alone: LSTM second starts from what another layer gives"


def test_a_reader_that_two_normalisations_follow_has_no_single_heir() -> None:
    class TwoNorms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 4, bias=False)
            self.left, self.right = nn.BatchNorm1d(4), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return self.left(self.second(torch.relu(h))) * self.right(self.second(torch.tanh(h)))

    assert watched(TwoNorms())._module_units.found.rows[0].means == ("second has nothing that takes over a mean",)


class Code(nn.Module):
    """Two linear layers and what a function does between them."""

    def __init__(self, between: Callable[..., Tensor], *, width: int = 6, reader: int | None = None) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, width), nn.Linear(reader or width, 3)
        self.other = nn.Linear(5, width)
        self.table = nn.Parameter(torch.zeros(width))
        self._between = between

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None:
            x = x * mask
        return self.second(self._between(self, torch.relu(self.first(x)), x))


def added_in_place(module: Code, h: Tensor, x: Tensor) -> Tensor:
    h.add_(module.other(x))
    return h


def swish_gate(_module: Code, h: Tensor, _x: Tensor) -> Tensor:
    gate, value = h.chunk(2, dim=-1)
    return F.silu(gate) * value


KEPT: dict[str, tuple[Callable[..., Tensor], dict[str, int], list[tuple[str, int, str]]]] = {
    "scaled": (lambda _m, h, _x: 2 * h / 3 + 1, {}, [("first", 6, "second")]),
    "halves of a gate": (swish_gate, {"reader": 3}, [("first", 3, "second")]),
    "added in place": (added_in_place, {}, [("first other", 6, "second")]),
    "a product of layers": (lambda m, h, x: h * m.other(x), {}, [("first other", 6, "second")]),
    "beside the input": (lambda _m, h, x: torch.cat([x, h], 1), {"reader": 11}, [("first", 6, "second")]),
    "beside another": (
        lambda m, h, x: torch.cat([m.other(x), h], dim=-1),
        {"reader": 12},
        [("first", 6, "second"), ("other", 6, "second")],
    ),
    "some paths dropped": (
        lambda m, h, x: h + m.other(x) * x.new_empty(x.shape[0], 1).bernoulli_(0.5) * torch.rand_like(h),
        {},
        [("first other", 6, "second")],
    ),
    "part by part": (
        lambda _m, h, _x: torch.cat([h.chunk(2, dim=-1)[0], torch.tanh(h.chunk(2, dim=-1)[1])], -1),
        {},
        [("first", 6, "second")],
    ),
    "twice in one reader": (lambda _m, h, _x: torch.cat([h, -h], -1), {"reader": 12}, [("first", 6, "second")]),
    "flattened": (lambda _m, h, _x: h.flatten(1).view(-1, 6), {}, [("first", 6, "second")]),
}


@pytest.mark.parametrize("name", KEPT)
def test_code_that_keeps_units_apart(name: str) -> None:
    between, sizes, expected = KEPT[name]
    assert groups(Code(between, **sizes)) == expected


REASONS: dict[str, tuple[Callable[..., Tensor], dict[str, int], str]] = {
    "softmax": (lambda _m, h, _x: h.softmax(-1), {}, "feeds softmax: it is not known to keep units apart"),
    "a product with itself": (lambda _m, h, _x: h @ h.T @ h, {}, "feeds "),
    "the input is added": (lambda _m, h, x: h + x, {"width": 5}, "combined with values that are not a layer's outputs"),
    "a parameter is added": (lambda m, h, _x: h + m.table, {}, "combined with a parameter of no layer"),
    "averaged over units": (lambda _m, h, _x: h - h.mean(-1, keepdim=True), {}, "averaged over the units"),
    "a shift of itself": (lambda _m, h, _x: h.roll(1, -1), {}, "feeds roll"),
    "sorted": (lambda _m, h, _x: h.sort(-1)[0], {}, "feeds sort"),
    "part of the units": (lambda _m, h, _x: h[:, :4], {"reader": 4}, "whose number of axes is not known is indexed"),
    "one unit beside all": (lambda _m, h, _x: h - h[:, :1], {}, "whose number of axes is not known is indexed"),
    "averaged over units, from the left": (
        lambda _m, h, _x: h - h.mean(1, keepdim=True),
        {},
        "it may be averaged over the units: count the axis from the right",
    ),
    "an axis behind the units": (
        lambda _m, h, _x: h.unsqueeze(-1).sum(-2) * h,
        {},
        "averaged over the units",
    ),
    "part of a batch": (lambda _m, h, _x: h.flatten(1).split(2, dim=0)[7], {}, "an unknown number of them"),
    "by name": (lambda _m, h, _x: torch.add(input=h, other=1), {}, "its arguments go by name"),
    "several at once": (lambda _m, h, _x: torch.cat(torch.stack([h, h]).unbind(), -1), {}, "feeds stack"),
    "the weight is used": (
        lambda m, h, x: h * F.linear(x, m.first.weight),
        {},
        "first.weight is used by other code than its layer's",
    ),
}


@pytest.mark.parametrize("name", REASONS)
def test_code_that_does_not_is_left_alone(name: str) -> None:
    between, sizes, reason = REASONS[name]
    with pytest.raises(SpecError) as caught:
        watched(Code(between, **sizes))
    assert reason in caught.value.violations[0].description
    assert caught.value.violations[0].field == "module"


def test_weights_that_are_shared_frozen_or_computed_are_left_alone() -> None:
    def mlp() -> nn.Sequential:
        return nn.Sequential(
            nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 2)
        )

    tied = mlp()
    tied[4].weight = tied[2].weight
    with pytest.raises(SpecError, match=r"2\.weight is shared by the layers 2, 4"):
        watched(tied)
    frozen = mlp()
    frozen[0].requires_grad_(False)
    assert left_alone(frozen)["0"] == "left alone: 0.weight is frozen"
    assert [row[0] for row in groups(frozen)] == ["2", "4"]
    computed = mlp()
    torch.nn.utils.parametrizations.weight_norm(computed[6])
    assert left_alone(computed)["4"] == "left alone: 6.weight is computed from other parameters"


def test_a_module_that_cannot_be_traced_says_where_and_what_to_do() -> None:
    module = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), Untraceable())
    with pytest.raises(SpecError) as caught:
        watched(module)
    [violation] = caught.value.violations
    assert violation.field == "module"
    assert violation.description.startswith("torch.fx cannot trace 2 (Untraceable): symbolically traced variables")
    assert "units=[HiddenUnits(producers='fc1', activation='relu', consumers='fc2')]" in violation.description


def test_units_named_by_hand_are_reset() -> None:
    module = Untraceable()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    named = [HiddenUnits(producers="fc1", activation="relu", consumers="fc2")]
    resets = ContinualBackprop(module, optimizer, units=named, replacement_rate=0.1, maturity_threshold=4)
    assert "reset; mean to fc2.bias" in resets.explain()
    for _ in range(30):
        optimizer.zero_grad()
        module(torch.randn(6, 5)).square().mean().backward()
        optimizer.step()
        resets.step()
    assert resets.replacements["hidden_0"] > 10


def test_named_and_found_units_are_the_same() -> None:
    make, _ = ARCHITECTURES["vgg"]
    named = [
        HiddenUnits(producers="features.0", norms="features.1", activation="relu", consumers="features.4"),
        HiddenUnits(producers="features.4", norms=["features.5"], activation="relu", consumers=["classifier.0"]),
    ]
    by_hand, found = watched(make(), units=named)._module_units.found, watched(make())._module_units.found
    for one, other in zip(by_hand.groups, found.groups, strict=False):
        for kind in ("incoming", "attached", "outgoing"):
            [first], [second] = getattr(one, kind), getattr(other, kind)
            assert first.name == second.name
            assert torch.equal(first.places.index, second.places.index)
    assert by_hand.rows == found.rows[:2]


@pytest.mark.parametrize(
    ("named", "field", "text"),
    [
        (HiddenUnits(producers="fc9", consumers="fc2"), "units[0].producers", "has no layer 'fc9'"),
        (HiddenUnits(producers="fc1", consumers=""), "units[0].consumers", "expected a linear layer or convolution"),
        (HiddenUnits(producers="fc1", consumers=()), "units[0].consumers", "Name at least one layer"),
        (HiddenUnits(producers=("fc1", "fc2"), consumers="fc2"), "units[0].producers", "8 and 4 outputs"),
        (HiddenUnits(producers="fc1", consumers="fc1"), "units[0].consumers", "8 channels do not divide 5 inputs"),
        (HiddenUnits(producers="fc1", consumers="fc2", norms="fc2"), "units[0].norms", "not a normalisation layer"),
        (
            HiddenUnits(producers="fc1", consumers="fc2", activation="swish"),  # type: ignore[arg-type]
            "units[0].activation",
            "Expected one of relu",
        ),
    ],
)
def test_wrong_names_are_refused(named: HiddenUnits, field: str, text: str) -> None:
    with pytest.raises(SpecError) as caught:
        watched(Untraceable(), units=[named])
    assert caught.value.violations[0].field == field
    assert text in caught.value.violations[0].description


def test_lazy_modules_are_refused() -> None:
    module = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.LazyLinear(2))
    with pytest.raises(SpecError, match="lazy layers"):
        watched(module)

"""What the benchmarks call literal Continual Backprop is just that: it follows the published reference."""

import json
from pathlib import Path

import numpy as np
import torch
from baselines import LiteralContinualBackprop
from torch import Tensor
from workloads import Net

GOLDEN = Path(__file__).parents[1] / "cbp" / "golden" / "sgd_adaptable_ce_b4.npz"


class InPublishedOrder(LiteralContinualBackprop):
    """The published code zeroes what a layer's new units feed before it draws the next layer's."""

    def replace(self, replaced: list[Tensor]) -> None:
        for layer in range(len(replaced)):
            super().replace([units if other == layer else units[:0] for other, units in enumerate(replaced)])


def test_literal_continual_backprop_follows_the_published_algorithm() -> None:
    with np.load(GOLDEN) as archive:
        recorded = {key: archive[key] for key in archive.files}
    config = json.loads(str(recorded.pop("config")))
    widths = (config["in_features"], *config["hidden"], config["out_features"])
    net = Net("golden", widths, config["batch_size"], config["loss"], replacement_rate=config["replacement_rate"])
    expected = [tuple(row) for row in recorded["replaced"].tolist()]
    drawn = 0

    def draw(layer: int, fan_in: int, bound: float) -> Tensor:
        nonlocal drawn
        weights = torch.from_numpy(recorded[f"drawn_{drawn}"])
        assert layer == expected[drawn][1]
        assert weights.shape == (fan_in,)
        np.testing.assert_allclose(bound, recorded[f"bound_{layer}"], rtol=1e-6)
        drawn += 1
        return weights

    loop = InPublishedOrder(
        net,
        learning_rate=config["lr"],
        decay_rate=config["decay_rate"],
        maturity_threshold=config["maturity_threshold"],
        draw=draw,
    )
    for layer, linear in enumerate(loop.linears):
        linear.weight.data = torch.from_numpy(recorded[f"init_weight_{layer}"].copy())
        linear.bias.data = torch.from_numpy(recorded[f"init_bias_{layer}"].copy())

    replaced = []
    for step in range(config["steps"]):
        loop.step(torch.from_numpy(recorded["inputs"][step]), torch.from_numpy(recorded["targets"][step]))
        for layer, ages in enumerate(loop.ages):
            replaced += [(step, layer, unit) for unit in (ages == 0).nonzero()[:, 0].tolist()]

    assert replaced == expected
    for layer, linear in enumerate(loop.linears):
        final = linear.weight.detach().numpy(), linear.bias.detach().numpy()
        np.testing.assert_allclose(final[0], recorded[f"final_weight_{layer}"], rtol=5e-5, atol=3e-5)
        np.testing.assert_allclose(final[1], recorded[f"final_bias_{layer}"], rtol=5e-5, atol=3e-5)
    for layer, utilities in enumerate(loop.utilities):
        np.testing.assert_allclose(utilities, recorded[f"final_utility_{layer}"], rtol=5e-5, atol=3e-5)

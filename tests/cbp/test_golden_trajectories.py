"""Trajectories recorded from the published reference code, followed step by step."""

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

import cbp.continual_backprop
from cbp import Batch, ContinualBackprop, Learner, LearnerSpec, losses
from cbp.engines.names import EngineName, PerceptronEngineName
from cbp.engines.torch_engine import TorchEngine, initial_stack
from cbp.units.unit_groups import replace_in_groups

GOLDEN = Path(__file__).parent / "golden"
NAMES = sorted(path.stem for path in GOLDEN.glob("*.npz"))
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Trajectory:
    config: dict[str, Any]
    arrays: dict[str, NDArray[Any]]

    @property
    def replaced(self) -> list[tuple[int, int, int]]:
        """(step counted from 0, hidden layer, unit), in order"""
        return [(int(step), int(layer), int(unit)) for step, layer, unit in self.arrays["replaced"]]

    def side_by_side(self, key: str) -> NDArray[Any]:
        """All hidden layers' units in one row."""
        return np.concatenate([self.arrays[f"{key}_{layer}"] for layer in range(len(self.config["hidden"]))])

    @property
    def spec(self) -> LearnerSpec:
        config = self.config
        return LearnerSpec.parse(
            {
                "network": {
                    "kind": "mlp",
                    "in_features": config["in_features"],
                    "hidden": config["hidden"],
                    "out_features": config["out_features"],
                    "activation": config["activation"],
                },
                "loss": config["loss"],
                "optimizer": {"kind": config["optimizer"], "lr": config["lr"]},
                "batch_size": config["batch_size"],
                "resets": {
                    "replacement_rate": config["replacement_rate"],
                    "maturity_threshold": config["maturity_threshold"],
                    "decay_rate": config["decay_rate"],
                    "utility": config["utility"],
                    "bias_compensation": config["bias_compensation"],
                },
            }
        )


class RecordedDraws:
    """Hands out the recorded incoming weights in their order, to each learner of a stack."""

    def __init__(self, trajectory: Trajectory, learners: int = 1) -> None:
        self._trajectory = trajectory
        self.drawn = [0] * learners

    def incoming_weights(self, learner: int, layer: int, count: int) -> torch.Tensor:
        rows = []
        for _ in range(count):
            assert layer == self._trajectory.replaced[self.drawn[learner]][1]
            rows.append(torch.from_numpy(self._trajectory.arrays[f"drawn_{self.drawn[learner]}"]))
            self.drawn[learner] += 1
        return torch.stack(rows)

    def utilities(self) -> torch.Tensor:
        raise AssertionError("No recorded trajectory ranks units at random")


@pytest.fixture(params=NAMES)
def trajectory(request: pytest.FixtureRequest) -> Trajectory:
    with np.load(GOLDEN / f"{request.param}.npz") as archive:
        arrays = {key: archive[key] for key in archive.files}
    return Trajectory(json.loads(str(arrays.pop("config"))), arrays)


def newborn(ages: torch.Tensor, widths: list[int]) -> Iterator[tuple[int, int]]:
    """(layer, unit) of the units that were replaced at the step just taken; ages [U]."""
    for layer, layer_ages in enumerate(ages.split(widths)):
        for unit in (layer_ages == 0).nonzero()[:, 0].tolist():
            yield layer, unit


def assert_near(actual: NDArray[Any], expected: NDArray[Any], what: str) -> None:
    """Float32 rounding, grown over 400 steps.

    The published adaptation utility becomes infinite when all inputs of a unit were reset; ours is cut off before.
    """
    finite = np.isfinite(expected)
    np.testing.assert_allclose(actual[finite], expected[finite], rtol=5e-5, atol=3e-5, err_msg=what)
    assert (actual[~finite] > 1e8).all(), what


def test_the_recorded_trajectories_are_all_here() -> None:
    assert len(NAMES) == 7


@pytest.mark.parametrize(
    ("engine", "device"),
    [
        *((engine, "cpu") for engine in get_args(PerceptronEngineName)),
        *(pytest.param(engine, "cuda", marks=pytest.mark.gpu) for engine in ("torch", "stacked")),
    ],
)
def test_learner_follows_the_published_algorithm(engine: EngineName, device: str, trajectory: Trajectory) -> None:
    spec = trajectory.spec
    learner = Learner(spec, device=device, engine=engine)
    state = learner._state
    for layer, (weight, bias) in enumerate(zip(state.parameters.weights, state.parameters.biases, strict=True)):
        weight[0] = torch.from_numpy(trajectory.arrays[f"init_weight_{layer}"])
        bias[0] = torch.from_numpy(trajectory.arrays[f"init_bias_{layer}"])
    draws = RecordedDraws(trajectory)
    learner._install(state, draws, published_order=True)

    replaced, step_losses = [], []
    for step in range(trajectory.config["steps"]):
        batch = Batch.validate(spec, trajectory.arrays["inputs"][step], trajectory.arrays["targets"][step])
        step_losses.append(learner.train(batch).loss)
        replaced += [(step, *unit) for unit in newborn(state.units.age[0].cpu(), trajectory.config["hidden"])]
        if (step + 1) % 100 == 0:
            expected = trajectory.side_by_side(f"utility_after_{step + 1}")
            assert_near(state.units.utility[0].cpu().numpy(), expected, f"utility after {step + 1} steps")

    assert replaced == trajectory.replaced
    assert draws.drawn == [len(replaced)]
    assert_near(np.asarray(step_losses), trajectory.arrays["losses"], "losses")
    for layer, (weight, bias) in enumerate(zip(state.parameters.weights, state.parameters.biases, strict=True)):
        assert_near(weight[0].cpu().numpy(), trajectory.arrays[f"final_weight_{layer}"], f"weight {layer}")
        assert_near(bias[0].cpu().numpy(), trajectory.arrays[f"final_bias_{layer}"], f"bias {layer}")
    assert_near(state.units.utility[0].cpu().numpy(), trajectory.side_by_side("final_utility"), "utility")
    assert_near(
        state.units.mean_activation[0].cpu().numpy(),
        trajectory.side_by_side("final_mean_activation"),
        "mean activation",
    )
    assert state.units.age[0].tolist() == trajectory.side_by_side("final_age").tolist()


def test_drop_in_follows_the_published_algorithm(trajectory: Trajectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch.optim, whose Adam keeps one step count for a whole tensor."""
    in_published_order = functools.partial(replace_in_groups, published_order=True)
    monkeypatch.setattr(cbp.continual_backprop, "replace_in_groups", in_published_order)
    config = trajectory.config
    network = sequential(trajectory)
    optimizer_type = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[config["optimizer"]]
    optimizer = optimizer_type(network.parameters(), lr=config["lr"])
    resets = ContinualBackprop(
        network,
        optimizer,
        replacement_rate=config["replacement_rate"],
        maturity_threshold=config["maturity_threshold"],
        decay_rate=config["decay_rate"],
        utility=config["utility"],
        bias_compensation=config["bias_compensation"],
        draws=RecordedDraws(trajectory),
    )
    loss_of = nn.functional.cross_entropy if config["loss"] == "cross_entropy" else nn.functional.mse_loss
    replaced = []
    for step in range(config["steps"]):
        outputs = network(torch.from_numpy(trajectory.arrays["inputs"][step]))
        optimizer.zero_grad()
        loss_of(outputs, torch.from_numpy(trajectory.arrays["targets"][step])).backward()
        optimizer.step()
        resets.step()
        replaced += [(step, *unit) for unit in newborn(resets.state_dict()["age"][0], config["hidden"])]

    assert replaced == trajectory.replaced
    linears = [module for module in network if isinstance(module, nn.Linear)]
    for layer, linear in enumerate(linears):
        assert_near(linear.weight.detach().numpy(), trajectory.arrays[f"final_weight_{layer}"], f"weight {layer}")
        assert_near(linear.bias.detach().numpy(), trajectory.arrays[f"final_bias_{layer}"], f"bias {layer}")


def sequential(trajectory: Trajectory) -> nn.Sequential:
    activation = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "tanh": nn.Tanh}[trajectory.config["activation"]]
    modules: list[nn.Module] = []
    for layer in range(len(trajectory.config["hidden"]) + 1):
        weight = torch.from_numpy(trajectory.arrays[f"init_weight_{layer}"].copy())
        linear = nn.Linear(weight.shape[1], weight.shape[0])
        linear.weight.data = weight
        linear.bias.data = torch.from_numpy(trajectory.arrays[f"init_bias_{layer}"].copy())
        modules += [linear, activation()]
    return nn.Sequential(*modules[:-1])


def test_stacked_learners_follow_the_published_algorithm_side_by_side(trajectory: Trajectory) -> None:
    """Three learners in one stack, the second with inputs of its own: the neighbours are not disturbed."""
    spec, steps = trajectory.spec, 150
    state = initial_stack([spec] * 3, CPU)
    for layer, (weight, bias) in enumerate(zip(state.parameters.weights, state.parameters.biases, strict=True)):
        weight[:] = torch.from_numpy(trajectory.arrays[f"init_weight_{layer}"])
        bias[:] = torch.from_numpy(trajectory.arrays[f"init_bias_{layer}"])
    engine = TorchEngine([spec] * 3, state, CPU, RecordedDraws(trajectory, 3), published_order=True)
    examples, outputs = trajectory.config["batch_size"], spec.network.out_features
    scale = torch.full((3, examples, 1), losses.gradient_scale(spec.loss, outputs) / examples)
    replaced: list[list[tuple[int, int, int]]] = [[], []]
    for step in range(steps):
        inputs = torch.from_numpy(trajectory.arrays["inputs"][step]).repeat(3, 1, 1)
        inputs[1] *= -1
        targets = losses.encode_targets(spec.loss, torch.from_numpy(trajectory.arrays["targets"][step]), outputs)
        engine.step(inputs, targets.expand(3, -1, -1), scale, torch.empty(3, examples, outputs))
        for of_one, learner in zip(replaced, (0, 2), strict=True):
            of_one += [(step, *unit) for unit in newborn(state.units.age[learner], trajectory.config["hidden"])]

    expected = [replacement for replacement in trajectory.replaced if replacement[0] < steps]
    assert replaced == [expected, expected]

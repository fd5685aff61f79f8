"""The closed forms against autograd and torch.optim."""

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from network_kinds import PERCEPTRON_ENGINES
from torch import nn

from cbp import Batch, Learner, LearnerSpec
from cbp.engines.names import EngineName
from cbp.spec.learner_spec import Activation, LossKind

ACTIVATIONS: dict[Activation, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "selu": nn.SELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "identity": nn.Identity,
}
LOSSES: dict[LossKind, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "cross_entropy": nn.CrossEntropyLoss(reduction="none"),
    "mse": lambda outputs, targets: nn.functional.mse_loss(outputs, targets, reduction="none").mean(-1),
    "huber": lambda outputs, targets: nn.functional.huber_loss(outputs, targets, reduction="none", delta=0.3).mean(-1),
    "binary_cross_entropy": lambda outputs, targets: nn.functional.binary_cross_entropy_with_logits(
        outputs, targets, reduction="none"
    ).mean(-1),
}
OPTIMIZERS: dict[str, tuple[dict[str, Any], Callable[[Any], torch.optim.Optimizer]]] = {
    "sgd": ({"kind": "sgd", "lr": 0.1}, lambda p: torch.optim.SGD(p, lr=0.1)),
    "sgd_momentum_decay": (
        {"kind": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    ),
    "sgd_nesterov": (
        {"kind": "sgd", "lr": 0.05, "momentum": 0.9, "nesterov": True},
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    ),
    "sgd_nesterov_decay": (
        {"kind": "sgd", "lr": 0.05, "momentum": 0.7, "nesterov": True, "weight_decay": 0.01},
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.7, nesterov=True, weight_decay=0.01),
    ),
    "sgd_clipped": ({"kind": "sgd", "lr": 0.1, "clip_norm": 0.2}, lambda p: torch.optim.SGD(p, lr=0.1)),
    "adamw_clipped": ({"kind": "adamw", "lr": 0.01, "clip_norm": 0.2}, lambda p: torch.optim.AdamW(p, lr=0.01)),
    "sgd_clipped_decay": (
        {"kind": "sgd", "lr": 0.1, "momentum": 0.5, "weight_decay": 0.1, "clip_norm": 0.2},
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5, weight_decay=0.1),
    ),
    "rmsprop": ({"kind": "rmsprop", "lr": 0.005}, lambda p: torch.optim.RMSprop(p, lr=0.005)),
    "rmsprop_all": (
        {"kind": "rmsprop", "lr": 0.005, "alpha": 0.8, "epsilon": 1e-5, "momentum": 0.6, "weight_decay": 0.05},
        lambda p: torch.optim.RMSprop(p, lr=0.005, alpha=0.8, eps=1e-5, momentum=0.6, weight_decay=0.05),
    ),
    "adam": ({"kind": "adam", "lr": 0.01}, lambda p: torch.optim.Adam(p, lr=0.01)),
    "adam_decay": (
        {"kind": "adam", "lr": 0.01, "beta1": 0.8, "beta2": 0.95, "epsilon": 1e-6, "weight_decay": 0.1},
        lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1),
    ),
    "adam_no_memory": (
        {"kind": "adam", "lr": 0.01, "beta1": 0.0, "beta2": 0.0},
        lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.0, 0.0)),
    ),
    "adamw": ({"kind": "adamw", "lr": 0.01}, lambda p: torch.optim.AdamW(p, lr=0.01)),
}


def module_like(learner: Learner) -> nn.Sequential:
    network = learner.spec.network
    parameters = learner._state.parameters
    modules: list[nn.Module] = []
    for weight, bias in zip(parameters.weights, parameters.biases, strict=True):
        linear = nn.Linear(weight.shape[2], weight.shape[1])
        linear.weight.data, linear.bias.data = weight[0].clone(), bias[0].clone()
        modules += [linear, ACTIVATIONS[network.activation]()]
    return nn.Sequential(*modules[:-1])


def assert_trains_alike(
    spec: LearnerSpec,
    make_batch: Callable[..., Batch],
    optimizer_of: Callable[[Any], torch.optim.Optimizer],
    steps: int,
    weighted: bool,
    engine: EngineName = "torch",
) -> None:
    learner = Learner(spec, engine=engine)
    module = module_like(learner)
    optimizer = optimizer_of(module.parameters())
    loss_of = LOSSES[spec.loss.kind]
    clipped = 0
    for step in range(steps):
        batch = make_batch(spec, spec.batch_size, seed=step, weighted=weighted)
        result = learner.train(batch, return_outputs=True)
        outputs = module(torch.from_numpy(batch.features))
        each = loss_of(outputs, torch.from_numpy(batch.targets))
        weights = torch.ones(len(batch)) if batch.weights is None else torch.from_numpy(batch.weights)
        optimizer.zero_grad()
        (weights * each).mean().backward()
        if spec.optimizer.clip_norm is not None:
            norm = nn.utils.clip_grad_norm_(module.parameters(), spec.optimizer.clip_norm)
            clipped += bool(norm > spec.optimizer.clip_norm)
        optimizer.step()
        assert result.outputs is not None
        torch.testing.assert_close(torch.from_numpy(result.outputs), outputs.detach(), rtol=1e-4, atol=2e-5)
        assert result.loss == pytest.approx(float(each.detach().mean()), rel=1e-4, abs=1e-6)
    assert clipped or spec.optimizer.clip_norm is None
    parameters = learner._state.parameters
    linears = [module for module in module if isinstance(module, nn.Linear)]
    for linear, weight, bias in zip(linears, parameters.weights, parameters.biases, strict=True):
        torch.testing.assert_close(weight[0], linear.weight.detach(), rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(bias[0], linear.bias.detach(), rtol=1e-4, atol=2e-5)


def test_every_choice_is_covered() -> None:
    assert set(ACTIVATIONS) == set(get_args(Activation))
    assert set(LOSSES) == set(get_args(LossKind))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_autograds(
    activation: Activation,
    loss: LossKind,
    make_spec: Callable[..., LearnerSpec],
    make_batch: Callable[..., Batch],
) -> None:
    plain_loss = {"kind": loss, "delta": 0.3} if loss == "huber" else loss
    spec = make_spec(network__activation=activation, loss=plain_loss, batch_size=3, resets__layers="none")
    assert_trains_alike(spec, make_batch, lambda p: torch.optim.SGD(p, lr=0.05), steps=3, weighted=True)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("engine", PERCEPTRON_ENGINES)
def test_optimizers_are_those_of_torch(
    engine: EngineName,
    optimizer: str,
    loss: LossKind,
    batch_size: int,
    make_spec: Callable[..., LearnerSpec],
    make_batch: Callable[..., Batch],
) -> None:
    plain, optimizer_of = OPTIMIZERS[optimizer]
    plain_loss = {"kind": loss, "delta": 0.3} if loss == "huber" else loss
    # tanh: with a kink, rounding alone decides on which side an activation falls, and Adam makes much of little.
    spec = make_spec(
        network__activation="tanh",
        loss=plain_loss,
        optimizer=plain,
        batch_size=batch_size,
        resets__layers="none",
    )
    assert_trains_alike(spec, make_batch, optimizer_of, steps=12, weighted=False, engine=engine)

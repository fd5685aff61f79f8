"""The losses: value, gradient in the outputs, and what counts as a correct answer.

Shapes: L learners, B examples, C outputs. Labels are encoded as one-hot rows once per message, so that every loss
takes float targets [L, B, C] and a step needs two operations.
"""

import torch
from torch import Tensor
from torch.nn import functional

from cbp.spec.learner_spec import LossSpec


def encode_targets(loss: LossSpec, targets: Tensor, outputs: int) -> Tensor:
    """[..., C] float targets from [...] labels (cross_entropy) or [..., C] values."""
    if loss.kind == "cross_entropy":
        return functional.one_hot(targets, outputs).to(torch.float32)
    return targets


def gradient_scale(loss: LossSpec, outputs: int) -> float:
    """What the residual of one example is multiplied by, apart from its weight over the step's examples."""
    match loss.kind:
        case "cross_entropy":
            return 1.0
        case "mse":
            return 2.0 / outputs
        case "huber" | "binary_cross_entropy":
            return 1.0 / outputs


def output_gradient(loss: LossSpec, outputs: Tensor, targets: Tensor, scale: Tensor) -> Tensor:
    """Gradient of a step's loss in the outputs; scale [L, B, 1] is weight / B times `gradient_scale`."""
    match loss.kind:
        case "cross_entropy":
            residual = torch.softmax(outputs, dim=-1).sub_(targets)
        case "mse":
            residual = outputs - targets
        case "huber":
            residual = (outputs - targets).clamp_(-loss.delta, loss.delta)
        case "binary_cross_entropy":
            residual = torch.sigmoid(outputs).sub_(targets)
    return residual.mul_(scale)


def example_losses(loss: LossSpec, outputs: Tensor, targets: Tensor) -> Tensor:
    """[...] unweighted loss of every example, from [..., C] outputs and encoded targets."""
    match loss.kind:
        case "cross_entropy":
            return torch.logsumexp(outputs, dim=-1) - (outputs * targets).sum(dim=-1)
        case "mse":
            return (outputs - targets).square().mean(dim=-1)
        case "huber":
            return functional.huber_loss(outputs, targets, reduction="none", delta=loss.delta).mean(dim=-1)
        case "binary_cross_entropy":
            return functional.binary_cross_entropy_with_logits(outputs, targets, reduction="none").mean(dim=-1)


def example_accuracies(loss: LossSpec, outputs: Tensor, targets: Tensor) -> Tensor | None:
    """[...] share of right answers per example, None for regression.

    Cross entropy: whether the largest output is the label's. Binary: the share of outputs on the target's side of
    a half.
    """
    match loss.kind:
        case "cross_entropy":
            return (outputs.argmax(dim=-1) == targets.argmax(dim=-1)).to(torch.float32)
        case "binary_cross_entropy":
            return ((outputs > 0) == (targets > 0.5)).to(torch.float32).mean(dim=-1)
        case "mse" | "huber":
            return None

"""Plasticity samples of one plain multilayer perceptron, operation by operation, on any device."""

from collections.abc import Callable

import torch
from torch import Tensor

from cbp import losses, optimizers
from cbp.activations import NONLINEARITIES
from cbp.engines.torch_engine import StackState, unit_layout
from cbp.examples.pending import Probe
from cbp.networks import Mlp, flat_layers
from cbp.plasticity.measures import Probed, measure_layers
from cbp.plasticity.samples import LayerPlasticity
from cbp.spec.learner_spec import LearnerSpec


@torch.inference_mode()
def measure_perceptron(
    spec: LearnerSpec, state: StackState, probe: Probe, between_layers: Callable[[], None] | None
) -> tuple[LayerPlasticity, ...]:
    """Every layer of the only learner in the stack."""
    device = state.parameters.flat.device
    return measure_layers(
        spec.layer_names,
        0,
        state.parameters,
        state.initial_parameters,
        state.units,
        unit_layout(spec.mlp, device),
        optimizers.log_decay([spec.resets.decay_rate], device),
        state.replacements[0],
        _probed(spec, state, probe),
        spec.monitoring.dormant_threshold,
        NONLINEARITIES[spec.mlp.plain_activation].saturated_outside,
        between_layers,
    )


def _probed(spec: LearnerSpec, state: StackState, probe: Probe) -> Probed:
    network, loss, device = spec.mlp, spec.loss, state.parameters.flat.device
    count = len(probe)
    inputs = torch.from_numpy(probe.features).to(device).unsqueeze(0)
    mlp = Mlp(network.plain_activation)
    passed = mlp.forward(state.parameters, inputs)
    activations = [activation[0] for activation in passed.activations]
    layer_inputs = [inputs[0], *activations]
    if not count:
        return Probed(inputs=layer_inputs, activations=activations, deltas=None, gradient=None)
    targets = torch.from_numpy(probe.targets).to(device).unsqueeze(0)
    encoded = losses.encode_targets(loss, targets, network.out_features)
    scale = torch.full((1, count, 1), losses.gradient_scale(loss, network.out_features) / count)
    residual = losses.output_gradient(loss, passed.outputs, encoded, scale.to(device))
    gradient = flat_layers(network, 1, device)
    deltas: list[Tensor] = []
    mlp.backward(state.parameters, inputs, passed, residual, gradient, deltas)
    return Probed(
        inputs=layer_inputs,
        activations=activations,
        deltas=[delta[0] for delta in reversed(deltas)],
        gradient=gradient,
    )

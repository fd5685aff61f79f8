"""The hidden activations that an optimizer's step learned from, gathered from any module."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.optim import Optimizer

from cbp.errors import CbpError
from cbp.units.unit_facts import Tap


class ActivationTaps:
    """Gathers the activations of the forward passes, in training mode, that the last `optimizer.step()` learned from.

    A pass counts from its backward pass on, so one whose loss is never differentiated leaves no trace and takes no
    memory. Several passes before one optimizer step, as in gradient accumulation, count as one larger batch. Where
    `optimizer.step()` is called several times before they are taken, the passes of the last one count.
    """

    def __init__(self, taps: Sequence[Tap], optimizer: Optimizer) -> None:
        self._gathered: list[list[Tensor]] = [[] for _ in taps]
        self._learned = False  # whether the optimizer has taken its step on what is gathered
        self._hooks = [
            tap.layer.register_forward_hook(self._gatherer(place, tap), with_kwargs=True)
            for place, tap in enumerate(taps)
        ]
        self._hooks.append(optimizer.register_step_post_hook(self._finish_gathering))

    @property
    def passes(self) -> list[int]:
        """Per tap, how many passes are held."""
        return [len(passes) for passes in self._gathered]

    def take(self) -> list[list[Tensor]]:
        """Per tap the activations of each pass, at least in float32 whatever they were computed in; they are forgotten
        here.

        Raises `CbpError` if no forward and backward pass in training mode has happened since the last time.
        """
        if not all(self._gathered):
            raise CbpError("step() needs a forward pass in training mode, and its backward pass, since the last step")
        taken = [[_widened(activations) for activations in passes] for passes in self._gathered]
        self._forget()
        return taken

    def remove(self) -> None:
        """Takes the hooks off the module and the optimizer."""
        for hook in self._hooks:
            hook.remove()

    def _gatherer(self, place: int, tap: Tap) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
        """A hook for the layer that reads units, whose input is their activations, or that makes them.

        Not a hook on the activation module, since one module may serve several layers. Until the backward pass
        comes, the activations hang on the graph that holds them anyway, and go with it.
        """

        def gather(layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            made = _tensors(output)
            learned_from = [tensor for tensor in made if tensor.requires_grad]
            if not (layer.training and learned_from):
                return
            seen = made if tap.side == "output" else _tensors((*inputs, *named.values()))
            waiting = [seen[0].detach()]

            def differentiated(_gradient: Tensor) -> None:
                if waiting:  # a graph may be walked more than once, and reach a layer by several of its outputs
                    self._gather(place, waiting.pop())

            for tensor in learned_from:
                tensor.register_hook(differentiated)  # type: ignore[no-untyped-call]

        return gather

    def _gather(self, place: int, activations: Tensor) -> None:
        if self._learned:
            self._forget()
        self._gathered[place].append(activations)

    def _finish_gathering(self, _optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        self._learned = True

    def _forget(self) -> None:
        self._learned = False
        for passes in self._gathered:
            passes.clear()


def _widened(activations: Tensor) -> Tensor:
    """Means of many values need more digits than those of half a float's width."""
    return activations.float() if activations.dtype in (torch.bfloat16, torch.float16) else activations


def _tensors(value: Any) -> list[Tensor]:
    """All tensors of what a layer takes or gives, in its order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, PackedSequence):
        return [value.data]
    return [found for entry in value for found in _tensors(entry)] if isinstance(value, tuple | list) else []

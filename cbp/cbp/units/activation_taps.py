"""The hidden activations that an optimizer's step learned from, gathered from any module."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import PackedSequence
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from cbp.errors import CbpError
from cbp.units.hidden_hooks import ForwardHook, hook_forward
from cbp.units.unit_facts import Tap

_MARK = "_cbp_version"
"""Of a gradient: its version when the last pass had been added to it."""


@dataclass(eq=False)
class _Pass:
    """One pass through a tapped layer, on its way back."""

    activations: Tensor
    backward: int
    """Which backward pass came by."""


class ActivationTaps:
    """Gathers the activations of the forward passes, in training mode, that the last `optimizer.step()` learned from.

    A pass counts once a backward pass has added its share to the gradients of the tapped layer's parameters: one whose
    loss is never differentiated leaves no trace and takes no memory, nor does one through a frozen layer or one whose
    gradients go elsewhere, as in `torch.autograd.grad`. It counts no longer if those gradients are dropped, as
    `zero_grad` does, before the optimizer has taken its step. Several passes before one step, as in gradient
    accumulation or for several losses, count as one larger batch. Where `optimizer.step()` is called several times
    before they are taken, the passes of the last one count.

    Copies gather for themselves: what is attached here belongs to one module and one optimizer.
    """

    _hooks: list[RemovableHandle]
    _unlearned_version: int | None

    def __init__(self, taps: Sequence[Tap], optimizer: Optimizer) -> None:
        self._taps = list(taps)
        self._optimizer = optimizer
        self._attach()

    @property
    def passes(self) -> list[int]:
        """Per tap, how many passes are held."""
        return [len(passes) for passes in self._gathered]

    @property
    def parallel(self) -> torch.distributed.ProcessGroup | None:
        """The processes that hold replicas of the module, if its last pass went through `DistributedDataParallel`."""
        wrapper = self._wrapper() if self._wrapper is not None else None
        return None if wrapper is None else wrapper.process_group

    def take(self) -> list[list[Tensor]] | None:
        """Per tap the activations of each pass, at least in float32 whatever they were computed in; none for layers
        that took no part in the step. They are forgotten here.

        None if the optimizer has not taken a step on them, as where a gradient scaler skips one.

        Raises `CbpError` if no forward and backward pass in training mode has happened since the last time, or if
        another optimizer moves the parameters.
        """
        if not any(self._gathered):
            raise CbpError("step() needs a forward pass in training mode, and its backward pass, since the last step")
        if not self._learned:
            self._check_optimizer()
            return None
        self._unlearned_version = None
        taken = [[_widened(activations) for activations in passes] for passes in self._gathered]
        self._forget()
        return taken

    def use(self, optimizer: Optimizer) -> None:
        """Goes on with another optimizer."""
        self.remove()
        self._optimizer = optimizer
        self._attach()

    def remove(self) -> None:
        """Takes the hooks off the module and the optimizer."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def __getstate__(self) -> dict[str, Any]:
        return {"taps": self._taps, "optimizer": self._optimizer}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._taps, self._optimizer = state["taps"], state["optimizer"]
        self._attach()

    def _attach(self) -> None:
        self._gathered: list[list[Tensor]] = [[] for _ in self._taps]
        self._on_their_way: list[list[_Pass]] = [[] for _ in self._taps]
        self._learned = False  # whether the optimizer has taken its step on what is gathered
        self._wrapper: weakref.ref[DistributedDataParallel] | None = None  # whose group is not to outlive it
        self._unlearned_version = None
        # The hooks do not keep this object: one that nobody has any more lets go of what it has gathered.
        self._hooks = []
        me = weakref.ref(self)
        for place, tap in enumerate(self._taps):
            parameters = [own for own in tap.layer.parameters(recurse=False) if own.requires_grad]
            self._hooks.append(hook_forward(tap.layer, _gatherer(me, place, tap)))
            self._hooks += [
                own.register_post_accumulate_grad_hook(_accumulated(me, place))  # type: ignore[no-untyped-call]
                for own in parameters
            ]
        self._hooks.append(self._optimizer.register_step_post_hook(_stepped(me)))

    def note(self, place: int, activations: Tensor) -> None:
        """A backward pass has come to the tapped layer."""
        on_their_way, backward = self._on_their_way[place], _backward_under_way()
        on_their_way[:] = [other for other in on_their_way if other.backward == backward]
        on_their_way.append(_Pass(activations, backward))

    def count(self, place: int, parameter: Tensor) -> None:
        """The tapped layer's parameter has got its share of a gradient."""
        gradient = parameter.grad
        assert gradient is not None
        # Whatever else changes a gradient between two shares of it, or puts another one in its place, drops the first.
        continues = getattr(gradient, _MARK, None) == gradient._version - 1
        setattr(gradient, _MARK, gradient._version)
        on_their_way, backward = self._on_their_way[place], _backward_under_way()
        arrived = [other.activations for other in on_their_way if other.backward == backward]
        on_their_way.clear()
        if not arrived:  # another parameter of the layer was first
            return
        if self._learned:
            self._forget()
        elif not continues:
            self._gathered[place].clear()
        self._gathered[place] += arrived

    def finish(self) -> None:
        """The optimizer has taken a step."""
        for tap, passes in zip(self._taps, self._gathered, strict=True):
            if passes and all(own.grad is None for own in tap.layer.parameters(recurse=False)):
                passes.clear()
        self._learned = any(self._gathered)

    def replicated(self) -> None:
        """Notes whether the pass that is under way is one of replicas."""
        active = DistributedDataParallel._get_active_ddp_module()  # type: ignore[no-untyped-call]
        self._wrapper = None if active is None else weakref.ref(active)

    def _check_optimizer(self) -> None:
        """Raises `CbpError` if the parameters have moved since the last step on which nothing was learned."""
        version = sum(own._version for tap in self._taps for own in tap.layer.parameters(recurse=False))
        if self._unlearned_version not in (None, version):
            raise CbpError(
                "The optimizer has not stepped, but the parameters move. If there is a new optimizer, tell the resets: "
                "use_optimizer(optimizer)"
            )
        self._unlearned_version = version

    def _forget(self) -> None:
        self._learned = False
        for passes in self._gathered:
            passes.clear()


def _gatherer(me: "weakref.ref[ActivationTaps]", place: int, tap: Tap) -> ForwardHook:
    """A hook for the layer that reads units, whose input is their activations, or that makes them.

    Not a hook on the activation module, since one module may serve several layers. Until the backward pass comes, the
    activations hang on the graph that holds them anyway, and go with it.
    """
    own = dict(tap.layer.named_parameters(recurse=False))

    def gather(layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        taps = me()
        if taps is None or layer is not tap.layer or not layer.training:
            return
        present = layer._parameters
        # `torch.func.functional_call` puts other tensors in the parameters' places, and learns those.
        if not any(given is present.get(name) and given.requires_grad for name, given in own.items()):
            return
        made = _tensors(output)
        learned_from = [tensor for tensor in made if tensor.requires_grad]
        if not learned_from:
            return
        taps.replicated()
        seen = made if tap.side == "output" else _tensors((*inputs, *named.values()))
        waiting = [seen[0].detach()]

        def differentiated(_gradient: Tensor) -> None:
            if waiting and (taps := me()) is not None:  # a graph may be walked more than once, and reach a layer by
                taps.note(place, waiting.pop())  # several of its outputs

        for tensor in learned_from:
            tensor.register_hook(differentiated)  # type: ignore[no-untyped-call]

    return gather


def _accumulated(me: "weakref.ref[ActivationTaps]", place: int) -> Callable[[Tensor], None]:
    def accumulated(parameter: Tensor) -> None:
        if (taps := me()) is not None:
            taps.count(place, parameter)

    return accumulated


def _stepped(me: "weakref.ref[ActivationTaps]") -> Callable[[Optimizer, Any, Any], None]:
    def stepped(_optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        if (taps := me()) is not None:
            taps.finish()

    return stepped


def _backward_under_way() -> int:
    """Its number; autograd gives the same to all that one `backward` calls."""
    return int(torch._C._current_graph_task_id())


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

"""Hooks on a layer that copies and pickles of it know nothing of.

PyTorch keeps a layer's hooks in the layer, so that a copy would call them, too, and a pickle would have to hold them.
The hooks here are those of one layer of one process: copies, pickles and TorchScript see the others only.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

ForwardHook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]


class _Hooks(OrderedDict[int, Any]):
    """A layer's forward hooks, some of which nobody is shown but the layer when it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden: set[int] = set()

    def _shown(self) -> Iterator[tuple[int, Any]]:
        return ((key, hook) for key, hook in self.items() if key not in self.hidden)

    def values(self) -> Any:
        """What TorchScript would compile."""
        return [hook for _, hook in self._shown()]

    def __deepcopy__(self, memo: dict[int, Any]) -> OrderedDict[int, Any]:
        return OrderedDict((key, copy.deepcopy(hook, memo)) for key, hook in self._shown())

    def __reduce_ex__(self, _protocol: Any) -> Any:
        return OrderedDict, (), None, None, iter(list(self._shown()))


class _Unseen:
    """A hook among others that were there before it: a copy of it does nothing."""

    def __init__(self, hook: ForwardHook | None) -> None:
        self._hook = hook

    def __call__(self, layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        if self._hook is not None:
            self._hook(layer, inputs, named, output)

    def __deepcopy__(self, _memo: dict[int, Any]) -> "_Unseen":
        return _Unseen(None)

    def __reduce__(self) -> Any:
        return _Unseen, (None,)


def hook_forward(layer: nn.Module, hook: ForwardHook) -> RemovableHandle:
    """Calls the hook after every pass through the layer, with what it was given and gives."""
    hooks = layer._forward_hooks
    if not hooks and not isinstance(hooks, _Hooks):
        hooks = layer._forward_hooks = _Hooks()
    if not isinstance(hooks, _Hooks):  # those who registered the others take them off this very dictionary
        return layer.register_forward_hook(_Unseen(hook), with_kwargs=True)
    handle = layer.register_forward_hook(hook, with_kwargs=True)
    hooks.hidden.add(handle.id)
    return handle

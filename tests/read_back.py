"""Watches for what makes the host wait for the device."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class NoReadBack(TorchDispatchMode):
    """Fails on whatever makes the host wait for the device."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "item", "equal", "is_nonzero", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = func.__name__.split(".")[0].lstrip("_")
        assert name not in {forbidden.lstrip("_") for forbidden in self.FORBIDDEN}, func
        assert name != "index" or all(index is None or index.dtype != torch.bool for index in args[1]), (
            "a boolean mask's size must be read back"
        )
        self.operations[name] += 1
        return func(*args, **(kwargs or {}))

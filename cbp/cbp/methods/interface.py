"""What every method against loss of plasticity looks like from a training loop."""

from collections.abc import Mapping
from typing import Any, Protocol


class PlasticityMethod(Protocol):
    """A method attached to a module and the optimizer that moves its parameters.

    It registers nothing in the module: neither `parameters()` nor `state_dict()` of it change. Where the module is
    moved to another device, its own state follows.
    """

    def step(self) -> None:
        """What the method does after a step; call it after each `optimizer.step()`, before gradients are zeroed."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that is not the module's or the optimizer's own; save it together with theirs."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state_dict` returned. Raises `SnapshotError` if it does not fit, and changes nothing."""

    def remove(self) -> None:
        """Takes its hooks off the module and the optimizer; the object is of no more use."""


class UnitResettingMethod(PlasticityMethod, Protocol):
    """A method that resets whole units."""

    @property
    def replacements(self) -> dict[str, int]:
        """Units replaced so far, per group of units."""

    def explain(self) -> str:
        """A table of all groups of units, and of what is left alone."""

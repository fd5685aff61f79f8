"""What ReDo and self-normalised resets share, whatever decides which units are reset."""

from collections.abc import Sequence

from torch import nn
from torch.optim import Optimizer

from cbp.spec.learner_spec import Initializer
from cbp.units.module_units import ModuleUnits
from cbp.units.named_units import HiddenUnits
from cbp.units.unit_groups import Grouping


class UnitResets:
    """The units of a module, and what is said of them."""

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        initializer: Initializer,
        units: Sequence[HiddenUnits] | None,
        seed: int,
    ) -> None:
        self._units = ModuleUnits(module, optimizer, initializer=initializer, units=units, seed=seed)

    @property
    def replacements(self) -> dict[str, int]:
        """Units replaced so far, per group of units."""
        return self._units.replacements

    def explain(self) -> str:
        """A table of all groups of units, and of what is left alone."""
        return self._units.explain(lambda _index, row: row.verdict)

    def use_optimizer(self, optimizer: Optimizer) -> None:
        """Goes on with another optimizer of the same parameters. Raises `SpecError` if it does not move them all or is
        not supported; then nothing has changed."""
        self._units.use_optimizer(optimizer)

    def remove(self) -> None:
        """Takes the hooks off the module and the optimizer; the object is of no more use."""
        self._units.remove()

    @property
    def _grouping(self) -> Grouping:
        return self._units.grouping

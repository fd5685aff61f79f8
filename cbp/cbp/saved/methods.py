"""What methods against loss of plasticity save beside their tensors."""

from collections.abc import Iterator, Mapping, Sequence

from cbp.errors import FieldViolation
from cbp.saved.learner import misfits_of_replacements
from cbp.saved.parts import Count, Owed, SavedBeside


class SavedSteps(SavedBeside):
    """Of a method that acts every so many steps."""

    step: Count


class SavedUnits(SavedBeside):
    """Of a method that resets units; lists are by group."""

    replacements: list[Count]
    step: Count | None = None

    def misfits(self, widths: Sequence[int]) -> Iterator[FieldViolation]:
        """What cannot be of groups of so many units."""
        yield from misfits_of_replacements(widths, self.step, self.replacements)


class SavedResets(SavedUnits):
    """Of `ContinualBackprop`."""

    step: Count
    accumulated_replacements: list[Owed]
    replacements_in_window: list[Count] | None = None

    def misfits(self, widths: Sequence[int]) -> Iterator[FieldViolation]:
        yield from misfits_of_replacements(
            widths, self.step, self.replacements, self.accumulated_replacements, self.replacements_in_window
        )


class SavedRedraws(SavedBeside):
    """Of `SelectiveWeightReinitialization`, by parameter."""

    step: Count
    owed: dict[str, Owed]
    redrawn: dict[str, Count]

    def misfits(self, weights: Mapping[str, int]) -> Iterator[FieldViolation]:
        """What cannot be of parameters of so many weights."""
        for field, names in {"owed": self.owed.keys(), "redrawn": self.redrawn.keys()}.items():
            if names != weights.keys():
                yield FieldViolation(field, "Expected a number for each parameter that has weights, and no other")
        for name, count in self.redrawn.items():
            if name in weights and count > weights[name] * self.step:
                text = f"Expected at most {weights[name] * self.step}, by {self.step} steps of {weights[name]} weights"
                yield FieldViolation(f"redrawn.{name}", f"{text}; got {count}")

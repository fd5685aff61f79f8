"""What a learner asks of the state that its engine changes: to be saved, restored and adjusted."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from cbp.errors import Diverged
from cbp.saved.learner import SavedLearner
from cbp.spec.learner_spec import LearnerSpec


class CheckedState(Protocol):
    """What may have become infinite or not a number."""

    def checked_numbers(self) -> list[tuple[Diverged, Tensor]]:
        """Where a step whose predictions are finite may yet have left something that is not."""


class LearnerState(CheckedState, Protocol):
    """One learner's, whatever its network; lists have one entry, that of this learner."""

    steps: list[int]
    """Steps taken."""

    @property
    def replacements(self) -> Sequence[Sequence[int]]:
        """Per hidden layer, units replaced so far."""

    def changing_tensors(self) -> dict[str, Tensor]:
        """All that steps change, by name; the tensors themselves where they can be had."""

    def first_tensors(self) -> dict[str, Tensor]:
        """The first draw of the parameters, which nothing changes."""

    def to_plain(self) -> dict[str, Any]:
        """What is to be saved beside the tensors, as JSON."""

    @property
    def saved_as(self) -> type[SavedLearner]:
        """What `to_plain` is a part of."""

    def load(self, tensors: Mapping[str, Tensor], saved: SavedLearner) -> None:
        """Goes on from what was saved: a record of `saved_as`, which has been checked. Every tensor is checked before
        it is taken. Raises `SnapshotError`; the state is of no more use then."""

    def adopt(self, spec: LearnerSpec) -> None:
        """Goes on with another specification, of which only settings differ; the engine is configured afterwards."""

"""The learners that there are, by id; each change of one wakes whoever watches."""

from bisect import bisect_left, insort
from collections.abc import Iterable

from cbp_server.errors import EtagMismatch, LearnerNotDeleted, LearnerNotFound
from cbp_server.learners.hosted import Hosted
from cbp_server.loop.broadcast import Broadcast


class Registry:
    """Every learner that is not purged."""

    def __init__(self) -> None:
        self._present: dict[str, Hosted] = {}  # by id
        self._deleted: dict[str, Hosted] = {}  # by uid
        self._ordered: list[Hosted] = []  # both
        self.changed = Broadcast()

    def present(self) -> list[Hosted]:
        """The learners that are not deleted, in no order."""
        return list(self._present.values())

    def deleted(self) -> list[Hosted]:
        """The deleted ones, in no order."""
        return list(self._deleted.values())

    def ordered(self) -> list[Hosted]:
        """All of them, by id and then uid."""
        return list(self._ordered)

    def __len__(self) -> int:
        return len(self._present)

    def __contains__(self, learner_id: str) -> bool:
        return learner_id in self._present

    def add(self, learners: Iterable[Hosted]) -> None:
        for hosted in learners:
            if hosted.stored.delete_time is None:
                self._present[hosted.learner_id] = hosted
            else:
                self._deleted[hosted.uid] = hosted
            insort(self._ordered, hosted, key=_place)
            self.touch(hosted)

    def get(self, learner_id: str) -> Hosted:
        """Raises `LearnerNotFound`."""
        try:
            return self._present[learner_id]
        except KeyError:
            raise LearnerNotFound(learner_id) from None

    def has(self, hosted: Hosted) -> bool:
        """Whether this very learner is present."""
        return self._present.get(hosted.learner_id) is hosted

    def check_present(self, hosted: Hosted, expected_etag: str) -> None:
        """Raises `LearnerNotFound` if it was deleted since it was looked up, `EtagMismatch` if its spec has changed."""
        if not self.has(hosted):
            raise LearnerNotFound(hosted.learner_id)
        if expected_etag and expected_etag != hosted.record.etag:
            raise EtagMismatch(hosted.learner_id, hosted.record.etag)

    def get_deleted(self, learner_id: str, uid: str) -> list[Hosted]:
        """Deleted learners of this id, the one deleted last first; only the one with this uid if one is given.

        Raises:
            LearnerNotFound: there is none.
        """
        found = [
            hosted for hosted in self._deleted.values() if hosted.learner_id == learner_id and uid in ("", hosted.uid)
        ]
        if found:
            return sorted(
                found, key=lambda hosted: hosted.record.delete_time or hosted.record.create_time, reverse=True
            )
        if learner_id in self._present:
            raise LearnerNotDeleted(learner_id)
        raise LearnerNotFound(learner_id)

    def remove(self, hosted: Hosted) -> None:
        """Takes the learner out, wherever it is."""
        if self.has(hosted):
            del self._present[hosted.learner_id]
        self._deleted.pop(hosted.uid, None)
        position = bisect_left(self._ordered, _place(hosted), key=_place)
        if self._ordered[position : position + 1] == [hosted]:
            del self._ordered[position]
        self.changed.announce()

    def touch(self, hosted: Hosted) -> None:
        """The learner's record has changed."""
        hosted.unshown = ""
        hosted.record.journal_position = hosted.log.position
        hosted.record.version += 1
        self.changed.announce()


def _place(hosted: Hosted) -> tuple[str, str]:
    return hosted.learner_id, hosted.uid

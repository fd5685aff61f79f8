"""Memory for checkpoints on their way to disk, used again and again: fresh memory costs more than the copy itself."""

import threading
from collections import OrderedDict

from cbp import LearnerSnapshot, LearnerSpec

#: Memory that may lie idle between two checkpoints.
_MOST_BYTES = 512 * 2**20


class SpareSnapshots:
    """Snapshots that have been written, for learners of the same architecture to write over. Safe between threads."""

    def __init__(self, most_bytes: int = _MOST_BYTES) -> None:
        self._most_bytes = most_bytes
        self._bytes = 0
        self._spares: OrderedDict[str, LearnerSnapshot] = OrderedDict()  # the one used longest ago first
        self._lock = threading.Lock()

    def take(self, spec: LearnerSpec) -> LearnerSnapshot | None:
        """One for a learner of this spec, if there is one."""
        with self._lock:
            spare = self._spares.pop(_architecture(spec), None)
            if spare is not None:
                self._bytes -= _size(spare)
            return spare

    def give(self, spec: LearnerSpec, snapshot: LearnerSnapshot) -> None:
        """Nobody reads the snapshot any more."""
        with self._lock:
            replaced = self._spares.pop(_architecture(spec), None)
            self._spares[_architecture(spec)] = snapshot
            self._bytes += _size(snapshot) - (_size(replaced) if replaced is not None else 0)
            while self._bytes > self._most_bytes:
                _, dropped = self._spares.popitem(last=False)
                self._bytes -= _size(dropped)


def _architecture(spec: LearnerSpec) -> str:
    return f"{spec.network!r} {spec.optimizer.kind} {spec.loss.kind}"


def _size(snapshot: LearnerSnapshot) -> int:
    return sum(tensor.nbytes for tensor in snapshot.tensors.values())

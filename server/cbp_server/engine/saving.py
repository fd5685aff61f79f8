"""Checkpoints and exports: copied between two steps, written on a thread while learners go on."""

import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from cbp_server.engine import messages
from cbp_server.engine.checkpoint_content import Copy
from cbp_server.engine.outbox import Outbox
from cbp_server.engine.roster import Roster
from cbp_server.engine.spares import SpareSnapshots
from cbp_server.errors import CheckpointFailed
from cbp_server.store.checkpoints import CheckpointFiles


class Saving:
    """Answers when what was asked for is written."""

    def __init__(self, roster: Roster, outbox: Outbox, files: CheckpointFiles) -> None:
        self._roster = roster
        self._outbox = outbox
        self._files = files
        self._spares = SpareSnapshots()
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint-writer")

    def close(self) -> None:
        """Returns when all is written."""
        self._writer.shutdown(wait=True)

    def checkpoint(self, call: messages.Call, request: messages.Checkpoint) -> None:
        """Copies the learner's state; the copy is written while the learner goes on."""
        try:
            hosted = self._roster.get(request.learner)
            copy = Copy(hosted, self._spares.take(hosted.learner.spec))
        except Exception as error:
            self._outbox.refuse(call, error)
            return
        self._writer.submit(self._outbox.reply, call, partial(self._write, request, copy))

    def export(self, call: messages.Call, request: messages.Export) -> None:
        """The learner as a file, without where the service stood with it."""
        try:
            snapshot = self._roster.get(request.learner).learner.snapshot()
        except Exception as error:
            self._outbox.refuse(call, error)
            return
        self._writer.submit(self._outbox.reply, call, snapshot.to_bytes)

    def _write(self, request: messages.Checkpoint, copy: Copy) -> messages.CheckpointReport:
        started = time.perf_counter()
        data = copy.to_bytes(request.stored_as)
        self._spares.give(copy.report.spec, copy.snapshot)
        try:
            self._files.write(request.stored_as, request.number, data)
        except OSError as error:
            raise CheckpointFailed(f"the checkpoint could not be written: {error}") from error
        return messages.CheckpointReport(copy.report, len(data), time.time(), time.perf_counter() - started)

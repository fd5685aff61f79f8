"""Learners go on with the engine that they should have, from an entry of their journal on."""

import asyncio

import structlog

from cbp_server.engine import messages
from cbp_server.engine.protocol import Engine
from cbp_server.learners.checkpointing import Checkpointer
from cbp_server.learners.engine_choice import EngineChoice
from cbp_server.learners.hosted import Hosted
from cbp_server.learners.registry import Registry
from cbp_server.learners.residence import Residence
from cbp_server.store.journal import EntryKind
from cbp_server.streams.change_log import ChangeLog, NewEntry

log = structlog.get_logger("cbp_server.learners.host")


class EngineSwitch:
    """Told when an engine process is up and when a learner is in it."""

    def __init__(
        self,
        engine: Engine,
        choice: EngineChoice,
        registry: Registry,
        changes: ChangeLog,
        checkpointer: Checkpointer,
        residence: Residence,
    ) -> None:
        self._engine = engine
        self._choice = choice
        self._registry = registry
        self._changes = changes
        self._checkpointer = checkpointer
        self._residence = residence

    def engine_up(self, ready: messages.EngineReady) -> None:
        """Notes what this engine process can; if its code is being compiled, learners change over when it is there."""
        self._choice.device, self._choice.compiled = ready.device, ready.compiled
        if not ready.compiled:
            self._engine.submit(messages.Prepare()).add_done_callback(self._prepared)

    def _prepared(self, prepared: "asyncio.Future[messages.PrepareReport]") -> None:
        if prepared.cancelled() or prepared.exception() is not None or not prepared.result().compiled:
            return
        self._choice.compiled = True
        for hosted in self._registry.present():
            if hosted.recovery is None:
                self.choose(hosted)

    def choose(self, hosted: Hosted) -> None:
        """Has the learner go on with the engine that it should have; from which entry on, its journal says."""
        wanted = self._choice.of(hosted.record.spec)
        if wanted == hosted.record.engine or not hosted.in_engine or hosted.stored.quarantine is not None:
            return

        def switched(applied: "asyncio.Future[None]") -> None:
            if not applied.cancelled() and applied.exception() is None:
                hosted.record.engine = wanted
                self._registry.touch(hosted)
                log.info("learner goes on with another engine", learner=hosted.learner_id, engine=wanted)

        applied = self._changes.record(
            hosted.log,
            NewEntry(kind=EntryKind.ENGINE, payload=wanted.encode()),
            lambda position: messages.SwitchEngine(hosted.uid, position, wanted),
        )
        applied.add_done_callback(switched)
        self._residence.watch(hosted, applied)
        self._checkpointer.note_change(hosted)

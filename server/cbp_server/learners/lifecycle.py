"""How learners come and go: made, copied, imported, exported, deleted and brought back, removed."""

import asyncio
import os
import re
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import structlog

from cbp import CbpError, FieldViolation, FormatError, LearnerSpec, SnapshotError
from cbp.errors import shown
from cbp_server.engine import messages
from cbp_server.engine.protocol import Engine
from cbp_server.errors import (
    CheckpointFailed,
    EngineUnavailable,
    ExportFailed,
    InvalidRequest,
    JournalUnavailable,
    LearnerExists,
    LearnerNotFound,
    LimitReached,
    RequestIdReused,
)
from cbp_server.learners.checkpointing import Checkpointer
from cbp_server.learners.engine_choice import EngineChoice
from cbp_server.learners.hosted import Hosted, digest, hosted_from_catalog, stored_checkpoint
from cbp_server.learners.registry import Registry
from cbp_server.learners.residence import Residence
from cbp_server.records.learners import Durability, LearnerRecord, LearnerState
from cbp_server.store.catalog import StoredCheckpoint, StoredLearner
from cbp_server.store.storage import Storage

_LEARNER_ID = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")

log = structlog.get_logger("cbp_server.learners.lifecycle")


class Lifecycle:
    """Operations of which each is carried through whole or not at all.

    Args:
        max_learners: learners that may exist, besides deleted ones.
        deleted_seconds: how long a deleted learner can be undeleted.
        history_samples: plasticity samples kept in memory of each learner.
    """

    def __init__(
        self,
        engine: Engine,
        storage: Storage,
        registry: Registry,
        checkpointer: Checkpointer,
        residence: Residence,
        engines: EngineChoice,
        *,
        max_learners: int,
        deleted_seconds: float,
        history_samples: int,
    ) -> None:
        self._engine = engine
        self._storage = storage
        self._registry = registry
        self._checkpointer = checkpointer
        self._residence = residence
        self._engines = engines
        self._max_learners = max_learners
        self._deleted_seconds = deleted_seconds
        self._history_samples = history_samples
        self._creation = asyncio.Lock()
        self._in_doubt: set[str] = set()  # uids of learners that were not made, but for all we know are in the catalog

    # -- making --

    async def create(
        self, learner_id: str, spec: LearnerSpec, durability: Durability, request_id: str
    ) -> LearnerRecord:
        """A new learner; or, repeated with the same request_id, the one that was made the first time."""
        request_digest = digest({"learner_id": learner_id, "spec": spec.to_plain(), "durability": durability.value})
        async with self._creating():
            stored = self._new(learner_id, spec, durability, request_id, request_digest, born=True)
            if (earlier := self._made_by(stored)) is not None:
                return earlier.record
            if not self._engine.status.up:
                raise EngineUnavailable
            await self._add(stored)
            hosted = hosted_from_catalog(stored, None, LearnerState.UNAVAILABLE, self._history_samples)
            self._registry.add([hosted])
            await asyncio.wait([self._residence.begin_recovery(hosted)])
            if hosted.unreadable:  # the engine cannot make it
                await self._storage.run(self._storage.catalog.purge, stored.uid)
                self._registry.remove(hosted)
            self._residence.check_predicts(hosted)
        log.info("learner created", learner=learner_id, resets=spec.resets.layers, durability=durability.value)
        return hosted.record

    async def fork(
        self, source: Hosted, learner_id: str, durability: Durability | None, request_id: str
    ) -> LearnerRecord:
        """A copy of a live learner under a new name."""
        durability = durability or source.stored.durability
        request_digest = digest({"learner_id": learner_id, "fork": source.uid, "durability": durability.value})
        async with self._creating():
            stored = self._new(learner_id, source.record.spec, durability, request_id, request_digest, born=False)
            if (earlier := self._made_by(stored)) is not None:
                return earlier.record
            await self._residence.use(source)
            hosted = await self._take_up(stored, messages.Copy(source.uid, stored.uid))
        log.info("learner forked", learner=learner_id, source=source.learner_id)
        return hosted.record

    async def import_(
        self,
        learner_id: str,
        data: bytes,
        durability: Durability,
        request_id: str,
        check_spec: Callable[[LearnerSpec], None],
    ) -> LearnerRecord:
        """A learner from a snapshot's bytes, which anybody may have written: the engine checks all that they say.
        `check_spec` raises if the server does not host such learners."""
        try:
            metadata, spec = await asyncio.to_thread(_looked_at, data, check_spec)
        except SnapshotError as error:
            raise _no_learner(error) from error
        content = {"learner_id": learner_id, "import": len(data), "durability": durability.value}
        request_digest = digest(content | {"metadata": metadata})
        async with self._creating():
            stored = self._new(learner_id, spec, durability, request_id, request_digest, born=False)
            if (earlier := self._made_by(stored)) is not None:
                return earlier.record
            try:
                hosted = await self._take_up(stored, messages.Import(stored.uid, data, stored.engine))
            except SnapshotError as error:
                raise _no_learner(error) from error
        log.info("learner imported", learner=learner_id)
        return hosted.record

    @asynccontextmanager
    async def _creating(self) -> AsyncIterator[None]:
        """Names are given to one learner at a time, and what earlier failures may have left does not hold any."""
        async with self._creation:
            for uid in list(self._in_doubt):
                await self._storage.run(self._storage.catalog.purge, uid)
                self._in_doubt.discard(uid)
                with suppress(OSError):
                    await self._storage.run(self._storage.files.delete_all, uid)
            yield

    async def _add(self, stored: StoredLearner, checkpoint: StoredCheckpoint | None = None) -> None:
        try:
            await self._storage.run(self._storage.catalog.add, stored, checkpoint)
        except JournalUnavailable:
            self._in_doubt.add(stored.uid)  # the commit may have happened
            raise

    def _new(
        self,
        learner_id: str,
        spec: LearnerSpec,
        durability: Durability,
        request_id: str,
        request_digest: str,
        *,
        born: bool,
    ) -> StoredLearner:
        now = datetime.now(UTC)
        return StoredLearner(
            uid=uuid.uuid4().hex,
            learner_id=learner_id,
            spec=spec.to_plain(),
            engine=self._engines.of(spec),
            durability=durability,
            born=born,
            create_time=now,
            request_id=request_id,
            request_digest=request_digest,
        )

    def _made_by(self, stored: StoredLearner) -> Hosted | None:
        """The learner that an earlier attempt of the same request has made; None if a new one may be made."""
        _check_learner_id(stored.learner_id)
        _check_request_id(stored.request_id)
        if stored.request_id:
            for hosted in self._registry.present():
                if hosted.stored.request_id == stored.request_id:
                    if hosted.stored.request_digest != stored.request_digest:
                        raise RequestIdReused(stored.request_id)
                    return hosted
        self._check_room(stored.learner_id)
        return None

    def _check_room(self, learner_id: str) -> None:
        if learner_id in self._registry:
            raise LearnerExists(learner_id)
        if len(self._registry) >= self._max_learners:
            raise LimitReached(self._max_learners)

    async def _take_up(self, stored: StoredLearner, request: messages.Request[messages.LearnerReport]) -> Hosted:
        """Has the engine make a learner that is no newborn, and saves it: there is no other way to make it again."""
        uid = stored.uid
        try:
            await self._engine.call(request)
            written = await self._engine.call(messages.Checkpoint(uid, 1, uid))
            checkpoint = stored_checkpoint(uid, 1, written)
            await self._add(stored, checkpoint)
        except BaseException:
            self._residence.drop(uid)
            if uid not in self._in_doubt:
                with suppress(OSError):
                    await self._storage.run(self._storage.files.delete_all, uid)
            raise
        hosted = hosted_from_catalog(stored, checkpoint, LearnerState.ACTIVE, self._history_samples)
        hosted.in_engine, hosted.used = True, time.monotonic()
        self._registry.add([hosted])
        return hosted

    # -- out --

    async def export(self, hosted: Hosted, format_name: str) -> bytes:
        """The learner as a file: `safetensors` with its whole state, or `onnx` or `torch_export` with its network.

        Raises:
            FormatError: the format cannot hold the network, or the package that writes it is not installed.
        """
        await self._residence.use(hosted)
        data = await self._engine.call(messages.Export(hosted.uid))
        return data if format_name == "safetensors" else await _converted(data, format_name)

    # -- removing --

    async def delete(self, hosted: Hosted, expected_etag: str) -> LearnerRecord:
        """Sets the learner aside and frees its name."""
        async with hosted.changing:
            self._registry.check_present(hosted, expected_etag)
            if not hosted.log.journals_batches and hosted.in_engine:
                await self._checkpointer.try_save(hosted)
            now = datetime.now(UTC)
            purge_time = now + timedelta(seconds=self._deleted_seconds)
            async with hosted.saving:
                await self._storage.run(self._storage.catalog.delete, hosted.uid, now, purge_time)
                hosted.end_sessions(LearnerNotFound(hosted.learner_id))
                self._registry.remove(hosted)
                hosted.stored = replace(hosted.stored, delete_time=now, purge_time=purge_time)
                record = hosted.record
                record.delete_time, record.purge_time, record.state = now, purge_time, LearnerState.DELETED
                if hosted.in_engine:
                    hosted.in_engine = False
                    with suppress(EngineUnavailable):
                        await self._engine.call(messages.Drop(hosted.uid))
            self._registry.add([hosted])
        log.info("learner deleted", learner=hosted.learner_id)
        if not self._deleted_seconds:
            await self._purge(hosted)
        return record

    async def undelete(self, learner_id: str, uid: str) -> LearnerRecord:
        """Brings a deleted learner back as it was."""
        async with self._creating():
            hosted = self._registry.get_deleted(learner_id, uid)[0]
            self._check_room(learner_id)
            await self._storage.run(self._storage.catalog.undelete, hosted.uid)
            self._registry.remove(hosted)
            hosted.stored = replace(hosted.stored, delete_time=None, purge_time=None)
            hosted.record.delete_time = hosted.record.purge_time = None
            hosted.record.state = LearnerState.EVICTED
            self._registry.add([hosted])
        log.info("learner undeleted", learner=learner_id)
        await self._residence.use(hosted)
        return hosted.record

    async def purge(self, learner_id: str, uid: str) -> None:
        """Removes deleted learners for good."""
        for hosted in self._registry.get_deleted(learner_id, uid):
            await self._purge(hosted)

    async def purge_expired(self) -> None:
        """Removes the deleted learners whose time is over."""
        now = datetime.now(UTC)
        if self._creation.locked():
            return  # next time; whoever has it may take long
        for hosted in self._registry.deleted():
            if hosted.record.purge_time is not None and hosted.record.purge_time <= now:
                try:
                    await self._purge(hosted)
                except CheckpointFailed as error:  # tried again
                    log.warning("learner not purged", learner=hosted.learner_id, error=str(error))

    async def _purge(self, hosted: Hosted) -> None:
        async with self._creation:
            if hosted.stored.delete_time is None:
                return  # undeleted a moment ago
            self._registry.remove(hosted)  # nobody can bring it back any more
        run, uid = self._storage.run, hosted.uid
        try:
            await run(self._storage.files.delete_all, uid)  # first: its row is what finds them
            await run(self._storage.journal.forget, uid)  # bit by bit, not all in one transaction
            await run(self._storage.catalog.purge, uid)
        except (OSError, CbpError) as error:
            self._registry.add([hosted])
            raise CheckpointFailed(f"learner '{hosted.learner_id}' was not removed whole: {error}") from error
        log.info("learner purged", learner=hosted.learner_id, uid=hosted.uid)


async def _converted(snapshot: bytes, format_name: str) -> bytes:
    """In a process of its own: it takes seconds of computing, which neither streams nor steps shall wait for."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "cbp.export", format_name.replace("_", "-"),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        converted, complaint = await process.communicate(snapshot)
    except BaseException:
        with suppress(ProcessLookupError):
            process.kill()
        raise
    if process.returncode:
        text = complaint.decode(errors="replace").strip()
        reason = text.splitlines()[-1] if text else "no reason given"
        if process.returncode == os.EX_UNAVAILABLE:
            raise FormatError(reason)
        log.error("export failed", format=format_name, error=text)
        raise ExportFailed(f"the network could not be converted: {reason}")
    return converted


def _check_learner_id(learner_id: str) -> None:
    if not _LEARNER_ID.fullmatch(learner_id):
        description = (
            "must be 1 to 63 characters of a-z, 0-9 and hyphen, beginning with a letter and not ending with a hyphen, "
            f"not {shown(learner_id)}"
        )
        raise InvalidRequest(FieldViolation("learner_id", description))


def _check_request_id(request_id: str) -> None:
    if request_id:
        try:
            uuid.UUID(request_id)
        except ValueError:
            raise InvalidRequest(FieldViolation("request_id", f"must be a UUID, not {shown(request_id)}")) from None


def _looked_at(data: bytes, check_spec: Callable[[LearnerSpec], None]) -> tuple[dict[str, Any], LearnerSpec]:
    """The metadata and the specification in a snapshot. Raises `SnapshotError`, and what `check_spec` raises."""
    from cbp import LearnerSnapshot  # which loads torch, and the server is up sooner and smaller without

    snapshot = LearnerSnapshot.from_bytes(data)
    spec = snapshot.read_spec()
    check_spec(spec)
    return snapshot.metadata, spec


def _no_learner(error: SnapshotError) -> InvalidRequest:
    if not error.violations:
        return InvalidRequest(FieldViolation("data", f"is no learner that was exported: {error}"))
    return InvalidRequest(
        *(FieldViolation(f"data.{violation.field}", violation.description) for violation in error.violations)
    )

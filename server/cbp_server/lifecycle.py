"""What can be done to a learner as a whole: made, changed, copied, taken back, moved in and out, removed."""

import asyncio
import json
import re
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import structlog

from cbp import CbpError, FieldViolation, LearnerSnapshot, LearnerSpec, SnapshotError, SpecError
from cbp.errors import shown
from cbp_server.change_log import ChangeLog, NewEntry
from cbp_server.checkpointing import Checkpointer
from cbp_server.engine import messages
from cbp_server.engine.protocol import Engine
from cbp_server.errors import (
    BatchNotLearnt,
    CheckpointFailed,
    CheckpointNeeded,
    CheckpointNotFound,
    EngineUnavailable,
    EtagMismatch,
    ExportFailed,
    InvalidRequest,
    JournalUnavailable,
    LearnerExists,
    LearnerNotFound,
    LearnerNotQuarantined,
    LimitReached,
    PositionNotHeld,
    RequestIdReused,
)
from cbp_server.hosted import Hosted, Unsaved, digest, etag, hosted_from_catalog, stored_checkpoint
from cbp_server.records import Durability, LearnerRecord, LearnerState
from cbp_server.recovery import Recovery, Restoration, Resumption, with_learning_rate
from cbp_server.registry import Registry
from cbp_server.residence import Residence
from cbp_server.storage import Storage
from cbp_server.store.catalog import StoredCheckpoint, StoredLearner
from cbp_server.store.journal import EntryKind

_LEARNER_ID = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")

log = structlog.get_logger("cbp_server.lifecycle")


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
        changes: ChangeLog,
        registry: Registry,
        recovery: Recovery,
        checkpointer: Checkpointer,
        residence: Residence,
        *,
        max_learners: int,
        deleted_seconds: float,
        history_samples: int,
    ) -> None:
        self._engine = engine
        self._storage = storage
        self._changes = changes
        self._registry = registry
        self._recovery = recovery
        self._checkpointer = checkpointer
        self._residence = residence
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
            stored = _new(learner_id, spec, durability, request_id, request_digest, born=True)
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
            stored = _new(learner_id, source.record.spec, durability, request_id, request_digest, born=False)
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
        """A learner from a snapshot's bytes. `check_spec` raises if the server does not host such learners."""
        try:
            snapshot = await asyncio.to_thread(LearnerSnapshot.from_bytes, data)
            spec = LearnerSpec.parse(snapshot.metadata["spec"])
        except (SnapshotError, SpecError, KeyError, TypeError) as error:
            raise InvalidRequest(FieldViolation("data", f"is no learner that was exported: {error}")) from error
        check_spec(spec)
        content = {"learner_id": learner_id, "import": len(data), "durability": durability.value}
        request_digest = digest(content | {"metadata": snapshot.metadata})
        async with self._creating():
            stored = _new(learner_id, spec, durability, request_id, request_digest, born=False)
            if (earlier := self._made_by(stored)) is not None:
                return earlier.record
            try:
                hosted = await self._take_up(stored, messages.Import(stored.uid, data))
            except SnapshotError as error:
                raise InvalidRequest(FieldViolation("data", str(error))) from error
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
            self._forget(uid)
            if uid not in self._in_doubt:
                with suppress(OSError):
                    await self._storage.run(self._storage.files.delete_all, uid)
            raise
        hosted = hosted_from_catalog(stored, checkpoint, LearnerState.ACTIVE, self._history_samples)
        hosted.in_engine, hosted.used = True, time.monotonic()
        self._registry.add([hosted])
        return hosted

    def _forget(self, uid: str) -> None:
        dropped = self._engine.submit(messages.Drop(uid))
        dropped.add_done_callback(lambda done: done.cancelled() or done.exception())

    # -- changing --

    async def update(
        self, hosted: Hosted, revise: Callable[[LearnerSpec], LearnerSpec], durability: Durability | None, expected: str
    ) -> LearnerRecord:
        """Gives a live learner the spec that `revise` makes of its present one, behind every batch accepted so far."""
        async with hosted.changing:
            record = await self._ready_to_change(hosted, expected)
            spec = revise(record.spec)
            record.spec.check_update(spec)
            if durability is not None:
                _check_durability(hosted.stored.durability, durability)
            now = datetime.now(UTC)
            payload = json.dumps({"update_time": now.isoformat(), "spec": spec.to_plain()}).encode()
            applied = self._changes.record(
                hosted.log,
                NewEntry(kind=EntryKind.UPDATE, payload=payload),
                lambda position: messages.Update(hosted.uid, position, now.isoformat(), spec),
            )
            self._residence.watch(hosted, applied)
            await applied
            record.spec, record.update_time = spec, now
            record.etag = etag(hosted.uid, now, spec)
            self._checkpointer.note_change(hosted, journal_bytes=len(payload))
            if durability is not None:
                await self._storage.run(self._storage.catalog.set_durability, hosted.uid, durability)
                hosted.stored = replace(hosted.stored, durability=durability)
                hosted.log.durability = record.durability = durability
            self._registry.touch(hosted)
        log.info("learner updated", learner=hosted.learner_id)
        return record

    async def reset_units(self, hosted: Hosted, layers: Sequence[str], fraction: float) -> dict[str, int]:
        """Resets the least useful mature units; how many, by layer."""
        async with hosted.changing:
            record = await self._ready_to_change(hosted, "")
            indices = _layer_indices(record.spec, layers)
            if not 0.0 < fraction <= 1.0:
                raise InvalidRequest(FieldViolation("fraction", f"must be more than 0 and at most 1, not {fraction}"))
            payload = json.dumps({"layers": indices, "fraction": fraction}).encode()
            applied = self._changes.record(
                hosted.log,
                NewEntry(kind=EntryKind.RESET, payload=payload),
                lambda position: messages.ResetUnits(hosted.uid, position, indices, fraction),
            )
            self._residence.watch(hosted, applied)
            report = await applied
            record.progress = report.progress
            self._checkpointer.note_change(hosted, journal_bytes=len(payload))
            self._registry.touch(hosted)
        log.info("units reset", learner=hosted.learner_id, **report.replacements)
        return report.replacements

    async def resume(self, hosted: Hosted, lr: float | None, *, skip_batch: bool) -> LearnerRecord:
        """Lets a quarantined learner go on, at the batch that it was quarantined for."""
        async with hosted.changing:
            self._check_present(hosted, "")
            await self._residence.use(hosted)
            quarantine = hosted.stored.quarantine
            if quarantine is None:
                raise LearnerNotQuarantined(hosted.learner_id)
            if lr is not None:
                try:
                    with_learning_rate(hosted.record.spec, lr)
                except SpecError as error:
                    raise InvalidRequest(FieldViolation("lr", error.violations[0].description)) from error
            bounds = await self._storage.run(self._storage.journal.bounds, hosted.uid)
            # Behind a resumption whose commit was not answered, too: the same one twice is the same as once.
            position = max(hosted.log.position, bounds[1] if bounds is not None else 0) + 1
            if skip_batch and not quarantine.position:
                description = (
                    "cannot be done for a learner without a journal: its client sends the batch, or leaves it out"
                )
                raise InvalidRequest(FieldViolation("skip_batch", description))
            now = datetime.now(UTC).isoformat()
            resumption = Resumption(quarantine.position or position, now, lr, skip_batch)
            entry = NewEntry(kind=EntryKind.RESUME, payload=resumption.to_payload()).at(hosted.uid, position)
            await self._storage.run(self._storage.catalog.resume, entry)
            hosted.log.position = position
            hosted.set_quarantine(None)
            task = self._residence.begin_recovery(hosted)
            await asyncio.wait([task])
            self._residence.check_predicts(hosted)
        log.info("learner resumed", learner=hosted.learner_id, lr=lr, skip_batch=skip_batch)
        return hosted.record

    async def _ready_to_change(self, hosted: Hosted, expected_etag: str) -> LearnerRecord:
        self._check_present(hosted, expected_etag)
        await self._residence.use(hosted)
        self._residence.check_trains(hosted)
        self._check_present(hosted, expected_etag)  # once more: it may have taken a while
        return hosted.record

    def _check_present(self, hosted: Hosted, expected_etag: str) -> None:
        if not self._registry.has(hosted):
            raise LearnerNotFound(hosted.learner_id)  # deleted while this call waited its turn
        if expected_etag and expected_etag != hosted.record.etag:
            raise EtagMismatch(hosted.learner_id, hosted.record.etag)

    # -- checkpoints --

    async def create_checkpoint(self, hosted: Hosted) -> StoredCheckpoint:
        """Saves the learner as it is now, until `delete_checkpoint`."""
        await self._residence.use(hosted)
        checkpoint = await self._checkpointer.save(hosted, pinned=True)
        assert checkpoint is not None
        log.info("checkpoint created", learner=hosted.learner_id, number=checkpoint.number)
        return checkpoint

    async def checkpoints(self, hosted: Hosted) -> tuple[list[StoredCheckpoint], int, int]:
        """Newest first; and the first and last position that the learner can be restored to besides."""
        rows = await self._storage.run(self._storage.catalog.checkpoints, hosted.uid)
        first, last = await self._restorable(hosted, rows)
        return rows, first, last

    async def delete_checkpoint(self, hosted: Hosted, number: int) -> None:
        """Removes a pinned checkpoint."""
        async with hosted.saving:
            rows = await self._storage.run(self._storage.catalog.checkpoints, hosted.uid)
            row = _numbered(hosted, rows, number)
            if not row.pinned or (row is rows[0] and not hosted.log.journals_batches):
                raise CheckpointNeeded(hosted.learner_id, number)
            await self._storage.run(self._storage.catalog.remove_checkpoint, hosted.uid, number)
            with suppress(OSError):
                await self._storage.run(self._storage.files.delete, hosted.uid, number)
        log.info("checkpoint deleted", learner=hosted.learner_id, number=number)

    async def _restorable(self, hosted: Hosted, rows: Sequence[StoredCheckpoint]) -> tuple[int, int]:
        bounds = await self._storage.run(self._storage.journal.bounds, hosted.uid)
        quarantine = hosted.stored.quarantine
        last = quarantine.position - 1 if quarantine is not None and quarantine.position else hosted.log.position
        behind = bounds[0] - 1 if bounds is not None else hosted.log.position  # the journal holds what is behind it
        if hosted.stored.born and not behind and hosted.log.journals_batches:
            return 0, last
        return min((row.position for row in rows if row.position >= behind), default=last), last

    async def restore(
        self, hosted: Hosted, *, number: int | None, position: int | None, expected_etag: str
    ) -> LearnerRecord:
        """Takes the learner back to a checkpoint or a journal position; its producers stay where they are."""
        async with hosted.changing:
            self._check_present(hosted, expected_etag)
            await self._residence.use(hosted)
            await self._check_held(hosted, number, position)
            await self._residence.occupy(hosted, self._restore(hosted, number, position))
        log.info("learner restored", learner=hosted.learner_id, checkpoint=number, position=position)
        return hosted.record

    async def _check_held(self, hosted: Hosted, number: int | None, position: int | None) -> None:
        rows = await self._storage.run(self._storage.catalog.checkpoints, hosted.uid)
        if number is not None:
            _numbered(hosted, rows, number)
        if position is not None:
            if not hosted.log.journals_batches:
                description = "is not possible: the learner's batches are not journaled; name a checkpoint"
                raise InvalidRequest(FieldViolation("journal_position", description))
            first, last = await self._restorable(hosted, rows)
            if not first <= position <= last:
                raise PositionNotHeld(hosted.learner_id, first, last)

    async def _restore(self, hosted: Hosted, source: int | None, position: int | None) -> None:
        uid, scratch = hosted.uid, f"{hosted.uid}-restored"
        async with hosted.saving:
            await self._check_held(hosted, source, position)  # once more: it was not, until here, kept from removal
            await self._storage.commit.mend(uid)  # behind everything that was on its way into the journal
            now = await self._engine.call(messages.Describe(uid))
            positions, last = await self._storage.run(self._recovery.positions_behind, uid, now)
            end, number = last + 1, await self._checkpointer.next_number(hosted)
            restoration = Restoration(number, datetime.now(UTC).isoformat(), source, position)
            try:
                report = await self._recovery.rebuild(hosted.stored, scratch, restoration, positions, end)
                written = await self._engine.call(messages.Checkpoint(scratch, number, uid))
                checkpoint = stored_checkpoint(uid, number, written)
                entry = NewEntry(kind=EntryKind.RESTORE, payload=restoration.to_payload()).at(uid, end)
                await self._storage.run(self._storage.catalog.restore, entry, checkpoint)
            except BatchNotLearnt as error:
                description = f"cannot be reached any more: {error}"
                raise InvalidRequest(FieldViolation("journal_position", description)) from error
            except BaseException:
                self._forget(scratch)
                raise
            # It counts from here on, also if the engine ends now.
            hosted.log.position = end
            hosted.unsaved = Unsaved()
            hosted.set_quarantine(None)
            self._checkpointer.note_saved(hosted, checkpoint)
            await self._engine.call(messages.Rename(scratch, uid))
            hosted.install(report)
            hosted.record.state = LearnerState.ACTIVE

    # -- out --

    async def export(self, hosted: Hosted, format_name: str) -> bytes:
        """The learner as a file: `safetensors` with its whole state, or `onnx` or `torch_export` with its network."""
        await self._residence.use(hosted)
        data = await self._engine.call(messages.Export(hosted.uid))
        return data if format_name == "safetensors" else await _converted(data, format_name)

    # -- removing --

    async def delete(self, hosted: Hosted, expected_etag: str) -> LearnerRecord:
        """Sets the learner aside and frees its name."""
        async with hosted.changing:
            self._check_present(hosted, expected_etag)
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


def _new(
    learner_id: str, spec: LearnerSpec, durability: Durability, request_id: str, request_digest: str, *, born: bool
) -> StoredLearner:
    now = datetime.now(UTC)
    return StoredLearner(
        uid=uuid.uuid4().hex,
        learner_id=learner_id,
        spec=spec.to_plain(),
        durability=durability,
        born=born,
        create_time=now,
        request_id=request_id,
        request_digest=request_digest,
    )


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
        log.error("export failed", format=format_name, error=text)
        raise ExportFailed(
            f"the network could not be converted: {text.splitlines()[-1] if text else 'no reason given'}"
        )
    return converted


def _numbered(hosted: Hosted, rows: Sequence[StoredCheckpoint], number: int) -> StoredCheckpoint:
    row = next((row for row in rows if row.number == number), None)
    if row is None:
        raise CheckpointNotFound(hosted.learner_id, number)
    return row


def _layer_indices(spec: LearnerSpec, layers: Sequence[str]) -> tuple[int, ...]:
    """The hidden layers that are named as in `resets.layers`."""
    named: str | list[str] = layers[0] if len(layers) == 1 and layers[0] in ("all", "first", "none") else list(layers)
    try:
        chosen = LearnerSpec.parse({**spec.to_plain(), "resets": {"layers": named, "replacement_rate": 1.0}})
    except SpecError as error:
        raise InvalidRequest(FieldViolation("layers", error.violations[0].description)) from error
    indices = tuple(index for index, rate in enumerate(chosen.replacement_rates) if rate)
    if not indices:
        raise InvalidRequest(FieldViolation("layers", "names no layer; write 'all', 'first', or layers"))
    return indices


def _check_durability(present: Durability, wanted: Durability) -> None:
    if present is not wanted and Durability.NONE in (present, wanted):
        description = (
            f"cannot be changed from '{present.value}' to '{wanted.value}'; fork the learner with the other one"
        )
        raise InvalidRequest(FieldViolation("durability", description))


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

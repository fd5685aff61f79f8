"""What changes a learner that is there: updates, resets by hand, resumption, checkpoints by request, restores."""

import asyncio
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime

import structlog

from cbp import FieldViolation, LearnerSpec, SpecError
from cbp.architectures.profile import check_buildable, replacement_rates
from cbp_server.engine import messages
from cbp_server.engine.protocol import Engine
from cbp_server.errors import (
    BatchNotLearnt,
    CheckpointNeeded,
    CheckpointNotFound,
    InvalidRequest,
    LearnerNotQuarantined,
    PositionNotHeld,
)
from cbp_server.learners.checkpointing import Checkpointer
from cbp_server.learners.hosted import Hosted, Unsaved, etag, stored_checkpoint
from cbp_server.learners.recovery import Recovery, Restoration, Resumption, with_learning_rate
from cbp_server.learners.registry import Registry
from cbp_server.learners.residence import Residence
from cbp_server.records.learners import Durability, LearnerRecord, LearnerState
from cbp_server.store.catalog import StoredCheckpoint
from cbp_server.store.journal import EntryKind
from cbp_server.store.storage import Storage
from cbp_server.streams.change_log import ChangeLog, NewEntry

log = structlog.get_logger("cbp_server.learners.alterations")


class Alterations:
    """Operations of which each is carried through whole or not at all."""

    def __init__(
        self,
        engine: Engine,
        storage: Storage,
        changes: ChangeLog,
        registry: Registry,
        recovery: Recovery,
        checkpointer: Checkpointer,
        residence: Residence,
    ) -> None:
        self._engine = engine
        self._storage = storage
        self._changes = changes
        self._registry = registry
        self._recovery = recovery
        self._checkpointer = checkpointer
        self._residence = residence

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
            self._registry.check_present(hosted, "")
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
        self._registry.check_present(hosted, expected_etag)
        await self._residence.use(hosted)
        self._residence.check_trains(hosted)
        self._registry.check_present(hosted, expected_etag)  # once more: it may have taken a while
        return hosted.record

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
            self._registry.check_present(hosted, expected_etag)
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
            behind = await self._storage.run(self._recovery.behind, uid, now)
            end, number = behind.journal_position + 1, await self._checkpointer.next_number(hosted)
            restoration = Restoration(number, datetime.now(UTC).isoformat(), source, position)
            try:
                report = await self._recovery.rebuild(hosted.stored, scratch, restoration, behind, end)
                written = await self._engine.call(messages.Checkpoint(scratch, number, uid))
                checkpoint = stored_checkpoint(uid, number, written)
                entry = NewEntry(kind=EntryKind.RESTORE, payload=restoration.to_payload()).at(uid, end)
                await self._storage.run(self._storage.catalog.restore, entry, checkpoint)
            except BatchNotLearnt as error:
                description = f"cannot be reached any more: {error}"
                raise InvalidRequest(FieldViolation("journal_position", description)) from error
            except BaseException:
                self._residence.drop(scratch)
                raise
            # It counts from here on, also if the engine ends now.
            hosted.log.position = end
            hosted.unsaved = Unsaved()
            hosted.set_quarantine(None)
            self._checkpointer.note_saved(hosted, checkpoint)
            await self._engine.call(messages.Rename(scratch, uid))
            hosted.install(report)
            hosted.record.state = LearnerState.ACTIVE


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
        check_buildable(chosen)
    except SpecError as error:
        raise InvalidRequest(FieldViolation("layers", error.violations[0].description)) from error
    indices = tuple(index for index, rate in enumerate(replacement_rates(chosen)) if rate)
    if not indices:
        raise InvalidRequest(FieldViolation("layers", "names no layer; write 'all', 'first', or layers"))
    return indices


def _check_durability(present: Durability, wanted: Durability) -> None:
    if present is not wanted and Durability.NONE in (present, wanted):
        description = (
            f"cannot be changed from '{present.value}' to '{wanted.value}'; fork the learner with the other one"
        )
        raise InvalidRequest(FieldViolation("durability", description))

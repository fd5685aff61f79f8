"""Brings a learner back to where its journal ends: newest readable checkpoint, and what comes behind it."""

import asyncio
import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol, cast

import structlog

from cbp import Batch, CbpError, EngineName, LearnerSpec, SnapshotError
from cbp_server.engine import messages
from cbp_server.engine.protocol import Engine
from cbp_server.errors import BatchNotLearnt, EngineUnavailable, JournalDamaged, NotInEngine, ServerDraining
from cbp_server.records.learners import Quarantine
from cbp_server.records.samples import PackedSample
from cbp_server.store.catalog import StoredLearner
from cbp_server.store.journal import Entry, EntryKind
from cbp_server.store.storage import Storage

#: Entries read and decoded at a time, few because the engine has nothing to do before it has the first ones; and how
#: many such parts are under way to the engine meanwhile.
_DECODED_AT_ONCE = 64
_BYTES_AT_ONCE = 4 * 2**20
_PARTS_UNDER_WAY = 4
_BYTES_UNDER_WAY = 64 * 2**20
#: Deaths of the engine process while it applied one and the same entry, and nothing else, that convict the entry.
_DEATHS_THAT_CONVICT = 3
_PROGRESS_SECONDS = 5.0

log = structlog.get_logger("cbp_server.learners.recovery")


class ReplayObserver(Protocol):
    """Counts what is learnt again, for the metrics."""

    def entries_replayed(self, count: int) -> None: ...


@dataclass(frozen=True)
class Recovered:
    """A learner in the engine, as its journal says."""

    report: messages.LearnerReport
    samples: tuple[PackedSample, ...] | None  # None: the learner was in the engine all along
    quarantine: Quarantine | None
    journal_position: int  # of the journal's last entry
    damaged: tuple[int, ...] = ()  # checkpoints that turned out to be unreadable


@dataclass(frozen=True)
class Loaded:
    """A learner in the engine as a checkpoint holds it, or newborn."""

    report: messages.LearnerReport
    samples: tuple[PackedSample, ...]
    damaged: tuple[int, ...]


@dataclass
class Behind:
    """Where a learner's producers stand behind an entry of its journal, and which one that is: some that the log counts
    may have failed to be written."""

    positions: dict[str, messages.Position]
    epoch_floor: int
    journal_position: int

    def follow(self, entry: Entry) -> None:
        """Moves behind this entry."""
        self.journal_position = entry.position
        producer, epoch = entry.producer or "", entry.epoch or 0
        before = self.positions.get(producer) or messages.Position(life=self.epoch_floor)
        match entry.kind:
            case EntryKind.OPEN:
                self.positions[producer] = before.opened(epoch, entry.payload.decode())
            case EntryKind.BATCH:
                self.positions[producer] = before.advance(epoch, entry.sequence or 0, entry.payload_hash)
            case EntryKind.FORGET:
                forgotten = self.positions.pop(entry.payload.decode(), None)
                if forgotten is not None:
                    self.epoch_floor = max(self.epoch_floor, forgotten.epoch)


@dataclass(frozen=True)
class Restoration:
    """What a RESTORE entry says: which checkpoint holds the restored state, and what that was made of."""

    checkpoint: int
    update_time: str
    source: int | None = None  # another checkpoint
    position: int | None = None  # or a position of the journal

    def to_payload(self) -> bytes:
        return json.dumps(vars(self)).encode()

    @classmethod
    def from_payload(cls, payload: bytes) -> "Restoration":
        return cls(**json.loads(payload))


@dataclass(frozen=True)
class Resumption:
    """What a RESUME entry says of the batch that the learner had been quarantined for."""

    at: int  # the batch's position; that of the entry itself if the batch is not in the journal
    update_time: str
    lr: float | None = None
    skip: bool = False

    def to_payload(self) -> bytes:
        return json.dumps(vars(self)).encode()

    @classmethod
    def from_payload(cls, payload: bytes) -> "Resumption":
        return cls(**json.loads(payload))


class Recovery:
    """Loads and replays.

    Args:
        decode_batch: the batch in an entry's payload.
    """

    def __init__(
        self,
        engine: Engine,
        storage: Storage,
        decode_batch: Callable[[bytes, LearnerSpec], Batch],
        observer: ReplayObserver,
    ) -> None:
        self._engine = engine
        self._storage = storage
        self._decode_batch = decode_batch
        self._observer = observer
        self._deaths: dict[tuple[str, int], int] = {}  # by learner and position
        self.replaying: set[str] = set()  # uids of the learners whose journals are being replayed now

    async def recover(
        self,
        stored: StoredLearner,
        *,
        in_engine: bool,
        carefully: bool,
        on_quarantine: Callable[[Quarantine], None],
    ) -> Recovered:
        """The learner with everything that its journal holds; quarantined before a batch that it cannot learn.

        Args:
            in_engine: the engine holds the learner, and it is whole; only what comes behind is applied.
            carefully: one entry at a time, so that it is known which one the engine process dies of.
            on_quarantine: told of a new quarantine when the catalog has it.

        Raises:
            SnapshotError: no checkpoint is readable.
            JournalDamaged: an entry is missing or damaged.
            JournalUnavailable: the database cannot be reached.
        """
        uid, quarantine = stored.uid, stored.quarantine
        while True:
            last = quarantine.position - 1 if quarantine is not None and quarantine.position else None
            loaded = None
            if not in_engine:
                loaded = await self.load(stored, uid, last)
            report = loaded.report if loaded is not None else await self._engine.call(messages.Describe(uid))
            try:
                report = await self.replay(stored, uid, report, last, carefully=carefully)
                await self._check_whole(uid, report, last)
                break
            except NotInEngine:  # lost with others that it shared an engine call with; it goes on alone
                in_engine = False
            except BatchNotLearnt as failure:
                in_engine = False
                quarantine = failure.quarantine(failure.position)
                await self._storage.run(self._storage.catalog.quarantine, uid, quarantine)
                on_quarantine(quarantine)
        bounds = await self._storage.run(self._storage.journal.bounds, uid)
        end = max(report.journal_position, bounds[1] if bounds is not None else 0)
        if loaded is None:
            return Recovered(report, None, quarantine, end)
        return Recovered(report, loaded.samples, quarantine, end, loaded.damaged)

    async def _check_whole(self, uid: str, report: messages.LearnerReport, last: int | None) -> None:
        """Raises `JournalDamaged` if a checkpoint, readable or not, holds more than what has been brought back."""
        checkpoints = await self._storage.run(self._storage.catalog.checkpoints, uid)
        known = max((row.position for row in checkpoints if last is None or row.position <= last), default=0)
        if report.journal_position < known:
            raise JournalDamaged(uid, report.journal_position + 1)

    async def load(self, stored: StoredLearner, uid: str, last: int | None) -> Loaded:
        """Loads the newest readable checkpoint that goes no further than position `last`, as learner `uid`.

        Raises:
            SnapshotError: there is none.
        """
        storage = self._storage
        failures: dict[int, str] = {}
        checkpoints = await storage.run(storage.catalog.checkpoints, stored.uid)
        for checkpoint in checkpoints:
            if last is not None and checkpoint.position > last:
                continue
            try:
                loaded = await self._engine.call(messages.Load(uid, checkpoint.number, stored.uid))
                return Loaded(loaded.learner, loaded.samples, tuple(failures))
            except SnapshotError as error:
                log.warning("checkpoint unreadable", learner=stored.learner_id, error=str(error))
                failures[checkpoint.number] = str(error)
        bounds = await storage.run(storage.journal.bounds, stored.uid)
        reaches_back = bounds[0] == 1 if bounds is not None else not checkpoints
        if not (stored.born and reaches_back):
            reasons = "; ".join(failures.values()) or "there is none that reaches back so far"
            raise SnapshotError(f"no checkpoint of learner '{stored.learner_id}' is readable: {reasons}")
        report = await self._engine.call(messages.Create(uid, LearnerSpec.parse(stored.spec), stored.engine))
        return Loaded(report, (), tuple(failures))

    async def replay(
        self,
        stored: StoredLearner,
        uid: str,
        report: messages.LearnerReport,
        last: int | None,
        *,
        carefully: bool = False,
    ) -> messages.LearnerReport:
        """Applies what the journal of `stored` has behind `report`, up to position `last`, to learner `uid`.

        Raises:
            BatchNotLearnt: at a batch that the learner cannot learn; it is no longer in the engine then.
            JournalDamaged: an entry is missing or damaged.
        """
        self.replaying.add(stored.uid)
        try:
            return await self._replay(stored, uid, report, last, carefully=carefully)
        finally:
            self.replaying.discard(stored.uid)

    async def _replay(
        self, stored: StoredLearner, uid: str, report: messages.LearnerReport, last: int | None, *, carefully: bool
    ) -> messages.LearnerReport:
        storage, started, told = self._storage, time.monotonic(), time.monotonic()
        if restores := await storage.run(storage.journal.restores, stored.uid, report.journal_position, last):
            report = await self._restored(stored, uid, report, restores[-1])  # whatever lies before it
        replaying = _Replaying(self, stored, uid, report, carefully=carefully)
        resumes = await storage.run(storage.journal.resumes, stored.uid, report.journal_position)
        replaying.resumptions = [Resumption.from_payload(entry.payload) for entry in resumes]
        entries = storage.journal.read(stored.uid, report.journal_position, last)
        while chunk := await storage.run(self._decoded, entries, report.spec):
            await replaying.apply(chunk)
            if time.monotonic() - told > _PROGRESS_SECONDS:
                told = time.monotonic()
                log.info("replaying the journal", learner=stored.learner_id, entries=replaying.applied)
        await replaying.finish()
        if not replaying.applied:
            return report
        self._observer.entries_replayed(replaying.applied)
        seconds = round(time.monotonic() - started, 3)
        log.info("journal replayed", learner=stored.learner_id, entries=replaying.applied, seconds=seconds)
        return await self._engine.call(messages.Describe(uid))

    async def _restored(
        self, stored: StoredLearner, uid: str, report: messages.LearnerReport, entry: Entry
    ) -> messages.LearnerReport:
        """The learner behind a RESTORE entry: from the checkpoint that was written for it, or made once more."""
        restoration = Restoration.from_payload(entry.payload)
        try:
            return (await self._engine.call(messages.Load(uid, restoration.checkpoint, stored.uid))).learner
        except SnapshotError as error:
            log.warning("checkpoint unreadable", learner=stored.learner_id, error=str(error))
        scratch = f"{uid}-restored"
        behind = await self._storage.run(self.behind, stored.uid, report, entry.position - 1)
        try:
            restored = await self.rebuild(stored, scratch, restoration, behind, entry.position)
        except BatchNotLearnt as error:
            raise SnapshotError(f"the state that was restored cannot be made again: {error}") from error
        await self._engine.call(messages.Rename(scratch, uid))
        return restored

    async def rebuild(
        self,
        stored: StoredLearner,
        scratch: str,
        restoration: Restoration,
        behind: "Behind",
        journal_position: int,
    ) -> messages.LearnerReport:
        """Makes the earlier state that is to be restored, as learner `scratch`, placed behind the journal.

        Raises:
            BatchNotLearnt: on the way there; it was left out or given up when it was first met.
            SnapshotError: a checkpoint that it takes is not readable.
            JournalDamaged: the journal does not hold what it takes.
        """
        if restoration.source is not None:
            await self._engine.call(messages.Load(scratch, restoration.source, stored.uid))
        else:
            loaded = await self.load(stored, scratch, restoration.position)
            reached = await self.replay(stored, scratch, loaded.report, restoration.position)
            if reached.journal_position != restoration.position:
                raise JournalDamaged(stored.uid, reached.journal_position + 1)
        placed = messages.Place(
            scratch, behind.positions, behind.epoch_floor, journal_position, restoration.update_time
        )
        return await self._engine.call(placed)

    def behind(self, uid: str, report: messages.LearnerReport, last: int | None = None) -> "Behind":
        """What lies behind the journal up to `last`, also behind batches that were never applied."""
        behind = Behind(dict(report.positions), report.epoch_floor, report.journal_position)
        for entry in self._storage.journal.read(uid, report.journal_position, last):
            behind.follow(entry)
        return behind

    def _decoded(self, entries: Iterator[Entry], spec: LearnerSpec) -> list[tuple[Entry, Batch | None]]:
        decoded: list[tuple[Entry, Batch | None]] = []
        size = 0
        for entry in islice(entries, _DECODED_AT_ONCE):
            batch = self._decode_batch(entry.payload, spec) if entry.kind is EntryKind.BATCH else None
            decoded.append((entry, batch))
            size += len(entry.payload)
            if size >= _BYTES_AT_ONCE:
                break
        return decoded

    def engine_died_at(self, uid: str, position: int) -> bool:
        """Notes a death of the engine process while it applied this entry alone; whether the entry is convicted."""
        key = uid, position
        self._deaths[key] = self._deaths.get(key, 0) + 1
        return self._deaths[key] >= _DEATHS_THAT_CONVICT


class _Replaying:
    """One replay under way.

    Args:
        carefully: one entry at a time, so that it is known which one the engine process dies of.
    """

    def __init__(
        self, recovery: Recovery, stored: StoredLearner, uid: str, report: messages.LearnerReport, *, carefully: bool
    ) -> None:
        self._recovery = recovery
        self._engine = recovery._engine
        self._stored = stored
        self._uid = uid
        self._spec = report.spec
        self._carefully = carefully
        self._part: list[tuple[Entry, messages.Change[Any]]] = []  # what goes to the engine next, together
        self._under_way: deque[tuple[Sequence[Entry], asyncio.Future[Mapping[int, Exception]]]] = deque()
        self._bytes_under_way = 0
        self.resumptions: list[Resumption] = []
        self.applied = 0

    async def apply(self, chunk: Sequence[tuple[Entry, Batch | None]]) -> None:
        """Has the engine apply these entries, while the caller gets the next ones."""
        for entry, batch in chunk:
            resumptions = [resumption for resumption in self.resumptions if resumption.at == entry.position]
            for resumption in resumptions:
                await self._revise(resumption)
            skip = any(resumption.skip for resumption in resumptions)
            self._part.append((entry, self._request(entry, batch, skip=skip)))
            if self._carefully:
                await self.finish()
        self._send_part()
        while self._bytes_under_way > _BYTES_UNDER_WAY or len(self._under_way) > _PARTS_UNDER_WAY:
            await self._settle_oldest()

    async def finish(self) -> None:
        """Returns when everything has been applied."""
        self._send_part()
        while self._under_way:
            await self._settle_oldest()

    def _send_part(self) -> None:
        if not self._part:
            return
        part, self._part = self._part, []
        entries = [entry for entry, _ in part]
        self._under_way.append((entries, self._engine.submit_all([change for _, change in part])))
        self._bytes_under_way += _size_bytes(entries)
        self.applied += len(entries)

    async def _settle_oldest(self) -> None:
        entries, outcome = self._under_way[0]
        try:
            failures = await outcome
            for index in sorted(failures):
                self._take_failure(entries[index], failures[index])
        except EngineUnavailable:
            self._abandon()
            entry = entries[0]
            if self._carefully and self._recovery.engine_died_at(self._uid, entry.position):
                raise BatchNotLearnt(
                    entry.position, entry.producer or "", entry.sequence or 0, "the engine process ended at it"
                ) from None
            raise
        except CbpError:
            self._abandon()
            raise
        self._under_way.popleft()
        self._bytes_under_way -= _size_bytes(entries)

    def _take_failure(self, entry: Entry, error: Exception) -> None:
        if isinstance(error, BatchNotLearnt | NotInEngine | ServerDraining) or not isinstance(error, CbpError):
            raise error
        if entry.kind is EntryKind.BATCH:
            raise JournalDamaged(self._stored.uid, entry.position) from error
        log.info("entry without effect", learner=self._stored.learner_id, kind=entry.kind, error=str(error))

    def _abandon(self) -> None:
        """Nobody waits for what is still under way."""
        for _, outcome in self._under_way:
            outcome.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._under_way.clear()

    async def _revise(self, resumption: Resumption) -> None:
        if resumption.lr is not None:
            self._spec = with_learning_rate(self._spec, resumption.lr)
            await self.finish()
            await self._engine.call(messages.Revise(self._uid, resumption.update_time, self._spec))

    def _request(self, entry: Entry, batch: Batch | None, *, skip: bool) -> messages.Change[Any]:
        uid, position = self._uid, entry.position
        producer, epoch, sequence = entry.producer or "", entry.epoch or 0, entry.sequence or 0
        match entry.kind:
            case EntryKind.BATCH if skip:
                return messages.Skip(uid, position, producer, epoch, sequence, entry.payload_hash)
            case EntryKind.BATCH:
                assert batch is not None
                return messages.Train(uid, position, producer, epoch, sequence, entry.payload_hash, batch, False)
            case EntryKind.OPEN:
                return messages.OpenProducer(uid, position, producer, epoch, entry.payload.decode())
            case EntryKind.FORGET:
                return messages.ForgetProducer(uid, position, entry.payload.decode())
            case EntryKind.UPDATE:
                plain = json.loads(entry.payload)
                self._spec = LearnerSpec.parse(plain["spec"])
                return messages.Update(uid, position, plain["update_time"], self._spec)
            case EntryKind.ENGINE:
                return messages.SwitchEngine(uid, position, cast(EngineName, entry.payload.decode()))
            case EntryKind.RESET:
                plain = json.loads(entry.payload)
                return messages.ResetUnits(uid, position, tuple(plain["layers"]), plain["fraction"])
            case _:
                return messages.Pass(uid, position)


def _size_bytes(entries: Sequence[Entry]) -> int:
    return sum(len(entry.payload) for entry in entries)


def with_learning_rate(spec: LearnerSpec, lr: float) -> LearnerSpec:
    """Raises `SpecError` if it is no learning rate."""
    plain: Mapping[str, Any] = spec.to_plain()
    return LearnerSpec.parse({**plain, "optimizer": {**plain["optimizer"], "lr": lr}})

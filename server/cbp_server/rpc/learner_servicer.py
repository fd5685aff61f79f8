"""cbp.v1.LearnerService."""

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import grpc
from google.protobuf.empty_pb2 import Empty

from cbp import FieldViolation, LearnerSpec
from cbp_proto.v1 import learner_pb2, learner_service_pb2, learner_service_pb2_grpc
from cbp_server.errors import InvalidRequest, ServerDraining, StreamProtocolError
from cbp_server.learners.host import Host
from cbp_server.learners.paging import checkpoints_page_of
from cbp_server.limits import Limits
from cbp_server.records.learners import Durability, LearnerRecord
from cbp_server.records.read_model import all_shown, one_shown
from cbp_server.rpc import convert
from cbp_server.rpc.sizes import COMPACT_BYTES, WHOLE_BYTES, fitting

_DEFAULT_WATCH_SECONDS, _LEAST_WATCH_SECONDS, _LONGEST_NAP_SECONDS = 1.0, 0.05, 0.2
#: Learners in one message of a watch at most.
_MOST_WATCHED = 50
#: Bytes of a file in one message, well below the 4 MiB that clients take.
_EXPORTED_AT_ONCE = 2**20

if TYPE_CHECKING:  # generic in the type stubs only
    Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]


class LearnerServicer(learner_service_pb2_grpc.LearnerServiceServicer):
    """Translates between messages and the host."""

    def __init__(self, host: Host, limits: Limits) -> None:
        self._host = host
        self._limits = limits

    async def CreateLearner(
        self, request: learner_service_pb2.CreateLearnerRequest, context: "Context"
    ) -> learner_pb2.Learner:
        # In another thread: what is no plain network has to be built to be counted, and torch loaded before the first.
        spec = await asyncio.to_thread(convert.spec_from_message, request.learner.spec, self._limits)
        durability = convert.durability_of(request.learner.durability, "learner.durability")
        record = await self._host.create(
            request.learner_id, spec, durability=durability or Durability.FSYNC, request_id=request.request_id
        )
        return convert.learner_to_message(record)

    async def GetLearner(
        self, request: learner_service_pb2.GetLearnerRequest, context: "Context"
    ) -> learner_pb2.Learner:
        record = self._host.learner(convert.learner_id_of(request.name, "name"))
        return one_shown(self._host, record, convert.learner_to_message)

    async def ListLearners(
        self, request: learner_service_pb2.ListLearnersRequest, context: "Context"
    ) -> learner_service_pb2.ListLearnersResponse:
        records, token = self._host.page(request.page_size, request.page_token, deleted=request.show_deleted)
        shown = all_shown(self._host, records, convert.learner_to_message)
        if len(shown) < len(records):  # those that cannot be shown are on no page any more
            return await self.ListLearners(request, context)
        learners = fitting(shown, COMPACT_BYTES)
        if len(learners) < len(records):
            _, token = self._host.page(len(learners), request.page_token, deleted=request.show_deleted)
        return learner_service_pb2.ListLearnersResponse(learners=learners, next_page_token=token)

    async def UpdateLearner(
        self, request: learner_service_pb2.UpdateLearnerRequest, context: "Context"
    ) -> learner_pb2.Learner:
        durability, mask, revises = convert.updated_durability(request)

        def revise(present: LearnerSpec) -> LearnerSpec:
            return convert.revised_spec(present, request.learner.spec, mask, self._limits) if revises else present

        record = await self._host.update(
            convert.learner_id_of(request.learner.name, "learner.name"),
            revise,
            durability=durability,
            etag=request.learner.etag,
        )
        return convert.learner_to_message(record)

    async def DeleteLearner(
        self, request: learner_service_pb2.DeleteLearnerRequest, context: "Context"
    ) -> learner_pb2.Learner:
        record = await self._host.delete(convert.learner_id_of(request.name, "name"), etag=request.etag)
        return convert.learner_to_message(record)

    async def UndeleteLearner(
        self, request: learner_service_pb2.UndeleteLearnerRequest, context: "Context"
    ) -> learner_pb2.Learner:
        record = await self._host.undelete(convert.learner_id_of(request.name, "name"), request.uid)
        return convert.learner_to_message(record)

    async def PurgeLearner(self, request: learner_service_pb2.PurgeLearnerRequest, context: "Context") -> Empty:
        await self._host.purge(convert.learner_id_of(request.name, "name"), request.uid)
        return Empty()

    async def ForkLearner(
        self, request: learner_service_pb2.ForkLearnerRequest, context: "Context"
    ) -> learner_pb2.Learner:
        record = await self._host.fork(
            convert.learner_id_of(request.name, "name"),
            request.learner_id,
            durability=convert.durability_of(request.durability, "durability"),
            request_id=request.request_id,
        )
        return convert.learner_to_message(record)

    async def CreateCheckpoint(
        self, request: learner_service_pb2.CreateCheckpointRequest, context: "Context"
    ) -> learner_pb2.Checkpoint:
        learner_id = convert.learner_id_of(request.parent, "parent")
        return convert.checkpoint_to_message(learner_id, await self._host.create_checkpoint(learner_id))

    async def ListCheckpoints(
        self, request: learner_service_pb2.ListCheckpointsRequest, context: "Context"
    ) -> learner_service_pb2.ListCheckpointsResponse:
        learner_id = convert.learner_id_of(request.parent, "parent")
        checkpoints, first, last = await self._host.checkpoints(learner_id)
        page, token = checkpoints_page_of(checkpoints, request.page_size, request.page_token)
        return learner_service_pb2.ListCheckpointsResponse(
            checkpoints=[convert.checkpoint_to_message(learner_id, checkpoint) for checkpoint in page],
            next_page_token=token,
            first_restorable_position=first,
            last_restorable_position=last,
        )

    async def DeleteCheckpoint(self, request: learner_service_pb2.DeleteCheckpointRequest, context: "Context") -> Empty:
        await self._host.delete_checkpoint(*convert.checkpoint_of(request.name, "name"))
        return Empty()

    async def DeleteProducer(self, request: learner_service_pb2.DeleteProducerRequest, context: "Context") -> Empty:
        await self._host.forget_producer(*convert.producer_of(request.name, "name"))
        return Empty()

    async def RestoreLearner(
        self, request: learner_service_pb2.RestoreLearnerRequest, context: "Context"
    ) -> learner_pb2.Learner:
        learner_id = convert.learner_id_of(request.name, "name")
        number = position = None
        match request.WhichOneof("target"):
            case "checkpoint":
                owner, number = convert.checkpoint_of(request.checkpoint, "checkpoint")
                if owner != learner_id:
                    description = f"is a checkpoint of learner '{owner}'; fork that one, or name one of '{learner_id}'"
                    raise InvalidRequest(FieldViolation("checkpoint", description))
            case "journal_position":
                position = request.journal_position
            case _:
                raise InvalidRequest(FieldViolation("checkpoint", "name a checkpoint, or a journal_position"))
        record = await self._host.restore(learner_id, number=number, position=position, etag=request.etag)
        return convert.learner_to_message(record)

    async def ResumeLearner(
        self, request: learner_service_pb2.ResumeLearnerRequest, context: "Context"
    ) -> learner_pb2.Learner:
        lr = request.lr if request.HasField("lr") else None
        learner_id = convert.learner_id_of(request.name, "name")
        return convert.learner_to_message(await self._host.resume(learner_id, lr, skip_batch=request.skip_batch))

    async def ResetUnits(
        self, request: learner_service_pb2.ResetUnitsRequest, context: "Context"
    ) -> learner_service_pb2.ResetUnitsResponse:
        learner_id = convert.learner_id_of(request.name, "name")
        counts = await self._host.reset_units(learner_id, request.layers, request.fraction)
        return learner_service_pb2.ResetUnitsResponse(replacements=counts)

    async def ExportLearner(
        self, request: learner_service_pb2.ExportLearnerRequest, context: "Context"
    ) -> AsyncIterator[learner_service_pb2.ExportLearnerResponse]:
        learner_id = convert.learner_id_of(request.name, "name")
        data = await self._host.export(learner_id, convert.export_format(request.format))
        for start in range(0, len(data), _EXPORTED_AT_ONCE):
            yield learner_service_pb2.ExportLearnerResponse(data=data[start : start + _EXPORTED_AT_ONCE])

    async def ImportLearner(
        self, request_iterator: AsyncIterator[learner_service_pb2.ImportLearnerRequest], context: "Context"
    ) -> learner_pb2.Learner:
        first = await anext(request_iterator, None)
        if first is None or not first.HasField("header"):
            raise StreamProtocolError("the first message of ImportLearner must be `header`")
        header = first.header
        durability = convert.durability_of(header.durability, "header.durability") or Durability.FSYNC
        data = await self._received(request_iterator)
        record = await self._host.import_(
            header.learner_id,
            data,
            durability=durability,
            request_id=header.request_id,
            check_spec=partial(convert.check_imported, limits=self._limits),
        )
        return convert.learner_to_message(record)

    async def _received(self, requests: AsyncIterator[learner_service_pb2.ImportLearnerRequest]) -> bytes:
        """The whole file. Everything is read before anything is refused: a client that is writing hears only then."""
        data, limit, size, misplaced = bytearray(), self._limits.max_import_bytes, 0, False
        async for request in requests:
            misplaced |= not request.HasField("data")
            size += len(request.data)
            if size <= limit:
                data += request.data
        if misplaced:
            raise StreamProtocolError("after `header`, every message of ImportLearner must be `data`")
        if size > limit:
            description = (
                f"has {size} bytes; at most {limit} are allowed, which learners within --max-parameters keep to"
            )
            raise InvalidRequest(FieldViolation("data", description))
        return bytes(data)

    async def GetPlasticity(
        self, request: learner_service_pb2.GetPlasticityRequest, context: "Context"
    ) -> learner_service_pb2.GetPlasticityResponse:
        learner_id = convert.learner_id_of(request.name, "name")
        if request.max_samples < 0:
            raise InvalidRequest(FieldViolation("max_samples", f"must not be negative, is {request.max_samples}"))
        if request.fresh:
            await self._host.sample(learner_id)
        samples = self._host.samples(learner_id, request.max_samples or 1)
        newest_first = fitting(map(convert.sample_to_message, reversed(samples)), WHOLE_BYTES)
        return learner_service_pb2.GetPlasticityResponse(samples=reversed(newest_first))

    async def WatchLearners(
        self, request: learner_service_pb2.WatchLearnersRequest, context: "Context"
    ) -> AsyncIterator[learner_service_pb2.WatchLearnersResponse]:
        names = {convert.learner_id_of(name, f"names[{index}]") for index, name in enumerate(request.names)}
        for learner_id in sorted(names):
            self._host.learner(learner_id)  # NOT_FOUND now rather than silence
        interval = _DEFAULT_WATCH_SECONDS
        if request.HasField("interval"):
            interval = max(request.interval.ToNanoseconds() / 1e9, _LEAST_WATCH_SECONDS)
        seen: dict[str, tuple[str, int]] = {}  # by id: uid and version
        first = True
        while not self._host.draining:
            present = {record.learner_id: record for record in self._host.learners() if _wanted(record, names)}
            changed = [r for r in present.values() if seen.get(r.learner_id) != (r.uid, r.version)]
            deleted = [learner_id for learner_id in seen if learner_id not in present]
            if not (changed or deleted or first):
                await self._host.wait_for_change()
                continue
            for learner_id in deleted:
                del seen[learner_id]
            names_deleted = [convert.learner_name(learner_id) for learner_id in deleted]
            first, more = False, True
            while more:
                # Noted before the message goes out: what changes meanwhile has not been seen.
                shown = all_shown(self._host, changed[:_MOST_WATCHED], lambda record: (record, _watched(record)))
                learners = fitting((message for _, message in shown), COMPACT_BYTES)
                told, others = shown[: len(learners)], shown[len(learners) :]
                seen |= {record.learner_id: (record.uid, record.version) for record, _ in told}
                changed = [record for record, _ in others] + changed[_MOST_WATCHED:]
                more = bool(changed)
                yield learner_service_pb2.WatchLearnersResponse(
                    learners=learners, deleted=names_deleted, more_follow=more
                )
                names_deleted = []
            await self._pause(interval)
        raise ServerDraining

    async def _pause(self, seconds: float) -> None:
        """Sleeps, in short naps: learners change too often to be woken by each change, but a drain must not wait."""
        while seconds > 0 and not self._host.draining:
            nap = min(seconds, _LONGEST_NAP_SECONDS)
            await asyncio.sleep(nap)
            seconds -= nap


def _wanted(record: LearnerRecord, names: set[str]) -> bool:
    return not names or record.learner_id in names


def _watched(record: LearnerRecord) -> learner_service_pb2.WatchedLearner:
    newest = record.samples.newest
    return learner_service_pb2.WatchedLearner(
        learner=convert.learner_to_message(record),
        plasticity=convert.sample_to_message(newest) if newest is not None else None,
    )

"""cbp.v1.LearnerService."""

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, TypeAlias

import grpc
from google.protobuf.empty_pb2 import Empty

from cbp import FieldViolation
from cbp_proto.v1 import learner_pb2, learner_service_pb2, learner_service_pb2_grpc
from cbp_server.errors import InvalidRequest, ServerDraining
from cbp_server.host import Host
from cbp_server.limits import Limits
from cbp_server.records import LearnerRecord
from cbp_server.rpc import convert

_DEFAULT_WATCH_SECONDS, _LEAST_WATCH_SECONDS, _LONGEST_NAP_SECONDS = 1.0, 0.05, 0.2
#: Learners in one message of a watch: with all their tasks they stay well below the 4 MiB that clients take.
_MOST_WATCHED = 50

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
        spec = convert.spec_from_message(request.learner.spec, self._limits)
        record = await self._host.create(request.learner_id, spec, request_id=request.request_id)
        return convert.learner_to_message(record)

    async def GetLearner(
        self, request: learner_service_pb2.GetLearnerRequest, context: "Context"
    ) -> learner_pb2.Learner:
        return convert.learner_to_message(self._host.learner(convert.learner_id_of(request.name, "name")))

    async def ListLearners(
        self, request: learner_service_pb2.ListLearnersRequest, context: "Context"
    ) -> learner_service_pb2.ListLearnersResponse:
        records, token = self._host.page(request.page_size, request.page_token)
        learners = [convert.learner_to_message(record) for record in records]
        return learner_service_pb2.ListLearnersResponse(learners=learners, next_page_token=token)

    async def UpdateLearner(
        self, request: learner_service_pb2.UpdateLearnerRequest, context: "Context"
    ) -> learner_pb2.Learner:
        record = await self._host.update(
            convert.learner_id_of(request.learner.name, "learner.name"),
            lambda present: convert.revised_spec(present, request.learner.spec, request.update_mask, self._limits),
            etag=request.learner.etag,
        )
        return convert.learner_to_message(record)

    async def DeleteLearner(self, request: learner_service_pb2.DeleteLearnerRequest, context: "Context") -> Empty:
        await self._host.delete(convert.learner_id_of(request.name, "name"), etag=request.etag)
        return Empty()

    async def GetPlasticity(
        self, request: learner_service_pb2.GetPlasticityRequest, context: "Context"
    ) -> learner_service_pb2.GetPlasticityResponse:
        learner_id = convert.learner_id_of(request.name, "name")
        if request.max_samples < 0:
            raise InvalidRequest(FieldViolation("max_samples", f"must not be negative, is {request.max_samples}"))
        if request.fresh:
            await self._host.sample(learner_id)
        samples = self._host.samples(learner_id, request.max_samples or 1)
        return learner_service_pb2.GetPlasticityResponse(samples=[convert.sample_to_message(item) for item in samples])

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
            for start in range(0, max(len(changed), 1), _MOST_WATCHED):
                records = changed[start : start + _MOST_WATCHED]
                # Noted before the message goes out: what changes meanwhile has not been seen.
                seen |= {record.learner_id: (record.uid, record.version) for record in records}
                yield learner_service_pb2.WatchLearnersResponse(
                    learners=[_watched(record) for record in records],
                    deleted=[convert.learner_name(learner_id) for learner_id in deleted] if not start else (),
                    more_follow=start + _MOST_WATCHED < len(changed),
                )
            first = False
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
    return learner_service_pb2.WatchedLearner(
        learner=convert.learner_to_message(record),
        plasticity=convert.sample_to_message(record.samples[-1]) if record.samples else None,
    )

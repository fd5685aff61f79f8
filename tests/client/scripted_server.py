"""A TrainingService that keeps the contract and does what a test scripts: crash, forget, reject, withhold credits.

It runs on a real loopback port. It learns nothing: the step of a learner is the number of its examples, and the
first feature of a batch's first example is the payload by which tests recognise it.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

import grpc
from google.protobuf import any_pb2
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from cbp_proto import decode_tensor
from cbp_proto.v1 import (
    learner_pb2,
    learner_service_pb2,
    learner_service_pb2_grpc,
    training_service_pb2,
    training_service_pb2_grpc,
)

MessageT = TypeVar("MessageT", bound=Message)


@dataclass
class Producer:
    """What a server knows of a producer. `pending` batches are accepted and not yet applied; `durable` ones survive
    `ScriptedServer.crash`."""

    epoch: int = 0
    stream_id: str = ""
    applied: list[float] = field(default_factory=list)
    pending: deque[training_service_pb2.TrainBatch] = field(default_factory=deque)
    durable: int = 0
    session: "Session | None" = None

    @property
    def accepted(self) -> list[float]:
        return [*self.applied, *(payload(batch) for batch in self.pending)]


@dataclass(eq=False)
class Session:
    """One open stream."""

    epoch: int
    unanswered: int = 0
    outbox: asyncio.Queue[training_service_pb2.TrainResponse | BaseException] = field(default_factory=asyncio.Queue)


class ScriptedServer(
    training_service_pb2_grpc.TrainingServiceServicer, learner_service_pb2_grpc.LearnerServiceServicer
):
    """One learner, "clicks", and any number of producers.

    Attributes:
        credits: what a stream is granted when it opens; each answer grants one more.
        rejects: which payloads are rejected as invalid.
        answering: while it is clear, nothing is answered, and batches are received but not accepted.
        applying: if False, batches are accepted but wait for `apply`.
        opens: how the streams were opened, in order.
        most_in_flight: largest number of unanswered batches that any stream had.
        received: payload and sequence of each batch, in the order of arrival, over all streams.
        applied_ahead: added to the applied sequence of acknowledgements, as if later batches were applied as well.
        requests: those of unary calls, in order.
        time_left: the seconds that each of these calls had when it came.
        learner: what else GetLearner and ListLearners say of a learner.
        prediction: the answer to each Predict; None for its features.
        export_parts: what an export consists of.
        imported: the file that the last import sent.
        lost_answers: acknowledgements to leave out, so that the client does not hear of batches that are applied.
    """

    def __init__(self) -> None:
        self.credits = 4
        self.max_message_bytes = 100_000
        self.uid = "uid-1"
        self.rejects: Callable[[float], bool] = lambda _: False
        self.answering = asyncio.Event()
        self.answering.set()
        self.applying = True
        self.producers: dict[str, Producer] = {}
        self.opens: list[training_service_pb2.OpenStream] = []
        self.most_in_flight = 0
        self.received: list[tuple[float, int]] = []
        self.arrived = asyncio.Condition()
        self.lost_answers = 0
        self.applied_ahead = 0
        self.open_errors: list[BaseException] = []
        self.unary_errors: list[BaseException] = []
        self.requests: list[Any] = []
        self.time_left: list[float | None] = []
        self.learner = learner_pb2.Learner()
        self.prediction: training_service_pb2.PredictResponse | None = None
        self.export_parts = [b"first", b"second"]
        self.imported = b""
        self.port = 0
        self._server: grpc.aio.Server | None = None

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    def producer(self, name: str = "web") -> Producer:
        return self.producers.setdefault(name, Producer())

    async def start(self) -> None:
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        training_service_pb2_grpc.add_TrainingServiceServicer_to_server(self, self._server)
        learner_service_pb2_grpc.add_LearnerServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self._server.start()

    async def stop(self) -> None:
        assert self._server is not None
        await self._server.stop(None)
        self._server = None

    async def crash(self) -> None:
        """Stop, and forget all that is not durable."""
        await self.stop()
        for producer in self.producers.values():
            producer.pending.clear()
            del producer.applied[producer.durable :]

    def end_streams(self, failure: BaseException) -> None:
        """End every stream with an error."""
        for producer in self.producers.values():
            if producer.session is not None:
                producer.session.outbox.put_nowait(failure)

    def drain(self) -> None:
        """End every stream as a server does that is shutting down."""
        self.end_streams(error(grpc.StatusCode.UNAVAILABLE, "SERVER_DRAINING"))

    def apply(self, count: int = 1_000_000, name: str = "web") -> None:
        """Apply at most so many accepted batches; whichever stream is open hears of it."""
        producer = self.producer(name)
        for _ in range(min(count, len(producer.pending))):
            batch = producer.pending.popleft()
            producer.applied.append(payload(batch))
            self._tell(producer, self._result(batch))

    async def make_durable(self, name: str = "web") -> None:
        """A checkpoint: everything applied is durable, and the client hears of it."""
        producer = self.producer(name)
        producer.durable = len(producer.applied)
        if producer.session is not None:
            producer.session.outbox.put_nowait(self._acknowledgement(producer, producer.session, []))

    async def wait_for_batches(self, count: int) -> None:
        """Until so many batches have arrived since the server was made."""
        async with self.arrived:
            await self.arrived.wait_for(lambda: len(self.received) >= count)

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        """Until `condition` holds, for what no event tells of."""
        async with asyncio.timeout(10):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.001)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        if self._server is not None:
            await self.stop()

    async def Train(self, request_iterator: Any, context: Any) -> AsyncIterator[training_service_pb2.TrainResponse]:  # noqa: N802
        opening = (await anext(request_iterator)).open
        assert opening.learner == "learners/clicks"
        self.opens.append(opening)
        producer = self.producer(opening.producer)
        if opening.learner_uid not in ("", self.uid):
            raise await abort(context, error(grpc.StatusCode.FAILED_PRECONDITION, "LEARNER_REPLACED"))
        if opening.resumed_epoch not in (0, producer.epoch) and opening.stream_id != producer.stream_id:
            raise await abort(context, error(grpc.StatusCode.ABORTED, "PRODUCER_FENCED"))
        producer.epoch, producer.stream_id = producer.epoch + 1, opening.stream_id
        if self.open_errors:
            raise await abort(context, self.open_errors.pop(0))
        if producer.session is not None:
            producer.session.outbox.put_nowait(error(grpc.StatusCode.ABORTED, "PRODUCER_FENCED"))
        session = producer.session = Session(producer.epoch, unanswered=len(producer.pending))
        inbox: asyncio.Queue[training_service_pb2.TrainBatch] = asyncio.Queue()
        tasks = [
            asyncio.create_task(self._read(request_iterator, session, inbox)),
            asyncio.create_task(self._accept_all(producer, session, inbox)),
        ]
        try:
            yield training_service_pb2.TrainResponse(
                opened=training_service_pb2.StreamOpened(
                    epoch=session.epoch,
                    applied_sequence=len(producer.applied),
                    durable_sequence=producer.durable,
                    learner_uid=self.uid,
                    max_message_bytes=self.max_message_bytes,
                    next_sequence=len(producer.accepted) + 1,
                ),
                credits=self.credits - len(producer.pending),
            )
            while True:
                answer = await session.outbox.get()
                if isinstance(answer, StopAsyncIteration):
                    return
                if isinstance(answer, BaseException):
                    raise await abort(context, answer)
                session.unanswered -= answer.credits
                yield answer
        finally:
            if producer.session is session:
                producer.session = None
            for task in tasks:
                task.cancel()

    async def _read(
        self, requests: Any, session: Session, inbox: asyncio.Queue[training_service_pb2.TrainBatch]
    ) -> None:
        async for request in requests:
            session.unanswered += 1
            self.most_in_flight = max(self.most_in_flight, session.unanswered)
            async with self.arrived:
                self.received.append((payload(request.batch), request.batch.sequence))
                self.arrived.notify_all()
            inbox.put_nowait(request.batch)
        await inbox.join()
        session.outbox.put_nowait(StopAsyncIteration())

    async def _accept_all(
        self, producer: Producer, session: Session, inbox: asyncio.Queue[training_service_pb2.TrainBatch]
    ) -> None:
        while True:
            batch = await inbox.get()
            await self.answering.wait()
            answer = self._accept(producer, session, batch)
            if answer is not None:
                session.outbox.put_nowait(answer)
            elif self.applying:
                self.apply(name=next(name for name, item in self.producers.items() if item is producer))
            inbox.task_done()

    def _accept(
        self, producer: Producer, session: Session, batch: training_service_pb2.TrainBatch
    ) -> training_service_pb2.TrainResponse | BaseException | None:
        """The answer to a batch that is not accepted, or was before."""
        if session.epoch != producer.epoch:
            return error(grpc.StatusCode.ABORTED, "PRODUCER_FENCED")
        expected = len(producer.accepted) + 1
        if batch.sequence > expected:
            return rejection(batch.sequence, expected, "SEQUENCE_GAP", code_pb2.FAILED_PRECONDITION)
        if batch.sequence < expected and producer.accepted[batch.sequence - 1] != payload(batch):
            return rejection(batch.sequence, expected, "SEQUENCE_REUSED", code_pb2.ALREADY_EXISTS)
        if self.rejects(payload(batch)):
            return rejection(batch.sequence, expected, "INVALID_BATCH", code_pb2.INVALID_ARGUMENT)
        if batch.sequence < expected:
            repeated = training_service_pb2.BatchResult(sequence=batch.sequence, step=batch.sequence, duplicate=True)
            return self._acknowledgement(producer, session, [repeated])
        producer.pending.append(batch)
        return None

    def _result(self, batch: training_service_pb2.TrainBatch) -> training_service_pb2.BatchResult:
        examples = batch.features.shape[0]
        return training_service_pb2.BatchResult(
            sequence=batch.sequence,
            step=batch.sequence,
            steps=examples,
            examples=examples,
            loss=payload(batch),
            accuracy=0.5,
            outputs=batch.features if batch.return_outputs else None,
        )

    def _tell(self, producer: Producer, result: training_service_pb2.BatchResult) -> None:
        if self.lost_answers:
            self.lost_answers -= 1
        elif producer.session is not None:
            producer.session.outbox.put_nowait(self._acknowledgement(producer, producer.session, [result]))

    def _acknowledgement(
        self, producer: Producer, session: Session, results: list[training_service_pb2.BatchResult]
    ) -> training_service_pb2.TrainResponse:
        return training_service_pb2.TrainResponse(
            acknowledgement=training_service_pb2.Acknowledgement(
                epoch=session.epoch,
                applied_sequence=len(producer.applied) + self.applied_ahead,
                durable_sequence=producer.durable,
                results=results,
            ),
            credits=len(results),
        )

    async def Predict(self, request: Any, context: Any) -> training_service_pb2.PredictResponse:  # noqa: N802
        return await self._answer(
            request, context, self.prediction or training_service_pb2.PredictResponse(outputs=request.features)
        )

    async def GetLearner(self, request: Any, context: Any) -> learner_pb2.Learner:  # noqa: N802
        learner = learner_pb2.Learner(name=request.name, uid=self.uid)
        learner.MergeFrom(self.learner)
        return await self._answer(request, context, learner)

    async def CreateLearner(self, request: Any, context: Any) -> learner_pb2.Learner:  # noqa: N802
        learner = learner_pb2.Learner(name=f"learners/{request.learner_id}", uid=self.uid, spec=request.learner.spec)
        return await self._answer(request, context, learner)

    async def UpdateLearner(self, request: Any, context: Any) -> learner_pb2.Learner:  # noqa: N802
        return await self._answer(request, context, request.learner)

    async def ListLearners(self, request: Any, context: Any) -> learner_service_pb2.ListLearnersResponse:  # noqa: N802
        first = int(request.page_token or 0)
        learners = [learner_pb2.Learner(name=f"learners/l{index}") for index in range(first, first + 2)]
        for learner in learners:
            learner.MergeFrom(self.learner)
        token = str(first + 2) if first < 4 else ""
        answer = learner_service_pb2.ListLearnersResponse(learners=learners, next_page_token=token)
        return await self._answer(request, context, answer)

    async def DeleteLearner(self, request: Any, context: Any) -> learner_pb2.Learner:  # noqa: N802
        deleted = learner_pb2.Learner(name=request.name, uid=self.uid, state=learner_pb2.Learner.STATE_DELETED)
        deleted.delete_time.FromJsonString("2026-11-22T10:00:00Z")
        deleted.purge_time.FromJsonString("2026-11-29T10:00:00Z")
        return await self._answer(request, context, deleted)

    async def UndeleteLearner(self, request: Any, context: Any) -> learner_pb2.Learner:  # noqa: N802
        return await self._answer(request, context, learner_pb2.Learner(name=request.name, uid=request.uid))

    async def PurgeLearner(self, request: Any, context: Any) -> Empty:  # noqa: N802
        return await self._answer(request, context, Empty())

    async def ForkLearner(self, request: Any, context: Any) -> learner_pb2.Learner:  # noqa: N802
        fork = learner_pb2.Learner(name=f"learners/{request.learner_id}", durability=request.durability)
        return await self._answer(request, context, fork)

    async def CreateCheckpoint(self, request: Any, context: Any) -> learner_pb2.Checkpoint:  # noqa: N802
        return await self._answer(request, context, checkpoint(request.parent, 12, pinned=True))

    async def ListCheckpoints(self, request: Any, context: Any) -> learner_service_pb2.ListCheckpointsResponse:  # noqa: N802
        first = int(request.page_token or 0)
        answer = learner_service_pb2.ListCheckpointsResponse(
            checkpoints=[checkpoint(request.parent, 4 - number) for number in range(first, first + 2)],
            next_page_token="" if first else "2",
            first_restorable_position=10,
            last_restorable_position=99,
        )
        return await self._answer(request, context, answer)

    async def DeleteCheckpoint(self, request: Any, context: Any) -> Empty:  # noqa: N802
        return await self._answer(request, context, Empty())

    async def DeleteProducer(self, request: Any, context: Any) -> Empty:  # noqa: N802
        return await self._answer(request, context, Empty())

    async def RestoreLearner(self, request: Any, context: Any) -> learner_pb2.Learner:  # noqa: N802
        return await self._answer(request, context, learner_pb2.Learner(name=request.name, journal_position=100))

    async def ResumeLearner(self, request: Any, context: Any) -> learner_pb2.Learner:  # noqa: N802
        return await self._answer(request, context, learner_pb2.Learner(name=request.name))

    async def ResetUnits(self, request: Any, context: Any) -> learner_service_pb2.ResetUnitsResponse:  # noqa: N802
        answer = learner_service_pb2.ResetUnitsResponse(replacements={"hidden_0": 4, "hidden_1": 0})
        return await self._answer(request, context, answer)

    async def ExportLearner(  # noqa: N802
        self, request: Any, context: Any
    ) -> AsyncIterator[learner_service_pb2.ExportLearnerResponse]:
        self.requests.append(request)
        for part in self.export_parts:
            yield learner_service_pb2.ExportLearnerResponse(data=part)
            if self.unary_errors:
                raise await abort(context, self.unary_errors.pop(0))
            await self.answering.wait()

    async def ImportLearner(self, request_iterator: Any, context: Any) -> learner_pb2.Learner:  # noqa: N802
        header = (await anext(request_iterator)).header
        self.requests.append(header)
        if self.unary_errors:
            raise await abort(context, self.unary_errors.pop(0))
        self.imported = b"".join([request.data async for request in request_iterator])
        return learner_pb2.Learner(name=f"learners/{header.learner_id}", durability=header.durability)

    async def GetPlasticity(self, request: Any, context: Any) -> learner_service_pb2.GetPlasticityResponse:  # noqa: N802
        return await self._answer(request, context, learner_service_pb2.GetPlasticityResponse())

    def WatchLearners(self, request: Any, context: Any) -> Any:  # noqa: N802
        raise NotImplementedError

    async def _answer(self, request: Any, context: Any, answer: MessageT) -> MessageT:
        self.time_left.append(context.time_remaining())
        self.requests.append(request)
        await self.answering.wait()
        if self.unary_errors:
            raise await abort(context, self.unary_errors.pop(0))
        return answer


def checkpoint(parent: str, number: int, *, pinned: bool = False) -> learner_pb2.Checkpoint:
    """A checkpoint whose facts follow from its number."""
    made = learner_pb2.Checkpoint(
        name=f"{parent}/checkpoints/{number}",
        journal_position=10 * number,
        step=100 * number,
        examples=200 * number,
        size_bytes=1000,
        pinned=pinned,
    )
    made.create_time.FromJsonString("2026-11-22T10:00:00Z")
    return made


def payload(batch: training_service_pb2.TrainBatch) -> float:
    """What tests recognise a batch by."""
    return float(decode_tensor(batch.features)[0, 0])


class RpcError(Exception):
    """An error to end a call with."""

    def __init__(self, code: grpc.StatusCode, message: str, details: tuple[Message, ...]) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.details = details


def error(
    code: grpc.StatusCode, reason: str, *details: Message, message: str = "", metadata: dict[str, str] | None = None
) -> RpcError:
    """An error as a cbp server sends it."""
    info = error_details_pb2.ErrorInfo(reason=reason, domain="cbp.v1", metadata=metadata or {})
    return RpcError(code, message or f"because {reason}", (info, *details))


async def abort(context: Any, failure: BaseException) -> Exception:
    if not isinstance(failure, RpcError):
        raise failure
    packed = []
    for detail in failure.details:
        packed.append(any_pb2.Any())
        packed[-1].Pack(detail)
    status = status_pb2.Status(code=failure.code.value[0], message=failure.message, details=packed)
    await context.abort_with_status(rpc_status.to_status(status))
    return AssertionError("abort raises")


def rejection(sequence: int, expected: int, reason: str, code: int) -> training_service_pb2.TrainResponse:
    violation = training_service_pb2.FieldViolation(field="targets", description="must be from 0 to 9")
    return training_service_pb2.TrainResponse(
        rejection=training_service_pb2.Rejection(
            sequence=sequence,
            code=code,
            reason=reason,
            message=f"because {reason}",
            field_violations=[violation] if reason == "INVALID_BATCH" else [],
            expected_sequence=expected,
        ),
        credits=1,
    )

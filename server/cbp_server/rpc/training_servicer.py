"""cbp.v1.TrainingService."""

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, TypeAlias

import grpc

from cbp_proto import WireBatch, encode_tensor, read_train_request
from cbp_proto.v1 import training_service_pb2
from cbp_server.errors import MessageTooLarge, StreamProtocolError
from cbp_server.learners.host import Host
from cbp_server.limits import Limits
from cbp_server.loop.turns import Turns
from cbp_server.rpc import convert
from cbp_server.rpc.sizes import COMPACT_BYTES
from cbp_server.streams.sessions import Accepted, Durable, Ended, Rejected, TrainSession

TRAINING_SERVICE = training_service_pb2.DESCRIPTOR.services_by_name["TrainingService"].full_name

#: Results in one response at most, and bytes of their outputs: one that has more goes alone.
_LARGEST_ACKNOWLEDGEMENT = 64
#: A response costs both sides about as much as a small batch, so it waits until one in so many of the batches under way
#: is learnt: a client that sends one at a time hears at once, and one with many never runs out of credits.
_SHARE_ANSWERED = 4
#: Seconds that a result may wait for others.
_LONGEST_DELAY = 0.01

#: Batches in one message at most.
_MOST_BATCHES = 64

#: A decoded message of a Train stream.
TrainMessage: TypeAlias = training_service_pb2.OpenStream | list[WireBatch]

if TYPE_CHECKING:  # generic in the type stubs only
    Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
    Handler: TypeAlias = grpc.RpcMethodHandler[Any, Any]


class _TrainRequest:
    """In the place of the generated class, whose decoding copies all examples several times."""

    DESCRIPTOR = training_service_pb2.TrainRequest.DESCRIPTOR

    @classmethod
    def decode(cls, data: bytes) -> TrainMessage:
        return read_train_request(data, _MOST_BATCHES)


class TrainingServicer:
    """Translates between messages and the host's sessions."""

    def __init__(self, host: Host, *, max_message_bytes: int, limits: Limits) -> None:
        self._host = host
        self._max_message_bytes = max_message_bytes
        self._limits = limits

    async def Predict(
        self, request: training_service_pb2.PredictRequest, context: "Context"
    ) -> training_service_pb2.PredictResponse:
        learner_id = convert.learner_id_of(request.learner, "learner")
        record = self._host.learner(learner_id)
        if (size := request.ByteSize()) > self._max_message_bytes:
            raise MessageTooLarge(size, self._max_message_bytes, "features")
        features = convert.features_of(request.features, record.spec, self._limits)
        report = await self._host.predict(learner_id, features)
        return training_service_pb2.PredictResponse(outputs=encode_tensor(report.outputs), step=report.step)

    async def Train(
        self, request_iterator: AsyncIterator[TrainMessage], context: "Context"
    ) -> AsyncIterator[training_service_pb2.TrainResponse]:
        session = await self._open(await anext(request_iterator, None))
        reading = asyncio.create_task(_read(request_iterator, session, self._limits))
        try:
            yield self._opened(session)
            while not isinstance(event := await session.next_event(), Ended):
                yield await _answer(session, event)
            if event.error is not None:
                raise event.error
        finally:
            session.close()
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def _open(self, stream: TrainMessage | None) -> TrainSession:
        if not isinstance(stream, training_service_pb2.OpenStream):
            raise StreamProtocolError("the first message of a Train stream must be `open`")
        return await self._host.open_stream(
            convert.learner_id_of(stream.learner, "open.learner"),
            stream.producer,
            stream_id=stream.stream_id,
            resumed_epoch=stream.resumed_epoch,
            learner_uid=stream.learner_uid,
        )

    def _opened(self, session: TrainSession) -> training_service_pb2.TrainResponse:
        producer = session.producer.record
        return training_service_pb2.TrainResponse(
            opened=training_service_pb2.StreamOpened(
                epoch=session.epoch,
                applied_sequence=session.acknowledged_sequence,
                durable_sequence=producer.durable_sequence,
                learner_uid=session.record.uid,
                max_message_bytes=self._max_message_bytes,
                next_sequence=session.next_sequence,
                max_batches_per_message=_MOST_BATCHES,
            ),
            credits=session.unused_credits,
        )


async def _read(messages: AsyncIterator[TrainMessage], session: TrainSession, limits: Limits) -> None:
    """Offers the client's batches to the session until the client has finished."""
    try:
        async for message in messages:
            if isinstance(message, training_service_pb2.OpenStream) or not message:
                raise StreamProtocolError("after `open`, every message of a Train stream must be `batch` or `batches`")
            if len(message) > _MOST_BATCHES:
                text = f"the message holds more than {_MOST_BATCHES} batches; send the others in another one"
                raise StreamProtocolError(text)
            turns = Turns()
            for batch in message:
                session.offer(convert.incoming_batch(batch, limits))
                if turns.over:
                    await turns.give_way()
            await session.wait_for_room()
    except Exception as error:
        session.end(error)
    else:
        session.end(None)


async def _answer(session: TrainSession, event: Accepted | Rejected | Durable) -> training_service_pb2.TrainResponse:
    """The response to `event`, together with those behind it that can be answered by now."""
    if isinstance(event, Rejected):
        session.answered(1)
        return convert.rejection(event)
    batches: list[Accepted] = []
    room = COMPACT_BYTES
    if isinstance(event, Accepted):
        if event.applied is not None:
            await asyncio.shield(event.applied)
        batches.append(event)
        room -= event.output_bytes
        if (enough := session.under_way(_SHARE_ANSWERED)) is not None:
            await asyncio.wait([enough], timeout=_LONGEST_DELAY)
    while len(batches) < _LARGEST_ACKNOWLEDGEMENT and (behind := session.take_applied(max(room, 0))) is not None:
        batches.append(behind)
        room -= behind.output_bytes
    session.acknowledge(batches)
    return convert.acknowledgement(session.epoch, session.acknowledged_sequence, session.durable_sequence, batches)


def add_training_service(servicer: TrainingServicer, server: grpc.aio.Server) -> None:
    """As the generated function of the service does, but for how Train's requests are decoded."""
    handlers: dict[str, Handler] = {
        "Train": grpc.stream_stream_rpc_method_handler(
            servicer.Train,
            request_deserializer=_TrainRequest.decode,
            response_serializer=training_service_pb2.TrainResponse.SerializeToString,
        ),
        "Predict": grpc.unary_unary_rpc_method_handler(
            servicer.Predict,
            request_deserializer=training_service_pb2.PredictRequest.FromString,
            response_serializer=training_service_pb2.PredictResponse.SerializeToString,
        ),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(TRAINING_SERVICE, handlers),))

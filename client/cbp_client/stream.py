"""A producer's stream of batches: reconnects, resumes, applies back-pressure. The bookkeeping is in ledger.py."""

# ruff: noqa: ASYNC109 - `timeout` covers all of a wait, with the words that say what is unfinished

import asyncio
import contextlib
import threading
import uuid
from collections.abc import Callable, Generator
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypedDict

import grpc
from numpy.typing import ArrayLike

from cbp_client import arguments, forks
from cbp_client.convert import batch_result, learner_name
from cbp_client.errors import (
    BatchRejected,
    CbpClientError,
    DeadlineExceeded,
    MessageTooLarge,
    RejectedBatch,
    ServerError,
    StreamClosed,
    Unavailable,
    rejected_batch,
)
from cbp_client.examples import EncodedBatch, examples_of
from cbp_client.ledger import HeldBatch, Ledger, StreamPosition
from cbp_client.rpc import Connection, backoff
from cbp_client.types import BatchResult, StreamSummary
from cbp_proto import MAX_MESSAGE_BYTES, encode_train_request
from cbp_proto.v1 import training_service_pb2

_OPEN_TIMEOUT = 30.0
_CLOSE_TIMEOUT = 2.0
_SEND_MANY_BYTES = 1024 * 1024
_SEQUENCE_BYTES = 24  # what the sequence and the message around it add to an encoded batch, at most
_TOGETHER_BYTES = 1024 * 1024  # of batches that go in one message
_TURN = 0.0002  # seconds for which a user who does nothing but send may keep the event loop
_OVERHEAD_BYTES = 1024  # all of a message but the tensors' data, at most

_Call = grpc.aio.StreamStreamCall[bytes, training_service_pb2.TrainResponse]


class StreamOptions(TypedDict, total=False):
    """Settings of a stream.

    return_outputs: results hold the predictions made before each update. Default False.
    max_in_flight_bytes: bound on the batches that are not yet applied; `send` waits for room. Default 16 MiB.
    resend_bytes: bound on the batches that are applied but not yet on the server's disk, kept to survive a server that
        falls back to an older one; beyond it the oldest are let go. Default 64 MiB.
    reconnect_timeout: seconds without a connection after which the stream fails; None, the default, is for ever.
    on_result: called with each batch's result, in order, on the event loop's thread; must not block. An exception
        that it raises ends the stream.
    on_rejection: called likewise with each rejected batch, which is then not raised by `send`, `flush` and `close`.
    """

    return_outputs: bool
    max_in_flight_bytes: int
    resend_bytes: int
    reconnect_timeout: float | None
    on_result: Callable[[BatchResult], None] | None
    on_rejection: Callable[[RejectedBatch], None] | None


class Ticket(forks.InOneProcess):
    """Stands for a batch that was sent. May be dropped: the stream keeps it only until the batch has its result.

    Attributes:
        number: counts the batches of the stream from 1.
    """

    def __init__(self, number: int, unreported: dict[int, RejectedBatch]) -> None:
        self.number = number
        self._unreported = unreported
        self._lock = threading.Lock()  # the stream settles on the event loop, others may wait on any thread
        self._outcome: BatchResult | BaseException | None = None
        self._awaited: Future[BatchResult] | None = None

    def done(self) -> bool:
        """Whether the batch was applied, rejected or given up."""
        return self._outcome is not None

    def result(self, timeout: float | None = None) -> BatchResult:
        """Wait for the batch's result. Blocks the thread: on an event loop, `await` the ticket instead.

        Raises:
            BatchRejected: the server did not accept it; no other call raises that for this batch again.
            DeadlineExceeded: no result after `timeout` seconds.
            CbpClientError: the stream ended before.
        """
        timeout = arguments.seconds("timeout", timeout, none="to wait for ever")
        self._check_process()
        try:
            return self._future().result(timeout)
        except TimeoutError:
            raise DeadlineExceeded(f"batch {self.number} is not applied after {timeout} s") from None
        except BatchRejected:
            self._unreported.pop(self.number, None)
            raise

    def __await__(self) -> Generator[None, None, BatchResult]:
        return self._wait().__await__()

    async def _wait(self) -> BatchResult:
        self._check_process()
        try:
            return await asyncio.shield(asyncio.wrap_future(self._future()))
        except BatchRejected:
            self._unreported.pop(self.number, None)
            raise

    def _check_process(self) -> None:
        if not self.done():  # in a forked process it never will be
            forks.check()

    def _future(self) -> Future[BatchResult]:
        """Made for whoever waits first: most tickets are dropped, and it costs more than the rest of one."""
        with self._lock:
            if self._awaited is None:
                self._awaited = Future()
                self._tell()
            return self._awaited

    def _settle(self, outcome: BatchResult | BaseException) -> None:
        with self._lock:
            self._outcome = outcome
            self._tell()

    def _tell(self) -> None:
        if self._awaited is None or self._outcome is None:
            return
        if isinstance(self._outcome, BaseException):
            self._awaited.set_exception(self._outcome)
        else:
            self._awaited.set_result(self._outcome)


class AsyncTrainingStream(forks.InOneProcess):
    """Sends one producer's batches to one learner, each applied exactly once. Made by `AsyncLearner.stream`.

    Leaving `async with` normally closes the stream, which waits until every batch is applied; leaving it by an
    exception aborts it, which gives up what is not applied yet.
    """

    def __init__(
        self,
        connection: Connection,
        learner_id: str,
        producer: str,
        *,
        return_outputs: bool = False,
        max_in_flight_bytes: int = 16 * 1024 * 1024,
        resend_bytes: int = 64 * 1024 * 1024,
        reconnect_timeout: float | None = None,
        on_result: Callable[[BatchResult], None] | None = None,
        on_rejection: Callable[[RejectedBatch], None] | None = None,
    ) -> None:
        self._connection = connection
        self._open_request = training_service_pb2.OpenStream(
            learner=learner_name(learner_id),
            producer=arguments.text("producer", producer),
            stream_id=str(uuid.uuid4()),
        )
        self._return_outputs = arguments.flag("return_outputs", return_outputs)
        self._max_in_flight_bytes = arguments.whole("max_in_flight_bytes", max_in_flight_bytes)
        self._reconnect_timeout = arguments.seconds("reconnect_timeout", reconnect_timeout, none="to go on for ever")
        self._on_result = arguments.callback("on_result", on_result)
        self._on_rejection = arguments.callback("on_rejection", on_rejection)
        self._ledger = Ledger(resend_bytes=arguments.whole("resend_bytes", resend_bytes))
        self._totals = _Totals()
        self._tickets: dict[int, Ticket] = {}  # of batches without a result
        self._unreported: dict[int, RejectedBatch] = {}
        self._sent = 0
        self._send_order = asyncio.Lock()
        self._turn_ends = 0.0  # on the event loop's clock, as is _lost_at
        self._changed = asyncio.Event()
        self._conversation: asyncio.Task[None] | None = None
        self._connected = False
        self._lost = False
        self._lost_at = 0.0
        self._delays = backoff()
        self._closing = False
        self._error: BaseException | None = None
        connection.streams.add(self)

    @property
    def position(self) -> StreamPosition:
        """Where the producer stands with the server.

        Raises:
            StreamClosed: the stream has not been opened.
        """
        if self._ledger.position is None:
            raise StreamClosed("the stream is not open: use it in a with statement, or call open()")
        return self._ledger.position

    @property
    def connected(self) -> bool:
        """Whether the server is listening now; if not, the stream is reconnecting, or closed."""
        return self._connected

    @property
    def unapplied(self) -> int:
        """Batches taken by `send` that are not known to be applied."""
        return self._ledger.unapplied

    @property
    def summary(self) -> StreamSummary:
        """Running totals."""
        return self._totals.summary()

    async def open(self) -> None:
        """Connect; returns once the server has said where the producer stands.

        Raises:
            NotFound: there is no such learner.
            LearnerQuarantined: it does not train until it is resumed.
            Unavailable: no connection within the reconnect timeout.
        """
        forks.check()
        if self._conversation is None:
            self._conversation = asyncio.create_task(self._converse_until_closed())
        try:
            while self._ledger.position is None and self._error is None:
                await self._changed.wait()
        except asyncio.CancelledError:
            await self.abort()
            raise
        self._raise_error()

    async def send(
        self, features: ArrayLike, targets: ArrayLike, *, weights: ArrayLike | None = None, task: str | int = ""
    ) -> Ticket:
        """Take a batch; waits while max_in_flight_bytes are unapplied.

        Args:
            features: [N, …], the shape of the network's examples behind N.
            targets: [N] labels or [N, out_features] numbers, depending on the learner's loss.
            weights: [N] factors of the examples' losses.
            task: a label for reports; a whole number is its digits.

        Raises:
            BatchRejected: batches sent earlier were not accepted; this one has not been taken.
            InvalidArgument: this batch can't be sent, such as MessageTooLarge; it has not been taken.
            Fenced, BatchesLost, LearnerReplaced, LearnerQuarantined, Unavailable: the stream is at its end.
        """
        return await self.send_encoded(self.encode(features, targets, weights=weights, task=task))

    async def send_many(
        self,
        features: ArrayLike,
        targets: ArrayLike,
        *,
        weights: ArrayLike | None = None,
        task: str | int = "",
        examples_per_message: int | None = None,
    ) -> list[Ticket]:
        """Send arrays of any length, cut into messages of `examples_per_message`, by default of about 1 MiB.

        A learner whose batch_size is 0 makes one step of each message, so for it the cut matters.
        """
        examples = examples_of(features, targets, weights)
        if examples_per_message is not None:
            examples_per_message = arguments.whole("examples_per_message", examples_per_message, least=1)
        else:
            wanted_bytes = min(_SEND_MANY_BYTES, self.position.max_message_bytes - _OVERHEAD_BYTES)
            examples_per_message = max(1, len(examples) * wanted_bytes // max(1, examples.nbytes))
        return [
            await self.send_encoded(part.encode(task=task, return_outputs=self._return_outputs))
            for part in examples.parts(examples_per_message)
        ]

    def encode(
        self, features: ArrayLike, targets: ArrayLike, *, weights: ArrayLike | None, task: str | int
    ) -> EncodedBatch:
        """The message of a batch, which shares nothing with the arrays; may be called on any thread.

        Raises:
            InvalidArgument: something is not an array of numbers, or the lengths differ.
        """
        return examples_of(features, targets, weights).encode(task=task, return_outputs=self._return_outputs)

    async def send_encoded(self, batch: EncodedBatch) -> Ticket:
        """`send` for a message that is made already."""
        forks.check()
        size = len(batch.encoded)
        limit = min(self.position.max_message_bytes, MAX_MESSAGE_BYTES) - _SEQUENCE_BYTES
        if size > limit:
            raise MessageTooLarge(
                f"{batch.examples} examples make a message of {size} bytes, but one may have at most {limit}; send "
                "fewer at once, or use send_many, which cuts them up",
                reason="MESSAGE_TOO_LARGE",
            )
        await self._let_others_run()
        async with self._send_order:
            while True:
                self._raise_error()
                self._raise_rejections()
                if self._ledger.unapplied == 0 or self._ledger.waiting_bytes + size <= self._max_in_flight_bytes:
                    break
                await self._changed.wait()
            self._sent += 1
            ticket = self._tickets[self._sent] = Ticket(self._sent, self._unreported)
            self._ledger.append(HeldBatch(number=self._sent, batch=batch))
        self._notify()
        return ticket

    async def _let_others_run(self) -> None:
        """Lets the stream send while its user does nothing but fill it; not for each batch, since a round of the event
        loop costs about as much as taking a small one, and what is filled meanwhile goes together."""
        clock = asyncio.get_running_loop().time
        if clock() >= self._turn_ends:
            await asyncio.sleep(0)
            self._turn_ends = clock() + _TURN

    async def flush(self, *, durable: bool = False, timeout: float | None = None) -> None:
        """Wait until every batch is applied, and if `durable` also until the server has it on disk.

        Raises:
            BatchRejected: batches were not accepted; all others are applied or on their way.
            DeadlineExceeded: not done after `timeout` seconds; nothing is lost, and the stream goes on.
            Fenced, BatchesLost, LearnerReplaced, LearnerQuarantined, Unavailable: the stream is at its end.
        """
        forks.check()
        durable = arguments.flag("durable", durable)
        timeout = arguments.seconds("timeout", timeout, none="to wait for ever")
        try:
            async with asyncio.timeout(timeout):
                while True:
                    self._raise_error()
                    if self._ledger.unapplied == 0 and (self._ledger.durable or not durable):
                        break
                    await self._changed.wait()
        except TimeoutError:
            raise DeadlineExceeded(
                f"{self._ledger.unapplied} batches are not applied after {timeout} s"
                if self._ledger.unapplied
                else f"the batches are applied, but not durable after {timeout} s"
            ) from None
        self._raise_rejections()

    async def close(self) -> None:
        """Wait until every batch is applied, then end the stream. Does nothing if it is closed already.

        Raises:
            What `flush` does.
        """
        if self._closing:
            return
        try:
            if self._conversation is not None:
                await self.flush()
        finally:
            self._closing = True
            self._notify()
            if self._conversation is not None and self._connected and self._ledger.unapplied == 0:
                await asyncio.wait([self._conversation], timeout=_CLOSE_TIMEOUT)
            await self.abort()

    async def abort(self) -> None:
        """End the stream at once. Batches that are not known to be applied are given up: their tickets raise
        StreamClosed, and whether the server has them shows in the next stream's `position`. In a forked process nothing
        happens: the stream is that of the process before."""
        if forks.forked():
            return
        if self._conversation is not None and not self._conversation.done():
            self._conversation.cancel()
            await asyncio.wait([self._conversation])
        self._closing = True
        self._end(StreamClosed("the stream is closed"))

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if exc_type is None:
            await self.close()
        else:
            await self.abort()

    async def _converse_until_closed(self) -> None:
        try:
            self._lost_at = asyncio.get_running_loop().time()
            while not self._closing:
                try:
                    await self._converse()
                except (Unavailable, DeadlineExceeded) as error:
                    await self._pause(error)
        except Exception as error:
            self._end(error)
        except asyncio.CancelledError:  # by `abort`, or because the event loop ends
            self._end(StreamClosed("the stream is closed"))
            raise

    async def _pause(self, lost: CbpClientError) -> None:
        self._lost = True
        delay = max(next(self._delays), lost.retry_after or 0.0)
        outage = asyncio.get_running_loop().time() + delay - self._lost_at
        if self._reconnect_timeout is not None and outage > self._reconnect_timeout:
            raise lost
        await asyncio.sleep(delay)

    async def _converse(self) -> None:
        """One call to the server, from its opening until it ends or a rejection makes a new one necessary."""
        call = self._connection.train()
        writer = None
        try:
            with self._connection.translated_errors():
                await self._open_call(call)
                writer = asyncio.create_task(self._write(call))
                while not self._ledger.must_reopen:
                    response = await call.read()
                    if not isinstance(response, training_service_pb2.TrainResponse):  # end of the call, status OK
                        if self._closing:
                            return
                        raise Unavailable("the server ended the stream")
                    self._receive(response)
        finally:
            call.cancel()
            if writer is not None:
                writer.cancel()
                await asyncio.wait([writer])
            if self._connected:
                self._connected = False
                self._lost_at = asyncio.get_running_loop().time()

    async def _open_call(self, call: _Call) -> None:
        await _write(call, training_service_pb2.TrainRequest(open=self._open_request).SerializeToString())
        try:
            async with asyncio.timeout(_OPEN_TIMEOUT):
                response = await call.read()
        except TimeoutError:
            raise Unavailable(f"the server did not open the stream within {_OPEN_TIMEOUT} s") from None
        if not isinstance(response, training_service_pb2.TrainResponse) or not response.HasField("opened"):
            raise ServerError("the server did not answer the opening of the stream", reason="STREAM_PROTOCOL")
        self._totals.reconnections += self._lost and self._ledger.position is not None
        self._lost = False
        untold = self._ledger.opened(response.opened, response.credits)
        self._open_request.resumed_epoch = response.opened.epoch
        self._open_request.learner_uid = response.opened.learner_uid
        for batch in untold:
            self._finish(batch, training_service_pb2.BatchResult(sequence=batch.sequence, duplicate=True))
        self._connected = True
        self._notify()

    async def _write(self, call: _Call) -> None:
        while True:
            changed = self._changed
            batches = self._ledger.take_next(_TOGETHER_BYTES)
            if batches:
                if not await _write(
                    call, encode_train_request([(held.sequence, held.batch.encoded) for held in batches])
                ):
                    return
            elif self._closing and self._ledger.unapplied == 0:
                with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                    await call.done_writing()
                return
            else:
                await changed.wait()

    def _receive(self, response: training_service_pb2.TrainResponse) -> None:
        self._ledger.credits += response.credits
        match response.WhichOneof("message"):
            case "acknowledgement":
                results = {result.sequence: result for result in response.acknowledgement.results}
                for batch in self._ledger.acknowledged(response.acknowledgement):
                    untold = training_service_pb2.BatchResult(sequence=batch.sequence, duplicate=True)
                    self._finish(batch, results.get(batch.sequence, untold))
                    self._delays = backoff()
            case "rejection":
                batch_or_none = self._ledger.rejected(response.rejection)
                if batch_or_none is not None:
                    self._reject(batch_or_none, response.rejection)
            case "opened":
                raise ServerError("the server opened the stream twice", reason="STREAM_PROTOCOL")
        self._notify()

    def _finish(self, batch: HeldBatch, result: training_service_pb2.BatchResult) -> None:
        if batch.finished:
            return
        batch.finished = True
        outcome = batch_result(result, number=batch.number, task=batch.batch.task)
        self._totals.add(outcome)
        self._tickets.pop(batch.number)._settle(outcome)
        if self._on_result is not None:
            self._on_result(outcome)

    def _reject(self, batch: HeldBatch, rejection: training_service_pb2.Rejection) -> None:
        rejected = rejected_batch(rejection, number=batch.number, task=batch.batch.task)
        self._totals.rejected += 1
        if self._on_rejection is None:
            self._unreported[batch.number] = rejected
        ticket = self._tickets.pop(batch.number, None)
        if ticket is not None:  # else it was applied once, by a server that fell back since and accepts less now
            ticket._settle(BatchRejected([rejected]))
        if self._on_rejection is not None:
            self._on_rejection(rejected)

    def _end(self, error: BaseException) -> None:
        if self._error is None:
            self._error = error
        self._ledger.abandon()
        for ticket in self._tickets.values():
            ticket._settle(self._error)
        self._tickets.clear()
        self._notify()

    def _raise_error(self) -> None:
        if self._error is not None:
            rejected = self._take_unreported()
            raise self._error from (BatchRejected(rejected) if rejected else None)

    def _raise_rejections(self) -> None:
        rejected = self._take_unreported()
        if rejected:
            raise BatchRejected(rejected)

    def _take_unreported(self) -> list[RejectedBatch]:
        rejected = list(self._unreported.values())
        self._unreported.clear()
        return rejected

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


async def _write(call: _Call, request: bytes) -> bool:
    """Whether the call took the message; if not it has ended, and reading from it says why."""
    try:
        await call.write(request)
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
        return False
    return True


@dataclass
class _Totals:
    batches: int = 0
    examples: int = 0
    steps: int = 0
    rejected: int = 0
    reconnections: int = 0
    _loss: float = 0.0  # summed over the examples that it is known of, as is the accuracy
    _loss_examples: int = 0
    _accuracy: float = 0.0
    _accuracy_examples: int = 0

    def add(self, result: BatchResult) -> None:
        self.batches += 1
        self.examples += result.examples
        self.steps += result.steps
        if result.loss is not None:
            self._loss += result.loss * result.examples
            self._loss_examples += result.examples
        if result.accuracy is not None:
            self._accuracy += result.accuracy * result.examples
            self._accuracy_examples += result.examples

    def summary(self) -> StreamSummary:
        return StreamSummary(
            batches=self.batches,
            examples=self.examples,
            steps=self.steps,
            loss=self._loss / self._loss_examples if self._loss_examples else None,
            accuracy=self._accuracy / self._accuracy_examples if self._accuracy_examples else None,
            rejected=self.rejected,
            reconnections=self.reconnections,
        )

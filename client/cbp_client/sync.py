"""The synchronous client: the asynchronous one on an event loop of its own, in one background thread."""

import asyncio
import contextlib
import threading
import weakref
from collections.abc import AsyncGenerator, Coroutine, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Never, Self, TypeVar, Unpack

import grpc
from numpy.typing import ArrayLike

from cbp_client import forks
from cbp_client.aio import DEFAULT_TIMEOUT, AsyncClient
from cbp_client.errors import ClientUnusable
from cbp_client.learner import TRANSFER_TIMEOUT, AsyncLearner, Plain
from cbp_client.ledger import StreamPosition
from cbp_client.stream import AsyncTrainingStream, StreamOptions, Ticket
from cbp_client.target import DEFAULT_TARGET
from cbp_client.transfer import PathOrFile
from cbp_client.types import (
    Checkpoint,
    CheckpointList,
    Durability,
    ExportFormat,
    LearnerInfo,
    PlasticitySample,
    Prediction,
    StreamSummary,
    WatchUpdate,
)

ResultT = TypeVar("ResultT")


class _Running:
    """An event loop in a daemon thread, which ends with its owner or the interpreter, whichever is first."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="cbp-client", daemon=True)
        self.thread.start()
        self.stop = weakref.finalize(self, _stop, self.loop, self.thread)


class _LoopThread:
    """Runs coroutines on an event loop of its own, from the first one on: a client that has done nothing may be made
    before a fork and used behind it."""

    def __init__(self) -> None:
        self._starting = threading.Lock()
        self._running: _Running | None = None
        self._stopped = False

    @property
    def usable(self) -> bool:
        """Whether coroutines still run here."""
        ended = self._stopped or (self._running is not None and not self._running.stop.alive)
        return not ended and not forks.forked()

    @property
    def started(self) -> bool:
        """Whether any coroutine ever ran here."""
        return self._running is not None

    def run(self, coroutine: Coroutine[Any, Any, ResultT]) -> ResultT:
        """Run to the end on the loop; an interrupt of the waiting thread cancels."""
        try:
            running = self._started()
        except BaseException:
            coroutine.close()
            raise
        future = asyncio.run_coroutine_threadsafe(coroutine, running.loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def _started(self) -> _Running:
        forks.note_use()  # before the lock, which a fork may leave locked
        with self._starting:
            if not self.usable:
                raise ClientUnusable("the client is closed; make a new one", reason="CLIENT_CLOSED")
            if self._running is None:
                self._running = _Running()
        if threading.current_thread() is self._running.thread:
            raise ClientUnusable(
                "a callback of a stream must not call the client, whose thread it runs on", reason="CLIENT_CALLBACK"
            )
        return self._running

    def stop(self) -> None:
        """End the loop and its thread."""
        with self._starting:
            self._stopped = True
        if self._running is not None:  # outside the lock: a callback on that thread may be waiting for it
            self._running.stop()

    def iterate(self, items: AsyncGenerator[ResultT]) -> Iterator[ResultT]:
        """Iterate on the loop; the asynchronous iterator ends along with this one."""
        try:
            while (item := self.run(_next(items))) is not None:
                yield item
        finally:
            if self.usable:
                self.run(_close(items))


async def _next(items: AsyncGenerator[ResultT]) -> ResultT | None:
    return await anext(items, None)


async def _close(items: AsyncGenerator[Any]) -> None:
    with contextlib.suppress(RuntimeError):  # an interrupt is ending it already
        await items.aclose()


def _stop(loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    if forks.forked():  # loop and thread are those of the process before, which still uses their files
        return
    asyncio.run_coroutine_threadsafe(_cancel_tasks(), loop).add_done_callback(
        lambda _: loop.call_soon_threadsafe(loop.stop)
    )
    if threading.current_thread() is not thread:
        thread.join()
        loop.close()


async def _cancel_tasks() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class TrainingStream(forks.InOneProcess):
    """Sends one producer's batches to one learner, each applied exactly once. Made by `Learner.stream`.

    Leaving `with` normally closes the stream, which waits until every batch is applied; leaving it by an exception
    aborts it, which gives up what is not applied yet. May be used by several threads.
    """

    def __init__(self, loop: _LoopThread, stream: AsyncTrainingStream) -> None:
        self._loop = loop
        self._stream = stream

    @property
    def position(self) -> StreamPosition:
        """Where the producer stands with the server."""
        return self._stream.position

    @property
    def connected(self) -> bool:
        """Whether the server is listening now; if not, the stream is reconnecting, or closed."""
        return self._stream.connected

    @property
    def unapplied(self) -> int:
        """Batches taken by `send` that are not known to be applied."""
        return self._stream.unapplied

    @property
    def summary(self) -> StreamSummary:
        """Running totals."""
        return self._stream.summary

    def open(self) -> None:
        """Connect, as `with` does; see `AsyncTrainingStream.open`."""
        self._loop.run(self._stream.open())

    def send(
        self, features: ArrayLike, targets: ArrayLike, *, weights: ArrayLike | None = None, task: str | int = ""
    ) -> Ticket:
        """Take a batch; blocks while max_in_flight_bytes are unapplied.

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
        batch = self._stream.encode(features, targets, weights=weights, task=task)
        return self._loop.run(self._stream.send_encoded(batch))

    def send_many(
        self,
        features: ArrayLike,
        targets: ArrayLike,
        *,
        weights: ArrayLike | None = None,
        task: str | int = "",
        examples_per_message: int | None = None,
    ) -> list[Ticket]:
        """Send arrays of any length in several messages; see `AsyncTrainingStream.send_many`."""
        return self._loop.run(
            self._stream.send_many(
                features, targets, weights=weights, task=task, examples_per_message=examples_per_message
            )
        )

    def flush(self, *, durable: bool = False, timeout: float | None = None) -> None:
        """Wait until every batch is applied, and if `durable` also until the server has it on disk;
        see `AsyncTrainingStream.flush`."""
        self._loop.run(self._stream.flush(durable=durable, timeout=timeout))

    def close(self) -> None:
        """Wait until every batch is applied, then end the stream; see `AsyncTrainingStream.close`."""
        self._loop.run(self._stream.close())

    def abort(self) -> None:
        """End the stream at once; see `AsyncTrainingStream.abort`."""
        if not forks.forked():  # there it is the stream of the process before
            self._loop.run(self._stream.abort())

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if exc_type is None:
            self.close()
        else:
            self.abort()


class Learner(forks.InOneProcess):
    """A learner on the server; the synchronous `AsyncLearner`."""

    def __init__(self, loop: _LoopThread, learner: AsyncLearner) -> None:
        self._loop = loop
        self._learner = learner

    @property
    def id(self) -> str:
        """The learner's id."""
        return self._learner.id

    @property
    def info(self) -> LearnerInfo:
        """What the server last said of the learner; see `refresh`."""
        return self._learner.info

    def refresh(self) -> LearnerInfo:
        """Ask the server for the learner's state now."""
        return self._loop.run(self._learner.refresh())

    def update(
        self,
        *,
        resets: Plain | None = None,
        optimizer: Plain | None = None,
        monitoring: Plain | None = None,
        durability: Durability | None = None,
        if_unchanged: bool = False,
        **unchangeable: Never,
    ) -> LearnerInfo:
        """Change exactly the given entries of a live learner, between two steps; see `AsyncLearner.update`."""
        return self._loop.run(
            self._learner.update(
                resets=resets,
                optimizer=optimizer,
                monitoring=monitoring,
                durability=durability,
                if_unchanged=if_unchanged,
                **unchangeable,
            )
        )

    def delete(self, *, if_unchanged: bool = False) -> LearnerInfo:
        """Delete the learner, which can be undeleted until `purge_time`; see `AsyncLearner.delete`."""
        return self._loop.run(self._learner.delete(if_unchanged=if_unchanged))

    def fork(self, learner_id: str, *, durability: Durability | None = None) -> Self:
        """Copy the learner between two of its steps, under a new id; see `AsyncLearner.fork`."""
        return type(self)(self._loop, self._loop.run(self._learner.fork(learner_id, durability=durability)))

    def checkpoint(self) -> Checkpoint:
        """Save the learner's whole state, and keep it until `delete_checkpoint`."""
        return self._loop.run(self._learner.checkpoint())

    def checkpoints(self) -> CheckpointList:
        """The learner's checkpoints, newest first, and the journal positions that `restore` can reach."""
        return self._loop.run(self._learner.checkpoints())

    def delete_checkpoint(self, number: int) -> None:
        """Delete a checkpoint; see `AsyncLearner.delete_checkpoint`."""
        self._loop.run(self._learner.delete_checkpoint(number))

    def forget_producer(self, producer: str) -> None:
        """Give a producer's name free; see `AsyncLearner.forget_producer`."""
        self._loop.run(self._learner.forget_producer(producer))

    def restore(
        self, *, checkpoint: int | None = None, position: int | None = None, if_unchanged: bool = False
    ) -> LearnerInfo:
        """Take the learner back to a checkpoint or a journal position; see `AsyncLearner.restore`."""
        return self._loop.run(
            self._learner.restore(checkpoint=checkpoint, position=position, if_unchanged=if_unchanged)
        )

    def resume(self, *, lr: float | None = None, skip_batch: bool = False) -> LearnerInfo:
        """Let a quarantined learner go on; see `AsyncLearner.resume`."""
        return self._loop.run(self._learner.resume(lr=lr, skip_batch=skip_batch))

    def reset_units(self, layers: str | int | Sequence[str | int], fraction: float) -> dict[str, int]:
        """Reset units of least utility by hand; returns how many, by layer. See `AsyncLearner.reset_units`."""
        return self._loop.run(self._learner.reset_units(layers, fraction))

    def export(
        self, target: PathOrFile, *, format: ExportFormat | None = None, timeout: float | None = TRANSFER_TIMEOUT
    ) -> int:
        """Write the learner to a file; returns its size in bytes. See `AsyncLearner.export`."""
        return self._loop.run(self._learner.export(target, format=format, timeout=timeout))

    def predict(self, features: ArrayLike, *, timeout: float | None = None) -> Prediction:
        """Predict for features [N, …] with the learner's state between two steps; changes nothing."""
        return self._loop.run(self._learner.predict(features, timeout=timeout))

    def plasticity(self, *, history: int = 1, fresh: bool = False) -> list[PlasticitySample]:
        """The newest `history` plasticity samples, oldest first; `fresh` measures now."""
        return self._loop.run(self._learner.plasticity(history=history, fresh=fresh))

    def stream(self, producer: str, **options: Unpack[StreamOptions]) -> TrainingStream:
        """A stream of training batches, to be used in `with`; see `StreamOptions`."""
        return TrainingStream(self._loop, self._learner.stream(producer, **options))

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id}>"


class Client(forks.InOneProcess):
    """A client of one server; may be used by several threads.

    Args:
        target: host and port of the server's gRPC endpoint; the port is 50051 if there is none.
        timeout: seconds that a call may take, with its retries, unless it says otherwise; None for no limit.
        credentials: for a server behind TLS.

    Raises:
        InvalidArgument: an argument is wrong.
        ClientUnusable: the process was forked after a client had been used; see docs/client.md.
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        timeout: float | None = DEFAULT_TIMEOUT,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        self._client = AsyncClient(target, timeout=timeout, credentials=credentials)
        self._loop = _LoopThread()

    def close(self) -> None:
        """Close the connection and end the background thread. Streams still open are aborted. In a forked process
        nothing happens: the connection is that of the process before."""
        if self._loop.usable:
            if self._loop.started:
                self._loop.run(self._client.close())
            self._loop.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def wait_until_ready(self, timeout: float | None = DEFAULT_TIMEOUT) -> None:
        """Return as soon as the server answers; raises Unavailable if it does not within `timeout` seconds. None waits
        for ever."""
        self._loop.run(self._client.wait_until_ready(timeout))

    def create_learner(
        self,
        learner_id: str,
        *,
        network: Plain,
        loss: str | Plain | None = None,
        optimizer: str | Plain | None = None,
        batch_size: int | None = None,
        seed: int | None = None,
        precision: str | None = None,
        resets: Plain | None = None,
        methods: Sequence[Plain] | None = None,
        monitoring: Plain | None = None,
        durability: Durability | None = None,
        exist_ok: bool = False,
    ) -> Learner:
        """Create a learner; what is left out takes the server's documented default. See `AsyncClient.create_learner`
        for what the arguments may be."""
        return Learner(
            self._loop,
            self._loop.run(
                self._client.create_learner(
                    learner_id,
                    network=network,
                    loss=loss,
                    optimizer=optimizer,
                    batch_size=batch_size,
                    seed=seed,
                    precision=precision,
                    resets=resets,
                    methods=methods,
                    monitoring=monitoring,
                    durability=durability,
                    exist_ok=exist_ok,
                )
            ),
        )

    def get_learner(self, learner_id: str) -> Learner:
        """The learner of that id; raises NotFound if there is none."""
        return Learner(self._loop, self._loop.run(self._client.get_learner(learner_id)))

    def list_learners(self, *, show_deleted: bool = False) -> Iterator[Learner]:
        """All learners, in the order of their ids; if `show_deleted` also those that can be undeleted."""
        for learner in self._loop.iterate(self._client.list_learners(show_deleted=show_deleted)):
            yield Learner(self._loop, learner)

    def delete_learner(self, learner_id: str) -> LearnerInfo:
        """Delete a learner, which can be undeleted until `purge_time`; raises NotFound if there is none of that id."""
        return self._loop.run(self._client.delete_learner(learner_id))

    def undelete_learner(self, learner_id: str, *, uid: str | None = None) -> Learner:
        """Bring a deleted learner back as it was; see `AsyncClient.undelete_learner`."""
        return Learner(self._loop, self._loop.run(self._client.undelete_learner(learner_id, uid=uid)))

    def purge_learner(self, learner_id: str, *, uid: str | None = None) -> None:
        """Remove a deleted learner for good; see `AsyncClient.purge_learner`."""
        self._loop.run(self._client.purge_learner(learner_id, uid=uid))

    def import_learner(
        self,
        learner_id: str,
        source: PathOrFile,
        *,
        durability: Durability | None = None,
        timeout: float | None = TRANSFER_TIMEOUT,
    ) -> Learner:
        """Create a learner from a file that `Learner.export` made; see `AsyncClient.import_learner`."""
        return Learner(
            self._loop,
            self._loop.run(self._client.import_learner(learner_id, source, durability=durability, timeout=timeout)),
        )

    def watch(self, learner_ids: str | Iterable[str] | None = None, *, interval: float = 1.0) -> Iterator[WatchUpdate]:
        """What happens to learners: all watched ones at once, then those that have changed, as they change; see
        `AsyncClient.watch`."""
        return self._loop.iterate(self._client.watch(learner_ids, interval=interval))

"""The asynchronous client, which the synchronous one wraps."""

# ruff: noqa: ASYNC109 - `timeout` covers a call with its retries, as users of gRPC know it

import asyncio
import contextlib
import uuid
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import grpc
from google.protobuf.duration_pb2 import Duration

from cbp_client import convert
from cbp_client.errors import AlreadyExists, DeadlineExceeded, Unavailable
from cbp_client.learner import TRANSFER_TIMEOUT, AsyncLearner, Plain, learner_info, spec_message
from cbp_client.rpc import Connection, backoff
from cbp_client.transfer import PathOrFile, upload
from cbp_client.types import Durability, LearnerInfo, WatchUpdate
from cbp_proto import to_plain
from cbp_proto.v1 import learner_pb2, learner_service_pb2

DEFAULT_TARGET = "localhost:50051"
DEFAULT_TIMEOUT = 30.0
_PAGE_SIZE = 200
_IMMUTABLE = ("network", "loss", "batch_size", "seed", "precision", "methods")


class AsyncClient:
    """A client of one server, for use on one event loop.

    Args:
        target: host:port of the server's gRPC endpoint.
        timeout: seconds that a call may take, with its retries, unless it says otherwise.
        credentials: for a server behind TLS.
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        timeout: float = DEFAULT_TIMEOUT,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        self._connection = Connection(target, timeout=timeout, credentials=credentials)

    async def close(self) -> None:
        """Close the connection. Streams still open are aborted."""
        await self._connection.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def wait_until_ready(self, timeout: float = DEFAULT_TIMEOUT) -> None:
        """Return as soon as the server answers.

        Raises:
            Unavailable: it does not within `timeout` seconds.
        """
        request = learner_service_pb2.ListLearnersRequest(page_size=1)
        deadline = _now() + timeout
        for delay in backoff(most=1.0):
            try:
                await self._connection.call(
                    self._connection.learners.ListLearners, request, retry=False, timeout=max(0.1, deadline - _now())
                )
            except (Unavailable, DeadlineExceeded) as error:
                if _now() + delay >= deadline:
                    raise Unavailable(f"not ready after {timeout} s: {error.message}", reason=error.reason) from None
                await asyncio.sleep(delay)
            else:
                return

    async def create_learner(
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
    ) -> AsyncLearner:
        """Create a learner; what is left out takes the server's documented default.

        Args:
            learner_id: 1 to 63 characters of a-z, 0-9 and hyphen, a letter first, no hyphen last.
            network: of any kind, see docs/networks.md; such as
                `{"kind": "mlp", "in_features": 64, "hidden": [100, 100], "out_features": 10,
                "activation": "relu"}`.
            loss: "cross_entropy", "mse", "huber" or "binary_cross_entropy", or such as `{"kind": "huber", "delta": 2}`.
            optimizer: "sgd", "rmsprop", "adam" or "adamw", or such as `{"kind": "sgd", "lr": 0.01}`.
            batch_size: examples in one step; 0 makes every message one step.
            seed: of the initial weights and every later draw.
            precision: "float32", or "bfloat16" for mixed precision; see docs/networks.md.
            resets: continual backprop, such as `{"layers": "first", "replacement_rate": 1e-4}`.
            methods: other methods against loss of plasticity, see docs/methods.md; such as
                `[{"kind": "l2_init", "strength": 1e-3}]`.
            monitoring: how plasticity is measured.
            durability: what an acknowledged batch survives: "fsync" power loss, "os" a crash of the server, "none"
                nothing before the next checkpoint.
            exist_ok: return a learner that exists already, unless what it is can't be changed and differs from what
                is given here: network, loss, batch_size, seed, precision or methods. Other settings stay as they are.

        Raises:
            AlreadyExists: the id is taken.
            InvalidArgument: the id or an entry is wrong; `violations` names them.
        """
        plain = {
            "network": network,
            "loss": loss,
            "optimizer": optimizer,
            "batch_size": batch_size,
            "seed": seed,
            "precision": precision,
            "resets": resets,
            "methods": methods,
            "monitoring": monitoring,
        }
        spec = spec_message(plain)
        request = learner_service_pb2.CreateLearnerRequest(
            learner_id=learner_id,
            learner=learner_pb2.Learner(spec=spec, durability=convert.durability(durability)),
            request_id=str(uuid.uuid4()),
        )
        try:
            answer = await self._connection.call(self._connection.learners.CreateLearner, request, retry=True)
        except AlreadyExists:
            if not exist_ok:
                raise
            learner = await self.get_learner(learner_id)
            _check_same(to_plain(spec), learner.info)
            return learner
        return AsyncLearner(self._connection, convert.learner_info(answer))

    async def get_learner(self, learner_id: str) -> AsyncLearner:
        """The learner of that id.

        Raises:
            NotFound: there is none.
        """
        return AsyncLearner(self._connection, await learner_info(self._connection, learner_id))

    async def list_learners(self, *, show_deleted: bool = False) -> AsyncGenerator[AsyncLearner]:
        """All learners, in the order of their ids; if `show_deleted` also those that can be undeleted."""
        request = learner_service_pb2.ListLearnersRequest(page_size=_PAGE_SIZE, show_deleted=show_deleted)
        while True:
            answer = await self._connection.call(self._connection.learners.ListLearners, request, retry=True)
            for learner in answer.learners:
                yield AsyncLearner(self._connection, convert.learner_info(learner))
            if not answer.next_page_token:
                return
            request.page_token = answer.next_page_token

    async def delete_learner(self, learner_id: str) -> LearnerInfo:
        """Delete a learner: its id is free. Until the `purge_time` of the answer, `undelete_learner` brings it back.

        Raises:
            NotFound: there is none of that id.
        """
        request = learner_service_pb2.DeleteLearnerRequest(name=convert.learner_name(learner_id))
        answer = await self._connection.call(self._connection.learners.DeleteLearner, request, retry=False)
        return convert.learner_info(answer)

    async def undelete_learner(self, learner_id: str, *, uid: str | None = None) -> AsyncLearner:
        """Bring a deleted learner back as it was.

        Args:
            learner_id: its id.
            uid: which of the deleted learners of that id; None for the one deleted last.

        Raises:
            NotFound: there is none, or it has been purged.
            AlreadyExists: the id has been taken meanwhile.
        """
        request = learner_service_pb2.UndeleteLearnerRequest(name=convert.learner_name(learner_id), uid=uid or "")
        answer = await self._connection.call(self._connection.learners.UndeleteLearner, request, retry=False)
        return AsyncLearner(self._connection, convert.learner_info(answer))

    async def purge_learner(self, learner_id: str, *, uid: str | None = None) -> None:
        """Remove a deleted learner, its checkpoints and its journal for good.

        Args:
            learner_id: its id.
            uid: which of the deleted learners of that id; None for all of them.

        Raises:
            NotFound: there is none.
            FailedPrecondition: the learner is not deleted.
        """
        request = learner_service_pb2.PurgeLearnerRequest(name=convert.learner_name(learner_id), uid=uid or "")
        await self._connection.call(self._connection.learners.PurgeLearner, request, retry=False)

    async def import_learner(
        self,
        learner_id: str,
        source: PathOrFile,
        *,
        durability: Durability | None = None,
        timeout: float = TRANSFER_TIMEOUT,
    ) -> AsyncLearner:
        """Create a learner from a file that `export` made with the format "safetensors".

        Args:
            learner_id: of the new learner.
            source: a path, or a file opened in binary mode.
            durability: as in `create_learner`.
            timeout: seconds for all of it.

        Raises:
            AlreadyExists: the id is taken.
            InvalidArgument: the file is something else, or damaged.
        """
        header = learner_service_pb2.ImportHeader(
            learner_id=learner_id, request_id=str(uuid.uuid4()), durability=convert.durability(durability)
        )
        return AsyncLearner(
            self._connection,
            convert.learner_info(await upload(self._connection, header, source, timeout=timeout)),
        )

    async def watch(
        self, learner_ids: Iterable[str] | None = None, *, interval: float = 1.0
    ) -> AsyncGenerator[WatchUpdate]:
        """What happens to learners: all watched ones at once, then those that have changed, as they change.

        Args:
            learner_ids: which; None means all, also those created later.
            interval: least seconds between two updates.
        """
        period = Duration()
        period.FromNanoseconds(round(interval * 1e9))
        request = learner_service_pb2.WatchLearnersRequest(
            names=[convert.learner_name(learner_id) for learner_id in learner_ids or ()], interval=period
        )
        responses = self._connection.learners.WatchLearners(request)
        async with contextlib.aclosing(self._connection.stream(responses)) as messages:
            collected = learner_service_pb2.WatchLearnersResponse()
            async for message in messages:
                collected.MergeFrom(message)
                if not message.more_follow:  # many learners come in several messages
                    yield convert.watch_update(collected)
                    collected = learner_service_pb2.WatchLearnersResponse()


def _check_same(wanted: Plain, info: LearnerInfo) -> None:
    for part in _IMMUTABLE:
        if part in wanted and not _agrees(wanted[part], info.spec.get(part)):
            raise AlreadyExists(
                f"learner {info.id} exists with {part} {info.spec.get(part)}, not {wanted[part]}; "
                "choose another id or delete it",
                reason="LEARNER_EXISTS",
            )


def _agrees(wanted: Any, existing: Any) -> bool:
    if isinstance(wanted, Mapping) and isinstance(existing, Mapping):
        return all(_agrees(value, existing.get(key)) for key, value in wanted.items())
    if isinstance(wanted, list) and isinstance(existing, list):
        return len(wanted) == len(existing) and all(map(_agrees, wanted, existing))
    return bool(wanted == existing)


def _now() -> float:
    return asyncio.get_running_loop().time()

"""The asynchronous client, which the synchronous one wraps."""

# ruff: noqa: ASYNC109 - `timeout` covers a call with its retries, as users of gRPC know it

import asyncio
import contextlib
import math
import uuid
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import grpc
from google.protobuf.duration_pb2 import Duration

from cbp_client import arguments, convert, forks
from cbp_client.errors import AlreadyExists, DeadlineExceeded, Unavailable
from cbp_client.learner import TRANSFER_TIMEOUT, AsyncLearner, Plain, learner_info, spec_message
from cbp_client.rpc import Connection, backoff
from cbp_client.target import DEFAULT_TARGET
from cbp_client.transfer import PathOrFile, upload
from cbp_client.types import Durability, LearnerInfo, WatchUpdate
from cbp_proto import to_plain
from cbp_proto.v1 import learner_pb2, learner_service_pb2

DEFAULT_TIMEOUT = 30.0
_PAGE_SIZE = 200
_IMMUTABLE = ("network", "loss", "batch_size", "seed", "precision", "methods")


class AsyncClient(forks.InOneProcess):
    """A client of one server, for use on one event loop at a time: that of its first call. May be made before there is
    one, such as at the top of an application's module.

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
        self._connection = Connection(target, timeout=timeout, credentials=credentials)

    async def close(self) -> None:
        """Close the connection. Streams still open are aborted. In a forked process nothing happens: the connection is
        that of the process before."""
        await self._connection.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def wait_until_ready(self, timeout: float | None = DEFAULT_TIMEOUT) -> None:
        """Return as soon as the server answers; None waits for ever.

        Raises:
            Unavailable: it does not within `timeout` seconds.
        """
        request = learner_service_pb2.ListLearnersRequest(page_size=1)
        timeout = arguments.seconds("timeout", timeout, none="to wait for ever")
        deadline = math.inf if timeout is None else _now() + timeout
        for delay in backoff(most=1.0):
            try:
                await self._connection.call(
                    self._connection.learners.ListLearners,
                    request,
                    retry=False,
                    timeout=min(max(0.1, deadline - _now()), DEFAULT_TIMEOUT),
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
            network: of any kind, see docs/networks.md, an "mlp" if it names none; such as
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
                is given here: network, loss, optimizer's kind, batch_size, seed, precision or methods. Other settings
                stay as they are.

        Raises:
            AlreadyExists: the id is taken.
            InvalidArgument: the id or an entry is wrong; `violations` names them.
        """
        plain = {
            "network": _with_kind(network),
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
        exist_ok = arguments.flag("exist_ok", exist_ok)
        request = learner_service_pb2.CreateLearnerRequest(
            learner_id=arguments.text("learner_id", learner_id),
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
        request = learner_service_pb2.ListLearnersRequest(
            page_size=_PAGE_SIZE, show_deleted=arguments.flag("show_deleted", show_deleted)
        )
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
        request = learner_service_pb2.UndeleteLearnerRequest(
            name=convert.learner_name(learner_id), uid=arguments.optional_text("uid", uid) or ""
        )
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
        request = learner_service_pb2.PurgeLearnerRequest(
            name=convert.learner_name(learner_id), uid=arguments.optional_text("uid", uid) or ""
        )
        await self._connection.call(self._connection.learners.PurgeLearner, request, retry=False)

    async def import_learner(
        self,
        learner_id: str,
        source: PathOrFile,
        *,
        durability: Durability | None = None,
        timeout: float | None = TRANSFER_TIMEOUT,
    ) -> AsyncLearner:
        """Create a learner from a file that `export` made with the format "safetensors".

        Args:
            learner_id: of the new learner.
            source: a path, or a file opened in binary mode.
            durability: as in `create_learner`.
            timeout: seconds for all of it; None for the client's.

        Raises:
            AlreadyExists: the id is taken.
            InvalidArgument: the file is something else, or damaged.
        """
        arguments.path_or_file("source", source, "read")
        timeout = arguments.seconds("timeout", timeout, none="for the client's")
        header = learner_service_pb2.ImportHeader(
            learner_id=arguments.text("learner_id", learner_id),
            request_id=str(uuid.uuid4()),
            durability=convert.durability(durability),
        )
        return AsyncLearner(
            self._connection,
            convert.learner_info(await upload(self._connection, header, source, timeout=timeout)),
        )

    async def watch(
        self, learner_ids: str | Iterable[str] | None = None, *, interval: float = 1.0
    ) -> AsyncGenerator[WatchUpdate]:
        """What happens to learners: all watched ones at once, then those that have changed, as they change.

        Args:
            learner_ids: which, one or several; None means all, also those created later.
            interval: least seconds between two updates.
        """
        watched = [] if learner_ids is None else arguments.texts("learner_ids", learner_ids)
        period = Duration()
        period.FromNanoseconds(round(arguments.period("interval", interval) * 1e9))
        request = learner_service_pb2.WatchLearnersRequest(
            names=[convert.learner_name(learner_id) for learner_id in watched], interval=period
        )
        responses = self._connection.learners.WatchLearners(request)
        async with contextlib.aclosing(self._connection.stream(responses)) as messages:
            collected = learner_service_pb2.WatchLearnersResponse()
            async for message in messages:
                collected.MergeFrom(message)
                if not message.more_follow:  # many learners come in several messages
                    yield convert.watch_update(collected)
                    collected = learner_service_pb2.WatchLearnersResponse()


def _with_kind(network: Plain) -> Plain:
    """A network that names no kind is a perceptron, here as in `cbp.LearnerSpec`."""
    given = arguments.entries("network", network)
    return given if given.get("kind") is not None else {**given, "kind": "mlp"}


def _check_same(wanted: Plain, info: LearnerInfo) -> None:
    kinds = [spec.get("optimizer", {}).get("kind") for spec in (wanted, info.spec)]
    if kinds[0] not in (None, kinds[1]):
        raise _differs(info, "optimizer", kinds[1], kinds[0])
    for part in _IMMUTABLE:
        if part in wanted and not _agrees(wanted[part], info.spec.get(part)):
            raise _differs(info, part, info.spec.get(part), wanted[part])


def _differs(info: LearnerInfo, part: str, existing: object, wanted: object) -> AlreadyExists:
    return AlreadyExists(
        f"learner {info.id} exists with {part} {existing}, not {wanted}; choose another id or delete it",
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

"""The front's end of the engine process: starts it, speaks to it, and starts it again if it dies."""

import asyncio
import contextlib
import os
import subprocess
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar, cast

import structlog

from cbp_server.engine import messages
from cbp_server.engine.connection import EngineConnection
from cbp_server.engine.spawning import SpawnedEngine
from cbp_server.errors import EngineUnavailable
from cbp_server.records.learners import EngineStatus

AnswerT = TypeVar("AnswerT")

_BACKOFF_SECONDS = (0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
#: A process that lived this long was healthy: its successor starts at once.
_HEALTHY_SECONDS = 60.0

log = structlog.get_logger("cbp_server.engine")


class EngineProcess:
    """One supervised engine process.

    Args:
        spawned: the first one, if it has been begun already; it is this object's from `start` on.
        on_up: awaited whenever a new process is ready, before `start` returns for the first one.
        on_down: called whenever the process has ended unasked; then every call under way fails.
    """

    def __init__(
        self,
        options: messages.EngineOptions,
        spawned: SpawnedEngine | None = None,
        *,
        on_up: Callable[[messages.EngineReady], Awaitable[None]],
        on_down: Callable[[], None],
    ) -> None:
        self._options = options
        self._on_up = on_up
        self._on_down = on_down
        self._spawned = spawned
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: EngineConnection | None = None  # from the start of the process
        self._up = False  # the process takes requests
        self._announcing: asyncio.Task[None] | None = None
        self._waiting: dict[int, asyncio.Future[object]] = {}
        self._failures: dict[int, tuple[dict[int, Exception], int]] = {}  # where to note them, of calls in a sequence
        self._next_number = 0
        self._device = options.device
        self._was_ready = False  # once
        self._restarts = 0
        self._train_seconds = 0.0
        self._steps = 0
        self._stopping = asyncio.Event()
        self._supervisor: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """The engine's process id while it is up."""
        return self._process.pid if self._process is not None and self._up else None

    @property
    def status(self) -> EngineStatus:
        return EngineStatus(
            up=self._up,
            device=self._device,
            restarts=self._restarts,
            train_seconds=self._train_seconds,
            steps=self._steps,
            resident_bytes=_resident_bytes(self.pid),
        )

    async def start(self) -> None:
        """Starts the process and its supervision; returns when it is ready and `on_up` has returned.

        Raises:
            EngineUnavailable: the first process ended before it was ready; its own message is on standard error.
        """
        first_up: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._supervisor = asyncio.create_task(self._supervise(first_up))
        await first_up

    async def stop(self) -> None:
        """Ends the process: it finishes what it is writing, and drops what still waits."""
        self._stopping.set()
        if self._connection is not None:
            self._connection.close()
        if self._supervisor is not None:
            await self._supervisor

    def submit(self, request: messages.Request[AnswerT]) -> asyncio.Future[AnswerT]:
        """Sends the request; those of one learner are carried out in the order of these calls, but for predictions,
        which overtake.

        The future fails with `EngineUnavailable` if the process is down, or goes down before it answers, and with
        what the engine raised, a `CbpError`.
        """
        answer: asyncio.Future[AnswerT] = asyncio.get_running_loop().create_future()
        if not self._up:
            answer.set_exception(EngineUnavailable())
        else:
            self._waiting[self._send(request)] = cast("asyncio.Future[object]", answer)
        return answer

    def submit_all(self, changes: Sequence[messages.Change[object]]) -> "asyncio.Future[Mapping[int, Exception]]":
        """Sends changes of one learner, whose answers do not matter; completes when all have been carried out.

        The result says what failed, by index in `changes`. Fails with `EngineUnavailable` as `submit` does.
        """
        outcome: asyncio.Future[Mapping[int, Exception]] = asyncio.get_running_loop().create_future()
        if not self._up:
            outcome.set_exception(EngineUnavailable())
            return outcome
        failures: dict[int, Exception] = {}
        *others, last = range(len(changes))
        numbers = [self._send(changes[index], quiet=True) for index in others]
        self._failures |= {number: (failures, index) for index, number in enumerate(numbers)}
        answered = self.submit(changes[last])

        def settle(answered: "asyncio.Future[object]") -> None:
            for number in numbers:
                del self._failures[number]
            error = answered.exception()
            if outcome.done():
                return
            if isinstance(error, EngineUnavailable):
                outcome.set_exception(error)
                return
            if error is not None:
                failures[last] = cast(Exception, error)
            outcome.set_result(failures)

        answered.add_done_callback(settle)
        return outcome

    def _send(self, request: messages.Request[object], *, quiet: bool = False) -> int:
        """The call's number."""
        number = self._next_number
        self._next_number += 1
        assert self._connection is not None
        call = messages.Call(number, request, quiet)
        self._connection.send(call, request.size_bytes, urgent=isinstance(request, messages.Predict))
        return number

    async def call(self, request: messages.Request[AnswerT]) -> AnswerT:
        """The engine's answer; raises what the future of `submit` would fail with."""
        return await self.submit(request)

    async def _supervise(self, first_up: asyncio.Future[None]) -> None:
        loop = asyncio.get_running_loop()
        failures = 0
        while not self._stopping.is_set():
            started = loop.time()
            try:
                await self._live(first_up)
            except Exception:
                log.exception("engine supervision failed")
            if self._stopping.is_set():
                break
            if not self._was_ready:
                first_up.set_exception(EngineUnavailable("the engine process could not start; see its message above"))
                break
            failures = 0 if loop.time() - started > _HEALTHY_SECONDS else failures + 1
            pause = _BACKOFF_SECONDS[min(failures, len(_BACKOFF_SECONDS) - 1)]
            log.error("engine process ended; starting it again", status=self._exit_status, pause_seconds=pause)
            self._restarts += 1
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), pause)

    async def _live(self, first_up: asyncio.Future[None]) -> None:
        """One process, from its start to its end."""
        spawned, self._spawned = self._spawned or SpawnedEngine(), None
        spawned.taken = True
        process = self._process = spawned.process
        connection = self._connection = EngineConnection(spawned.connection, partial(self._take, first_up))
        if self._stopping.is_set():  # stop() came before there was a connection to close
            connection.close()
        try:
            connection.send(self._options)
            await connection.wait_closed()
        finally:
            self._up, self._connection = False, None
            if not self._stopping.is_set():
                self._on_down()
            self._fail_waiting()
            connection.close()
            await asyncio.to_thread(process.wait)
            if self._announcing is not None:
                await self._announcing
                self._announcing = None

    def _take(self, first_up: asyncio.Future[None], message: object) -> None:
        """What the process says: that it is ready, then answers."""
        if isinstance(message, messages.EngineReady):
            self._device = message.device
            self._up = self._was_ready = True
            log.info("engine process ready", pid=self.pid, device=message.device)
            self._announcing = asyncio.create_task(self._announce(message, first_up))
            return
        news = cast(messages.Answers, message)
        self._train_seconds += news.train_seconds
        self._steps += news.steps
        for answer in news.answers:
            self._settle(answer)

    async def _announce(self, ready: messages.EngineReady, first_up: asyncio.Future[None]) -> None:
        try:
            await self._on_up(ready)
        except EngineUnavailable:
            return  # it ended again while the front was restoring learners
        except Exception as error:
            log.exception("restoring learners failed")
            if not first_up.done():
                first_up.set_exception(error)
            return
        if not first_up.done():
            first_up.set_result(None)

    def _settle(self, answer: messages.Answer) -> None:
        if (part := self._failures.get(answer.number)) is not None and answer.error is not None:
            failures, index = part
            failures[index] = answer.error
            return
        waiting = self._waiting.pop(answer.number, None)
        if waiting is None or waiting.done():
            return  # the caller has gone
        if answer.error is not None:
            waiting.set_exception(answer.error)
        else:
            waiting.set_result(answer.value)

    def _fail_waiting(self) -> None:
        failing, self._waiting = self._waiting, {}
        for waiting in failing.values():
            if not waiting.done():
                waiting.set_exception(EngineUnavailable("the engine process ended before it answered; try again"))

    @property
    def _exit_status(self) -> int | None:
        return self._process.returncode if self._process is not None else None


def _resident_bytes(pid: int | None) -> int:
    if pid is None:
        return 0
    with contextlib.suppress(OSError):  # not Linux, or just ended
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0

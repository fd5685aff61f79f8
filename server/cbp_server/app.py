"""Composition root: builds the server from its settings, runs it on one event loop, and takes it down in order."""

import asyncio
import contextlib
import errno
import fcntl
import json
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

import structlog
import uvicorn
from prometheus_client import CollectorRegistry
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from cbp import CbpError
from cbp_server.engine.messages import EngineOptions, EngineReady
from cbp_server.engine.process import EngineProcess
from cbp_server.engine.spawning import SpawnedEngine
from cbp_server.errors import EngineUnavailable
from cbp_server.learners.checkpointing import CheckpointPolicy
from cbp_server.learners.host import Host, HostOptions
from cbp_server.metrics.exposition import Exposition
from cbp_server.metrics.learners import LearnerMetrics
from cbp_server.metrics.service import HostMetrics, JournalMetrics, RpcMetrics, register_server_metrics
from cbp_server.process.addresses import listen, listening_addresses, port_of, with_port
from cbp_server.process.descriptors import tell_of_exhaustion
from cbp_server.rpc.convert import journaled_batch
from cbp_server.rpc.server import RpcServer
from cbp_server.settings import Settings
from cbp_server.store.catalog import Catalog
from cbp_server.store.checkpoints import CheckpointFiles
from cbp_server.store.database import DatabaseInUse, Ownership, exclusive, open_database
from cbp_server.store.directories import make_directory
from cbp_server.store.group_commit import GroupCommit
from cbp_server.store.journal import Entry, Journal
from cbp_server.store.storage import Guard, Storage
from cbp_server.web.app import create_app

#: Seconds that calls still open after the drain may take to end.
_STOP_GRACE = 2.0
#: Seconds between two looks at what is due.
_LONGEST_PAUSE = 1.0
_ENDPOINTS = "endpoints.json"
_CHECKPOINTS = "checkpoints"

log = structlog.get_logger("cbp_server")


class StartError(Exception):
    """The server cannot start; the text says why and what to do."""


async def serve(settings: Settings, engine: SpawnedEngine) -> int:
    """Runs the server until SIGTERM or SIGINT; the process's exit status, 0 if everything acknowledged is saved.

    Args:
        engine: the first engine process; it has been begun, and waits.

    Raises:
        StartError: a port is taken, the data directory is in use or not writable, or the engine cannot start.
    """
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    tell_of_exhaustion(loop)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    with _locked(settings.data_dir):
        (settings.data_dir / _ENDPOINTS).unlink(missing_ok=True)  # of a server that was killed
        with _database(settings) as (database, ownership):
            async with _Server(settings, engine, database, ownership).running(stopping) as server:
                await stopping.wait()
                log.info("shutting down")
                unsaved = await server.drain()
    if unsaved:
        log.error("shut down with unsaved learners", learners=unsaved)
    else:
        log.info("shut down; everything acknowledged is saved")
    return 1 if unsaved else 0


class _HttpServer(uvicorn.Server):
    """Leaves the signals alone: here they end the whole server in order."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Server:
    """All parts of the front process, wired together."""

    def __init__(self, settings: Settings, engine: SpawnedEngine, database: Engine, ownership: Ownership) -> None:
        self._settings = settings
        registry = CollectorRegistry()
        rpc_metrics = RpcMetrics(registry)
        checkpoint_url = settings.checkpoint_url or str(settings.data_dir / _CHECKPOINTS)
        guard, journal = Guard(ownership), Journal(database)
        storage = Storage(
            guard=guard,
            catalog=Catalog(database),
            journal=journal,
            commit=GroupCommit(_append(journal, guard), _end_loudly, JournalMetrics(registry)),
            files=_checkpoint_files(checkpoint_url),
        )
        self._commit = storage.commit
        self._engine = EngineProcess(
            EngineOptions(
                checkpoint_url=checkpoint_url,
                device=settings.device,
                engine=settings.engine,
                threads=settings.engine_threads,
                group_wait=settings.group_wait,
                log_level=settings.log_level,
                log_format=settings.log_format,
            ),
            engine,
            on_up=self._engine_up,
            on_down=self._engine_down,
        )
        self._host = Host(
            self._engine,
            storage,
            HostOptions(
                max_learners=settings.max_learners,
                max_live_learners=settings.max_live_learners,
                evict_after=settings.evict_after,
                deleted_retention=settings.deleted_retention,
                max_message_bytes=settings.max_message_bytes,
                stream_credits=settings.stream_credits,
                max_queued_bytes=settings.max_queued_bytes,
                max_producers=settings.max_producers,
                producer_retention=settings.producer_retention,
                history_samples=settings.history_samples,
                engine=settings.engine,
                checkpoints=CheckpointPolicy(
                    seconds=settings.checkpoint_interval,
                    steps=settings.checkpoint_steps,
                    journal_bytes=settings.checkpoint_bytes,
                    kept=settings.checkpoints_kept,
                ),
            ),
            decode_batch=journaled_batch,
            observer=HostMetrics(registry),
            on_readiness=self._readiness_changed,
        )
        register_server_metrics(registry, self._host)
        learner_metrics = LearnerMetrics(self._host, max_learners=settings.metrics_max_learners)
        self._rpc = RpcServer(
            self._host, rpc_metrics, max_message_bytes=settings.max_message_bytes, limits=settings.limits
        )
        self._http = _HttpServer(
            uvicorn.Config(
                create_app(self._host, Exposition(registry, learner_metrics), root_path=settings.root_path),
                log_config=None,
                access_log=False,
                lifespan="off",
                timeout_graceful_shutdown=int(_STOP_GRACE),
            )
        )
        self._tasks: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def running(self, stopping: asyncio.Event) -> AsyncIterator["_Server"]:
        """The server from its first answer to its last; `stopping` cuts its start short."""
        settings = self._settings
        try:
            await self._host.open()  # before anybody can ask for a learner, and hear that it does not exist
        except CbpError as error:
            await self._commit.close()
            raise StartError(str(error)) from error
        async with contextlib.AsyncExitStack() as stack:
            addresses = _addresses(settings.host)
            # HTTP first: /livez and /readyz answer while learners are being restored.
            http_port = await stack.enter_async_context(self._serving_http(addresses))
            try:
                grpc_port = await self._rpc.start(addresses, settings.grpc_port)
            except OSError as error:
                raise StartError(str(error)) from error
            stack.push_async_callback(self._rpc.stop, _STOP_GRACE)
            stack.push_async_callback(self._engine.stop)
            stack.push_async_callback(self._commit.close)
            maintenance = asyncio.create_task(self._maintain())
            stack.push_async_callback(_cancel, maintenance)
            if not await self._started(stopping):
                yield self
                return
            endpoints = {
                "host": settings.host,
                "addresses": addresses,
                "grpc_port": grpc_port,
                "http_port": http_port,
                "pid": os.getpid(),
            }
            stack.enter_context(_published(settings.data_dir / _ENDPOINTS, endpoints))
            log.info(
                "serving",
                grpc=with_port(settings.host, grpc_port),
                http=f"http://{with_port(settings.host, http_port)}",
                addresses=addresses,
                data_dir=str(settings.data_dir),
                version=version("cbp-server"),
            )
            yield self

    async def _started(self, stopping: asyncio.Event) -> bool:
        """Whether the engine has come up, rather than been told to stop before it had."""
        starting = asyncio.create_task(self._engine.start())
        told = asyncio.create_task(stopping.wait())
        await asyncio.wait({starting, told}, return_when=asyncio.FIRST_COMPLETED)
        told.cancel()
        if not starting.done():
            starting.cancel()
            return False
        try:
            await starting
        except CbpError as error:
            raise StartError(str(error)) from error
        return True

    async def drain(self) -> int:
        """Finishes what was accepted and saves it; the number of learners that could not be saved."""
        return await self._host.drain(self._settings.drain_timeout)

    @contextlib.asynccontextmanager
    async def _serving_http(self, addresses: Sequence[str]) -> AsyncIterator[int]:
        try:
            listeners = listen(addresses, self._settings.http_port)
        except OSError as error:
            taken = "; choose another --http-port" if error.errno == errno.EADDRINUSE else ""
            where = with_port(self._settings.host, self._settings.http_port)
            raise StartError(f"cannot listen on {where}: {error.strerror}{taken}") from error
        serving = asyncio.create_task(self._http.serve(listeners))
        try:
            yield port_of(listeners[0])
        finally:
            self._http.should_exit = True
            await serving

    async def _maintain(self) -> None:
        pause = min(_LONGEST_PAUSE, self._settings.checkpoint_interval / 2)
        while True:
            await asyncio.sleep(pause)
            try:
                await self._host.maintain()
            except EngineUnavailable:
                pass  # what was to be done is done when the engine is back
            except Exception:  # the next round must come whatever happened in this one
                log.exception("maintenance failed")

    async def _engine_up(self, ready: EngineReady) -> None:
        await self._host.engine_up(ready)

    def _engine_down(self) -> None:
        self._host.engine_down()

    def _readiness_changed(self, reasons: Sequence[str]) -> None:
        task = asyncio.create_task(self._rpc.set_serving(not reasons))
        self._tasks.add(task)  # the loop itself keeps only a weak reference
        task.add_done_callback(self._tasks.discard)


@contextlib.contextmanager
def _locked(data_dir: Path) -> Iterator[None]:
    """Two servers on one data directory would overwrite each other's checkpoints."""
    try:
        make_directory(data_dir)
        lock = (data_dir / "lock").open("w")
    except OSError as error:
        raise StartError(f"--data-dir {data_dir} cannot be written: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StartError(f"--data-dir {data_dir} is in use by another server; name another one") from error
        yield


@contextlib.contextmanager
def _published(path: Path, endpoints: dict[str, object]) -> Iterator[None]:
    """Lets programs that started this server find its ports; the file is there while it serves."""
    temporary = path.with_suffix(".writing")
    temporary.write_text(json.dumps(endpoints))
    temporary.replace(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _append(journal: Journal, guard: Guard) -> Callable[[Sequence[Entry], bool], None]:
    def append(entries: Sequence[Entry], sync: bool) -> None:
        guard.call(journal.append, entries, sync=sync)

    return append


def _end_loudly(reason: str) -> NoReturn:
    """After a failed fsync nobody knows what is on the disk: what is in memory must not be acknowledged any more."""
    log.critical("fsync failed; the server ends at once, and starts again from what the disk has", reason=reason)
    os._exit(os.EX_IOERR)


@contextlib.contextmanager
def _database(settings: Settings) -> Iterator[tuple[Engine, Ownership]]:
    """The database, for this server alone."""
    with contextlib.ExitStack() as stack:
        try:
            engine = open_database(settings.store_url, settings.data_dir)
            stack.callback(engine.dispose)
            ownership = stack.enter_context(exclusive(engine))
        except DatabaseInUse as error:
            raise StartError(f"{error}; name another --store-url") from error
        except (SQLAlchemyError, OSError) as error:
            reason = getattr(error, "orig", None) or error
            raise StartError(
                f"the journal's database cannot be used: {reason}; check --store-url and --data-dir"
            ) from error
        yield engine, ownership


def _checkpoint_files(url: str) -> CheckpointFiles:
    try:
        return CheckpointFiles(url)
    except ValueError as error:
        raise StartError(f"{error}; check --checkpoint-url") from error


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def _addresses(host: str) -> list[str]:
    try:
        return listening_addresses(host)
    except OSError as error:
        raise StartError(f"cannot listen on {host}: {error.strerror}; name another --host") from error

"""A server's live state without its engine: real records behind the read model that HTTP and metrics ask."""

import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Protocol

import pytest
import uvicorn
from browsing import chromium, watched_page
from playwright.sync_api import Browser, Page
from prometheus_client import CollectorRegistry

from cbp import (
    FieldViolation,
    LayerPlasticity,
    LearnerProgress,
    LearnerSpec,
    PlasticitySample,
    TaskRecord,
    Trainability,
)
from cbp_server.errors import InvalidRequest, LearnerNotFound
from cbp_server.metrics.exposition import Exposition
from cbp_server.metrics.learners import LearnerMetrics
from cbp_server.metrics.service import HostMetrics, JournalMetrics, RpcMetrics, register_server_metrics
from cbp_server.records.learners import (
    CheckpointRecord,
    EngineStatus,
    JournalStatus,
    LearnerRecord,
    LearnerState,
    ProducerRecord,
    Quarantine,
)
from cbp_server.records.samples import SampleHistory, SampleRecord, pack
from cbp_server.web.app import create_app

START = datetime(2026, 11, 22, 9, 0, tzinfo=UTC)


@dataclass
class FakeHost:
    """Satisfies `ReadModel`; tests change its attributes."""

    records: dict[str, LearnerRecord] = field(default_factory=dict)
    engine: EngineStatus = field(
        default_factory=lambda: EngineStatus(
            up=True, device="cpu", restarts=1, train_seconds=12.5, steps=50_000, resident_bytes=300 * 2**20
        )
    )
    journal: JournalStatus = field(default_factory=lambda: JournalStatus(up=True, since=START))
    reasons: list[str] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)
    open_streams: int = 2

    def add(self, *records: LearnerRecord) -> None:
        self.records.update({record.learner_id: record for record in records})

    def learners(self, *, deleted: bool = False) -> Sequence[LearnerRecord]:
        found = [self.records[learner_id] for learner_id in sorted(self.records)]
        shown = [record for record in found if record.learner_id not in self.broken]
        return [record for record in shown if deleted or record.delete_time is None]

    def page(self, page_size: int, page_token: str, *, deleted: bool = False) -> tuple[Sequence[LearnerRecord], str]:
        if page_token.startswith("!"):
            raise InvalidRequest(FieldViolation("page_token", "is not a token that a list call returned"))
        following = [record for record in self.learners(deleted=deleted) if record.learner_id > page_token]
        size = page_size or 50
        return following[:size], following[size - 1].learner_id if len(following) > size else ""

    def learner(self, learner_id: str) -> LearnerRecord:
        if learner_id not in self.records:
            raise LearnerNotFound(learner_id)
        return self.records[learner_id]

    def samples(self, learner_id: str, count: int) -> Sequence[SampleRecord]:
        return self.learner(learner_id).samples.last(count)

    def unreadable(self) -> Mapping[str, str]:
        return self.broken

    def cannot_show(self, record: LearnerRecord, error: Exception) -> str:
        self.broken[record.learner_id] = f"{type(error).__name__}: {error}"
        return self.broken[record.learner_id]

    def engine_status(self) -> EngineStatus:
        return self.engine

    def journal_status(self) -> JournalStatus:
        return self.journal

    def readiness(self) -> Sequence[str]:
        return self.reasons


@pytest.fixture
def host() -> FakeHost:
    return FakeHost()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser: Browser, http: "HttpServer") -> Iterator[Page]:
    with watched_page(browser, http.url) as page:
        yield page


@pytest.fixture
def http(serve: "Serve") -> "HttpServer":
    """The application over `host`, on a real port."""
    return serve()


@pytest.fixture
def serve(host: FakeHost) -> Iterator["Serve"]:
    """Serves the application over `host` on a real port, as if a proxy had it at `root_path`."""
    started: list[HttpServer] = []

    def start(root_path: str = "") -> HttpServer:
        registry = CollectorRegistry()
        RpcMetrics(registry)
        HostMetrics(registry)
        JournalMetrics(registry)
        register_server_metrics(registry, host)
        exposition = Exposition(registry, LearnerMetrics(host, max_learners=100))
        started.append(HttpServer(create_app(host, exposition, root_path=root_path)))
        return started[-1]

    yield start
    for running in started:
        running.stop()


class Serve(Protocol):
    def __call__(self, root_path: str = "") -> "HttpServer": ...


class HttpServer:
    """uvicorn on a thread."""

    def __init__(self, app: Any) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self._server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off"))
        self._thread = threading.Thread(target=self._server.run, args=([listener],))
        self._thread.start()  # the socket listens already: the first request waits until it is accepted

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join()


@pytest.fixture
def quarantined(make_learner: Callable[..., LearnerRecord]) -> Callable[..., LearnerRecord]:
    """Makes a learner that could not learn a batch; further arguments are those of `make_learner`."""

    def make(learner_id: str = "prices", *, position: int = 77, **changes: Any) -> LearnerRecord:
        quarantine = Quarantine(
            position, "web-1", 41, "Training diverged: at step 2001 the loss became infinite or not a number", START
        )
        return make_learner(learner_id, **{"state": LearnerState.QUARANTINED, "quarantine": quarantine, **changes})

    return make


@pytest.fixture
def tested(make_learner: Callable[..., LearnerRecord]) -> Callable[..., LearnerRecord]:
    """Makes a learner with three samples, whose trainability was tested before the first and the last; further
    arguments are those of `make_learner`."""

    def make(learner_id: str, **changes: Any) -> LearnerRecord:
        learner = make_learner(learner_id, **changes)
        tests = [
            Trainability(step=step, loss=loss, fresh_loss=1.5, chance_loss=2.5)
            for step, loss in [(500, 1.6), (500, 1.6), (2500, 1.7)]
        ]
        learner.samples.replace(
            pack(replace(record, sample=replace(record.sample, trainability=test)))
            for record, test in zip(learner.samples.last(3), tests, strict=True)
        )
        return learner

    return make


@pytest.fixture
def make_learner() -> Callable[..., LearnerRecord]:
    """Makes a learner in the middle of its second task; arguments are fields of its progress or of the record."""
    return _learner_record


def _learner_record(learner_id: str = "clicks", *, samples: int = 3, **changes: Any) -> LearnerRecord:
    progress = LearnerProgress(
        step=2000,
        examples=2000,
        pending=0,
        loss=0.41,
        accuracy=0.874,
        replacements={"hidden_0": 12, "hidden_1": 0},
        tasks=(
            TaskRecord(task="monday", first_step=1, steps=1500, examples=1500, loss=0.6, accuracy=0.8),
            TaskRecord(task="tuesday", first_step=1501, steps=500, examples=500, loss=0.3, accuracy=0.9),
        ),
        task_count=2,
    )
    of_progress = {name: changes.pop(name) for name in list(changes) if hasattr(progress, name)}
    record = LearnerRecord(
        learner_id=learner_id,
        uid=f"uid-{learner_id}",
        spec=LearnerSpec.parse(
            {
                "network": {"kind": "mlp", "in_features": 64, "hidden": [100, 100], "out_features": 10},
                "loss": "cross_entropy",
                "optimizer": {"kind": "sgd", "lr": 0.01},
                "resets": {"layers": "first"},
            }
        ),
        engine="compiled",
        etag="0123456789abcdef",
        create_time=START,
        update_time=START,
        state=LearnerState.ACTIVE,
        progress=replace(progress, **of_progress),
        samples=SampleHistory(500),
        producers={"web-1": ProducerRecord("web-1", epoch=3, applied_sequence=40, durable_sequence=32)},
        checkpoint=CheckpointRecord(step=1600, time=START, size_bytes=120_000, position=61),
        journal_position=76,
        queued_batches=4,
    )
    record.samples.extend(pack(_sample(1000 * number)) for number in range(1, samples + 1))
    return replace(record, **changes)


def _sample(step: int) -> SampleRecord:
    first = LayerPlasticity(
        layer="hidden_0",
        units=100,
        mean_abs_weight=0.05 + step / 1e6,
        weight_norm=5.5,
        distance_from_init=1.25,
        gradient_norm=0.75,
        dormant_fraction=0.04,
        dead_fraction=0.01,
        saturated_fraction=None,
        feature_norm=9.5,
        effective_rank=63.5,
        stable_rank=7.5,
        srank=88,
        gradient_rank=51.5,
        replacements=step // 100,
        age_quantiles=(90.0, 400.0, 900.0),
        utility_quantiles=(0.01, 0.2, 0.7),
    )
    second = replace(first, layer="hidden_1", dormant_fraction=0.08)
    output = replace(
        first,
        layer="output",
        units=10,
        dormant_fraction=None,
        dead_fraction=None,
        feature_norm=None,
        effective_rank=None,
        stable_rank=None,
        srank=None,
        replacements=None,
        age_quantiles=None,
        utility_quantiles=None,
    )
    return SampleRecord(PlasticitySample(step=step, examples=step, layers=(first, second, output)), START)

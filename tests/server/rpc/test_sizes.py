"""Answers that hold many learners or samples fit into a message."""

from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cbp import LayerPlasticity, LearnerSpec, PlasticitySample
from cbp_proto.v1 import learner_service_pb2
from cbp_server.learners.host import Host
from cbp_server.learners.hosted import newborn_progress
from cbp_server.learners.paging import page_of
from cbp_server.records.learners import LearnerRecord, LearnerState, ProducerRecord
from cbp_server.records.samples import SampleHistory, SampleRecord
from cbp_server.rpc import learner_servicer
from cbp_server.rpc.learner_servicer import LearnerServicer
from cbp_server.settings import Settings

NOW = datetime(2026, 1, 1, tzinfo=UTC)
SPEC = LearnerSpec.parse(
    {
        "network": {"kind": "mlp", "in_features": 4, "hidden": [8], "out_features": 3},
        "loss": "cross_entropy",
        "optimizer": {"kind": "sgd", "lr": 0.1},
    }
)
#: What gRPC takes if it is not told otherwise.
USUAL_BYTES = 4 * 2**20


def crowded(number: int) -> LearnerRecord:
    """A learner with as many producers as there may be, of names as long as they may be: half a megabyte."""
    names = [f"{producer:04d}{'ő' * 124}" for producer in range(1000)]
    return LearnerRecord(
        learner_id=f"clicks-{number:02d}",
        uid=f"uid-{number}",
        spec=SPEC,
        engine="compiled",
        etag="0123456789abcdef",
        create_time=NOW,
        update_time=NOW,
        state=LearnerState.ACTIVE,
        progress=newborn_progress(SPEC),
        samples=SampleHistory(500),
        producers={name: ProducerRecord(name, 10**9, 10**12, 10**12) for name in names},
    )


def sample(step: int) -> SampleRecord:
    layer = dict.fromkeys(LayerPlasticity.__dataclass_fields__, 1.5)
    layer |= {"layer": "hidden_0", "units": 9, "srank": 3, "replacements": 3}
    layer |= dict.fromkeys(("age_quantiles", "utility_quantiles"), (1.0, 2.0, 3.0))
    return SampleRecord(
        PlasticitySample(step=step, examples=step, layers=(LayerPlasticity(**cast(Any, layer)),) * 4), NOW
    )


@pytest.fixture
def crowd() -> list[LearnerRecord]:
    return [crowded(number) for number in range(40)]


@pytest.fixture
def servicer(crowd: list[LearnerRecord]) -> LearnerServicer:
    host = SimpleNamespace(
        page=lambda size, token, **_: page_of(crowd, size, token),
        learners=lambda: crowd,
        draining=False,
        samples=lambda _, count: [sample(step) for step in range(count)],
    )
    return LearnerServicer(cast(Host, host), Settings().limits)


async def test_a_page_of_large_learners_is_shorter_than_asked_for(servicer: LearnerServicer) -> None:
    uids: list[str] = []
    pages, token = 0, ""
    while not pages or token:
        request = learner_service_pb2.ListLearnersRequest(page_size=1000, page_token=token)
        answer = await servicer.ListLearners(request, cast(Any, None))
        assert answer.ByteSize() < USUAL_BYTES
        pages += 1
        uids += [learner.uid for learner in answer.learners]
        token = answer.next_page_token
    assert uids == [f"uid-{number}" for number in range(40)]
    assert pages < 20


async def test_a_watch_of_large_learners_comes_in_several_messages(servicer: LearnerServicer) -> None:
    told: list[str] = []
    async for message in servicer.WatchLearners(learner_service_pb2.WatchLearnersRequest(), cast(Any, None)):
        assert message.ByteSize() < USUAL_BYTES
        told += [watched.learner.uid for watched in message.learners]
        assert message.more_follow == (len(told) < 40)
        if not message.more_follow:
            break
    assert told == [f"uid-{number}" for number in range(40)]


async def test_more_samples_than_a_message_holds_are_the_newest(
    servicer: LearnerServicer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learner_servicer, "WHOLE_BYTES", 20_000)
    request = learner_service_pb2.GetPlasticityRequest(name="learners/clicks", max_samples=100)
    answer = await servicer.GetPlasticity(request, cast(Any, None))
    steps = [sample.step for sample in answer.samples]
    assert 2 < len(steps) < 100
    assert steps == list(range(100 - len(steps), 100))
    assert answer.ByteSize() < 20_200

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from cbp_server.errors import EngineUnavailable
from cbp_server.records.learners import Durability, JournalStatus, LearnerRecord, LearnerState

DOCS = Path(__file__).parents[3] / "docs" / "http_api.md"

MakeLearner = Callable[..., LearnerRecord]


@pytest.fixture
def client(http: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=http.url) as client:
        yield client


def assert_problem(response: httpx.Response, status: int, **expected: Any) -> dict[str, Any]:
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = response.json()
    assert problem["status"] == status
    assert problem["instance"] == response.url.path
    assert {key: problem.get(key) for key in expected} == expected
    return problem


def test_a_learner_with_all_its_keys(host: Any, client: httpx.Client, make_learner: MakeLearner) -> None:
    host.add(make_learner("clicks"))
    learner = client.get("/v1/learners/clicks").raise_for_status().json()
    assert learner["id"] == "clicks"
    assert learner["name"] == "learners/clicks"
    assert learner["state"] == "active"
    assert learner["spec"]["resets"]["layers"] == "first"
    assert learner["spec"]["network"]["hidden"] == [100, 100]
    assert learner["create_time"] == "2026-11-22T09:00:00Z"
    assert learner["checkpoint"] == {
        "journal_position": 61,
        "step": 1600,
        "time": "2026-11-22T09:00:00Z",
        "size_bytes": 120_000,
    }
    assert (learner["durability"], learner["journal_position"], learner["quarantine"]) == ("fsync", 76, None)
    assert (learner["delete_time"], learner["purge_time"]) == (None, None)
    assert learner["producers"] == [{"producer": "web-1", "epoch": 3, "applied_sequence": 40, "durable_sequence": 32}]
    progress = learner["progress"]
    assert {key: progress[key] for key in ("step", "pending_examples", "accuracy", "task_count")} == {
        "step": 2000,
        "pending_examples": 0,
        "accuracy": 0.874,
        "task_count": 2,
    }
    assert progress["tasks"][-1] == {
        "task": "tuesday",
        "first_step": 1501,
        "examples": 500,
        "loss": 0.3,
        "accuracy": 0.9,
    }
    assert learner["plasticity"]["step"] == 3000
    hidden, _, output = learner["plasticity"]["layers"]
    assert hidden["age_quantiles"][1] == {"quantile": 0.5, "value": 400.0}
    assert (output["dormant_fraction"], output["age_quantiles"]) == (None, [])
    assert (hidden["srank"], hidden["gradient_rank"], hidden["feature_norm"]) == (88, 51.5, 9.5)
    assert hidden["saturated_fraction"] is None
    assert learner["plasticity"]["trainability"] is None


def test_a_tested_learner_says_how_trainable_it_is(host: Any, client: httpx.Client, tested: MakeLearner) -> None:
    host.add(tested("clicks"))
    assert client.get("/v1/learners/clicks").json()["plasticity"]["trainability"] == {
        "step": 2500,
        "loss": 1.7,
        "fresh_loss": 1.5,
        "chance_loss": 2.5,
        "score": pytest.approx(0.8),
    }


def test_a_new_learner_has_nulls(host: Any, client: httpx.Client, make_learner: MakeLearner) -> None:
    host.add(make_learner("new", samples=0, checkpoint=None, loss=None, accuracy=None, tasks=()))
    learner = client.get("/v1/learners/new").json()
    assert (learner["checkpoint"], learner["plasticity"], learner["progress"]["loss"]) == (None, None, None)
    assert client.get("/v1/learners/new/plasticity").json() == {"samples": []}


def test_a_diverging_learner_is_still_json(host: Any, client: httpx.Client, make_learner: MakeLearner) -> None:
    host.add(make_learner("wild", loss=math.inf, accuracy=math.nan))
    progress = client.get("/v1/learners/wild").raise_for_status().json()["progress"]
    assert (progress["loss"], progress["accuracy"]) == (None, None)


def test_a_quarantined_learner_names_the_batch(host: Any, client: httpx.Client, quarantined: MakeLearner) -> None:
    host.add(quarantined("prices", durability=Durability.OS))
    learner = client.get("/v1/learners/prices").json()
    assert (learner["state"], learner["durability"]) == ("quarantined", "os")
    assert learner["quarantine"] == {
        "journal_position": 77,
        "producer": "web-1",
        "sequence": 41,
        "reason": "Training diverged: at step 2001 the loss became infinite or not a number",
        "quarantine_time": "2026-11-22T09:00:00Z",
    }


def test_deleted_learners_are_listed_on_request(host: Any, client: httpx.Client, make_learner: MakeLearner) -> None:
    host.add(make_learner("here"), deleted(make_learner, "gone"))
    assert [learner["id"] for learner in client.get("/v1/learners").json()["learners"]] == ["here"]
    gone, here = client.get("/v1/learners?show_deleted=true").json()["learners"]
    assert (gone["id"], gone["state"]) == ("gone", "deleted")
    assert (gone["delete_time"], gone["purge_time"]) == ("2026-11-22T10:00:00Z", "2026-11-29T10:00:00Z")
    assert here["delete_time"] is None


def deleted(make_learner: MakeLearner, learner_id: str) -> LearnerRecord:
    return make_learner(
        learner_id,
        state=LearnerState.DELETED,
        delete_time=datetime(2026, 11, 22, 10, tzinfo=UTC),
        purge_time=datetime(2026, 11, 29, 10, tzinfo=UTC),
    )


def test_pages_lead_through_all_learners(host: Any, client: httpx.Client, make_learner: MakeLearner) -> None:
    host.add(*(make_learner(f"learner-{number}") for number in range(5)))
    found, token = [], ""
    for _ in range(3):
        page = client.get("/v1/learners", params={"page_size": 2, "page_token": token}).json()
        found += [learner["id"] for learner in page["learners"]]
        token = page["next_page_token"]
    assert found == [f"learner-{number}" for number in range(5)]
    assert token == ""


@pytest.mark.parametrize(
    ("query", "steps"), [("", [3000]), ("?max_samples=0", [3000]), ("?max_samples=2", [2000, 3000])]
)
def test_plasticity_now_and_before(
    host: Any, client: httpx.Client, make_learner: MakeLearner, query: str, steps: list[int]
) -> None:
    host.add(make_learner("clicks"))
    samples = client.get(f"/v1/learners/clicks/plasticity{query}").json()["samples"]
    assert [sample["step"] for sample in samples] == steps


def test_the_server_in_one_view(
    host: Any, client: httpx.Client, make_learner: MakeLearner, quarantined: MakeLearner
) -> None:
    host.add(make_learner("a"), make_learner("b"), deleted(make_learner, "d"), quarantined("q", queued_batches=0))
    host.add(quarantined("r", state=LearnerState.EVICTED, queued_batches=0))
    host.broken["c"] = "its checkpoint is damaged"
    server = client.get("/v1/server").json()
    assert server["learners"] == {"active": 2, "unavailable": 0, "evicted": 1, "quarantined": 1, "deleted": 1}
    assert server["quarantined"] == ["q", "r"]
    assert server["unreadable"] == {"c": "its checkpoint is damaged"}
    assert (server["steps"], server["queued_batches"], server["open_streams"]) == (8000, 8, 2)
    assert server["engine"]["device"] == "cpu"
    assert server["journal"] == {"up": True, "since": "2026-11-22T09:00:00Z", "reason": ""}
    assert server["ready"] is True


def test_a_journal_that_cannot_be_written_says_why(host: Any, client: httpx.Client) -> None:
    host.journal = JournalStatus(up=False, since=host.journal.since, reason="database or disk is full")
    journal = client.get("/v1/server").json()["journal"]
    assert journal == {"up": False, "since": "2026-11-22T09:00:00Z", "reason": "database or disk is full"}


def test_ready_and_not(host: Any, client: httpx.Client) -> None:
    assert client.get("/livez").json() == {"status": "ok", "reasons": []}
    assert client.get("/readyz").json() == {"status": "ok", "reasons": []}
    host.reasons.append("the engine process is down")
    response = client.get("/readyz")
    assert response.status_code == 503
    assert response.json() == {"status": "unavailable", "reasons": ["the engine process is down"]}
    assert client.get("/livez").status_code == 200


def test_an_unknown_learner_is_a_problem(client: httpx.Client) -> None:
    for path in ("/v1/learners/nobody", "/v1/learners/nobody/plasticity"):
        problem = assert_problem(
            client.get(path),
            404,
            title="Learner not found",
            reason="LEARNER_NOT_FOUND",
            type="urn:cbp:error:LEARNER_NOT_FOUND",
        )
        assert "nobody" in problem["detail"]


def test_a_wrong_parameter_is_named(client: httpx.Client) -> None:
    problem = assert_problem(client.get("/v1/learners?page_size=many"), 422, reason="INVALID_ARGUMENT")
    assert [violation["field"] for violation in problem["violations"]] == ["query.page_size"]
    assert_problem(client.get("/v1/learners?page_size=-1"), 422)
    assert_problem(client.get("/v1/learners?page_token=!"), 400, reason="INVALID_ARGUMENT")


@pytest.mark.parametrize("path", ["/nothing", "/static/nothing.js", "/static/swagger-ui/nothing.js", "/v1/"])
def test_an_unknown_path_is_a_problem(client: httpx.Client, path: str) -> None:
    assert_problem(client.get(path), 404, title="Not Found", type="about:blank")


@pytest.mark.parametrize("wrong", [{"step": "x"}, {"step": None}, {"tasks": ["x"]}, {"replacements": None}])
def test_a_record_that_cannot_be_shown_hides_no_other(
    host: Any, client: httpx.Client, make_learner: MakeLearner, wrong: dict[str, Any]
) -> None:
    host.add(make_learner("a"), make_learner("b"), make_learner("c"))
    host.records["b"].progress = replace(host.records["b"].progress, **wrong)
    assert [learner["id"] for learner in client.get("/v1/learners").json()["learners"]] == ["a", "c"]
    assert list(client.get("/v1/server").json()["unreadable"]) == ["b"]
    host.broken.clear()
    assert client.get("/v1/learners/b").json()["reason"] == "UNREADABLE_STATE"
    host.broken.clear()
    assert client.get("/v1/server").status_code == 200


def test_only_reading_is_allowed(client: httpx.Client) -> None:
    response = client.post("/v1/learners")
    assert_problem(response, 405)
    assert response.headers["allow"] == "GET, HEAD"


HEADS = [
    "/",
    "/docs",
    "/openapi.json",
    "/livez",
    "/v1/learners",
    "/v1/learners/clicks",
    "/v1/learners/clicks/plasticity",
]


@pytest.mark.parametrize("path", [*HEADS, "/readyz", "/static/status.js", "/static/swagger-ui/swagger-ui.css"])
def test_head_is_get_without_a_body(host: Any, client: httpx.Client, make_learner: MakeLearner, path: str) -> None:
    host.add(make_learner("clicks"))
    host.reasons = ["learners are being restored"]  # so /readyz is not ready
    full, head = client.get(path), client.head(path)
    assert head.status_code == full.status_code == (503 if path == "/readyz" else 200)
    assert {**head.headers, "date": ""} == {**full.headers, "date": ""}
    assert int(head.headers["content-length"]) == len(full.content) > 0
    assert head.content == b""


@pytest.mark.parametrize(("path", "status"), [("/metrics", 200), ("/v1/server", 200), ("/nothing", 404)])
def test_head_of_what_changes_from_one_moment_to_the_next(client: httpx.Client, path: str, status: int) -> None:
    full, head = client.get(path), client.head(path)
    assert (head.status_code, head.content) == (status, b"")
    assert (head.headers.keys(), head.headers["content-type"]) == (full.headers.keys(), full.headers["content-type"])


def test_an_unavailable_engine_says_when_to_try_again(host: Any, client: httpx.Client) -> None:
    def fail(**_: Any) -> None:
        raise EngineUnavailable

    host.learners = fail
    response = client.get("/v1/server")
    assert_problem(response, 503, reason="ENGINE_UNAVAILABLE")
    assert response.headers["retry-after"] == "1"


def test_an_unforeseen_failure_gives_nothing_away(host: Any, client: httpx.Client) -> None:
    def fail(**_: Any) -> None:
        raise RuntimeError("a secret")

    host.learners = fail
    response = client.get("/v1/server")
    assert_problem(response, 500, reason="INTERNAL")
    assert "secret" not in response.text


def test_metrics_in_the_format_that_is_asked_for(host: Any, client: httpx.Client, make_learner: MakeLearner) -> None:
    host.add(make_learner("clicks"))
    plain = client.get("/metrics")
    assert plain.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "cbp_learner_steps" in {family.name for family in parse_text(plain.text)}
    accept = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.2"
    openmetrics = client.get("/metrics", headers={"Accept": accept})
    assert openmetrics.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert "cbp_learner_steps" in {family.name for family in parse_openmetrics(openmetrics.text)}


def test_openapi_describes_every_route_and_field(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    assert set(document["paths"]) == {
        "/v1/learners",
        "/v1/learners/{learner_id}",
        "/v1/learners/{learner_id}/plasticity",
        "/v1/server",
        "/livez",
        "/readyz",
        "/metrics",
    }
    for path, operations in document["paths"].items():
        assert operations["get"]["summary"], path
        for parameter in operations["get"].get("parameters", []):
            assert parameter["in"] == "path" or parameter["description"], (path, parameter["name"])
    documented = DOCS.read_text().replace("{id}", "{learner_id}")
    assert [path for path in document["paths"] if f"`{path}" not in documented] == []
    problem = document["paths"]["/v1/learners/{learner_id}"]["get"]["responses"]["404"]
    assert "application/problem+json" in problem["content"]


@pytest.mark.parametrize("path", ["/", "/docs", "/static/status.js", "/v1/server", "/nothing"])
def test_nothing_from_elsewhere_may_run(client: httpx.Client, path: str) -> None:
    headers = client.get(path).headers
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
    assert headers["x-content-type-options"] == "nosniff"

from dataclasses import replace
from datetime import UTC, datetime

from cbp_server.learners.hosted import Hosted, hosted_from_catalog
from cbp_server.learners.registry import Registry
from cbp_server.records.learners import Durability, LearnerState
from cbp_server.store.catalog import StoredLearner

NOW = datetime(2026, 11, 22, tzinfo=UTC)
SPEC = {
    "network": {"kind": "mlp", "in_features": 2, "hidden": [3], "out_features": 1},
    "loss": "mse",
    "optimizer": {"kind": "sgd", "lr": 0.01},
}


def hosted(learner_id: str, uid: str) -> Hosted:
    stored = StoredLearner(
        uid=uid,
        learner_id=learner_id,
        spec=SPEC,
        engine="compiled",
        durability=Durability.NONE,
        born=True,
        create_time=NOW,
    )
    return hosted_from_catalog(stored, None, LearnerState.ACTIVE, history_samples=1)


def test_learners_stay_in_order_as_they_come_and_go() -> None:
    registry = Registry()
    first, second, third = hosted("b", "2"), hosted("a", "3"), hosted("c", "1")
    registry.add([first, second, third])
    assert registry.ordered() == [second, first, third]
    registry.remove(first)
    registry.remove(first)  # nothing more to do
    assert registry.ordered() == [second, third]
    first.stored = replace(first.stored, delete_time=NOW)
    registry.add([hosted("b", "9"), first])  # a deleted learner's name is free
    assert [(each.learner_id, each.uid) for each in registry.ordered()] == [
        ("a", "3"),
        ("b", "2"),
        ("b", "9"),
        ("c", "1"),
    ]
    registry.remove(first)
    assert [each.uid for each in registry.ordered()] == ["3", "9", "1"]
    assert (len(registry.present()), registry.deleted()) == (3, [])

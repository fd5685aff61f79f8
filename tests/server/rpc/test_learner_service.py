"""LearnerService over the wire, as AIP users expect it."""

import uuid

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask

from cbp_proto import from_plain, to_plain
from cbp_proto.v1 import learner_pb2, learner_service_pb2, spec_pb2


def update(wire, learner_id, changes, *paths, etag=""):
    spec = from_plain(changes, spec_pb2.LearnerSpec)
    learner = learner_pb2.Learner(name=f"learners/{learner_id}", spec=spec, etag=etag)
    request = learner_service_pb2.UpdateLearnerRequest(learner=learner, update_mask=FieldMask(paths=paths))
    return wire.learners.UpdateLearner(request)


def test_a_created_learner_comes_back_with_every_field_filled_in(wire, learner_id):
    created = wire.create(learner_id)

    spec = to_plain(created.spec)
    assert created.name == f"learners/{learner_id}"
    assert created.uid
    assert created.etag
    assert created.create_time == created.update_time
    assert created.state == learner_pb2.Learner.STATE_ACTIVE
    assert spec["resets"]["utility"] == "adaptable_contribution"
    assert spec["network"]["activation"] == "relu"
    assert created.progress.step == 0
    assert not created.progress.HasField("loss")
    assert wire.get(learner_id) == created


def test_the_same_request_id_creates_once(wire, learner_id, refused):
    request_id = str(uuid.uuid4())
    first = wire.create(learner_id, request_id)
    assert wire.create(learner_id, request_id) == first

    other = refused(lambda: wire.create(learner_id + "-b", request_id))
    assert (other.code, other.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_ID_REUSED")
    assert "request_id" in refused(lambda: wire.create(learner_id, "not-a-uuid")).fields


def test_lists_come_in_pages_ordered_by_name(start_server, connect):
    wire = connect(start_server().grpc_target)
    for name in ("delta", "alpha", "echo", "bravo", "charlie"):
        wire.create(name)

    pages, token = [], ""
    while True:
        page = wire.learners.ListLearners(learner_service_pb2.ListLearnersRequest(page_size=2, page_token=token))
        pages.append([learner.name.removeprefix("learners/") for learner in page.learners])
        if not (token := page.next_page_token):
            break
        wire.delete(pages[-1][-1])  # a page token outlives the learner it was made from

    assert pages == [["alpha", "bravo"], ["charlie", "delta"], ["echo"]]


@pytest.mark.parametrize(
    ("field", "value"), [("page_token", "%%%"), ("page_token", "YQ"), ("page_token", "YWZ0ZXI"), ("page_size", -1)]
)
def test_a_wrong_page_is_named(wire, refused, field, value):
    request = learner_service_pb2.ListLearnersRequest(**{field: value})
    error = refused(lambda: wire.learners.ListLearners(request))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert error.fields.keys() == {field}


def test_an_update_changes_what_its_mask_names(wire, learner_id):
    created = wire.create(learner_id)

    changed = update(
        wire,
        learner_id,
        {"resets": {"layers": "first", "replacement_rate": 0.5}, "optimizer": {"lr": 0.01}},
        "spec.resets.layers",
        "spec.optimizer.lr",
    )

    before, after = to_plain(created.spec), to_plain(changed.spec)
    assert after["resets"] == before["resets"] | {"layers": ["first"]}
    assert after["optimizer"] == before["optimizer"] | {"lr": 0.01}
    assert changed.etag != created.etag
    assert changed.uid == created.uid
    assert wire.get(learner_id) == changed


def test_an_update_without_a_mask_takes_every_field_set(wire, learner_id):
    wire.create(learner_id)
    changed = update(wire, learner_id, {"resets": {"replacement_rate": 0.5}})
    assert changed.spec.resets.replacement_rate == 0.5
    assert changed.spec.resets.maturity_threshold == 5


def test_a_masked_field_that_is_not_set_goes_back_to_its_default(wire, learner_id):
    wire.create(learner_id)
    assert update(wire, learner_id, {}, "spec.resets.maturity_threshold").spec.resets.maturity_threshold == 100
    assert to_plain(update(wire, learner_id, {}, "spec.resets").spec)["resets"]["replacement_rate"] == 1e-4


@pytest.mark.parametrize("path", ["*", "spec"])
def test_a_mask_of_everything_replaces_all_that_can_be_updated(wire, learner_id, path):
    created = wire.create(learner_id, optimizer={"kind": "sgd", "lr": 0.05, "momentum": 0.9}, batch_size=2)

    changed = update(wire, learner_id, {"optimizer": {"lr": 0.1}, "resets": {"decay_rate": 0.5}}, path)

    before, after = to_plain(created.spec), to_plain(changed.spec)
    assert (after["optimizer"]["kind"], after["optimizer"]["lr"]) == ("sgd", 0.1)
    assert after["optimizer"]["momentum"] == 0
    assert after["resets"]["decay_rate"] == 0.5
    assert (after["resets"]["maturity_threshold"], after["resets"]["replacement_rate"]) == (100, 1e-4)
    for immutable in ("network", "loss", "batch_size", "seed"):
        assert after[immutable] == before[immutable]
    again = update(wire, learner_id, to_plain(created.spec), path)  # what was read may be sent back as it is
    assert again.spec == created.spec


@pytest.mark.parametrize("path", ["*", "spec"])
@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"optimizer": {"lr": 0.1}, "batch_size": 4}, "batch_size"),
        ({"optimizer": {"lr": 0.1}, "seed": 4}, "seed"),
        ({"optimizer": {"lr": 0.1}, "loss": "mse"}, "loss"),
        ({"optimizer": {"lr": 0.1}, "network": {"kind": "mlp", "hidden": [9]}}, "network"),
        ({"optimizer": {"kind": "adam", "lr": 0.1}}, "optimizer.kind"),
        ({"resets": {"decay_rate": 0.5}}, "optimizer.lr"),  # it has no default to go back to
    ],
)
def test_a_mask_of_everything_leaves_alone_what_cannot_change(wire, learner_id, refused, path, changes, field):
    created = wire.create(learner_id)
    assert refused(lambda: update(wire, learner_id, changes, path)).fields.keys() == {field}
    assert wire.get(learner_id) == created


@pytest.mark.parametrize(
    ("changes", "path", "field"),
    [
        ({"batch_size": 4}, "spec.batch_size", "batch_size"),
        ({"seed": 4}, "spec.seed", "seed"),
        ({"loss": "mse"}, "spec.loss", "loss"),
        ({"optimizer": {"kind": "adam", "lr": 0.1}}, "spec.optimizer", "optimizer.kind"),
        ({"resets": {"layers": ["9"]}}, "spec.resets.layers", "resets.layers"),
        ({}, "spec.nonsense", "update_mask"),
        ({}, "name", "update_mask"),
        ({}, "spec.*", "update_mask"),
        ({}, "spec.", "update_mask"),
        ({}, "spec." + "x" * 10**6, "update_mask"),
    ],
)
def test_a_wrong_update_names_its_field_and_changes_nothing(wire, learner_id, refused, changes, path, field):
    created = wire.create(learner_id)
    error = refused(lambda: update(wire, learner_id, changes, path))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert any(name.startswith(field) for name in error.fields), error.fields
    assert wire.get(learner_id) == created


def test_an_outdated_etag_stops_update_and_delete(wire, learner_id, refused):
    created = wire.create(learner_id)
    changed = update(wire, learner_id, {"resets": {"layers": "none"}}, etag=created.etag)

    for call in (
        lambda: update(wire, learner_id, {"resets": {"layers": "all"}}, etag=created.etag),
        lambda: wire.delete(learner_id, etag=created.etag),
    ):
        error = refused(call)
        assert (error.code, error.reason) == (grpc.StatusCode.ABORTED, "ETAG_MISMATCH")
        assert error.metadata["etag"] == changed.etag
    wire.delete(learner_id, etag=changed.etag)
    assert refused(lambda: wire.get(learner_id)).code is grpc.StatusCode.NOT_FOUND


def test_an_etag_does_not_come_back_with_an_earlier_spec(wire, learner_id, refused):
    created = wire.create(learner_id)
    changed = update(wire, learner_id, {"resets": {"layers": "none"}})
    restored = update(wire, learner_id, {"resets": {"layers": "all"}})
    assert restored.spec == created.spec
    assert len({created.etag, changed.etag, restored.etag}) == 3
    assert refused(lambda: wire.delete(learner_id, etag=created.etag)).reason == "ETAG_MISMATCH"


def test_a_new_learner_of_an_old_name_is_another_one(wire, learner_id):
    first = wire.create(learner_id)
    wire.delete(learner_id)
    assert wire.create(learner_id).uid != first.uid


def test_plasticity_is_measured_on_request_and_kept(wire, learner_id, examples):
    wire.create(learner_id, monitoring={"interval": 100})
    name = f"learners/{learner_id}"
    empty = wire.learners.GetPlasticity(learner_service_pb2.GetPlasticityRequest(name=name))
    assert list(empty.samples) == []

    stream = wire.stream(learner_id)
    stream.send_batch(1, *examples(250))
    stream.results(1)
    request = learner_service_pb2.GetPlasticityRequest(name=name, max_samples=10, fresh=True)
    samples = wire.learners.GetPlasticity(request).samples

    assert [sample.step for sample in samples] == [100, 200, 250]
    layers = {layer.layer: layer for layer in samples[-1].layers}
    assert list(layers) == ["hidden_0", "hidden_1", "output"]
    assert layers["hidden_0"].replacements > 0
    assert layers["hidden_0"].mean_abs_weight > 0
    assert not layers["output"].HasField("dormant_fraction")
    assert layers["hidden_0"].replacements == wire.get(learner_id).progress.replacements["hidden_0"]


def test_watching_shows_changes_arrivals_and_departures(wire, learner_id, examples):
    wire.create(learner_id)
    interval = Duration(nanos=50_000_000)
    watch = wire.learners.WatchLearners(learner_service_pb2.WatchLearnersRequest(interval=interval), timeout=60)

    def until(condition):
        for response in watch:
            if condition(response):
                return response
        raise AssertionError("the watch ended")

    name, newcomer = f"learners/{learner_id}", f"{learner_id}-b"
    until(lambda response: any(item.learner.name == name for item in response.learners))
    stream = wire.stream(learner_id)
    stream.send_batch(1, *examples(30))
    until(
        lambda response: any(
            item.learner.name == name and item.learner.progress.step == 30 for item in response.learners
        )
    )
    wire.create(newcomer)
    until(lambda response: any(item.learner.name == f"learners/{newcomer}" for item in response.learners))
    wire.delete(newcomer)
    until(lambda response: f"learners/{newcomer}" in response.deleted)
    watch.cancel()


def test_a_watch_of_named_learners_leaves_the_others_out(wire, learner_id):
    wire.create(learner_id)
    wire.create(f"{learner_id}-b")
    request = learner_service_pb2.WatchLearnersRequest(names=[f"learners/{learner_id}"])
    watch = wire.learners.WatchLearners(request, timeout=60)
    assert [item.learner.name for item in next(watch).learners] == [f"learners/{learner_id}"]
    watch.cancel()


def test_a_watch_of_very_many_learners_comes_in_several_messages(start_server, connect):
    wire = connect(start_server().grpc_target)
    tiny = {"network": {"kind": "mlp", "in_features": 1, "hidden": [1], "out_features": 2}}
    ids = [f"learner-{number:03}" for number in range(120)]
    for learner_id in ids:
        wire.create(learner_id, **tiny)

    watch = wire.learners.WatchLearners(learner_service_pb2.WatchLearnersRequest(), timeout=60)

    messages = [next(watch) for _ in range(3)]
    assert [len(message.learners) for message in messages] == [50, 50, 20]
    assert [message.more_follow for message in messages] == [True, True, False]
    assert [item.learner.name for message in messages for item in message.learners] == [f"learners/{i}" for i in ids]
    wire.delete(ids[7])
    last = next(watch)
    assert (list(last.deleted), list(last.learners), last.more_follow) == ([f"learners/{ids[7]}"], [], False)
    watch.cancel()


def test_a_watch_that_sleeps_ends_when_the_server_drains(own_server, connect, explain):
    wire = connect(own_server.grpc_target)
    wire.create("clicks")
    request = learner_service_pb2.WatchLearnersRequest(interval=Duration(seconds=3600))
    watch = wire.learners.WatchLearners(request, timeout=60)
    next(watch)
    own_server.begin_stop()
    with pytest.raises(grpc.RpcError) as caught:
        next(watch)
    error = explain(caught.value)
    assert (error.code, error.reason, error.retryable) == (grpc.StatusCode.UNAVAILABLE, "SERVER_DRAINING", True)
    assert own_server.wait() == 0

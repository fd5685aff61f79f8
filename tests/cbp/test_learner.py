import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from cbp import Batch, BatchError, CbpError, Learner, LearnerSpec, SpecError
from cbp.learner import SAMPLE_LIMIT
from cbp.progress import TASK_RECORD_LIMIT

MakeSpec = Callable[..., LearnerSpec]
MakeBatch = Callable[..., Batch]


def test_a_newborn_has_no_history(make_spec: MakeSpec) -> None:
    progress = Learner(make_spec()).progress
    assert (progress.step, progress.examples, progress.pending, progress.tasks) == (0, 0, 0, ())
    assert progress.loss is None
    assert progress.accuracy is None
    assert progress.replacements == {"hidden_0": 0, "hidden_1": 0}


def test_examples_wait_for_their_step_to_fill_up(make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    spec = make_spec(batch_size=4)
    learner = Learner(spec)
    first = learner.train(make_batch(spec, 3), return_outputs=True)
    assert (first.steps, first.first_step, first.examples, first.pending) == (0, 1, 0, 3)
    assert first.loss is None
    assert first.accuracy is None
    assert first.outputs is not None
    assert first.outputs.shape == (0, 3)
    second = learner.train(make_batch(spec, 7), return_outputs=True)
    assert (second.steps, second.first_step, second.examples, second.pending) == (2, 1, 8, 2)
    assert second.outputs is not None
    assert second.outputs.shape == (8, 3)
    assert learner.progress.examples == 8
    assert learner.train(make_batch(spec, 2)).first_step == 3


@pytest.mark.parametrize("sizes", [[24], [1] * 24, [5, 7, 12]])
def test_how_a_stream_is_cut_into_messages_does_not_matter(
    sizes: list[int], make_spec: MakeSpec, make_batch: MakeBatch
) -> None:
    spec = make_spec(batch_size=3)
    whole = make_batch(spec, 24, weighted=True)
    assert whole.weights is not None
    one, cut = Learner(spec), Learner(spec)
    expected = one.train(whole, return_outputs=True)
    outputs, start = [], 0
    for size in sizes:
        part = slice(start, start + size)
        batch = Batch.validate(spec, whole.features[part], whole.targets[part], whole.weights[part])
        outputs.append(cut.train(batch, return_outputs=True).outputs)
        start += size
    assert expected.outputs is not None
    np.testing.assert_array_equal(np.concatenate([part for part in outputs if part is not None]), expected.outputs)
    assert torch.equal(one._state.parameters.flat, cut._state.parameters.flat)
    assert one.progress.loss == pytest.approx(cut.progress.loss)


def test_outputs_are_predictions_before_the_update(make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    spec = make_spec(batch_size=0)
    learner = Learner(spec)
    batch = make_batch(spec, 5)
    before = learner.predict(batch.features)
    np.testing.assert_array_equal(learner.train(batch, return_outputs=True).outputs, before)
    assert not np.array_equal(learner.predict(batch.features), before)


def test_loss_and_accuracy_are_those_of_the_outputs(make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    spec = make_spec(monitoring__average_decay=0.9)
    learner = Learner(spec)
    batch = make_batch(spec, 40, weighted=True)
    result = learner.train(batch, return_outputs=True)
    outputs, labels = torch.from_numpy(result.outputs), torch.from_numpy(batch.targets)
    each = torch.nn.functional.cross_entropy(outputs, labels, reduction="none").double()
    right = (outputs.argmax(1) == labels).double()
    assert result.loss == pytest.approx(float(each.mean()))
    assert result.accuracy == pytest.approx(float(right.mean()))
    shares = 0.9 ** torch.arange(39, -1, -1, dtype=torch.float64)
    assert learner.progress.loss == pytest.approx(float((shares * each).sum() / shares.sum()))
    assert learner.progress.accuracy == pytest.approx(float((shares * right).sum() / shares.sum()))


@pytest.mark.parametrize("loss", ["mse", "huber"])
def test_regression_has_no_accuracy(loss: str, make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    spec = make_spec(loss=loss)
    learner = Learner(spec)
    result = learner.train(make_batch(spec, 8, task="a"))
    assert result.accuracy is None
    assert learner.progress.accuracy is None
    assert learner.progress.tasks[0].accuracy is None
    assert result.loss is not None


def test_binary_accuracy_is_the_share_of_right_outputs(make_spec: MakeSpec) -> None:
    spec = make_spec(loss="binary_cross_entropy", network__out_features=4)
    learner = Learner(spec)
    features = np.ones((2, 6))
    signs = (learner.predict(features[:1])[0] > 0).astype(float)
    targets = np.stack([signs, signs])
    targets[0, 0] = 1 - targets[0, 0]
    assert learner.train(Batch.validate(spec, features, targets)).accuracy == pytest.approx(7 / 8)


def test_weights_scale_the_gradient(make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    spec = make_spec(batch_size=0)
    batch = make_batch(spec, 4)
    silent, doubled, half = Learner(spec), Learner(spec), Learner(spec)
    before = silent._state.parameters.flat.clone()
    silent.train(Batch.validate(spec, batch.features, batch.targets, np.zeros(4)))
    assert torch.equal(silent._state.parameters.flat, before)
    doubled.train(Batch.validate(spec, batch.features[:2], batch.targets[:2], [2.0, 2.0]))
    half.train(Batch.validate(spec, batch.features, batch.targets, [4.0, 4.0, 0.0, 0.0]))
    torch.testing.assert_close(doubled._state.parameters.flat, half._state.parameters.flat)


def test_each_example_counts_for_its_own_task(make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    """A change of task does not cut a step short."""
    spec = make_spec(batch_size=4)
    learner = Learner(spec)
    first = learner.train(make_batch(spec, 6, task="a"), return_outputs=True)
    second = learner.train(make_batch(spec, 6, seed=1, task="b"), return_outputs=True)
    learner.train(make_batch(spec, 4, seed=2, task="b"))
    a, b = learner.progress.tasks
    assert (a.task, a.first_step, a.steps, a.examples) == ("a", 1, 2, 6)
    assert (b.task, b.first_step, b.steps, b.examples) == ("b", 2, 3, 10)
    labels = torch.from_numpy(make_batch(spec, 6).targets)
    assert first.outputs is not None
    assert second.outputs is not None
    outputs = torch.from_numpy(np.concatenate([first.outputs, second.outputs[:2]]))
    assert a.loss == pytest.approx(float(torch.nn.functional.cross_entropy(outputs, labels)), rel=1e-5)


def test_a_task_that_returns_is_recorded_again_and_old_records_go(make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    spec = make_spec(batch_size=0)
    learner = Learner(spec)
    for index in range(TASK_RECORD_LIMIT + 3):
        learner.train(make_batch(spec, 2, task="odd" if index % 2 else "even"))
    learner.train(make_batch(spec, 2))
    tasks = learner.progress.tasks
    assert len(tasks) == TASK_RECORD_LIMIT
    assert [record.task for record in tasks[:2]] == ["odd", "even"]
    assert tasks[-1].first_step == TASK_RECORD_LIMIT + 3


def test_predictions_between_steps_see_a_whole_state(make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    spec = make_spec(batch_size=2, resets__replacement_rate=0.3)
    batch = make_batch(spec, 40)
    plain, watched = Learner(spec), Learner(spec)
    seen: list[Any] = []

    def look() -> None:
        step = watched.progress.step
        seen.append((step, watched.progress.examples, watched.predict(batch.features[2 * step : 2 * step + 2])))

    expected = plain.train(batch, return_outputs=True)
    watched.train(batch, between_steps=look)
    assert [(step, examples) for step, examples, _ in seen] == [(step, 2 * step) for step in range(1, 20)]
    assert expected.outputs is not None
    for step, _, outputs in seen:
        np.testing.assert_array_equal(outputs, expected.outputs[2 * step : 2 * step + 2])
    assert torch.equal(plain._state.parameters.flat, watched._state.parameters.flat)


def test_predictions_need_not_wait_for_a_plasticity_sample(make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    spec = make_spec(monitoring={"interval": 5})
    batch = make_batch(spec, 5 * (spec.batch_size or 1))
    learner, undisturbed = Learner(spec), Learner(spec)
    steps: list[int] = []

    def look() -> None:
        learner.predict(batch.features)
        steps.append(learner.progress.step)

    learner.train(batch, between_steps=look)
    undisturbed.train(batch)
    assert steps.count(5) == len(spec.network.hidden)  # between its layers and the output's, behind the last step
    assert learner.take_samples() == undisturbed.take_samples()


@pytest.mark.parametrize("change", ["train", "update", "snapshot"])
def test_nothing_but_predictions_may_come_between_steps(
    change: str, make_spec: MakeSpec, make_batch: MakeBatch
) -> None:
    spec = make_spec()
    learner = Learner(spec)
    batch = make_batch(spec, 8)
    calls = {
        "train": lambda: learner.train(batch),
        "update": lambda: learner.update(spec),
        "snapshot": lambda: learner.snapshot(),
    }
    with pytest.raises(CbpError, match=f"{change} cannot be called from between_steps"):
        learner.train(batch, between_steps=lambda: void(calls[change]()))
    assert learner.progress.step == 1
    learner.snapshot()


def void(_: object) -> None:
    """Drops a result."""


def test_interrupted_training_goes_on_where_it_stopped(make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    spec = make_spec(batch_size=2)
    first, second = make_batch(spec, 11, task="a", weighted=True), make_batch(spec, 5, seed=1, task="b")
    whole, interrupted = Learner(spec), Learner(spec)
    whole.train(first)
    whole.train(second)

    def stop_after_two() -> None:
        if interrupted.progress.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted.train(first, between_steps=stop_after_two)
    assert (interrupted.progress.step, interrupted.progress.examples, interrupted.progress.pending) == (2, 4, 7)
    interrupted.train(second)
    assert torch.equal(whole._state.parameters.flat, interrupted._state.parameters.flat)
    assert whole.progress.examples == interrupted.progress.examples
    assert whole.progress.loss == pytest.approx(interrupted.progress.loss)


def test_a_batch_for_another_learner_is_refused(make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    learner = Learner(make_spec())
    stranger = make_batch(make_spec(network__in_features=5, loss="mse"), 4)
    with pytest.raises(BatchError) as caught:
        learner.train(stranger)
    assert [violation.field for violation in caught.value.violations] == ["features", "targets"]
    assert learner.progress.pending == 0


def test_predict_refuses_features_that_do_not_fit(make_spec: MakeSpec) -> None:
    learner = Learner(make_spec())
    with pytest.raises(BatchError, match="features"):
        learner.predict(np.zeros((2, 5)))
    assert learner.predict(np.zeros((2, 6), dtype=np.int8)).dtype == np.float32


def test_many_examples_are_predicted_in_several_passes(
    make_spec: MakeSpec, make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec()
    learner = Learner(spec)
    features = make_batch(spec, 23).features
    expected = learner.predict(features)
    monkeypatch.setattr("cbp.learner.PREDICTION_VALUES", 15 * 4 + 3)
    passes: list[int] = []
    predict = learner._engine.predict
    monkeypatch.setattr(learner._engine, "predict", lambda inputs: passes.append(inputs.shape[1]) or predict(inputs))
    np.testing.assert_allclose(learner.predict(features), expected, rtol=1e-4, atol=1e-6)
    assert passes == [4, 4, 4, 4, 4, 3]
    monkeypatch.setattr("cbp.learner.PREDICTION_VALUES", 1)
    np.testing.assert_allclose(learner.predict(features), expected, rtol=1e-4, atol=1e-6)


def test_running_out_of_memory_before_the_first_step_changes_nothing(
    make_spec: MakeSpec, make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec(batch_size=4)
    learner, untroubled = Learner(spec), Learner(spec)
    first, second = make_batch(spec, 3), make_batch(spec, 7, seed=1)
    learner.train(first)
    with monkeypatch.context() as patch:
        patch.setattr(learner._engine, "begin", lambda *_: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            learner.train(second)
    assert (learner.progress.step, learner.progress.pending) == (0, 3)
    for batch in (first, second):
        untroubled.train(batch)
    learner.train(second)
    assert torch.equal(learner._state.parameters.flat, untroubled._state.parameters.flat)


def test_resets_can_be_switched_on_and_moved(make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    spec = make_spec(resets__layers="none")
    learner = Learner(spec)
    learner.train(make_batch(spec, 40))
    assert sum(learner.progress.replacements.values()) == 0
    learner.update(make_spec(resets__layers=[1]))
    learner.train(make_batch(spec, 40, seed=1))
    replaced = learner.progress.replacements
    assert replaced["hidden_0"] == 0
    assert replaced["hidden_1"] >= 4, "units that are old enough from the start go at 0.05 x 7 a step"


@pytest.mark.parametrize("maturity", [0, 2, 30])
def test_the_schedule_follows_a_new_maturity_threshold(
    maturity: int, make_spec: MakeSpec, make_batch: MakeBatch
) -> None:
    """After an update the host's counts still are those of the device's ages."""
    spec = make_spec(resets__replacement_rate=0.2)
    learner = Learner(spec)
    learner.train(make_batch(spec, 60))
    changed = make_spec(resets__replacement_rate=0.2, resets__maturity_threshold=maturity)
    learner.update(changed)
    accumulated = list(learner._state.schedules[0].accumulated)
    replaced = dict(learner.progress.replacements)
    for step in range(60):
        ages = learner._state.units.age[0] + 1
        for layer, columns in enumerate((slice(0, 8), slice(8, 15))):
            accumulated[layer] += 0.2 * int((ages[columns] > maturity).sum())
            replaced[f"hidden_{layer}"] += int(accumulated[layer])
            accumulated[layer] -= int(accumulated[layer])
        learner.train(make_batch(spec, 2, seed=step))
        assert learner.progress.replacements == replaced


def test_a_new_learning_rate_takes_effect(make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    spec = make_spec(optimizer__momentum=0.0)
    learner = Learner(spec)
    learner.update(make_spec(optimizer__momentum=0.9, optimizer__lr=1e-30))
    before = learner._state.parameters.flat.clone()
    learner.train(make_batch(spec, 2))
    torch.testing.assert_close(learner._state.parameters.flat, before, rtol=0, atol=1e-20)
    assert set(learner._state.optimizer.slots()) == {"momentum"}
    learner.update(spec)
    assert learner._state.optimizer.slots() == {}


def test_a_refused_update_changes_nothing(make_spec: MakeSpec) -> None:
    spec = make_spec()
    learner = Learner(spec)
    with pytest.raises(SpecError):
        learner.update(make_spec(batch_size=7, resets__layers="none"))
    assert learner.spec == spec


def test_samples_are_taken_at_the_interval_within_messages(make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    spec = make_spec(monitoring__interval=4, monitoring__probe_size=10)
    learner = Learner(spec)
    learner.train(make_batch(spec, 22))
    samples = learner.take_samples()
    assert [(sample.step, sample.examples) for sample in samples] == [(4, 8), (8, 16)]
    assert learner.take_samples() == []
    np.testing.assert_array_equal(learner._probe.features, make_batch(spec, 22).features[-10:])


def test_interval_zero_takes_no_samples_and_old_samples_go(make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    spec = make_spec(monitoring__interval=0)
    learner = Learner(spec)
    learner.train(make_batch(spec, 22))
    assert learner.take_samples() == []
    assert learner._samples.maxlen == SAMPLE_LIMIT


def test_monitoring_does_not_change_learning(make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    watched, alone = Learner(make_spec(monitoring__interval=1)), Learner(make_spec(monitoring__interval=0))
    for learner in (watched, alone):
        learner.train(make_batch(learner.spec, 60))
    assert torch.equal(watched._state.parameters.flat, alone._state.parameters.flat)
    assert torch.equal(watched._state.units.utility, alone._state.units.utility)


def test_progress_is_plain_json(make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    spec = make_spec()
    learner = Learner(spec)
    learner.train(make_batch(spec, 4, task="a"))
    plain = learner.progress.to_plain()
    assert plain["tasks"][0]["task"] == "a"
    assert plain["step"] == 2


def test_arrays_that_may_not_be_written_to_are_learnt_without_a_word():
    script = (
        "import warnings; warnings.simplefilter('error'); import numpy as np\n"
        "from cbp import Batch, Learner, LearnerSpec\n"
        "spec = LearnerSpec.parse({'network': {'kind': 'mlp', 'in_features': 4, 'hidden': [3], 'out_features': 2},"
        " 'loss': 'mse', 'optimizer': {'kind': 'sgd', 'lr': 0.1}})\n"
        "rows = [np.frombuffer(np.ones(n, np.float32).tobytes(), np.float32) for n in (8, 4)]\n"
        "batch = Batch.validate(spec, rows[0].reshape(2, 4), rows[1].reshape(2, 2))\n"
        "Learner(spec).train(batch)\n"
    )
    # In a process of its own: torch says it once in each.
    subprocess.run([sys.executable, "-c", script], check=True)

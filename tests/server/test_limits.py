"""What one learner and one message may claim: refused with the numbers and the setting that allows more."""

from dataclasses import replace

import pytest

from cbp import BatchError, LearnerSpec, SpecError
from cbp_server.limits import Limits, check_prediction, check_spec, check_training

LIMITS = Limits(max_parameters=1000, max_layers=3, max_pending_bytes=2800, max_activation_bytes=10_000)


def spec_of(
    in_features: int = 4, hidden: tuple[int, ...] = (8,), out_features: int = 3, batch_size: int = 1, probe: int = 10
) -> LearnerSpec:
    network = {"kind": "mlp", "in_features": in_features, "hidden": hidden, "out_features": out_features}
    return LearnerSpec.parse(
        {
            "network": network,
            "loss": "mse",
            "optimizer": {"kind": "sgd", "lr": 0.1},
            "batch_size": batch_size,
            "monitoring": {"probe_size": probe},
        }
    )


@pytest.mark.parametrize(
    ("spec", "field", "texts"),
    [
        (spec_of(hidden=(2,) * 4), "network.hidden", ["has 4 layers", "at most 3", "--max-layers"]),
        (spec_of(hidden=(300,), probe=1), "network.hidden", ["2403 parameters", "at most 1000", "--max-parameters"]),
        (spec_of(in_features=200), "network.in_features", ["1635 parameters", "--max-parameters"]),
        (spec_of(out_features=200), "network.out_features", ["1840 parameters", "--max-parameters"]),
        (
            spec_of(batch_size=101),
            "batch_size",
            ["101 examples of 28 bytes", "2828 bytes", "at most 2800", "100 examples fit", "--max-pending-bytes"],
        ),
        (
            spec_of(hidden=(40, 10), batch_size=50),
            "batch_size",
            ["50 examples of 228 bytes", "11400", "at most 10000", "43 examples fit", "--max-activation-bytes"],
        ),
        (spec_of(probe=200), "monitoring.probe_size", ["200 examples", "12000", "166 examples fit"]),
    ],
)
def test_a_spec_that_claims_too_much_names_field_number_and_setting(spec, field, texts):
    with pytest.raises(SpecError) as caught:
        check_spec(spec, LIMITS)
    (violation,) = caught.value.violations
    assert violation.field == field
    for text in texts:
        assert text in violation.description


@pytest.mark.parametrize("spec", [spec_of(batch_size=100), spec_of(hidden=(8, 8, 8)), spec_of(probe=166)])
def test_a_spec_at_the_limit_is_fine(spec):
    check_spec(spec, LIMITS)


def test_everything_is_reported_at_once():
    with pytest.raises(SpecError) as caught:
        check_spec(spec_of(hidden=(1000,) * 5, batch_size=1000, probe=1000), LIMITS)
    fields = [violation.field for violation in caught.value.violations]
    assert fields == ["network.hidden", "network.hidden", "batch_size", "batch_size", "monitoring.probe_size"]


def test_sizes_of_the_wires_largest_integers_are_judged_like_others():
    largest = 2**31 - 1
    with pytest.raises(SpecError, match="--max-parameters"):
        check_spec(spec_of(in_features=largest, hidden=(largest,) * 3, out_features=largest), LIMITS)


@pytest.mark.parametrize(("batch_size", "most"), [(0, 166), (1, 356), (100, 242)])
def test_the_examples_that_fit_into_a_message_are_named_exactly(batch_size, most):
    spec = spec_of(batch_size=batch_size)
    check_training(spec, most, LIMITS)
    with pytest.raises(BatchError, match=rf"features: {most + 1} examples .* at most {most} at once"):
        check_training(spec, most + 1, LIMITS)


def test_a_prediction_is_bound_by_its_features_and_outputs():
    spec = spec_of(hidden=(10_000,))
    check_prediction(spec, 357, LIMITS)
    with pytest.raises(BatchError, match=r"features: 358 examples .* at most 357 at once, or raise"):
        check_prediction(spec, 358, LIMITS)


ANSWERS = replace(LIMITS, max_activation_bytes=2**20, max_answer_bytes=120)  # outputs of 10 examples


def test_a_prediction_is_bound_by_its_answer():
    check_prediction(spec_of(), 10, ANSWERS)
    with pytest.raises(BatchError, match=r"^features: the outputs of 11 examples take 132 bytes, at most 120 .* 10 ex"):
        check_prediction(spec_of(), 11, ANSWERS)


@pytest.mark.parametrize(
    ("batch_size", "most", "answered"),
    [(0, 10, 11), (1, 10, 11), (3, 9, 12), (10, 10, 20)],  # where 2 examples wait, 9 make 3 steps of 3, and 10 make 4
)
def test_outputs_that_are_returned_count_with_the_examples_that_waited(batch_size, most, answered):
    spec = spec_of(batch_size=batch_size)
    check_training(spec, most, ANSWERS, return_outputs=True)
    check_training(spec, 100, ANSWERS)
    with pytest.raises(
        BatchError, match=rf"{answered} examples take .* at most {most} examples at once, or do without"
    ):
        check_training(spec, most + 1, ANSWERS, return_outputs=True)


def test_a_step_whose_outputs_never_fit_says_so():
    with pytest.raises(BatchError, match=r"take 132 bytes, at most 120 fit into one answer: do without return_outputs"):
        check_training(spec_of(batch_size=11), 1, ANSWERS, return_outputs=True)

import cbp

EXPECTED = """
AdamSpec AdamWSpec Batch BatchError CategoricalColumn CbpError ContinualBackprop ConvnetSpec DivergenceError
EngineName FieldViolation HiddenUnits InputSpec LayerPlasticity Learner LearnerProgress LearnerSnapshot LearnerSpec
LinearSpec LossSpec MlpSpec MonitoringSpec PlasticitySample RegisteredSpec ResetSpec ResnetSpec RmspropSpec SgdSpec
SnapshotError SpecError TaskRecord TrainResult Trainability TransformerSpec choose_engine compile_ahead compiled_before
measure_trainability train_together
"""


def test_public_surface_is_pinned() -> None:
    assert sorted(cbp.__all__) == sorted(EXPECTED.split())
    assert all(hasattr(cbp, name) for name in cbp.__all__)

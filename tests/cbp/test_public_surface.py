import cbp

EXPECTED = """
AdamSpec AdamWSpec Batch BatchError CbpError ContinualBackprop DivergenceError EngineName FieldViolation HiddenUnits
LayerPlasticity Learner LearnerProgress LearnerSnapshot LearnerSpec LossSpec MlpSpec MonitoringSpec PlasticitySample
ResetSpec SgdSpec SnapshotError SpecError TaskRecord TrainResult Trainability choose_engine compile_ahead
compiled_before measure_trainability train_together
"""


def test_public_surface_is_pinned() -> None:
    assert sorted(cbp.__all__) == sorted(EXPECTED.split())
    assert all(hasattr(cbp, name) for name in cbp.__all__)

import cbp

EXPECTED = """
AdamSpec AdamWSpec Batch BatchError CbpError ContinualBackprop DivergenceError EngineName FieldViolation HiddenUnits
L2Init L2InitSpec LayerPlasticity Learner LearnerProgress LearnerSnapshot LearnerSpec LossSpec MethodSpec MlpSpec
MonitoringSpec PlasticityMethod PlasticitySample ReDo ReDoSpec ResetSpec SelectiveWeightReinitialization
SelectiveWeightReinitializationSpec SelfNormalizedResets SelfNormalizedResetsSpec SgdSpec ShrinkAndPerturb
ShrinkAndPerturbSpec SnapshotError SpecError TaskRecord TrainResult UnitResettingMethod Upgd UpgdSpec choose_engine
compile_ahead compiled_before make_methods train_together
"""


def test_public_surface_is_pinned() -> None:
    assert sorted(cbp.__all__) == sorted(EXPECTED.split())
    assert all(hasattr(cbp, name) for name in cbp.__all__)

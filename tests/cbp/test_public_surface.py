import cbp

EXPECTED = """
AdamSpec AdamWSpec Batch BatchError CategoricalColumn CbpError ContinualBackprop ConvnetSpec DivergenceError
EngineName FieldViolation FormatError HiddenUnits InputSpec L2Init L2InitSpec LayerPlasticity Learner LearnerProgress
LearnerSnapshot LearnerSpec LinearSpec LossSpec MethodSpec MlpSpec MonitoringSpec PlasticityMethod PlasticitySample ReDo
ReDoSpec RegisteredSpec ResetSpec ResnetSpec RmspropSpec SelectiveWeightReinitialization
SelectiveWeightReinitializationSpec SelfNormalizedResets SelfNormalizedResetsSpec SgdSpec ShrinkAndPerturb
ShrinkAndPerturbSpec SnapshotError SpecError TaskRecord TrainResult Trainability TransformerSpec UnitResettingMethod
Upgd UpgdSpec choose_engine compile_ahead compiled_before make_methods measure_trainability train_together
"""


def test_public_surface_is_pinned() -> None:
    assert sorted(cbp.__all__) == sorted(EXPECTED.split())
    assert all(hasattr(cbp, name) for name in cbp.__all__)

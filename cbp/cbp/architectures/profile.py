"""What a network of any kind takes. That of a registered architecture shows only when it is built."""

from cbp.errors import SpecError
from cbp.spec.learner_spec import OUTPUT_LAYER, LearnerSpec, hidden_layers
from cbp.spec.network_profile import NetworkProfile
from cbp.spec.network_spec import AnyNetwork, RegisteredSpec


def profile_of(network: AnyNetwork) -> NetworkProfile:
    """Raises `SpecError` if it is a registered architecture that cannot be built."""
    if not isinstance(network, RegisteredSpec):
        return network.profile
    # Imported when it is needed: it needs torch, for which nobody waits who has other networks.
    from cbp.architectures.measured_profile import measure

    return measure(network)


def check_buildable(spec: LearnerSpec) -> None:
    """Raises `SpecError` for what a specification cannot know of a registered architecture: whether it can be built
    here, and whether it has the layers that are to be reset."""
    if isinstance(spec.network, RegisteredSpec):
        problem = spec.misplaced(hidden_layer_names(spec))
        if problem is not None:
            raise SpecError([problem])


def layer_names(spec: LearnerSpec) -> tuple[str, ...]:
    """`hidden_0`, `hidden_1`, … and `output`."""
    return (*hidden_layer_names(spec), OUTPUT_LAYER)


def hidden_layer_names(spec: LearnerSpec) -> tuple[str, ...]:
    """`hidden_0`, `hidden_1`, …"""
    return hidden_layers(len(profile_of(spec.network).hidden_units))


def replacement_rates(spec: LearnerSpec) -> tuple[float, ...]:
    """The rate in force in each hidden layer; 0 where units are not reset."""
    return spec.resets.rates(hidden_layer_names(spec))

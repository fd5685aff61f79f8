"""From specifications to methods that are attached to a module."""

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from cbp.continual_backprop import ContinualBackprop
from cbp.errors import SpecError
from cbp.methods.interface import PlasticityMethod
from cbp.methods.l2_init import L2Init
from cbp.methods.redo import ReDo
from cbp.methods.selective_weight_reinitialization import SelectiveWeightReinitialization
from cbp.methods.self_normalized_resets import SelfNormalizedResets
from cbp.methods.shrink_and_perturb import ShrinkAndPerturb
from cbp.methods.upgd import Upgd
from cbp.spec.learner_spec import (
    Initializer,
    L2InitSpec,
    MethodSpec,
    ReDoSpec,
    ResetSpec,
    SelectiveWeightReinitializationSpec,
    SelfNormalizedResetsSpec,
    ShrinkAndPerturbSpec,
    UpgdSpec,
    method_contradiction,
)


def make_methods(
    specs: Sequence[MethodSpec],
    module: nn.Module,
    optimizer: Optimizer,
    *,
    resets: ResetSpec | None = None,
    initializer: Initializer = "default",
    seed: int = 0,
) -> list[PlasticityMethod]:
    """The methods of a specification, attached to a module that has not been trained yet.

    Continual Backprop comes first, where `resets` resets any unit, then the others in their order; call `step` of each
    in the order of the list. `initializer` is the distribution of the weights of newborn units. Each method has
    random numbers of its own, by `seed` and its place.

    Raises `SpecError` if they do not go together, or one does not go with the module or the optimizer.
    """
    clash = method_contradiction(specs, resets)
    if clash is not None:
        raise SpecError([clash])
    made: list[PlasticityMethod] = []
    try:
        if resets is not None and resets.resets_units:
            settings = {name: getattr(resets, name) for name in type(resets).model_fields}
            made.append(ContinualBackprop(module, optimizer, initializer=initializer, seed=seed, **settings))
        for place, spec in enumerate(specs, start=1):
            settings = {name: getattr(spec, name) for name in type(spec).model_fields if name != "kind"}
            made.append(_made(spec, module, optimizer, settings, initializer, seed + place))
    except SpecError:
        for method in made:
            method.remove()
        raise
    return made


def _made(
    spec: MethodSpec,
    module: nn.Module,
    optimizer: Optimizer,
    settings: dict[str, Any],
    initializer: Initializer,
    seed: int,
) -> PlasticityMethod:
    match spec:
        case L2InitSpec():
            return L2Init(module, optimizer, **settings)
        case ShrinkAndPerturbSpec():
            return ShrinkAndPerturb(module, optimizer, seed=seed, **settings)
        case ReDoSpec():
            return ReDo(module, optimizer, initializer=initializer, seed=seed, **settings)
        case SelfNormalizedResetsSpec():
            return SelfNormalizedResets(module, optimizer, initializer=initializer, seed=seed, **settings)
        case UpgdSpec():
            return Upgd(module, optimizer, seed=seed, **settings)
        case SelectiveWeightReinitializationSpec():
            return SelectiveWeightReinitialization(module, optimizer, seed=seed, **settings)

"""Methods against loss of plasticity, for any module and optimizer, under one interface."""

from cbp.continual_backprop import ContinualBackprop
from cbp.methods.choice import make_methods
from cbp.methods.interface import PlasticityMethod, UnitResettingMethod
from cbp.methods.l2_init import L2Init
from cbp.methods.redo import ReDo
from cbp.methods.selective_weight_reinitialization import SelectiveWeightReinitialization
from cbp.methods.self_normalized_resets import SelfNormalizedResets
from cbp.methods.shrink_and_perturb import ShrinkAndPerturb
from cbp.methods.upgd import Upgd

__all__ = [
    "ContinualBackprop",
    "L2Init",
    "PlasticityMethod",
    "ReDo",
    "SelectiveWeightReinitialization",
    "SelfNormalizedResets",
    "ShrinkAndPerturb",
    "UnitResettingMethod",
    "Upgd",
    "make_methods",
]

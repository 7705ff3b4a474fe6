"""Attacks: what Byzantine workers do, for tests and comparisons.

Attacks on vectors are called as ``attack(vectors, byzantine=[...])`` on an [m, d] tensor;
:class:`~lightning_byzantine.callbacks.ByzantineSimulation` puts any attack into a training run.
"""

from lightning_byzantine.attacks.a_little_is_enough import ALittleIsEnough
from lightning_byzantine.attacks.alternating import Alternating
from lightning_byzantine.attacks.attack import Attack, DataAttack, VectorAttack
from lightning_byzantine.attacks.bit_flip import BitFlip
from lightning_byzantine.attacks.fang import Fang
from lightning_byzantine.attacks.framing import Framing
from lightning_byzantine.attacks.gaussian_noise import GaussianNoise
from lightning_byzantine.attacks.honest_radius import HonestRadius
from lightning_byzantine.attacks.inner_product_manipulation import InnerProductManipulation
from lightning_byzantine.attacks.intermittent import Intermittent
from lightning_byzantine.attacks.label_flip import LabelFlip
from lightning_byzantine.attacks.mimic import Mimic
from lightning_byzantine.attacks.min_max import MinMax
from lightning_byzantine.attacks.min_sum import MinSum
from lightning_byzantine.attacks.non_finite import NonFinite
from lightning_byzantine.attacks.one_layer import OneLayer
from lightning_byzantine.attacks.optimal_a_little_is_enough import OptimalALittleIsEnough
from lightning_byzantine.attacks.optimal_inner_product_manipulation import OptimalInnerProductManipulation
from lightning_byzantine.attacks.relocated_orthogonal_perturbation import RelocatedOrthogonalPerturbation
from lightning_byzantine.attacks.scale import Scale
from lightning_byzantine.attacks.sign_flip import SignFlip
from lightning_byzantine.attacks.stale_gradient import StaleGradient
from lightning_byzantine.attacks.zero import Zero

__all__ = [
    "ALittleIsEnough",
    "Alternating",
    "Attack",
    "BitFlip",
    "DataAttack",
    "Fang",
    "Framing",
    "GaussianNoise",
    "HonestRadius",
    "InnerProductManipulation",
    "Intermittent",
    "LabelFlip",
    "Mimic",
    "MinMax",
    "MinSum",
    "NonFinite",
    "OneLayer",
    "OptimalALittleIsEnough",
    "OptimalInnerProductManipulation",
    "RelocatedOrthogonalPerturbation",
    "Scale",
    "SignFlip",
    "StaleGradient",
    "VectorAttack",
    "Zero",
]

"""Attacks: what Byzantine workers do, for tests and comparisons.

Attacks on vectors are called as ``attack(vectors, byzantine=[...])`` on an [m, d] tensor;
:class:`~lightning_byzantine.callbacks.ByzantineSimulation` puts any attack into a training run.
"""

from lightning_byzantine.attacks.a_little_is_enough import ALittleIsEnough
from lightning_byzantine.attacks.attack import Attack, DataAttack, VectorAttack
from lightning_byzantine.attacks.gaussian_noise import GaussianNoise
from lightning_byzantine.attacks.inner_product_manipulation import InnerProductManipulation
from lightning_byzantine.attacks.label_flip import LabelFlip
from lightning_byzantine.attacks.non_finite import NonFinite
from lightning_byzantine.attacks.sign_flip import SignFlip

__all__ = [
    "ALittleIsEnough",
    "Attack",
    "DataAttack",
    "GaussianNoise",
    "InnerProductManipulation",
    "LabelFlip",
    "NonFinite",
    "SignFlip",
    "VectorAttack",
]

import pytest
import torch
from vectors import rows

from lightning_byzantine.attacks import (
    ALittleIsEnough,
    GaussianNoise,
    InnerProductManipulation,
    LabelFlip,
    MinMax,
    Scale,
    SignFlip,
    StaleGradient,
    VectorAttack,
)


def test_attacks_on_data_are_not_for_vectors_and_those_on_vectors_need_a_formula() -> None:
    class Nothing(VectorAttack):
        pass

    with pytest.raises(TypeError, match="LabelFlip attacks batches, not vectors: call its `poison`"):
        LabelFlip(num_classes=10)(rows(), [0])
    with pytest.raises(NotImplementedError, match="Nothing must override forge, or tamper"):
        Nothing()(rows(), [0])


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="2D tensor"):
        SignFlip()(torch.zeros(3), [0])
    with pytest.raises(ValueError, match="epsilon must be finite and at least 0, got -1"):
        InnerProductManipulation(epsilon=-1)
    with pytest.raises(ValueError, match="std must be finite and at least 0, got -1"):
        GaussianNoise(std=-1)
    with pytest.raises(ValueError, match="std must be finite and at least 0, got inf"):
        GaussianNoise(std=float("inf"))
    with pytest.raises(TypeError, match="z must be a number, got '1'"):
        ALittleIsEnough(z="1")
    with pytest.raises(TypeError, match="target must be an index or a key of a batch, got None"):
        LabelFlip(num_classes=10, target=None)
    with pytest.raises(ValueError, match="factor must be finite, got nan"):
        Scale(factor=float("nan"))
    with pytest.raises(ValueError, match="delay must be at least 1, got 0"):
        StaleGradient(delay=0)
    with pytest.raises(ValueError, match="perturbation must be one of std, unit, sign, got 'mean'"):
        MinMax("mean")
    with pytest.raises(ValueError, match="num_classes must be at least 2, got 1"):
        LabelFlip(num_classes=1)

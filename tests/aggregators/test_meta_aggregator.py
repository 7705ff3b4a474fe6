import pytest
import torch

from lightning_byzantine.aggregators import CTMA, NNM, Bucketing, MultiKrum


@pytest.mark.parametrize("meta", [CTMA, NNM, Bucketing])
def test_a_base_must_be_a_rule(meta: type[CTMA]) -> None:
    with pytest.raises(TypeError, match=r"base must be an Aggregator, such as .*, got 'Krum'"):
        meta("Krum")


def test_the_base_of_a_meta_aggregator_checks_too() -> None:
    with pytest.raises(ValueError, match="num_selected must be at most m - f"):
        CTMA(NNM(MultiKrum(num_selected=5)))(torch.zeros(5, 2), 1)

import oracles
import torch
from cases import RuleCase

from lightning_byzantine.aggregators import MeaMed

CASES = [RuleCase(MeaMed(), oracles.mea_med)]


def test_mea_med_splits_ties() -> None:
    rows = torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, 4.0]])
    torch.testing.assert_close(MeaMed()(rows, num_byzantine=1), torch.tensor([1.0, 0.5]))

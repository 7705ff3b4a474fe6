import oracles
import torch
from cases import RuleCase

from lightning_byzantine.aggregators import CAF, SMEA, MinimumDiameterAveraging

CASES = [RuleCase(SMEA(), oracles.smea, slow_from=17)]


def test_caf_and_smea_see_ties_and_copies() -> None:
    rows = torch.eye(4)  # as far from one another in every direction
    torch.testing.assert_close(SMEA()(rows, num_byzantine=1), torch.tensor([1 / 3, 1 / 3, 1 / 3, 0.0]))
    assert torch.equal(CAF()(rows, num_byzantine=1), CAF()(torch.cat([rows.T]), num_byzantine=1))
    copies = torch.tensor([[1.0, 2.0]] * 3 + [[1e6, 0.0]] * 2)
    for rule in (CAF(), SMEA(), MinimumDiameterAveraging()):
        torch.testing.assert_close(rule(copies, num_byzantine=2), copies[0])

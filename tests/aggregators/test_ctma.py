import oracles
import torch
from cases import RuleCase
from exemptions import ABOUT_ZERO, ITERATIVE, MIXED_TIES, OWN_UNITS, TIE_OF_TWO

from lightning_byzantine.aggregators import ARC, CTMA, NNM, CoordinateWiseMedian, GeometricMedian, Krum, Mean

RFA = GeometricMedian(max_iterations=3, tolerance=0, smoothing=0.1, init="zero")
CASES = [
    RuleCase(CTMA(CoordinateWiseMedian()), oracles.ctma(oracles.coordinate_wise_median)),
    RuleCase(CTMA(RFA), oracles.ctma(oracles.rfa), [ITERATIVE, MIXED_TIES, OWN_UNITS], name="CTMA(RFA)"),
    RuleCase(CTMA(Krum()), oracles.ctma(oracles.krum), [TIE_OF_TWO]),
    RuleCase(
        CTMA(NNM(CoordinateWiseMedian())), oracles.ctma(oracles.nnm(oracles.coordinate_wise_median)), [MIXED_TIES]
    ),
    RuleCase(CTMA(ARC(Mean())), oracles.ctma(oracles.arc(oracles.mean)), [ABOUT_ZERO]),
]


def test_ctma_keeps_exactly_m_minus_f_rows_on_ties() -> None:
    rows = torch.tensor([[-1.0], [1.0], [0.0], [-1.0], [1.0]])
    # The center is 0 and four rows are as far: row 0 and then row 1 are kept, by index.
    torch.testing.assert_close(CTMA(CoordinateWiseMedian())(rows, num_byzantine=2), torch.tensor([0.0]))
    torch.testing.assert_close(CTMA(CoordinateWiseMedian())(rows[[0, 3, 2, 1, 4]], 2), torch.tensor([-2 / 3]))

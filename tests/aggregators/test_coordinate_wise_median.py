import oracles
from cases import RuleCase

from lightning_byzantine.aggregators import CoordinateWiseMedian

CASES = [RuleCase(CoordinateWiseMedian(), oracles.coordinate_wise_median)]

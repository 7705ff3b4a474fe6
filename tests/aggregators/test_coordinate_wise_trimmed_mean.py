import oracles
from cases import RuleCase

from lightning_byzantine.aggregators import CoordinateWiseTrimmedMean

CASES = [RuleCase(CoordinateWiseTrimmedMean(), oracles.coordinate_wise_trimmed_mean)]

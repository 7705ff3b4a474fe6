import oracles
from cases import RuleCase
from exemptions import ABOUT_ZERO

from lightning_byzantine.aggregators import ComparativeGradientElimination

CASES = [RuleCase(ComparativeGradientElimination(), oracles.comparative_gradient_elimination, [ABOUT_ZERO])]

import oracles
from cases import RuleCase
from exemptions import ITERATIVE

from lightning_byzantine.aggregators import CAF

CASES = [RuleCase(CAF(), oracles.caf, [ITERATIVE])]

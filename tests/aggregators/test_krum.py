import oracles
from cases import RuleCase
from exemptions import TIE_OF_TWO

from lightning_byzantine.aggregators import Krum

CASES = [RuleCase(Krum(), oracles.krum, [TIE_OF_TWO])]

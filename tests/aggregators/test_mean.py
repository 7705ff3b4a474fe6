import oracles
from cases import Exempt, RuleCase

from lightning_byzantine.aggregators import Mean

CASES = [RuleCase(Mean(), oracles.mean, [Exempt(["robustness"], because="one row moves it anywhere")])]

import oracles
from cases import Exempt, RuleCase

from lightning_byzantine.aggregators import MinimumDiameterAveraging

CASES = [
    RuleCase(
        MinimumDiameterAveraging(),
        oracles.minimum_diameter_averaging,
        [Exempt(["permutation"], because="several sets of rows may have the same diameter, and the first one wins")],
    )
]

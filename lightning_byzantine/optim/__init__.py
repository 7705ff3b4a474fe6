"""Double momentum: an optimizer around the user's own, and what its workers send."""

from lightning_byzantine.estimators import DoubleMomentumEstimator
from lightning_byzantine.optim.double_momentum import DoubleMomentum

__all__ = ["DoubleMomentum", "DoubleMomentumEstimator"]

"""Double momentum: an optimizer around the user's own, and what its workers send."""

from lightning_byzantine.optim.double_momentum import DoubleMomentum
from lightning_byzantine.optim.double_momentum_estimator import DoubleMomentumEstimator

__all__ = ["DoubleMomentum", "DoubleMomentumEstimator"]

"""Double momentum: a wrapper around the user's optimizer, and its estimator."""

from lightning_byzantine.estimators import DoubleMomentumEstimator
from lightning_byzantine.optim.double_momentum import DoubleMomentum

__all__ = ["DoubleMomentum", "DoubleMomentumEstimator"]

"""Estimators: what a worker sends instead of its raw gradient."""

from lightning_byzantine.estimators.double_momentum_estimator import DoubleMomentumEstimator
from lightning_byzantine.estimators.estimator import Estimator
from lightning_byzantine.estimators.worker_momentum import WorkerMomentum

__all__ = ["DoubleMomentumEstimator", "Estimator", "WorkerMomentum"]

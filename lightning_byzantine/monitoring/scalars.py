"""Scalars to log for each worker."""

from math import isnan

from torch import Tensor

from lightning_byzantine.monitoring.evidence import Evidence
from lightning_byzantine.monitoring.suspicion import Suspicion

__all__ = ["worker_scalars"]


def worker_scalars(suspicion: Suspicion, evidence: Evidence, weights: Tensor) -> dict[str, float]:
    """Return the scalars to log by their names, ``byzantine/distance/worker_0`` and so on, without unknown ones.

    Args:
        suspicion: of m workers.
        evidence: of at least one step.
        weights: [m], of the last step's report.

    Example:
        >>> import torch
        >>> from lightning_byzantine.aggregators import Report
        >>> one, unknown = torch.ones(1), torch.full((1,), torch.nan)
        >>> evidence = Evidence(num_workers=1, window=100)
        >>> evidence.update(Report(one.bool(), one, one, unknown, from_aggregate=False))
        >>> scalars = worker_scalars(Suspicion(num_workers=1), evidence, weights=one)
        >>> [name.split("/")[1] for name in scalars]
        ['norm', 'weight', 'trimmed', 'non_finite', 'score']

    """
    distances, norms = evidence.latest()
    rows = {
        "distance": distances,
        "norm": norms,
        "weight": weights.tolist(),
        "trimmed": evidence.trimmed_part(),
        "non_finite": evidence.non_finite,
        "score": [score / suspicion.threshold for score in suspicion.scores],
    }
    return {
        f"byzantine/{name}/worker_{worker}": value
        for name, row in rows.items()
        for worker, value in enumerate(row)
        if not isnan(value)
    }

"""Averages of random groups."""

import torch

from lightning_byzantine.aggregators.aggregator import Aggregator
from lightning_byzantine.aggregators.meta_aggregator import MetaAggregator
from lightning_byzantine.aggregators.monna import MoNNA
from lightning_byzantine.aggregators.persistent_filter import PersistentFilter
from lightning_byzantine.matrix import Point, WorkerMatrix
from lightning_byzantine.utilities.checks import check_integer_at_least
from lightning_byzantine.utilities.rng import StepSeed

__all__ = ["Bucketing"]


class Bucketing(MetaAggregator):
    """The base rule on the means of random buckets of s rows each (the last one may be smaller).

    At most f of the ceil(m / s) buckets hold a Byzantine row. Each call draws new buckets, the same on every rank; the
    number of calls is part of the ``state_dict``.

    Args:
        base: the rule to apply to the bucket means; not :class:`MoNNA`, because no bucket is a trusted worker's, nor
            :class:`PersistentFilter`, because none is the same workers' in every step.
        bucket_size: s. None for floor(m / 2f) (m when f = 0), or one less where that would leave only 2f buckets, too
            few for any base rule.
        seed: random seed.

    Source: Karimireddy et al., "Byzantine-Robust Learning on Heterogeneous Datasets via Bucketing", ICLR 2022.

    Example:
        >>> from lightning_byzantine.aggregators import CoordinateWiseMedian
        >>> Bucketing(CoordinateWiseMedian(), bucket_size=2)(torch.ones(6, 1), num_byzantine=1)
        tensor([1.])

    """

    def __init__(self, base: Aggregator, bucket_size: int | None = None, seed: int = 0) -> None:
        super().__init__(base)
        if any(isinstance(rule, MoNNA) for rule in base.modules()):
            raise ValueError("base must not be MoNNA nor contain it: random buckets have no trusted worker's row")
        if any(isinstance(rule, PersistentFilter) for rule in base.modules()):
            raise ValueError("base must not be PersistentFilter nor contain it: random buckets have no history")
        self.bucket_size = None if bucket_size is None else check_integer_at_least("bucket_size", bucket_size, 1)
        self.draws = StepSeed(seed)

    def check(self, num_workers: int, num_byzantine: int) -> None:
        """Raise :class:`ValueError` unless there are more than 2f buckets, and the base supports them."""
        Aggregator.check(self, num_workers, num_byzantine)
        size = self._size(num_workers, num_byzantine)
        num_buckets = -(-num_workers // size)
        if num_buckets <= 2 * num_byzantine:
            raise ValueError(
                f"bucket_size must leave more than 2f buckets, got bucket_size={size}, which makes"
                f" {num_buckets} buckets of m={num_workers} workers with f={num_byzantine}"
            )
        self.base.check(num_buckets, num_byzantine)

    def locate(self, matrix: WorkerMatrix, num_byzantine: int) -> Point:
        """Return the base's result on the bucket means."""
        order = torch.randperm(matrix.num_workers, generator=self.draws.next())
        buckets = torch.split(order, self._size(matrix.num_workers, num_byzantine))
        means = torch.zeros(len(buckets), matrix.num_workers, dtype=torch.float64)
        for mean, bucket in zip(means, buckets, strict=True):
            mean[bucket] = 1 / len(bucket)
        return self.base.locate(matrix.mix(means), num_byzantine)

    def _size(self, num_workers: int, num_byzantine: int) -> int:
        if self.bucket_size is not None:
            return self.bucket_size
        # The largest s with ceil(m / s) > 2f.
        return num_workers if num_byzantine == 0 else (num_workers - 1) // (2 * num_byzantine)

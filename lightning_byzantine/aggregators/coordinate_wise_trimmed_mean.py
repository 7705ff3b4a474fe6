"""The mean of every coordinate without its extremes."""

from lightning_byzantine.aggregators.coordinate_wise import CoordinateWise

__all__ = ["CoordinateWiseTrimmedMean"]


class CoordinateWiseTrimmedMean(CoordinateWise):
    """In every coordinate, the mean of the m - 2f values left without the f smallest and the f largest.

    Args:
        compile: whether to compile the trimmed mean with `torch.compile`. The result is bit-identical.

    Source: Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", ICML 2018.

    Example:
        >>> import torch
        >>> CoordinateWiseTrimmedMean()(torch.tensor([[-90.0], [2.0], [4.0], [90.0]]), num_byzantine=1)
        tensor([3.])

    """

    def ranks(self, num_workers: int, num_byzantine: int) -> tuple[int, ...]:
        """Return all but the f lowest and the f highest."""
        return tuple(range(num_byzantine, num_workers - num_byzantine))

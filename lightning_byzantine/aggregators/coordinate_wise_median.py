"""The median of every coordinate."""

from lightning_byzantine.aggregators.coordinate_wise import CoordinateWise

__all__ = ["CoordinateWiseMedian"]


class CoordinateWiseMedian(CoordinateWise):
    """[x]_k = median([x_1]_k, .., [x_m]_k); for even m the average of the middle two.

    Args:
        compile: whether to compile the median with `torch.compile`. The result is bit-identical.

    Source: Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", ICML 2018.

    Example:
        >>> import torch
        >>> CoordinateWiseMedian()(torch.tensor([[1.0], [2.0], [4.0], [90.0]]), num_byzantine=1)
        tensor([3.])

    """

    def ranks(self, num_workers: int, num_byzantine: int) -> tuple[int, ...]:
        """Return the middle rank, or the middle two."""
        low, high = (num_workers - 1) // 2, num_workers // 2
        return (low,) if low == high else (low, high)

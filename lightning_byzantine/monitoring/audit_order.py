"""Whom to audit first."""

from collections.abc import Collection, Sequence

__all__ = ["audit_order"]


def audit_order(
    scores: Sequence[float],
    crowding: Sequence[float],
    num_audits: Sequence[int],
    cleared: Collection[int],
    excluded: Collection[int] = (),
) -> list[int]:
    """Return the workers by how much an audit of each would tell, the most first.

    Those with the fewest audits come first, so that nobody can keep the turn from others. Of these, it is those who
    stand out, or who crowd around somebody: liars who agree with each other and with one honest worker, so that all
    others stand out, are in the crowd themselves. Then by index.

    Args:
        scores: [m], of suspicion, as multiples of the threshold.
        crowding: [m], see :func:`~lightning_byzantine.monitoring.crowding.crowding`.
        num_audits: [m], of each worker so far.
        cleared: indices of those that an audit has cleared, of which an audit tells less than of others.
        excluded: indices of those that need no audit.

    Example:
        >>> audit_order(
        ...     scores=[0.2, 1.0, 0.0, 0.0, 1.5, 0.0],
        ...     crowding=[0.0, 0.0, 0.0, 2.0, 0.0, 0.0],
        ...     num_audits=[0, 0, 0, 0, 1, 0],
        ...     cleared=[4],
        ...     excluded=[5],
        ... )
        [3, 1, 0, 2, 4]

    """
    values = [
        0.0 if worker in cleared else max(score, close)
        for worker, (score, close) in enumerate(zip(scores, crowding, strict=True))
    ]
    order = sorted(range(len(values)), key=lambda worker: (num_audits[worker], -values[worker], worker))
    return [worker for worker in order if worker not in excluded]

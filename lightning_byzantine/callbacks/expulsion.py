"""Puts workers into quarantine, if the assumptions of the rule allow it."""

from lightning.pytorch.utilities import rank_zero_warn

from lightning_byzantine.strategies.robust_strategy import RobustStrategy

__all__ = ["expel"]


def expel(strategy: RobustStrategy, worker: int, *, proved: bool) -> bool:
    """Put a worker into quarantine on all ranks, or warn why not.

    Of those expelled by proof, there may be f, and f in all where there is none: statistics must not fill the places.

    Args:
        strategy: with the quarantine.
        worker: its index.
        proved: whether there is proof that it is faulty.

    Returns:
        Whether it is in quarantine now and was not before.

    """
    already = strategy.quarantined_by_proof if proved else strategy.quarantined
    if worker in already:
        return False
    if len(already) >= strategy.num_byzantine:
        rank_zero_warn(
            f"Did not quarantine worker {worker}: no more than num_byzantine={strategy.num_byzantine} can be in"
            f" quarantine, got {sorted(already)} there already. Look into these hosts."
        )
        return False
    is_new = worker not in strategy.quarantined
    try:
        strategy.quarantine([worker], proved=proved)
    except ValueError as error:
        rank_zero_warn(f"Did not quarantine worker {worker}, which would leave the rule too few: {error}")
        return False
    if is_new:
        rank_zero_warn(f"Quarantined worker {worker}: its rows are dropped from the next step on.")
    return is_new

"""A gather of small tensors after which all honest ranks have the same rows."""

from torch import Tensor

from lightning_byzantine.exchange.case import Case
from lightning_byzantine.exchange.collectives import gather_rows
from lightning_byzantine.exchange.keyed_digest import digest_of
from lightning_byzantine.exchange.witnesses import Witnesses

__all__ = ["agreed_gather"]


def agreed_gather(tensor: Tensor, witnesses: Witnesses | None) -> Tensor:
    """Return the flat tensor [n] of each voter, as [v, n] in the order of ranks, the same on all honest ranks.

    Args:
        tensor: [n]; lengths must agree.
        witnesses: knows the v ranks that are not proved to be faulty, fewer than before if this proves more. None where
            ranks trust each other in what they tell others, and all vote.

    Raises:
        EquivocationError: if more ranks are proved to be faulty than may be.

    """
    if witnesses is None:
        return gather_rows(tensor)
    rows = witnesses.channel.gather(tensor)
    case = Case(witnesses, [rows])
    voted = rows[witnesses.voters]
    if case.is_disputed(digest_of([voted])):
        case.settle()
        while True:
            voted = rows[witnesses.voters]
            digest = digest_of([voted])
            if case.is_final(digest, digest):
                break
    return voted

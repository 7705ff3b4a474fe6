"""What follows from the workers' rows in one step, on which all ranks have to agree."""

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256

from lightning_byzantine.aggregation.aggregation import Aggregated
from lightning_byzantine.errors import ByzantineBreakdownError
from lightning_byzantine.exchange.keyed_digest import digest_of, keyed_digest
from lightning_byzantine.matrix import WorkerMatrix

__all__ = ["Outcome"]


@dataclass(frozen=True)
class Outcome:
    """The aggregate of the rows, or why there is none.

    Args:
        matrix: the rows.
        aggregated: their aggregate.
        error: why there is none; None if there is one.
        fingerprint: returns a digest of all that the aggregation found out about the rows.

    """

    matrix: WorkerMatrix
    aggregated: Aggregated | None
    error: ByzantineBreakdownError | None
    fingerprint: Callable[[], bytes]

    def digest(self, key: bytes | None) -> bytes:
        """Return a digest of the aggregate and of what was found out: a fast one with a key, or a slower one."""
        parts = [] if self.aggregated is None else self.aggregated.parts
        of_parts = digest_of(parts) if key is None else keyed_digest(parts, key)
        return sha256(of_parts + self.fingerprint()).digest()

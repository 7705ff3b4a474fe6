"""A check that all ranks still hold the same state."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn

from lightning_byzantine.errors import InconsistentRanksError
from lightning_byzantine.exchange.collectives import gather
from lightning_byzantine.exchange.fingerprint import fingerprints, leaves, with_leaves

__all__ = ["ConsistencyCheck"]


@dataclass
class ConsistencyCheck:
    """Compares fingerprints of the state that should be the same on all ranks, every few steps.

    Ranks diverge if one of them computes updates wrongly, because of faulty memory or another version of a library. The
    state that more than half of the ranks hold counts as correct. Each rank computes its own fingerprint, so this finds
    faults, but not ranks that lie.

    Args:
        every_n_steps: number of optimizer steps between two checks.
        on_inconsistency: "raise", or "restore" to copy the state of the majority to the other ranks.
        state: returns this rank's state, nested dicts and lists of tensors and numbers.
        load: loads such a state.
        device: where this rank trains.

    """

    every_n_steps: int
    on_inconsistency: Literal["raise", "restore"]
    state: Callable[[], dict[str, Any]]
    load: Callable[[dict[str, Any]], None]
    device: torch.device
    _steps: int = field(default=0, init=False)

    def is_due(self) -> bool:
        """Count a step, and return whether ranks compare after it."""
        self._steps += 1
        return self._steps % self.every_n_steps == 0

    def compare(self) -> None:
        """Compare with all other ranks.

        Raises:
            InconsistentRanksError: if ranks differ under "raise"; under "restore" if they can't be restored, because
                no majority has the same state, the states do not have the same shapes, or the rank to copy from sent
                another state than the one it reported.

        """
        state = self.state()
        own = torch.frombuffer(bytearray(b"".join(fingerprints(state))), dtype=torch.uint8)
        reports = [bytes(report.tolist()) for report in gather(own.to(self.device))]
        most, votes = Counter(reports).most_common(1)[0]
        if votes == len(reports):
            return
        if 2 * votes <= len(reports):
            raise InconsistentRanksError([], len(reports), self._steps)
        minority = [rank for rank, report in enumerate(reports) if report != most]
        error = InconsistentRanksError(minority, len(reports), self._steps)
        layouts = {report[: len(report) // 2] for report in reports}
        if self.on_inconsistency == "raise" or len(layouts) > 1:
            raise error
        source = reports.index(most)
        # Tensors only: unpickling an object from another rank could run its code.
        values = [value.detach().to(self.device, copy=True).contiguous() for value in leaves(state)]
        for value in values:
            dist.broadcast(value, src=source)
        if dist.get_rank() in minority:
            restored = with_leaves(state, iter(values))
            if b"".join(fingerprints(restored)) != most:
                raise InconsistentRanksError([source], len(reports), self._steps)
            self.load(restored)
        rank_zero_warn(f"{error}. They were replaced by those of rank {source}.")

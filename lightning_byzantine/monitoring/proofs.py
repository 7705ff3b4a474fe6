"""What is known for certain about each worker."""

from typing import Any, Literal

from torch import Tensor

from lightning_byzantine.aggregators.report import Report
from lightning_byzantine.utilities.checks import check_choice, check_positive

__all__ = ["Proof", "Proofs"]

Proof = Literal["not finite", "told ranks different things", "computes wrongly"]
_OUTCOMES = ("computes wrongly", "computes rightly", "inconclusive")

# What a row that is not finite adds, and what a finite one takes: as many bad steps suffice as for suspicion.
_BAD, _GOOD = 2.0, 1.0


class Proofs:
    """Facts about workers, which don't depend on what the others sent, and the outcomes of audits.

    A worker is proved to be faulty if

    - its rows are not finite for longer than chance explains, while most workers' are: F >= threshold for::

          F <- max(0, F + 2)      in a step in which its row can't be measured
          F <- max(0, F - 1)      in any other

      Where most rows can't be measured, the parameters may be to blame, so the step does not count. Neither does any
      step in float16, in which gradients of honest workers with large losses overflow;
    - its process told ranks different things, once;
    - an audit finds that it computes wrongly.

    A NaN in buffers or metrics where most processes have none is no proof: a metric may have no value on the data of
    an honest worker, and liars can be what turns those who have one into the majority.

    Args:
        num_workers: m.
        threshold: F from which rows that are not finite are a proof.

    Attributes:
        proofs: the first proof about each worker that is proved to be faulty, by index.
        verdicts: outcome of the last audit of each worker that was audited, by index.
        num_audits: number of audits of each worker, [m].

    Raises:
        ValueError: if the threshold is not finite and above 0.

    Example:
        >>> import torch
        >>> unknown, measurable = torch.full((3,), torch.nan), torch.tensor([True, True, False])
        >>> proofs = Proofs(num_workers=3, threshold=5.0)
        >>> [proofs.update(Report(measurable, unknown, unknown, unknown, from_aggregate=False)) for _ in range(4)]
        [[], [], [2], []]
        >>> proofs.proofs
        {2: 'not finite'}

    """

    def __init__(self, num_workers: int, threshold: float) -> None:
        self.threshold = check_positive("threshold", threshold)
        self.proofs: dict[int, Proof] = {}
        self.verdicts: dict[int, str] = {}
        self.num_audits = [0] * num_workers
        self._not_finite = [0.0] * num_workers

    def update(self, report: Report, *, overflows: bool = False) -> list[int]:
        """Add one step; return the workers that it is the first proof about.

        Args:
            report: on m workers.
            overflows: whether gradients of honest workers may overflow.

        """
        before = self.proofs.copy()
        if report.equivocated is not None:
            for worker in _indices(report.equivocated):
                self.proofs.setdefault(worker, "told ranks different things")
        bad = (~report.measurable).tolist()
        if 2 * sum(bad) < len(bad) and not overflows:
            changes = [_BAD if is_bad else -_GOOD for is_bad in bad]
            self._not_finite = [
                min(max(0.0, total + change), self.threshold)
                for total, change in zip(self._not_finite, changes, strict=True)
            ]
            for worker, total in enumerate(self._not_finite):
                if total >= self.threshold:
                    self.proofs.setdefault(worker, "not finite")
        return sorted(self.proofs.keys() - before.keys())

    def audited(self, worker: int, outcome: str) -> bool:
        """Add the outcome of an audit; return whether it is the first proof about the worker.

        Args:
            worker: its index.
            outcome: "computes wrongly", "computes rightly" or "inconclusive".

        Raises:
            ValueError: if the outcome is unknown.

        """
        self.verdicts[worker] = str(check_choice("outcome", outcome, _OUTCOMES))  # no enum in a checkpoint
        self.num_audits[worker] += 1
        if outcome != "computes wrongly" or worker in self.proofs:
            return False
        self.proofs[worker] = "computes wrongly"
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return everything."""
        return {
            "proofs": dict(self.proofs),
            "verdicts": dict(self.verdicts),
            "num_audits": list(self.num_audits),
            "not_finite": list(self._not_finite),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned for the same number of workers.

        Raises:
            ValueError: if the number of workers differs, which leaves everything unchanged.

        """
        if len(state["num_audits"]) != len(self.num_audits):
            raise ValueError(
                f"the state is of {len(state['num_audits'])} workers, got num_workers={len(self.num_audits)}"
            )
        self.proofs, self.verdicts = dict(state["proofs"]), dict(state["verdicts"])
        self.num_audits, self._not_finite = list(state["num_audits"]), list(state["not_finite"])


def _indices(flags: Tensor) -> list[int]:
    return [int(index) for index in flags.nonzero().flatten()]

"""The table of all workers at the end of a run."""

from collections.abc import Collection, Sequence

from lightning_byzantine.monitoring.evidence import Evidence
from lightning_byzantine.monitoring.suspect import Suspect

__all__ = ["worker_table"]


def worker_table(
    workers: Sequence[Suspect],
    evidence: Evidence,
    num_byzantine: int,
    suspects: Collection[int],
    quarantined: Collection[int],
) -> str:
    """Return a Markdown table below a title line.

    Distances and norms are of the last steps, the other numbers of the whole run.

    Args:
        workers: [m], all workers, suspected or not, with their evidence.
        evidence: of at least one step.
        num_byzantine: f.
        suspects: indices of those under suspicion, called "suspect" unless there is proof.
        quarantined: indices of those in quarantine.

    Example:
        >>> evidence = Evidence(num_workers=1, window=100)
        >>> evidence.steps = 4
        >>> alone = Suspect(0, 0, "node7", "cpu", 4, 0, 0, None, 1.0, 0, 0, shadow=False)
        >>> print(worker_table([alone], evidence, num_byzantine=0, suspects=[], quarantined=[]))
        ByzantineMonitor, 4 steps, num_byzantine=0
        | worker | rank | host | device | trimmed | non-finite | distance | norm | verdict |
        |---|---|---|---|---|---|---|---|---|
        | 0 | 0 | node7 | cpu | 0% | 0 |  | 1.00 |  |

    """
    lines = [
        f"ByzantineMonitor, {evidence.steps} steps, num_byzantine={num_byzantine}"
        + (", shadow mode" if workers[0].shadow else ""),
        "| worker | rank | host | device | trimmed | non-finite | distance | norm | verdict |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in workers:
        trimmed = "" if one.trimmed is None else f"{evidence.trimmed[one.worker] / evidence.steps:.0%}"
        verdict = _verdict(one, is_suspect=one.worker in suspects, is_quarantined=one.worker in quarantined)
        lines.append(
            f"| {one.worker} | {one.ranks} | {one.host} | {one.device} | {trimmed} | {evidence.non_finite[one.worker]}"
            f" | {_multiple(one.distance)} | {_multiple(one.norm)} | {verdict} |"
        )
    return "\n".join(lines)


def _verdict(worker: Suspect, *, is_suspect: bool, is_quarantined: bool) -> str:
    parts = ["quarantined"] if is_quarantined else []
    if worker.proof is not None:
        parts.append(f"proved: {worker.proof}")
    elif is_suspect and not is_quarantined:
        parts.append("suspect")
    if worker.verdict not in (None, worker.proof):
        parts.append(f"audit: {worker.verdict}")
    return ", ".join(parts)


def _multiple(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"

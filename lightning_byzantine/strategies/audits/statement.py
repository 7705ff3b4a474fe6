"""What each auditor states about a worker, and what follows from all statements."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, IntEnum, auto
from hashlib import sha256

import torch
from torch import Tensor

from lightning_byzantine.strategies.audits.verdict import Outcome

__all__ = ["SKETCH_SIZE", "Finding", "Judgement", "Statement", "digest", "judged", "sketched"]

SKETCH_SIZE = 1024
# A chunk of random signs, which should stay in cache.
_CHUNK = SKETCH_SIZE * 128
# How many times the distance between two auditors' gradients a residual may have, and which part of the gradient.
_SPREADS, _LARGEST = 3.0, 0.25


class Finding(IntEnum):
    """How an auditor's own computation has ended."""

    NOTHING = 0
    RECOMPUTED = 1
    FAILED = 2
    """The worker's batch is missing or malformed, or the training step raises on it."""
    UNUSABLE = 3
    OTHER_STRUCTURE = 4
    NOT_REPLAYABLE = 5
    OUT_OF_MEMORY = 6


_REASONS = {
    Finding.UNUSABLE: "its rows of the audit's two steps are not finite, or not known",
    Finding.OTHER_STRUCTURE: "its batch has another structure than those of others (keys, types, dtypes, dimensions,"
    " buffers), or is much larger, or can't be sent as tensors, or as so many, or the module is too large to restore",
    Finding.NOT_REPLAYABLE: "`training_step` can't be repeated: it keeps an iterator or a random generator, or gathers",
    Finding.OUT_OF_MEMORY: "the memory of the other ranks' devices does not suffice",
}
_SCATTERED = "what the other ranks compute differs too much, so `training_step` may depend on the rank or on chance"
_FEW = "too few other ranks have a vote: more than f of them have to agree, and two at least"
_UNREPRODUCED = "no worker's step could be recomputed so far, so `training_step` may depend on the rank"


@dataclass
class Statement:
    """One auditor's statement.

    Args:
        finding: how its computation has ended.
        has_reproduced: whether it knows of a worker whose step was reproduced on another rank before; otherwise, a
            difference could also come from a training step that depends on the rank.
        residual: the norm of what was sent minus what the batch leads to.
        scale: the norm of the gradient's part in the latter.
        rounding: the residual that rounding explains.
        sketch: of the same difference, [1024] float64.

    """

    finding: Finding = Finding.NOTHING
    has_reproduced: bool = False
    residual: float = 0.0
    scale: float = 0.0
    rounding: float = 0.0
    sketch: Tensor = field(default_factory=lambda: torch.zeros(SKETCH_SIZE, dtype=torch.float64))

    def packed(self) -> Tensor:
        """Return the statement as one tensor, [1029] float64."""
        numbers = [self.finding, self.has_reproduced, self.residual, self.scale, self.rounding]
        return torch.cat([torch.tensor(numbers, dtype=torch.float64), self.sketch.cpu()])

    @classmethod
    def unpacked(cls, packed: Tensor) -> "Statement":
        """Return the statement of another rank; one of nothing if it makes no sense."""
        numbers = packed[:5]
        if not numbers.isfinite().all() or (numbers < 0).any() or float(numbers[0]) not in set(Finding):
            return cls()
        finding, has_reproduced, residual, scale, rounding = numbers.tolist()
        return cls(Finding(int(finding)), has_reproduced == 1, residual, scale, rounding, packed[5:])


def digest(packed: Tensor) -> Tensor:
    """Return what a rank states before the statement itself, [32] uint8, so that nobody can copy another's."""
    return torch.tensor(list(sha256(packed.numpy().tobytes()).digest()), dtype=torch.uint8)


def sketched(parts: Sequence[Tensor], seed: int) -> Tensor:
    """Return a linear sketch of a vector, [1024] float64, whose squared norm estimates the vector's without bias.

    Coordinate i is added to bucket i mod 1024 with a random sign. Two auditors' residuals differ in what they have
    computed alone, not in what the worker sent, so nobody can choose the coordinates in which they differ.

    Args:
        parts: the vector, [n] each.
        seed: of the signs, which nobody could know before.

    Source: Charikar, Chen & Farach-Colton, "Finding Frequent Items in Data Streams", ICALP 2002; Alon, Matias &
    Szegedy, "The Space Complexity of Approximating the Frequency Moments", STOC 1996.

    Example:
        >>> sketched([torch.tensor([3.0]), torch.tensor([4.0])], seed=1).square().sum()
        tensor(25., dtype=torch.float64)

    """
    generator = torch.Generator().manual_seed(seed)
    sketch, offset = torch.zeros(SKETCH_SIZE, dtype=torch.float64), 0
    for part in parts:
        for chunk in torch.split(part, _CHUNK):
            signs = torch.randint(2, (len(chunk),), generator=generator, dtype=torch.int8).to(chunk.device)
            signed = torch.where(signs.bool(), chunk, -chunk).double()
            padded = torch.nn.functional.pad(signed, (offset, -(offset + len(chunk)) % SKETCH_SIZE))
            sketch += padded.view(-1, SKETCH_SIZE).sum(0).cpu()
            offset = (offset + len(chunk)) % SKETCH_SIZE
    return sketch


class _Vote(Enum):
    NONE = auto()
    RIGHT = auto()
    WRONG = auto()
    UNPROVED = auto()
    """Would say "wrong", but knows of no step that was reproduced so far."""
    UNSURE = auto()
    """The auditors' own computations differ too much."""


@dataclass(frozen=True)
class Judgement:
    """What follows from all statements.

    Args:
        outcome: of the audit.
        reason: why it is inconclusive; empty otherwise.
        wrong: number of auditors that say "wrong".
        right: ranks of the auditors that say "right".
        reproduced: those of them whose residual is one of rounding.
        scattered: ranks of the auditors whose residual is not, but comes from a step that can't be repeated exactly.
        unproved: number of auditors that would say "wrong", but know of no step that was reproduced so far.
        residual: the middle auditor's, in units of the scale; nan without.
        tolerance: likewise.

    """

    outcome: Outcome
    reason: str
    wrong: int
    right: frozenset[int]
    reproduced: frozenset[int]
    scattered: frozenset[int]
    unproved: int
    residual: float
    tolerance: float


def judged(statements: Mapping[int, Statement], num_byzantine: int) -> Judgement:
    """Return what f + 1 auditors agree on: one of them is honest.

    An auditor's residual r_q may be as large as ::

        max(sqrt(eps) ||g_q|| + rounding, 3 e_q)        e_q: the f-th smallest ||r_q - r_p|| of the other auditors p

    eps is the precision of the training step. r_q - r_p is how far the two auditors' own gradients differ. If the
    worker lies, f - 1 other auditors do at most, so that they can't enlarge e_q. A residual above the first of the two
    says nothing if the second is above 1/4 of the gradient. If e_q itself is above the first, only a residual above 1/4
    of the gradient says "wrong": a step that can't be repeated exactly may depend on state that differs from rank to
    rank, and then some auditors are closer to each other than to the worker by chance.

    Args:
        statements: of the auditors, by rank.
        num_byzantine: number of ranks that may be Byzantine, f. Should be 1 at least if there are other ranks: one
            auditor alone proves nothing.

    """
    votes: dict[_Vote, set[int]] = {vote: set() for vote in _Vote}
    tolerances = {}
    for rank, own in statements.items():
        others = [other for other_rank, other in statements.items() if other_rank != rank]
        spread = _spread(own, others, num_byzantine)
        tolerances[rank] = max(own.rounding, _SPREADS * spread)
        votes[_vote(own, spread, tolerances[rank])].add(rank)
    wrong, unproved, unsure = (len(votes[vote]) for vote in (_Vote.WRONG, _Vote.UNPROVED, _Vote.UNSURE))
    right = len(votes[_Vote.RIGHT])
    outcome, reason = Outcome.INCONCLUSIVE, ""
    if wrong > num_byzantine >= right:
        outcome = Outcome.WRONGLY
    elif right > num_byzantine >= wrong:
        outcome = Outcome.RIGHTLY
    else:
        reason = _reason(statements, num_byzantine, unproved + wrong, unsure)
    recomputed = {rank: own for rank, own in statements.items() if own.finding == Finding.RECOMPUTED}
    reproduced = {rank for rank, own in recomputed.items() if own.residual <= own.rounding}
    return Judgement(
        outcome,
        reason,
        wrong,
        frozenset(votes[_Vote.RIGHT]),
        frozenset(reproduced),
        frozenset(votes[_Vote.RIGHT] - reproduced | votes[_Vote.UNSURE]),
        unproved,
        _middle([own.residual / (own.scale or 1.0) for own in recomputed.values()]),
        _middle([tolerances[rank] / (own.scale or 1.0) for rank, own in recomputed.items()]),
    )


def _vote(own: Statement, spread: float, tolerance: float) -> "_Vote":
    if own.finding not in (Finding.RECOMPUTED, Finding.FAILED):
        return _Vote.NONE
    if own.finding == Finding.RECOMPUTED:
        # Rounding alone explains it, so that it does not matter what others say.
        if own.residual <= own.rounding:
            return _Vote.RIGHT
        largest = max(own.rounding, _LARGEST * own.scale)
        if tolerance > largest:
            return _Vote.UNSURE
        if own.residual <= tolerance:
            return _Vote.RIGHT
        if spread > own.rounding and own.residual <= largest:
            return _Vote.UNSURE
    return _Vote.WRONG if own.has_reproduced else _Vote.UNPROVED


def _spread(own: Statement, others: Sequence[Statement], num_byzantine: int) -> float:
    if own.finding != Finding.RECOMPUTED or num_byzantine == 0:
        return 0.0
    distances = [_distance(own, other) for other in others if other.finding == Finding.RECOMPUTED]
    return sorted(distances)[num_byzantine - 1] if len(distances) >= num_byzantine else torch.inf


def _distance(first: Statement, second: Statement) -> float:
    distance = float((first.sketch - second.sketch).norm())
    return distance if distance == distance else torch.inf


def _middle(values: list[float]) -> float:
    return sorted(values)[len(values) // 2] if values else torch.nan


def _reason(statements: Mapping[int, Statement], num_byzantine: int, differing: int, unsure: int) -> str:
    if len(statements) <= num_byzantine:
        return _FEW
    if differing > num_byzantine:
        return _UNREPRODUCED
    findings = [statement.finding for statement in statements.values() if statement.finding in _REASONS]
    if unsure > len(findings):
        return _SCATTERED
    if findings:
        return _REASONS[max(set(findings), key=lambda finding: (findings.count(finding), finding))]
    return "the auditors do not agree"

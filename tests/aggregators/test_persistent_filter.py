import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from cases import RuleCase
from exemptions import ITERATIVE
from layers import InTwoLayers, in_two_layers
from oracles import Rows
from torch import Tensor
from vectors import as_list, relative_error

from lightning_byzantine import ByzantineBreakdownError
from lightning_byzantine.aggregation.observers import Observers
from lightning_byzantine.aggregation.quarantine import Quarantine
from lightning_byzantine.aggregation.robust_aggregation import RobustAggregation
from lightning_byzantine.aggregators import PersistentFilter
from lightning_byzantine.matrix import Segments, WorkerMatrix


def lower_median(values: Sequence[float]) -> float:
    return sorted(values)[(len(values) - 1) // 2]


def distances_in(gram: np.ndarray, weights: np.ndarray) -> list[float]:
    """Return the rows' distances from the point of these weights."""
    steps = np.eye(len(gram)) - weights
    return [float(max(0.0, step @ gram @ step)) ** 0.5 for step in steps]


def middle(gram: np.ndarray, among: Sequence[int]) -> np.ndarray:
    """Return the weights of about the geometric median: eight iterations of Weiszfeld's from the origin."""
    squared = gram.diagonal()
    usual = lower_median([squared[i] for i in among])
    if usual == 0:
        same = [i for i in among if squared[i] == 0]
        return np.array([1 / len(same) if i in same else 0.0 for i in range(len(gram))])
    distances = [max(value, usual) ** 0.5 for value in squared]
    for _ in range(9):
        weights = np.array([1 / distances[i] if i in among else 0.0 for i in range(len(gram))])
        weights /= weights.sum()
        distances = [max(distance, 1e-6 * usual**0.5) for distance in distances_in(gram, weights)]
    return weights


def about_a_row_amid_the_others(rows: Rows) -> np.ndarray:
    distances = [sorted(float(np.sum((row - other) ** 2)) for other in rows) for row in rows]
    origin = rows[int(np.argmin([of_row[len(rows) // 2] for of_row in distances]))]
    return np.array([[float((row - origin) @ (other - origin)) for other in rows] for row in rows])


def with_explaining(average: np.ndarray, found: list[int], f: int) -> list[int]:
    """Return the workers that were found before, and those that explain loud directions."""
    m = len(average)
    among = [i for i in range(m) if i not in found]
    distances = distances_in(average, middle(average, among))
    usual = lower_median([distances[i] for i in among]) ** 2
    lengths = [max(average[i, i], usual / 4) ** 0.5 for i in range(m)]
    cosines = [
        abs(average[i, j]) / lengths[i] / lengths[j] if usual else 0.0 for i in range(m) for j in range(m) if i != j
    ]
    noise = 1.4826 * lower_median(cosines)
    loud = usual * min(1.2 + 3 * m**0.5 * noise, max(1.5, f * (m - f) / (2 * m)))
    unexplained: list[np.ndarray] = []
    for _ in range(2 * f):
        left, others = f - len(found), [i for i in range(m) if i not in found]
        if left == 0 or usual == 0:
            break
        centring = np.eye(len(others)) - 1 / len(others)
        seen = centring @ average[np.ix_(others, others)] @ centring
        if unexplained:
            basis = np.linalg.qr(centring @ np.array([direction[others] for direction in unexplained]).T)[0]
            without = np.eye(len(others)) - basis @ basis.T
            seen = without @ seen @ without
        loudness, vectors = np.linalg.eigh(seen)
        if loudness[-1] <= loud:
            break
        direction = dict(zip(others, vectors[:, -1], strict=True))
        center = np.median(list(direction.values()))
        offsets = {i: abs(value - center) for i, value in direction.items()}
        limit = 3 * sorted(offsets.values())[len(others) - left - 1]
        far = sorted((i for i in others if offsets[i] > limit), key=lambda i: -offsets[i])
        if far:
            found = found + far[:left]
        else:
            unexplained.append(np.array([direction.get(i, 0.0) for i in range(m)]))
    return found


@dataclass
class Loops:
    """The rule once more, for one tensor, with a memory of its own."""

    num_workers: int
    average: np.ndarray = field(init=False)
    sizes: np.ndarray = field(init=False)
    num_steps: np.ndarray = field(init=False)
    left_out: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.average, self.sizes = np.zeros((self.num_workers, self.num_workers)), np.zeros(self.num_workers)
        self.num_steps = np.zeros(self.num_workers)

    def __call__(self, rows: Rows, f: int, workers: Sequence[int] | None = None) -> np.ndarray:
        workers = range(self.num_workers) if workers is None else workers
        if f == 0:
            return np.mean(rows, axis=0)
        gram = about_a_row_amid_the_others(rows)
        center = middle(gram, range(len(rows))) @ np.array(rows)
        self.remember(rows, center, workers)
        found = self.with_farthest([], 25, workers, f)
        found = with_explaining(self.average[np.ix_(workers, workers)], found, f)
        found = self.with_farthest(found, 4, workers, f)
        self.left_out = sorted(workers[i] for i in found)
        return clipped_mean(rows, center, [i for i in range(len(rows)) if i not in found], len(rows) - f)

    def remember(self, rows: Rows, center: np.ndarray, workers: Sequence[int]) -> None:
        memories = np.minimum(0.98, self.num_steps / (self.num_steps + 1))
        deviations = [row - center for row in rows]
        usual = lower_median([float(deviation @ deviation) for deviation in deviations])
        for i, own in zip(workers, deviations, strict=True):
            size = float(own @ own)
            multiple = min(100.0, size / usual) if usual else 100.0 * (size > 0)
            self.sizes[i] = memories[i] * self.sizes[i] + (1 - memories[i]) * multiple
            self.num_steps[i] += 1
            for j, other in zip(workers, deviations, strict=True):
                short = [min(1.0, usual**0.5 / max(np.linalg.norm(each), 1e-300)) * each for each in (own, other)]
                product = float(short[0] @ short[1]) / usual if usual else 0.0
                memory = min(memories[i], memories[j])
                self.average[i, j] = memory * self.average[i, j] + (1 - memory) * product

    def with_farthest(self, found: list[int], bound: float, workers: Sequence[int], f: int) -> list[int]:
        far = sorted((i for i in range(len(workers)) if i not in found), key=lambda i: -self.sizes[workers[i]])
        return found + [i for i in far[: f - len(found)] if self.sizes[workers[i]] > bound]


def clipped_mean(rows: Rows, center: np.ndarray, kept: list[int], num_honest: int) -> np.ndarray:
    distances = [float(np.linalg.norm(row - center)) for row in rows]
    radius = 1.5 * sorted(distances)[num_honest - 1]
    shares = [radius / distances[i] if distances[i] > radius else 1.0 for i in kept]
    return np.mean([center + share * (rows[i] - center) for i, share in zip(kept, shares, strict=True)], axis=0)


def first_step(rows: Rows, f: int) -> np.ndarray:
    return Loops(len(rows))(rows, f)


CASES = [
    RuleCase(PersistentFilter(), first_step, [ITERATIVE]),
    RuleCase(InTwoLayers(PersistentFilter()), in_two_layers(first_step), [ITERATIVE]),
]

SIZES = {"first": 150, "second": 250}


def vectors(step: int, m: int = 8, seed: int = 0) -> Tensor:
    """Return the rows of honest workers, of which some directions are louder than others."""
    generator = torch.Generator().manual_seed(1000 * seed + step)
    loudness = 1 / torch.arange(1, 401, dtype=torch.float64).sqrt()
    return torch.ones(400) + torch.randn(m, 400, generator=generator, dtype=torch.float64) * (0.3 + loudness)


# For each attack, what f liars of m send in one step.
ATTACKS: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "none": lambda rows, f, step: rows,
    "one way": lambda rows, f, step: torch.cat([rows[:f] + 0.6, rows[f:]]),
    "copies": lambda rows, f, step: torch.cat([rows[f:].mean(0).expand(f, -1) - 0.8, rows[f:]]),
    "one layer": lambda rows, f, step: torch.cat([rows[:f] + (torch.arange(400) < 20) * 3.0, rows[f:]]),
    "now and then": lambda rows, f, step: torch.cat([rows[:f] * (-4 if step % 5 == 0 else 1), rows[f:]]),
    "changing sides": lambda rows, f, step: torch.cat([rows[:f] + 0.8 * (-1) ** step, rows[f:]]),
    "far away": lambda rows, f, step: torch.cat([1e6 * rows[:f], rows[f:]]),
    "not finite": lambda rows, f, step: torch.cat([rows[: f - 1] + 1, rows[:1] * torch.inf, rows[f:]]),
}


@pytest.mark.parametrize(
    ("attack", "m", "f"),
    [
        pytest.param(attack, m, f, marks=() if number % 4 in (size, 3 - size) else pytest.mark.slow)
        for number, attack in enumerate(ATTACKS)
        for size, (m, f) in enumerate([(5, 2), (8, 3), (9, 4), (16, 2)])
    ],
)
def test_follows_the_formulas_step_after_step(attack: str, m: int, f: int) -> None:
    rule, loops = PersistentFilter(), {name: Loops(m) for name in SIZES}
    segments = Segments.of_sizes(list(SIZES.values()))
    for step in range(12):
        rows = ATTACKS[attack](vectors(step, m), f, step)
        found = rule.aggregate(WorkerMatrix([rows], segments=segments), f)[0]
        workers = rows.isfinite().all(1).nonzero().flatten().tolist()
        parts = rows[workers].split(list(SIZES.values()), dim=1)
        fewer = f - (m - len(workers))
        expected = [loop(as_list(part), fewer, workers) for loop, part in zip(loops.values(), parts, strict=True)]
        assert relative_error(found, np.concatenate(expected), rows) < 1e-8
    if attack in ("one way", "copies", "changing sides", "far away"):
        assert all(loop.left_out == list(range(f)) for loop in loops.values())
    if attack == "one layer":
        assert loops["first"].left_out == list(range(f))
    if attack == "none":
        assert all(loop.left_out == [] for loop in loops.values())


def test_what_happens_in_one_parameter_changes_nothing_in_the_others() -> None:
    f, attacks = 4, list(ATTACKS.values())[:-1]
    rule, alone = PersistentFilter(), [PersistentFilter() for _ in attacks]
    segments = Segments.of_sizes([400] * len(attacks))
    for step in range(15):
        parts = [attack(vectors(step, 9, seed), f, step) for seed, attack in enumerate(attacks)]
        found = rule.aggregate(WorkerMatrix([torch.cat(parts, dim=1)], segments=segments), f)[0]
        for of_part, other, part in zip(found.split(400), alone, parts, strict=True):
            torch.testing.assert_close(of_part, other(part, num_byzantine=f), rtol=1e-9, atol=1e-9)


# What it remembers.


def after(
    steps: int, rule: PersistentFilter, attack: str = "one way", m: int = 8, f: int = 3, start: int = 0
) -> list[Tensor]:
    return [rule(ATTACKS[attack](vectors(step, m), f, step), num_byzantine=f) for step in range(start, start + steps)]


@pytest.mark.parametrize("done", [0, 1, 6])
def test_goes_on_from_its_state(done: int) -> None:
    rule, resumed = PersistentFilter(), PersistentFilter()
    whole = after(10, rule)
    first = PersistentFilter()
    after(done, first)
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    after(3, first, "none")  # a state that was saved is a copy
    for found, expected in zip(after(10 - done, resumed, start=done), whole[done:], strict=True):
        assert torch.equal(found, expected)
    rule.reset()
    assert all(torch.equal(*pair) for pair in zip(after(10, rule), whole, strict=True))


def test_a_copy_has_a_memory_of_its_own() -> None:
    rule = PersistentFilter()
    after(8, rule)
    other = copy.deepcopy(rule)
    expected = after(2, rule, start=8)
    after(5, rule, "none", start=10)
    assert all(torch.equal(*pair) for pair in zip(after(2, other, start=8), expected, strict=True))


def test_workers_without_a_row_are_remembered_as_they_were() -> None:
    """Some send what is not finite, others are in quarantine, for a while; what is known of all stays."""
    rule, quarantine = PersistentFilter(), Quarantine()
    robust = RobustAggregation(rule, 3, quarantine, Observers())
    loops = Loops(8)
    for step in range(25):
        rows = ATTACKS["one way"](vectors(step), 3, step)
        missing = {1} if step in range(9, 12) else set()
        if step == 13:
            quarantine.add([0], rule, 8, 3, proved=True)
        rows[list(missing)] = torch.nan
        workers = [i for i in range(8) if i not in missing | quarantine.workers]
        fewer = max(0, 3 - len(quarantine.workers)) - len(missing)
        expected = loops([row for i, row in enumerate(as_list(rows)) if i in workers], fewer, workers)
        found = robust.aggregate(WorkerMatrix([rows])).parts[0]
        assert relative_error(found, expected, vectors(step)) < 1e-8
    assert loops.left_out == [1, 2]  # the liars that are not in quarantine
    saved = rule.state_dict()["histories._extra_state"][""]
    np.testing.assert_allclose(saved[:8].numpy(), loops.average, atol=1e-8)
    np.testing.assert_allclose(saved[8].numpy(), loops.sizes, atol=1e-8)


def test_another_number_of_workers_needs_another_rule() -> None:
    rule = PersistentFilter()
    after(1, rule)
    with pytest.raises(ValueError, match=r"vectors must have as many rows as in the previous calls.* got 9 after 8"):
        rule(vectors(0, m=9), num_byzantine=3)
    rule.reset()
    rule(vectors(0, m=9), num_byzantine=3)


def test_more_unusable_rows_than_f_leave_no_trace() -> None:
    rule, expected = PersistentFilter(), PersistentFilter()
    rows = vectors(0)
    rows[:4] = torch.nan
    after(4, rule), after(4, expected)
    with pytest.raises(ByzantineBreakdownError):
        rule(rows, num_byzantine=3)
    assert all(torch.equal(*pair) for pair in zip(after(2, rule, start=4), after(2, expected, start=4), strict=True))


# What is true of it after many steps, too.


@pytest.mark.parametrize("attack", ATTACKS)
def test_it_moves_and_scales_with_all_rows_and_does_not_depend_on_their_order(attack: str) -> None:
    plain, moved, permuted = PersistentFilter(), PersistentFilter(), PersistentFilter()
    order = torch.tensor([4, 2, 7, 0, 1, 6, 3, 5])
    for step in range(10):
        rows = ATTACKS[attack](vectors(step), 3, step)
        expected = plain(rows, num_byzantine=3)
        near = {"rtol": 1e-6, "atol": 1e-6}
        torch.testing.assert_close(moved(-8 * rows + 4 * step, num_byzantine=3), -8 * expected + 4 * step, **near)
        torch.testing.assert_close(permuted(rows[order], num_byzantine=3), expected, **near)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e-18, 1e-3, 1e15])
def test_rows_of_any_size(size: float, dtype: torch.dtype) -> None:
    rule = PersistentFilter()
    for step in range(10):
        rows = vectors(step) * size
        rows[:3] += 0.8 * size
        found = rule(rows.to(dtype), num_byzantine=3)
    assert found.dtype == dtype
    assert abs(float(found.double().mean()) / size - 1) < 0.1


def extreme(rows: Tensor, value: float) -> Tensor:
    rows[:2], rows[2] = value, -value
    return rows


EXTREMES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "huge": lambda rows, step: extreme(rows, 1e15),
    "huge in turn": lambda rows, step: extreme(rows, 10.0 ** (3 * (step % 6))),
    "huge and not finite": lambda rows, step: torch.cat([rows[:1] * torch.nan, rows[1:3] * 1e15, rows[3:]]),
    "zeros": lambda rows, step: torch.cat([0 * rows[:3], rows[3:]]),
    "copies of an honest one": lambda rows, step: torch.cat([rows[5:6].expand(3, -1), rows[3:]]),
    "denormal": lambda rows, step: extreme(rows, 1e-42),
}


@pytest.mark.parametrize("attack", EXTREMES)
def test_extreme_rows_leave_it_with_the_honest_workers(attack: str) -> None:
    rule = PersistentFilter()
    for step in range(20):
        rows = EXTREMES[attack](vectors(step).float(), step)
        found = rule(rows, num_byzantine=3)
        honest = rows[3:]
        assert (found - honest.mean(0)).norm() < torch.pdist(honest).max()


def test_where_most_agree_they_decide() -> None:
    rule = PersistentFilter()
    for step in range(5):
        rows = torch.ones(7, 200)
        rows[:3] = float(step)
        torch.testing.assert_close(rule(rows, num_byzantine=3), torch.ones(200), rtol=0, atol=1e-6)
    assert rule(torch.ones(7, 200), num_byzantine=3).tolist() == [1.0] * 200
    # And of what they agreed on, nothing is held against anyone.
    honest = PersistentFilter()
    after(1, rule, "none", m=7), after(1, honest, "none", m=7)
    assert all(value.isfinite().all() for value in rule.state_dict()["histories._extra_state"].values())


@pytest.mark.parametrize(
    ("attack", "m", "f"), [("one way", 5, 2), ("copies", 9, 4), ("changing sides", 5, 2), ("far away", 9, 4)]
)
def test_sleepers_do_not_keep_the_trust_they_have_earned(attack: str, m: int, f: int) -> None:
    rule = PersistentFilter()
    after(150, rule, "none", m, f)
    off = []
    for step in range(150, 200):
        rows = ATTACKS[attack](vectors(step, m), f, step)
        off.append(float((rule(rows, num_byzantine=f) - rows[f:].mean(0)).norm() / (rows[f] - 1).norm()))
    # Clipped in the first steps, and left out once they are known.
    assert max(off) < 1.5
    assert max(off[30:]) < 1e-6


def test_nobody_is_left_out_where_all_are_honest() -> None:
    rule = PersistentFilter()
    means = [float((rule(rows, num_byzantine=2) - rows.mean(0)).norm()) for rows in map(vectors, range(60))]
    assert np.mean(np.array(means[20:]) > 1e-6) < 0.1


@pytest.mark.parametrize(("m", "f"), [(3, 1), (5, 2), (9, 4)])
def test_liars_who_had_others_left_out_gain_a_bounded_step(m: int, f: int) -> None:
    rule, generator, harm = PersistentFilter(), torch.Generator().manual_seed(0), []
    for step in range(60):
        rows = torch.randn(m, 500, generator=generator, dtype=torch.float64)
        # They crowd around one worker, so that the others seem to be the odd ones, and then attack.
        rows[1 : f + 1] = rows[0] + 0.2 * rows[1 : f + 1] if step < 50 else 1e4 * rows[1 : f + 1]
        honest = rows[[0, *range(f + 1, m)]]
        distance = (rule(rows, num_byzantine=f) - honest.mean(0)).norm()
        harm.append(float(distance / (honest - honest.mean(0)).norm(dim=1).median()))
    assert max(harm[50:]) < 2


def test_the_sign_of_an_eigenvector_makes_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    decided = torch.linalg.eigh

    def negated(matrix: Tensor) -> tuple[Tensor, Tensor]:
        eigenvalues, vectors = decided(matrix)
        return eigenvalues, -vectors

    rule, other = PersistentFilter(), PersistentFilter()
    for step in range(20):
        rows = ATTACKS["one way"](vectors(step), 3, step)
        expected = rule(rows, num_byzantine=3)
        with monkeypatch.context() as patched:
            patched.setattr(torch.linalg, "eigh", negated)
            assert torch.equal(other(rows, num_byzantine=3), expected)


def test_who_could_not_be_looked_at_before_is_not_trusted_for_it() -> None:
    rule, generator = PersistentFilter(), torch.Generator().manual_seed(0)
    for step in range(80):
        rows = torch.randn(5, 500, generator=generator, dtype=torch.float64)
        if step < 60:
            rows[3] = torch.nan
        else:
            rows[3:] += 2
        result = rule(rows, num_byzantine=2)
        if step >= 70:
            assert abs(float(result.mean())) < 0.2

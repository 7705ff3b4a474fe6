import copy
import pickle
import warnings

import numpy as np
import oracles
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from lightning_byzantine import ByzantineBreakdownError
from lightning_byzantine.aggregators import (
    ARC,
    CAF,
    CTMA,
    NNM,
    SMEA,
    Aggregator,
    Bucketing,
    Bulyan,
    CenteredClipping,
    Clipping,
    ComparativeGradientElimination,
    CoordinateWiseMedian,
    CoordinateWiseTrimmedMean,
    GeometricMedian,
    Krum,
    MeaMed,
    Mean,
    MinimumDiameterAveraging,
    MoNNA,
    MultiKrum,
)
from lightning_byzantine.errors import ReferenceLostError
from lightning_byzantine.matrix import WorkerMatrix
from lightning_byzantine.utilities.rng import StepSeed

RFA = GeometricMedian(max_iterations=3, tolerance=0, smoothing=0.1, init="zero")
WITH_ORACLE: dict[str, tuple[Aggregator, oracles.Oracle]] = {
    "mean": (Mean(), oracles.mean),
    "median": (CoordinateWiseMedian(), oracles.coordinate_wise_median),
    "trimmed mean": (CoordinateWiseTrimmedMean(), oracles.coordinate_wise_trimmed_mean),
    "geometric median": (GeometricMedian(), oracles.geometric_median),
    "geometric median from the mean": (GeometricMedian(init="mean"), oracles.geometric_median),
    "rfa": (RFA, oracles.rfa),
    "krum": (Krum(), oracles.krum),
    "multi-krum": (MultiKrum(), oracles.multi_krum),
    "ctma(median)": (CTMA(CoordinateWiseMedian()), oracles.ctma(oracles.coordinate_wise_median)),
    "ctma(rfa)": (CTMA(RFA), oracles.ctma(oracles.rfa)),
    "ctma(krum)": (CTMA(Krum()), oracles.ctma(oracles.krum)),
    "nnm(rfa)": (NNM(RFA), oracles.nnm(oracles.rfa)),
    "nnm(trimmed mean)": (NNM(CoordinateWiseTrimmedMean()), oracles.nnm(oracles.coordinate_wise_trimmed_mean)),
    "ctma(nnm(median))": (
        CTMA(NNM(CoordinateWiseMedian())),
        oracles.ctma(oracles.nnm(oracles.coordinate_wise_median)),
    ),
    "nnm(nnm(krum))": (NNM(NNM(Krum())), oracles.nnm(oracles.nnm(oracles.krum))),
    "nnm(ctma(geometric median))": (
        NNM(CTMA(GeometricMedian())),
        oracles.nnm(oracles.ctma(oracles.geometric_median)),
    ),
    "mea-med": (MeaMed(), oracles.mea_med),
    "mda": (MinimumDiameterAveraging(), oracles.minimum_diameter_averaging),
    "monna": (MoNNA(), oracles.monna),
    "cge": (ComparativeGradientElimination(), oracles.comparative_gradient_elimination),
    "caf": (CAF(), oracles.caf),
    "smea": (SMEA(), oracles.smea),
    "centered clipping": (CenteredClipping(tau=1.0), oracles.centered_clipping(1.0)),
    "centered clipping, three times": (CenteredClipping(5.0, 3), oracles.centered_clipping(5.0, 3)),
    "bulyan": (Bulyan(), oracles.bulyan),
    "clipping(krum)": (Clipping(Krum(), 9.0), oracles.clipping(oracles.krum, 9.0)),
    "clipping(geometric median)": (Clipping(GeometricMedian()), oracles.clipping(oracles.geometric_median, 2.0)),
    "arc(median)": (ARC(CoordinateWiseMedian()), oracles.arc(oracles.coordinate_wise_median)),
    "arc(smea)": (ARC(SMEA()), oracles.arc(oracles.smea)),
    "ctma(arc(mean))": (CTMA(ARC(Mean())), oracles.ctma(oracles.arc(oracles.mean))),
    "arc(nnm(mda))": (
        ARC(NNM(MinimumDiameterAveraging())),
        oracles.arc(oracles.nnm(oracles.minimum_diameter_averaging)),
    ),
    "nnm(arc(caf))": (NNM(ARC(CAF())), oracles.nnm(oracles.arc(oracles.caf))),
    "nnm(bulyan)": (NNM(Bulyan()), oracles.nnm(oracles.bulyan)),
    "ctma(monna)": (CTMA(MoNNA()), oracles.ctma(oracles.monna)),
}
ALL_RULES = {name: rule for name, (rule, _) in WITH_ORACLE.items()} | {
    "bucketing(median)": Bucketing(CoordinateWiseMedian()),
    "ctma(bucketing(median))": CTMA(Bucketing(CoordinateWiseMedian())),
    "bucketing(caf)": Bucketing(CAF()),
}
# Worker 2, who is never bad, is the one to trust. A center that starts at 0 takes steps of at most tau.
ROBUST = {name: rule for name, rule in ALL_RULES.items() if name not in ("mean", "centered clipping, three times")} | {
    "monna": MoNNA(reference=2),
    "ctma(monna)": CTMA(MoNNA(reference=2)),
}
# Lengths are about 0, and some in units of their own.
ABOUT_ZERO = ("rfa", "cge", "clipping", "arc")
SIZES = [(1, 0), (2, 0), (3, 0), (3, 1), (4, 1), (5, 2), (6, 2), (8, 2), (9, 4), (17, 8), (33, 10)]


def fresh(rule: Aggregator) -> Aggregator:
    # Bucketing draws anew at every call, centered clipping goes on from where it was.
    return copy.deepcopy(rule)


def serves(name: str, m: int, f: int) -> bool:
    try:
        ALL_RULES[name].check(m, f)
    except ValueError:
        return False
    return True


def at_most(f: int, name: str, m: int) -> int:
    """Return the largest number of Byzantine workers up to f that the rule can serve."""
    return next(fewer for fewer in range(f, -1, -1) if serves(name, m, fewer))


def workers(m: int, d: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = 1 + torch.randn(m, d, generator=generator, dtype=torch.float64)
    rows[: (m - 1) // 2] *= 3
    return rows.to(dtype)


def relative_error(actual: Tensor, expected: np.ndarray, rows: Tensor) -> float:
    scale = max(float(rows.double().norm(dim=1).median()), 1e-300)
    return float(np.linalg.norm(actual.double().numpy() - expected)) / scale


@pytest.mark.parametrize(
    ("name", "m", "f"),
    # Every point between two rows is a geometric median.
    [
        (name, *size)
        for name in WITH_ORACLE
        for size in [*SIZES, (7, 1), (11, 2)]
        if serves(name, *size) and (size[0] != 2 or "geometric median" not in name)
    ],
)
def test_equals_the_oracle_however_columns_are_cut(name: str, m: int, f: int) -> None:
    rule, oracle = WITH_ORACLE[name]
    rows = workers(m, 60, seed=m)
    expected = oracle(list(rows.double().numpy()), f)
    assert relative_error(fresh(rule)(rows, num_byzantine=f), expected, rows) < 1e-5
    for cut in ([60], [1, 59], [20, 3, 37], [1] * 60):
        blocks = rule.aggregate(WorkerMatrix(rows.split(cut, dim=1)), f)
        assert [len(block) for block in blocks] == cut
        assert relative_error(torch.cat(blocks), expected, rows) < 1e-5


@pytest.mark.parametrize(
    "name",
    [
        "mean",
        "median",
        "trimmed mean",
        "krum",
        "multi-krum",
        "ctma(median)",
        "ctma(nnm(median))",
        "nnm(trimmed mean)",
        "mea-med",
        "mda",
        "monna",
        "cge",
        "smea",
        "bulyan",
        "ctma(arc(mean))",
    ],
)
def test_rules_without_iterations_give_the_same_bits_however_columns_are_cut(name: str) -> None:
    rows = workers(9, 10_001, seed=1)
    f = at_most(4, name, 9)
    whole = ALL_RULES[name](rows, num_byzantine=f)
    for cut in ([10_000, 1], [7, 4_990, 5_004]):
        blocks = [block.contiguous() for block in rows.split(cut, dim=1)]
        assert torch.equal(torch.cat(ALL_RULES[name].aggregate(WorkerMatrix(blocks), f)), whole)


def test_a_matrix_larger_than_one_chunk_gives_the_same_result() -> None:
    rows = workers(5, 250_000, seed=3)
    for name in ("median", "ctma(krum)", "nnm(trimmed mean)"):
        rule, oracle = WITH_ORACLE[name]
        assert relative_error(rule(rows, num_byzantine=2), oracle(list(rows.double().numpy()), 2), rows) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", WITH_ORACLE)
def test_keeps_the_dtype_and_its_precision(name: str, dtype: torch.dtype) -> None:
    rule, oracle = WITH_ORACLE[name]
    rows = workers(7, 50, seed=5, dtype=dtype)
    f = at_most(2, name, 7)
    result = fresh(rule)(rows, num_byzantine=f)
    assert result.dtype == dtype
    tolerance = {torch.float64: 1e-6}.get(dtype, max(1e-5, 4 * torch.finfo(dtype).eps))
    assert relative_error(result, oracle(list(rows.double().numpy()), f), rows) < tolerance


def test_blocks_of_several_dtypes_keep_theirs() -> None:
    rows = workers(5, 30, seed=2, dtype=torch.float64)
    blocks = [rows[:, :10].half(), rows[:, 10:20].float(), rows[:, 20:]]
    result = CTMA(NNM(CoordinateWiseMedian())).aggregate(WorkerMatrix(blocks), 2)
    assert [block.dtype for block in result] == [torch.float16, torch.float32, torch.float64]


@st.composite
def matrices(draw: st.DrawFn) -> tuple[Tensor, int]:
    m = draw(st.integers(1, 9))
    d = draw(st.integers(1, 6))
    f = draw(st.integers(0, (m - 1) // 2))
    # Few different values make ties and duplicates, all values make the rest.
    entry = draw(st.sampled_from([st.integers(-2, 2), st.floats(-1e3, 1e3, width=32)]))
    rows = draw(st.lists(st.lists(entry, min_size=d, max_size=d), min_size=m, max_size=m))
    return torch.tensor(rows, dtype=torch.float32), f


@pytest.mark.parametrize("name", ALL_RULES)
@given(data=matrices())
def test_never_writes_to_its_input_and_repeats_itself(name: str, data: tuple[Tensor, int]) -> None:
    rows, f = data[0], at_most(data[1], name, len(data[0]))
    before = rows.clone()
    first = fresh(ALL_RULES[name])(rows, num_byzantine=f)
    assert torch.equal(rows, before)
    assert first.shape == rows.shape[1:]
    assert first.isfinite().all()
    assert torch.equal(first, fresh(ALL_RULES[name])(rows.clone(), num_byzantine=f))


# Not Bulyan of mixed rows: which values are as far from their median, but for rounding, changes with a move.
@pytest.mark.parametrize(
    "name", [name for name in ALL_RULES if all(part not in name for part in (*ABOUT_ZERO, "nnm(bulyan)"))]
)
@given(data=matrices(), shift=st.integers(-5, 5), factor=st.sampled_from([-8.0, -1.0, 0.125, 4.0]))
def test_moves_and_scales_with_its_input(name: str, data: tuple[Tensor, int], shift: int, factor: float) -> None:
    rows, f = data[0], at_most(data[1], name, len(data[0]))
    rows = (rows * 64).round() / 64  # so that float32 moves them exactly
    expected = fresh(ALL_RULES[name])(rows, num_byzantine=f) * factor + shift
    actual = fresh(ALL_RULES[name])(rows * factor + shift, num_byzantine=f)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * float(1 + rows.abs().max()))


# A trusted worker is not any other, sets may share a diameter, Bulyan leaves few rows to Krum, and NNM few points.
BY_INDEX = ("bucketing", "monna", "mda", "bulyan", "nnm(ctma(geometric median))")


@pytest.mark.parametrize("name", [name for name in ALL_RULES if all(part not in name for part in BY_INDEX)])
@given(seed=st.integers(0, 10_000), m=st.integers(1, 12), data=st.data())
def test_does_not_depend_on_who_is_who(name: str, seed: int, m: int, data: st.DataObject) -> None:
    f = data.draw(st.integers(0, (m - 1) // 2))
    rows = workers(m, 7, seed)
    order = torch.tensor(data.draw(st.permutations(range(m))))
    # Two rows are always as near to one another: a tie, which the lower index wins. All between them are medians.
    assume(m - f > 2 or "krum" not in name)
    assume(m > 2 or "geometric median" not in name)
    expected = fresh(ALL_RULES[name])(rows, num_byzantine=f)
    torch.testing.assert_close(fresh(ALL_RULES[name])(rows[order], num_byzantine=f), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in ALL_RULES if "clipping" not in name])
@given(m=st.integers(1, 9), value=st.floats(-1e4, 1e4, width=32), data=st.data())
def test_agreement_is_kept(name: str, m: int, value: float, data: st.DataObject) -> None:
    f = at_most(data.draw(st.integers(0, (m - 1) // 2)), name, m)
    rows = torch.full((m, 3), value)
    torch.testing.assert_close(fresh(ALL_RULES[name])(rows, num_byzantine=f), rows[0], rtol=1e-5, atol=1e-6)


ATTACKS_ON_NUMBERS = {
    "1e18": lambda rows, bad: rows.index_fill(0, bad, 1e18),
    "one coordinate 1e18": lambda rows, bad: rows.index_put((bad, torch.tensor(0)), rows.new_tensor(1e18)),
    "opposite 1.2e154": lambda rows, bad: (
        rows.double().index_fill(0, bad[:1], -1.2e154).index_fill(0, bad[1:], 1.2e154).to(rows)
    ),
    "opposite 1e18": lambda rows, bad: rows.index_fill(0, bad[:1], -1e18).index_fill(0, bad[1:], 1e18),
    "1.2e154": lambda rows, bad: rows.index_fill(0, bad, torch.tensor(1.2e154, dtype=torch.float64).to(rows)),
    "largest": lambda rows, bad: rows.index_fill(0, bad, (1e149 if rows.dtype == torch.float64 else 1e18)),
    "1e38": lambda rows, bad: rows.index_fill(0, bad, 1e38),
    "inf": lambda rows, bad: rows.index_fill(0, bad, torch.inf),
    "nan": lambda rows, bad: rows.index_fill(0, bad, torch.nan),
    "one nan": lambda rows, bad: rows.index_put((bad, torch.tensor(2)), rows.new_tensor(torch.nan)),
    "nan and 1e18": lambda rows, bad: rows.index_fill(0, bad[:1], torch.nan).index_fill(0, bad[1:], 1e18),
    "denormal": lambda rows, bad: rows.index_fill(0, bad, 1e-42),
    "identical colluders": lambda rows, bad: rows.index_fill(0, bad, 1e6),
}


@pytest.mark.parametrize("bad", [[0, 1], [1, 4], [3, 4]], ids=str)
@pytest.mark.parametrize("attack", ATTACKS_ON_NUMBERS)
@pytest.mark.parametrize("name", ROBUST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_stays_with_the_honest_workers(name: str, attack: str, bad: list[int], dtype: torch.dtype) -> None:
    m = 11 if "bulyan" in name else 5
    rows = workers(m, 40, seed=11, dtype=dtype)
    rows = rows / rows.norm(dim=1, keepdim=True)
    honest = rows[[i for i in range(m) if i not in bad]]
    result = fresh(ROBUST[name])(ATTACKS_ON_NUMBERS[attack](rows, torch.tensor(bad)), num_byzantine=2)
    diameter = torch.pdist(honest).max()
    # The smoothed start at 0 gives a row at 1e18 weight 1e-18: it moves by about one diameter, not by 1e18.
    assert (result - honest.mean(0)).norm() < 3 * diameter


@pytest.mark.parametrize("name", ALL_RULES)
def test_unmeasurable_rows_are_dropped_by_index(name: str) -> None:
    m = 15 if "bulyan" in name else 7
    rows = workers(m, 20, seed=4)
    for bad in (torch.nan, torch.inf, -torch.inf, 1e20):
        poisoned = rows.clone()
        poisoned[1, 3] = bad
        poisoned[6] = bad
        expected = fresh(ALL_RULES[name])(rows[[i for i in range(m) if i not in (1, 6)]], num_byzantine=1)
        assert torch.equal(fresh(ALL_RULES[name])(poisoned, num_byzantine=3), expected)


@pytest.mark.parametrize("name", ALL_RULES)
def test_more_unmeasurable_rows_than_num_byzantine_is_a_breakdown(name: str) -> None:
    rows = workers(7, 20, seed=4)
    rows[[0, 2, 5]] = torch.nan
    f = at_most(2, name, 7)
    with pytest.raises(ByzantineBreakdownError, match=rf"3 of 7 .*workers 0, 2, 5.*num_byzantine={f}") as caught:
        ALL_RULES[name](rows, num_byzantine=f)
    assert caught.value.workers == [0, 2, 5]


@pytest.mark.parametrize("name", ALL_RULES)
@pytest.mark.parametrize(
    ("vectors", "f", "error", "message"),
    [
        (torch.zeros(8, 2), 4, ValueError, r"num_byzantine must satisfy 0 <= f < m / 2, got f=4 with m=8"),
        (torch.zeros(8, 2), -1, ValueError, r"num_byzantine must satisfy .* got f=-1"),
        (torch.zeros(8, 2), 1.0, TypeError, r"num_byzantine must be an int, got 1.0"),
        (torch.zeros(8, 2), True, TypeError, r"num_byzantine must be an int, got True"),
        (torch.zeros(8), 1, ValueError, r"2D tensor \[num_workers, dimension\], got shape \(8,\)"),
        (torch.zeros(8, 2, 2), 1, ValueError, r"got shape \(8, 2, 2\)"),
        (torch.zeros(0, 2), 0, ValueError, r"must not be empty, got shape \(0, 2\)"),
        (torch.zeros(8, 0), 0, ValueError, r"must not be empty, got shape \(8, 0\)"),
        (torch.zeros(8, 2, dtype=torch.int64), 1, TypeError, r"got torch.int64"),
        (torch.zeros(8, 2, dtype=torch.complex64), 1, TypeError, r"got torch.complex64"),
        ([[1.0]], 0, TypeError, r"torch.Tensor .* got list"),
    ],
)
def test_bad_input_is_named(name: str, vectors: Tensor, f: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ALL_RULES[name](vectors, num_byzantine=f)


@pytest.mark.parametrize("offset", [1e4, 1e6])
@pytest.mark.parametrize("m", [5, 26, 40])
def test_precision_trap_common_offset(m: int, offset: float) -> None:
    """Rows share an offset far larger than their spread; above 25 rows torch.cdist takes a short cut and fails."""
    torch.manual_seed(0)
    rows = (offset + torch.randn(m, 50)).float()
    true = torch.cdist(rows.double(), rows.double(), compute_mode="donot_use_mm_for_euclid_dist")
    torch.testing.assert_close(WorkerMatrix([rows]).squared_distances().sqrt(), true, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_precision_trap_one_row_cannot_take_the_others_digits(offset: float) -> None:
    torch.manual_seed(0)
    rows = (offset + torch.randn(9, 50)).float()
    true = torch.cdist(rows.double(), rows.double(), compute_mode="donot_use_mm_for_euclid_dist")[1:, 1:]
    for huge in (1e12, 1e18):
        rows[0] = huge
        squared = WorkerMatrix([rows]).squared_distances()[1:, 1:]
        torch.testing.assert_close(squared.sqrt(), true, rtol=1e-6, atol=1e-9)


def test_precision_trap_one_coordinate_hides_all_others() -> None:
    torch.manual_seed(0)
    rows = 1e-3 * torch.randn(30, 50)
    rows[:, 0] = 1e10
    true = torch.cdist(rows.double(), rows.double(), compute_mode="donot_use_mm_for_euclid_dist")
    torch.testing.assert_close(WorkerMatrix([rows]).squared_distances().sqrt(), true, rtol=1e-6, atol=1e-12)


def test_ctma_keeps_exactly_m_minus_f_rows_on_ties() -> None:
    rows = torch.tensor([[-1.0], [1.0], [0.0], [-1.0], [1.0]])
    # The center is 0 and four rows are as far: row 0 and then row 1 are kept, by index.
    torch.testing.assert_close(CTMA(CoordinateWiseMedian())(rows, num_byzantine=2), torch.tensor([0.0]))
    torch.testing.assert_close(CTMA(CoordinateWiseMedian())(rows[[0, 3, 2, 1, 4]], 2), torch.tensor([-2 / 3]))


def test_geometric_median_leaves_a_row_it_starts_on() -> None:
    # The mean is row 0, which is not the median: one row pulls left, four pull right.
    rows = torch.tensor([[0.0, 0.0], [-4.0, 0.0], [1.0, 0.1], [1.0, -0.1], [1.0, 0.2], [1.0, -0.2]])
    result = GeometricMedian(init="mean")(rows, num_byzantine=2)
    torch.testing.assert_close(
        result.double().numpy(), oracles.geometric_median(list(rows.double().numpy()), 2), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_geometric_median_is_not_led_away_by_where_it_starts(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rows = torch.randn(101, 5, dtype=dtype)
    rows[:50] = 1e18 if dtype == torch.float32 else 1e149
    assert GeometricMedian()(rows, num_byzantine=50).norm() < 20


def test_geometric_median_arguments() -> None:
    with pytest.raises(ValueError, match="max_iterations must be at least 1, got 0"):
        GeometricMedian(max_iterations=0)
    with pytest.raises(ValueError, match=r"tolerance must be finite and at least 0, got -0.1"):
        GeometricMedian(tolerance=-0.1)
    with pytest.raises(ValueError, match="smoothing must be finite and at least 0, got nan"):
        GeometricMedian(smoothing=float("nan"))
    with pytest.raises(TypeError, match="smoothing must be a number, got '1'"):
        GeometricMedian(smoothing="1")
    with pytest.raises(ValueError, match="init must be 'medoid', 'median', 'mean' or 'zero', got 'random'"):
        GeometricMedian(init="random")


def test_multi_krum_selects_what_it_was_told_to() -> None:
    rows = workers(7, 5, seed=0)
    assert torch.equal(MultiKrum(num_selected=1)(rows, 3), Krum()(rows, 3))
    with pytest.raises(ValueError, match=r"num_selected must be at most m - f, got num_selected=5 with m=7 .* f=3"):
        MultiKrum(num_selected=5)(rows, 3)
    with pytest.raises(ValueError, match="num_selected must be at least 1, got 0"):
        MultiKrum(num_selected=0)


@pytest.mark.parametrize(("m", "f"), [(m, f) for m in range(1, 40) for f in range((m + 1) // 2)])
def test_bucketing_works_at_its_defaults_for_any_m_and_f(m: int, f: int) -> None:
    rule = Bucketing(CoordinateWiseMedian())
    rule.check(m, f)
    rows = torch.ones(m, 2)
    rows[:f] = 1e6
    torch.testing.assert_close(rule(rows, num_byzantine=f), torch.ones(2))


@pytest.mark.parametrize(("m", "f", "size"), [(12, 2, 2), (13, 2, 3), (7, 1, None), (9, 4, None), (8, 2, None)])
@pytest.mark.parametrize("name", ["median", "krum", "ctma(median)", "geometric median"])
def test_bucketing_against_a_loop(name: str, m: int, f: int, size: int | None) -> None:
    base, oracle = WITH_ORACLE[name]
    rows = workers(m, 20, seed=m)
    order = torch.randperm(m, generator=StepSeed(5).next()).tolist()
    step = size or max(s for s in range(1, m) if s * 2 * f <= m and -(-m // s) > 2 * f)
    shuffled = [rows[i].double().numpy() for i in order]
    means = [oracles.mean(shuffled[start : start + step], f) for start in range(0, m, step)]
    actual = Bucketing(base, bucket_size=size, seed=5)(rows, num_byzantine=f)
    assert relative_error(actual, oracle(means, f), rows) < 1e-5


def test_bucketing_draws_anew_and_resumes() -> None:
    rows = workers(12, 5, seed=0)
    rule, twin = (Bucketing(CoordinateWiseMedian(), bucket_size=2, seed=3) for _ in range(2))
    results = [rule(rows, 2) for _ in range(4)]
    assert not torch.equal(results[0], results[1])
    assert torch.equal(twin(rows, 2), results[0])
    assert not torch.equal(Bucketing(CoordinateWiseMedian(), bucket_size=2, seed=4)(rows, 2), results[0])
    state = copy.deepcopy(twin.state_dict())
    other = Bucketing(CoordinateWiseMedian(), bucket_size=2, seed=3)
    other.load_state_dict(state)
    assert torch.equal(other(rows, 2), results[1])


def test_a_rule_in_buckets_copes_with_fewer_of_them() -> None:
    rows = torch.ones(7, 2)
    rows[0] = torch.nan
    rule = Bucketing(MultiKrum(num_selected=3))
    for bad in (1e6, torch.nan):
        rows[1] = bad
        assert torch.equal(rule(rows, num_byzantine=2), torch.ones(2))


def test_blocks_without_columns_stay_empty() -> None:
    for rule in (Mean(), Krum(), CTMA(NNM(CoordinateWiseMedian())), CoordinateWiseTrimmedMean()):
        result = rule.aggregate(WorkerMatrix([workers(3, 4, seed=0), torch.empty(3, 0)]), 1)
        assert [len(block) for block in result] == [4, 0]


def test_numpy_integers_are_integers() -> None:
    rows = workers(5, 4, seed=0)
    assert torch.equal(Krum()(rows, num_byzantine=np.int64(2)), Krum()(rows, num_byzantine=2))


def test_bucketing_refuses_too_few_buckets() -> None:
    with pytest.raises(ValueError, match="more than 2f buckets, got bucket_size=3, which makes 2 buckets of m=5"):
        CTMA(Bucketing(Krum(), bucket_size=3))(torch.zeros(5, 2), 1)
    with pytest.raises(ValueError, match="bucket_size must be at least 1, got 0"):
        Bucketing(Krum(), bucket_size=0)
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        Bucketing(Krum(), seed=-1)


@pytest.mark.parametrize("meta", [CTMA, NNM, Bucketing])
def test_a_base_must_be_a_rule(meta: type[CTMA]) -> None:
    with pytest.raises(TypeError, match=r"base must be an Aggregator, such as .*, got 'Krum'"):
        meta("Krum")


def test_the_base_of_a_meta_aggregator_checks_too() -> None:
    with pytest.raises(ValueError, match="num_selected must be at most m - f"):
        CTMA(NNM(MultiKrum(num_selected=5)))(torch.zeros(5, 2), 1)


def test_works_without_grad_and_in_inference_mode() -> None:
    rows = workers(5, 4, seed=0).requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not Krum()(rows, 2).requires_grad
        with torch.inference_mode():
            CTMA(NNM(CoordinateWiseMedian()))(rows.detach().clone(), 2)


@pytest.mark.parametrize("name", ALL_RULES)
def test_autocast_and_fast_matrix_products_take_no_digits(name: str) -> None:
    rows = workers(9, 200, seed=6)
    f = at_most(4, name, 9)
    expected = fresh(ALL_RULES[name])(rows, num_byzantine=f)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(fresh(ALL_RULES[name])(rows, num_byzantine=f), expected)
    finally:
        torch.set_float32_matmul_precision(precision)


class OthersWantedError(Exception):
    pass


def in_shards(rule: Aggregator, shards: list[Tensor], f: int) -> list[Tensor]:
    """Aggregate each shard of the columns, statistics summed up over all: from sum to sum, each time from the start."""
    sums: list[Tensor] = []

    def aggregate(shard: Tensor, rank: int, parts: list[Tensor]) -> Tensor | None:
        known = iter(sums)

        def complete(total: Tensor) -> Tensor:
            for done in known:
                return done.clone()
            parts.append(total)
            raise OthersWantedError

        try:
            return fresh(rule).aggregate(WorkerMatrix([shard], complete, rank), f)[0]
        except OthersWantedError:
            return None

    while True:
        parts: list[Tensor] = []
        results = [aggregate(shard, rank, parts) for rank, shard in enumerate(shards)]
        if not parts:
            return results
        assert len(parts) == len(shards)
        sums.append(torch.stack(parts).sum(0))


@pytest.mark.parametrize("name", ALL_RULES)
def test_shards_give_what_the_whole_gives(name: str) -> None:
    rows = workers(11, 90, seed=8)
    rows[1] = rows[4]  # ties
    f = at_most(4, name, 11)
    shards = in_shards(ALL_RULES[name], list(rows.split(30, dim=1)), f)
    whole = fresh(ALL_RULES[name])(rows, num_byzantine=f)
    torch.testing.assert_close(torch.cat(shards), whole, rtol=1e-5, atol=1e-5)


def test_rules_of_subsets_refuse_what_would_not_end() -> None:
    for rule in (SMEA(), CTMA(MinimumDiameterAveraging()), Bucketing(SMEA(), bucket_size=1)):
        with pytest.raises(ValueError, match=r"100,000 at most, got 92,561,040 with m=33 workers and f=10"):
            rule(torch.zeros(33, 2), num_byzantine=10)


def test_bulyan_names_its_bound() -> None:
    with pytest.raises(ValueError, match=r"m >= 4f \+ 3 workers, got m=10 with f=2, for which m must be at least 11"):
        Bulyan()(torch.zeros(10, 2), num_byzantine=2)


def test_bulyan_is_not_led_by_one_coordinate() -> None:
    # Far away in one of many coordinates, rows hide in the spread of all others from Krum.
    rows = workers(11, 2000, seed=0) / 3
    rows[:2] = rows[2:].mean(0)
    rows[:2, 7] += 10
    honest = rows[2:, 7]
    assert MultiKrum()(rows, num_byzantine=2)[7] > honest.mean() + 1.5
    assert honest.min() < Bulyan()(rows, num_byzantine=2)[7] < honest.max()


def test_monna_knows_its_worker_when_others_are_dropped() -> None:
    rows = torch.tensor([[torch.nan], [7.0], [1.0], [2.0], [8.0]])
    torch.testing.assert_close(MoNNA(reference=3)(rows, num_byzantine=2), torch.tensor([10 / 3]))
    torch.testing.assert_close(NNM(MoNNA(reference=3))(rows, num_byzantine=2), torch.tensor([37 / 9]))


def test_monna_without_its_worker() -> None:
    rows = workers(5, 3, seed=0)
    with pytest.raises(ValueError, match="reference must be the index of one of m=5 workers, got reference=5"):
        CTMA(MoNNA(reference=5))(rows, num_byzantine=2)
    with pytest.raises(ValueError, match="reference must be at least 0, got -1"):
        MoNNA(reference=-1)
    with pytest.raises(ValueError, match="base must not be MoNNA nor contain it"):
        Bucketing(CTMA(MoNNA()))
    rows[3] = torch.nan
    with pytest.raises(ReferenceLostError, match=r"the trusted worker 3 sent a non-finite") as caught:
        CTMA(NNM(MoNNA(reference=3)))(rows, num_byzantine=2)
    assert isinstance(caught.value, ByzantineBreakdownError)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_mea_med_splits_ties() -> None:
    rows = torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, 4.0]])
    torch.testing.assert_close(MeaMed()(rows, num_byzantine=1), torch.tensor([1.0, 0.5]))


def test_caf_and_smea_see_ties_and_copies() -> None:
    rows = torch.eye(4)  # as far from one another in every direction
    torch.testing.assert_close(SMEA()(rows, num_byzantine=1), torch.tensor([1 / 3, 1 / 3, 1 / 3, 0.0]))
    assert torch.equal(CAF()(rows, num_byzantine=1), CAF()(torch.cat([rows.T]), num_byzantine=1))
    copies = torch.tensor([[1.0, 2.0]] * 3 + [[1e6, 0.0]] * 2)
    for rule in (CAF(), SMEA(), MinimumDiameterAveraging()):
        torch.testing.assert_close(rule(copies, num_byzantine=2), copies[0])


@pytest.mark.parametrize(
    "rule",
    [
        CenteredClipping(tau=1.0),
        NNM(CenteredClipping(tau=1.0)),
        Bucketing(CenteredClipping(tau=1.0), bucket_size=1),
        ARC(CenteredClipping(tau=1.0)),
    ],
    ids=repr,
)
def test_centered_clipping_goes_on_from_what_was_aggregated_last(rule: Aggregator) -> None:
    rows = 4 + workers(6, 8, seed=3)
    first, second = rule(rows, num_byzantine=1), rule(rows, num_byzantine=1)
    assert not torch.equal(first, second)
    twin = copy.deepcopy(rule)
    stateless = fresh(twin)
    state = copy.deepcopy(rule.state_dict())
    assert any("last_aggregate" in key for key in state)
    third = rule(rows, num_byzantine=1)
    twin.load_state_dict(state)
    assert torch.equal(twin(rows, num_byzantine=1), third)
    matrix = WorkerMatrix(list(rows.split([3, 5], dim=1)))
    matrix.previous = list(second.split([3, 5]))
    torch.testing.assert_close(torch.cat(stateless.aggregate(matrix, 1)), third)


def test_centered_clipping_against_its_loop() -> None:
    rule, center = CenteredClipping(tau=2.0, num_iterations=2), np.zeros(8)
    for step in range(5):
        rows = 4 + workers(6, 8, seed=step, dtype=torch.float64)
        center = oracles.centered_clipping(2.0, 2, start=center)(list(rows.numpy()), 1)
        np.testing.assert_allclose(rule(rows, num_byzantine=1).numpy(), center, rtol=1e-9)


def test_only_rules_that_go_on_have_state_for_it() -> None:
    assert not CTMA(NNM(CoordinateWiseMedian())).state_dict()
    assert not CTMA(NNM(CoordinateWiseMedian())).uses_previous
    assert CTMA(NNM(CenteredClipping())).uses_previous
    rule = CenteredClipping()
    rule(torch.ones(3, 2), num_byzantine=1)
    with pytest.raises(ValueError, match=r"as many columns as in the call before.*got 5 after 2"):
        rule(torch.ones(3, 5), num_byzantine=1)
    assert rule(torch.ones(4, 2, dtype=torch.float64), num_byzantine=1).dtype == torch.float64


def test_lengths_must_be_positive() -> None:
    with pytest.raises(ValueError, match="tau must be finite and above 0, got 0"):
        CenteredClipping(tau=0)
    with pytest.raises(ValueError, match="num_iterations must be at least 1, got 0"):
        CenteredClipping(num_iterations=0)
    with pytest.raises(ValueError, match="max_norm must be finite and above 0, got nan"):
        Clipping(Krum(), max_norm=float("nan"))


def test_clipping_leaves_short_rows_alone() -> None:
    rows = workers(7, 20, seed=1)
    assert torch.equal(Clipping(Krum(), max_norm=1e3)(rows, num_byzantine=3), Krum()(rows, num_byzantine=3))


@pytest.mark.parametrize("base", [Krum(), CoordinateWiseMedian(), GeometricMedian(), CTMA(Mean()), CAF()], ids=repr)
def test_arc_where_most_send_nothing(base: Aggregator) -> None:
    rows = torch.zeros(7, 3)
    rows[[0, 3]] = torch.tensor([[1e18], [-5.0]])
    assert torch.equal(ARC(base)(rows, num_byzantine=3), torch.zeros(3))


@pytest.mark.parametrize("base", [Krum(), GeometricMedian(), NNM(CoordinateWiseMedian()), SMEA()], ids=repr)
def test_clipped_distances_are_right_in_spite_of_a_common_offset(base: Aggregator) -> None:
    torch.manual_seed(0)
    rows = 1e6 + torch.randn(9, 50, dtype=torch.float64)
    rows[0] = 1e100
    norms = rows.norm(dim=1, keepdim=True)
    expected = base(rows * (3 / norms), num_byzantine=4)
    actual = Clipping(base, max_norm=3.0)(rows, num_byzantine=4)
    spread = torch.pdist(rows[1:]).mean() * 3 / norms[1]
    # The row of 1e100 is clipped to the others' place, to 16 digits of its length, of which the spread leaves ten.
    assert (actual - expected).norm() < 1e-3 * spread


def test_clipped_copies_tie() -> None:
    # They are at the same point of the sphere, each with another length.
    rows = torch.tensor([[2.0], [0.0], [-108.0], [0.0], [2.0], [-616.0], [-616.0]])
    distances = WorkerMatrix([rows]).scale(2 / rows.abs().clamp(min=2).flatten()).squared_distances()
    expected = WorkerMatrix([rows.clamp(-2, 2)]).squared_distances()
    assert torch.equal(distances[expected == 0], expected[expected == 0])
    torch.testing.assert_close(distances, expected)

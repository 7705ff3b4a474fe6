"""Rules, attacks and the exchanges' arithmetic on the device, against the CPU."""

import sys
from pathlib import Path

import torch
from cases import AttackCase, RuleCase, declared_in, name_of
from combinations import RULES
from harness import Table
from on_cuda import Section
from torch import Tensor

from lightning_byzantine.aggregators import Aggregator
from lightning_byzantine.matrix import WorkerMatrix

TESTS = Path(__file__).resolve().parents[1]
NUM_WORKERS, NUM_BYZANTINE = 9, 4
# Largest error of the value, in norms of a row: rounding to the dtype, and float32 inner products on the CPU.
BOUNDS = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 4e-6, torch.float64: 1e-9}


def run(section: Section) -> None:
    columns = {"what": "`{}`", "dtype": "{}", "error": "{:.1e}", "error against float64": "{:.1e}", "same choice": "{}"}
    table = section.table(columns)
    for case in all_rules():
        for dtype in BOUNDS:
            with section.attempt(f"{case.name} in {dtype}"):
                compare_rule(section, table, case, dtype)
    with section.attempt("TensorFloat-32 and autocast"):
        under_autocast(section, table)
    import_tests("attacks")
    for case in declared_in(TESTS / "attacks", AttackCase):
        for dtype in BOUNDS:
            with section.attempt(f"{case.name} in {dtype}"):
                compare_attack(section, table, case, dtype)


def all_rules() -> list[RuleCase]:
    """Return all rules that tests declare, and combinations of them."""
    import_tests("aggregators")
    declared: list[RuleCase] = declared_in(TESTS / "aggregators", RuleCase)
    known = {case.name for case in declared}
    return declared + [case_of(rule) for rule in RULES if name_of(rule) not in known]


def case_of(rule: Aggregator) -> RuleCase:
    """Return a case that is compared with itself only."""
    return RuleCase(rule, oracle=lambda rows, f: [])


def import_tests(folder: str) -> None:
    """Let the test files of a folder be imported by their names, as pytest does."""
    sys.path.append(str(TESTS / folder))


def rows_of(dtype: torch.dtype, columns: int) -> Tensor:
    """Return honest rows around a common direction, Byzantine ones elsewhere, and one that is not finite."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(NUM_WORKERS, columns, generator=generator) + 0.5
    rows[:2] = -rows[:2]
    rows[5] = torch.nan
    return rows.to(dtype)


def compare_rule(section: Section, table: Table, case: RuleCase, dtype: torch.dtype) -> None:
    rows = rows_of(dtype, 5_001 if section.small else 50_001)
    f = case.at_most(NUM_BYZANTINE, NUM_WORKERS)
    on_device, on_cpu = case.fresh()(rows.to(section.device), f), case.fresh()(rows, f)
    in_float64 = case.fresh()(rows.double(), f)
    assert on_device.dtype == dtype
    assert on_device.device.type == section.device.type
    error, true_error = (distance(on_device, other, rows) for other in (on_cpu, in_float64))
    same = True
    if not case.subject.uses_previous:
        blocks = list(rows.split(rows.shape[1] // 3, dim=1))
        choices = [choice(case.fresh(), part, f) for part in ([b.to(section.device) for b in blocks], blocks)]
        same = torch.equal(choices[0], choices[1])
    good = section.expect(same, f"{case.name} in {dtype}: other workers chosen than on the CPU")
    section.expect(max(error, true_error) <= BOUNDS[dtype], f"{case.name} in {dtype}: error {error} or {true_error}")
    table.add(case.name, str(dtype).removeprefix("torch."), error, true_error, good)


def under_autocast(section: Section, table: Table) -> None:
    """Let nothing of this package be rounded to three digits by settings of the user's."""
    rows, before = rows_of(torch.float32, 50_001), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        for rule in RULES[:4] + RULES[6:]:
            plain = case_of(rule).fresh()(rows.double(), NUM_BYZANTINE)
            with torch.autocast(section.device.type, torch.bfloat16):
                error = distance(case_of(rule).fresh()(rows.to(section.device), NUM_BYZANTINE), plain, rows)
            section.expect(error <= BOUNDS[torch.float32], f"{name_of(rule)} under autocast: error {error}")
            table.add(f"{name_of(rule)}, autocast", "float32", error, error, "")
    finally:
        torch.set_float32_matmul_precision(before)


def compare_attack(section: Section, table: Table, case: AttackCase, dtype: torch.dtype) -> None:
    rows, byzantine = rows_of(dtype, 5_001), [0, 4]
    rows[5] = rows[6]
    if not case.serves(NUM_WORKERS, byzantine):
        byzantine = [0]
    attacks, error, honest_same = (case.fresh(), case.fresh()), 0.0, True
    honest = [worker for worker in range(NUM_WORKERS) if worker not in byzantine]
    for step in range(3):  # some have state
        sent = rows * (1 + step)
        forged, expected = attacks[0](sent.to(section.device), byzantine), attacks[1](sent, byzantine)
        honest_same &= torch.equal(forged[honest].cpu(), sent[honest])
        # What is not finite must be the same as well.
        same = forged.cpu()[byzantine].nan_to_num(3.0, 5.0, -5.0).double()
        other = expected[byzantine].nan_to_num(3.0, 5.0, -5.0).double()
        error = max(error, float((same - other).norm() / other.norm().clamp(min=1e-3)))
    good = section.expect(honest_same, f"{case.name} in {dtype} has changed honest rows")
    section.expect(error <= BOUNDS[dtype], f"{case.name} in {dtype}: error {error}")
    table.add(case.name, str(dtype).removeprefix("torch."), error, float("nan"), good)


def choice(rule: Aggregator, blocks: list[Tensor], f: int) -> Tensor:
    """Return which workers did not contribute."""
    return rule.decide(WorkerMatrix(blocks), f).report().trimmed


def distance(first: Tensor, second: Tensor, rows: Tensor) -> float:
    scale = rows.double().norm(dim=1).nanmedian()
    return float((first.cpu().double() - second.cpu().double()).norm() / scale)

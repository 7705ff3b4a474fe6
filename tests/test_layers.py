"""Imports point down: each floor may import its own and those below."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lightning_byzantine"
FLOORS = {
    0: [
        "anchored_gram",
        "arriving",
        "checks",
        "compilation",
        "decision",
        "errors",
        "evidence",
        "fingerprint",
        "gradients",
        "gram",
        "heat_map",
        "mantissas",
        "matrix",
        "medians",
        "ordering",
        "points",
        "report",
        "rng",
        "scratch",
        "seeding",
        "selection",
        "snapshot",
        "suspicion",
        "votes",
    ],
    1: ["aggregators", "attacks", "estimators", "local_gradients", "optim", "shadow"],
    2: ["exchange", "heartbeat", "identities"],
    3: [
        "accumulation_window",
        "breakdown",
        "buffers",
        "callbacks",
        "checkpoint_io",
        "consistency",
        "fault_tolerant_ddp",
        "hook",
        "isolation",
        "metrics",
        "previous_point",
        "registry",
        "strategy",
        "worker_errors",
        "worker_states",
        "wrapping",
    ],
    4: ["__init__", "__main__", "cli"],
}
FLOOR = {name: floor for floor, names in FLOORS.items() for name in names}
FILES = sorted(PACKAGE.rglob("*.py"))


def floor_of(path: Path) -> int:
    return FLOOR[path.relative_to(PACKAGE).with_suffix("").parts[0]]


def imports_of(path: Path) -> list[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    modules = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return modules + [f"{node.module}" for node in nodes if isinstance(node, ast.ImportFrom)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    floor = floor_of(path)
    for module in imports_of(path):
        package, _, rest = module.partition(".")
        if package == "lightning_byzantine":
            assert FLOOR[rest.partition(".")[0] or "__init__"] <= floor, module
        assert package != "lightning" or floor >= 3, f"{module} below floor 3"
        assert not module.startswith("torch.distributed") or floor >= 2, f"{module} below floor 2"

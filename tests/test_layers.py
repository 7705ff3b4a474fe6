"""Imports point down: each room may import itself and the rooms on the floors below."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lightning_byzantine"
# From the ground up; rooms on one floor do not know each other.
FLOORS = [
    {"errors", "utilities"},
    {"matrix", "estimators"},
    {"aggregators", "optim", "exchange"},
    {"attacks", "aggregation", "monitoring", "watch"},
    {"hooks"},
    {"strategies", "fabric"},
    {"callbacks"},
    {"__init__", "__main__"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
KNOW_LIGHTNING = {"strategies", "fabric", "callbacks", "__init__", "__main__"}
FILES = sorted(PACKAGE.rglob("*.py"))


def imports_of(path: Path) -> list[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    modules = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return modules + [f"{node.module}" for node in nodes if isinstance(node, ast.ImportFrom)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    room = path.relative_to(PACKAGE).with_suffix("").parts[0]
    for module in imports_of(path):
        package, _, rest = module.partition(".")
        other = rest.partition(".")[0] or "__init__"
        if package == "lightning_byzantine":
            assert other == room or FLOOR[other] < FLOOR[room], f"{room} imports {other}"
        assert package != "lightning" or room in KNOW_LIGHTNING, f"{room} imports {module}"
        assert not module.startswith("torch.distributed") or FLOOR[room] >= FLOOR["exchange"], f"{room}: {module}"


def test_every_room_has_a_floor() -> None:
    assert {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in FILES} == set(FLOOR)

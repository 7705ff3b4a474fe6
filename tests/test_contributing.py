"""Follows the steps of .github/CONTRIBUTING.md in a copy of the package, and runs the tests as it says."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / ".github" / "CONTRIBUTING.md").read_text()
FILES = {
    path: (language, text)
    for language, path, text in re.findall(r'^```(\w+) title="(.*?)"\n(.*?)^```$', TEXT, re.S | re.M)
}
ADDED = {"Medoid": "aggregators", "OppositeExtreme": "attacks"}


def follow_the_steps(copy: Path) -> None:
    for name in ("lightning_byzantine", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    for name, (language, text) in FILES.items():
        path = copy / name
        if language == "python":
            assert not path.exists(), f"{path} is there already: CONTRIBUTING.md needs another example"
            path.write_text(text)
            continue
        # One line among the imports, one in `__all__`.
        imported, public = [line.removeprefix("+") for line in text.splitlines()]
        before, after = path.read_text().split("\n__all__ = [\n")
        path.write_text(f"{before}{imported}\n\n__all__ = [\n{public}\n{after}")


def names_of_tests(room: str) -> set[str]:
    """Return the names of the tests that a room's cases without any exemption take."""
    [path] = (ROOT / "tests" / room).glob("test_*_properties.py")
    return set(re.findall(r"^@every_case.*\n(?:@.*\n)*def (test_\w+)", path.read_text(), re.M))


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> str:
    copy = tmp_path_factory.mktemp("copy")
    follow_the_steps(copy)
    rooms = [f"{place}/{room}" for room in ADDED.values() for place in ("tests", "lightning_byzantine")]
    selected = " or ".join([*ADDED, *(Path(name).stem for name in FILES), "test_every"])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *rooms, "-v", "-p", "no:cacheprovider", "-k", selected],
        cwd=copy,
        # Coverage of a copy is of no use to anybody.
        env={key: value for key, value in os.environ.items() if not key.startswith("COV")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ADDED)
def test_what_is_added_as_described_is_tested_for_all_properties(name: str, output: str) -> None:
    passed = set(re.findall(rf"::(test_\w+)\[{name}.*\] PASSED", output))
    assert passed >= names_of_tests(ADDED[name])


def test_the_tests_and_examples_of_the_files_run_as_well(output: str) -> None:
    assert "test_medoid.py::test_a_minority_far_away_is_never_the_medoid PASSED" in output
    for module in (
        "aggregators/medoid.py::lightning_byzantine.aggregators.medoid.Medoid",
        "opposite_extreme.OppositeExtreme",
    ):
        assert f"{module} PASSED" in output


def test_no_rule_and_no_attack_goes_untested(output: str) -> None:
    for what in ("rule", "attack"):
        assert f"test_every_{what}_is_public PASSED" in output
        assert f"test_every_{what}_is_declared PASSED" in output

"""Real signals to real processes, in the middle of a run."""

import json
import re
import signal
from pathlib import Path

import processes
import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "faulty.py"


def run(*command: str) -> str:
    """Return what a command printed that ended well."""
    code, output = processes.run(*command)
    assert code == 0, output
    return output


MESSAGES = {
    "kill:1": "Lost rank 1: no sign of life for 3 s",
    "kill:0": "Lost rank 0: ",
    "stop:2": "Lost rank 2: no sign of life for 3 s",
    "stop:0": "Lost rank 0: it does not answer, and it hosts the store that all ranks need",
    "hang:1": "Lost rank 1: alive, but the others waited for it for more than the timeout of 10 s",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run all cases at once: most of the time they wait."""
    folder = tmp_path_factory.mktemp("faults")
    output = run(str(SCRIPT), "--timeout=10", f"--folder={folder}", "--fork", *MESSAGES)
    (folder / "codes.json").write_text(output.splitlines()[-1])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", MESSAGES)
def test_the_others_end_and_name_the_missing_rank(folder: Path, case: str) -> None:
    codes = json.loads((folder / "codes.json").read_text())[case]
    faulty = case.partition(":")[2]
    assert codes.pop(faulty) == -signal.SIGKILL
    for rank, code in codes.items():
        output = (folder / f"{case}.{rank}.log").read_text()
        assert f"WorkerLostError: {MESSAGES[case]}" in output
        assert code == 1, output  # by its own error
    assert (folder / case / "last.ckpt").exists()


@pytest.mark.slow
def test_torchrun_resumes_from_the_last_checkpoint(tmp_path: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=3", "--max-restarts=1", "--rdzv-backend=c10d"]
    torchrun += ["--rdzv-endpoint=127.0.0.1:0", str(SCRIPT), f"--folder={tmp_path}"]
    killed = run(*torchrun, "--fault=kill")
    assert "rank 1 has its fault" in killed
    starts = re.findall(r"rank (\d) starts at step (\d)", killed)
    assert sorted(starts) == sorted((rank, step) for rank in "012" for step in "02")
    ends = dict(re.findall(r"rank (\d) ends with (\S+)", killed))
    assert sorted(ends) == ["0", "1", "2"]
    # Momentum and all, to the bit: as if nothing had happened.
    whole = run(str(SCRIPT), f"--folder={tmp_path / 'whole'}")
    assert set(ends.values()) == set(re.findall(r"ends with (\S+)", whole))

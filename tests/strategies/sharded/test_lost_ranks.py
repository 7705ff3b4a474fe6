"""A rank that is killed or hangs in the middle of a run: the others name it and its replica, and the run resumes."""

import json
import re
import signal
from pathlib import Path

import processes
import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "faulty.py"
TIMEOUT = 20
MESSAGES = {
    "kill:3": r"Lost rank 3: no sign of life for 3 s",
    # Its replica's other rank waits for it in the forward pass, and has as little come to the end of it.
    "hang:1": r"Lost ranks? (0, )?1: alive, but the others waited for it for more than the timeout of 20 s",
}


def run(*command: str) -> str:
    code, output = processes.run(*command)
    assert code == 0, output
    return output


@pytest.mark.slow
@pytest.mark.parametrize("case", MESSAGES)
def test_the_others_name_the_rank_and_its_replica(tmp_path: Path, case: str) -> None:
    output = run(str(SCRIPT), "--strategy=fsdp", f"--timeout={TIMEOUT}", f"--folder={tmp_path}", "--fork", case)
    codes = json.loads(output.splitlines()[-1])[case]
    faulty = case.partition(":")[2]
    assert codes.pop(faulty) == -signal.SIGKILL
    for rank, code in codes.items():
        output = (tmp_path / f"{case}.{rank}.log").read_text()
        assert re.search(f"WorkerLostError: {MESSAGES[case]}", output), output
        assert f"Of replica {int(faulty) // 2}." in output
        assert code == 1, output
    assert (tmp_path / case / "last.ckpt").exists()


@pytest.mark.slow
def test_torchrun_resumes_from_the_last_checkpoint(tmp_path: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=6", "--max-restarts=1", "--rdzv-backend=c10d"]
    torchrun += ["--rdzv-endpoint=127.0.0.1:0", str(SCRIPT), "--strategy=fsdp"]
    killed = run(*torchrun, f"--folder={tmp_path}", "--fault=kill", "--rank=3")
    starts = re.findall(r"rank (\d) starts at step (\d)", killed)
    assert sorted(starts) == sorted((str(rank), step) for rank in range(6) for step in "02")
    ends = dict(re.findall(r"rank (\d) ends with (\S+)", killed))
    assert len(ends) == 6
    whole = run(*torchrun, f"--folder={tmp_path / 'whole'}")
    assert set(ends.values()) == set(re.findall(r"ends with (\S+)", whole))

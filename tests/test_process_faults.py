"""Real signals to real processes, in the middle of a run."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "scripts" / "faulty.py"
NUM_RANKS = 3


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.communicate()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_ranks(*options: str) -> list[subprocess.Popen[str]]:
    """Start every rank on its own, as a cluster would, so that no launcher ends them."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(NUM_RANKS),
        "NODE_RANK": "0",
    }
    return [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment | {"LOCAL_RANK": str(rank)},
        )
        for rank in range(NUM_RANKS)
    ]


@pytest.mark.parametrize(
    ("fault", "faulty", "message"),
    [
        ("kill", 1, "WorkerLostError: Lost rank 1: no sign of life for 3 s"),
        ("kill", 0, "WorkerLostError: Lost rank 0: "),
        ("stop", 2, "WorkerLostError: Lost rank 2: no sign of life for 3 s"),
        ("stop", 0, "WorkerLostError: Lost rank 0: it does not answer"),
        ("hang", 1, "WorkerLostError: Lost rank 1: alive, but the others waited for it for more than the timeout of 8"),
    ],
)
def test_the_others_end_and_name_the_missing_rank(
    tmp_path: Path, processes: list[subprocess.Popen[str]], fault: str, faulty: int, message: str
) -> None:
    processes += start_ranks(f"--fault={fault}", f"--rank={faulty}", "--timeout=8", f"--folder={tmp_path}")
    for rank, process in enumerate(processes):
        if rank != faulty:
            output, _ = process.communicate(timeout=90)
            assert message in output
            assert process.returncode > 0, output  # by its own error
    if fault == "kill":
        assert processes[faulty].wait(10) == -signal.SIGKILL
    assert (tmp_path / "last.ckpt").exists()


def test_torchrun_resumes_from_the_last_checkpoint(tmp_path: Path, processes: list[subprocess.Popen[str]]) -> None:
    def run(fault: str) -> str:
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={NUM_RANKS}", "--max-restarts=1"]
        command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", f"--rdzv-id={fault}"]
        command += [str(SCRIPT), f"--fault={fault}", f"--folder={tmp_path / fault}"]
        processes.append(
            subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        )
        output, _ = processes[-1].communicate(timeout=120)
        assert processes[-1].returncode == 0, output
        return output

    def ends(output: str) -> set[str]:
        found = re.findall(r"rank (\d) ends with (\S+)", output)
        assert sorted(rank for rank, _ in found) == ["0", "1", "2"], output
        return {parameters for _, parameters in found}

    killed, whole = run("kill"), run("none")
    assert "rank 1 has its fault" in killed
    assert re.findall(r"rank 1 starts at step (\d)", killed) == ["0", "2"]
    # Momentum and all, to the bit: as if nothing had happened.
    assert ends(killed) == ends(whole)
    assert len(ends(whole)) == 1

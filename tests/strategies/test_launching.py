"""The same script under every launcher that the README names, in processes that know nothing of pytest."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "fit.py"


def start(command: list[str]) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def finish(*processes: subprocess.Popen[str]) -> dict[int, str]:
    """Return what each rank printed at the end."""
    outputs = [process.communicate(timeout=400)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    found = re.findall(r"rank (\d+) of (\d+): (\S+)", "\n".join(outputs))
    assert len(found) == int(found[0][1]), outputs
    return {int(rank): parameters for rank, _, parameters in found}


@pytest.mark.parametrize(
    "start_method", [pytest.param("", marks=pytest.mark.slow), pytest.param("_spawn", marks=pytest.mark.slow), "_fork"]
)
def test_all_start_methods_train_alike(start_method: str) -> None:
    command = [sys.executable, str(SCRIPT), "--strategy", f"byzantine_ddp{start_method}", "--devices", "3"]
    ranks = finish(start(command))
    assert sorted(ranks) == [0, 1, 2]
    assert len(set(ranks.values())) == 1


@pytest.mark.slow
def test_two_nodes_of_torchrun() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    torchrun += ["--master-addr=127.0.0.1", f"--master-port={port}"]
    script = [str(SCRIPT), "--devices=1", "--num-nodes=2"]
    nodes = [start([*torchrun, f"--node-rank={node}", *script]) for node in (0, 1)]
    ranks = finish(*nodes)
    assert sorted(ranks) == [0, 1]
    assert ranks[0] == ranks[1]

"""The examples' command for several hosts, in two network namespaces joined by a cable that gets pulled."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
ADDRESSES = ("10.213.7.1", "10.213.7.2")


def readme_command() -> list[str]:
    text = (ROOT / "examples" / "README.md").read_text()
    return re.search(r"<!-- two hosts command -->\n```bash\n(.*?)```", text, re.DOTALL)[1].replace("\\\n", "").split()


class Hosts:
    """Two namespaces and the cable between them."""

    def __init__(self) -> None:
        self.names = [f"byzantine{os.getpid()}{side}" for side in "ab"]
        self.processes: list[subprocess.Popen[str]] = []

    def ip(self, *arguments: str) -> None:
        done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
        if done.returncode != 0:
            raise OSError(f"`ip {' '.join(arguments)}`: {done.stderr.strip()}")

    def connect(self) -> None:
        for name in self.names:
            self.ip("netns", "add", name)
        first, second = self.names
        self.ip("link", "add", "cable", "netns", first, "type", "veth", "peer", "name", "cable", "netns", second)
        for name, address in zip(self.names, ADDRESSES, strict=True):
            self.ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            self.ip("-n", name, "link", "set", "lo", "up")
            self.plug(name, "up")

    def plug(self, name: str, state: str) -> None:
        self.ip("-n", name, "link", "set", "cable", state)

    def remove(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)

    def start(self, folder: Path, *options: str) -> list[subprocess.Popen[str]]:
        """Start the README's command on both, with the hosts' own addresses in it."""
        started = []
        for name, address in zip(self.names, ADDRESSES, strict=True):
            words = " ".join(readme_command()).replace("eth0", "cable").replace("10.0.0.1:", f"{ADDRESSES[0]}:")
            words = words.replace("10.0.0.1", address).replace(" examples/", f" {ROOT}/examples/")
            if name == self.names[1]:
                words = words.replace("is_host=1", "is_host=0")
            words = words.replace(" torchrun ", f" {sys.executable} -m torch.distributed.run ")
            log = (folder / f"{name[-1]}.log").open("w")
            started.append(
                subprocess.Popen(
                    [
                        "ip",
                        "netns",
                        "exec",
                        name,
                        "env",
                        *words.split(),
                        f"--trainer.logger.save_dir={folder}",
                        *options,
                    ],
                    cwd=folder,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    text=True,
                    env=os.environ | {"OMP_NUM_THREADS": "1"},
                    start_new_session=True,
                )
            )
        self.processes += started
        return started


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    hosts = Hosts()
    try:
        hosts.connect()
    except OSError as error:
        hosts.remove()
        pytest.skip(f"network namespaces are not to be had here: {error}")
    yield hosts
    hosts.remove()


def wait_until(condition: Callable[[], bool], seconds: float, logs: list[Path]) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "\n".join(log.read_text() for log in logs)
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.timeout(800)
def test_two_hosts_train_lose_their_link_and_resume(hosts: Hosts, tmp_path: Path) -> None:
    last = tmp_path / "checkpoints" / "last.ckpt"
    logs = [tmp_path / f"{side}.log" for side in "ab"]
    options = ("--trainer.strategy.timeout=0:00:10", "--trainer.enable_progress_bar=false")
    first, second = hosts.start(tmp_path, "--trainer.max_epochs=100000", *options)
    wait_until(last.exists, 240, logs)

    hosts.plug(hosts.names[1], "down")
    wait_until(lambda: first.poll() is not None, 120, logs)
    assert first.returncode != 0
    assert "WorkerLostError: Lost ranks 2, 3: no sign of life for 3 s" in logs[0].read_text()
    wait_until(lambda: logs[1].read_text().count("WorkerLostError: Lost rank 0: it does not answer") == 2, 120, logs)
    # Its workers are gone; torchrun itself takes minutes to believe it.
    os.killpg(second.pid, signal.SIGKILL)
    second.wait()

    hosts.plug(hosts.names[1], "up")
    epoch = torch.load(last, weights_only=True)["epoch"]
    again = hosts.start(tmp_path, f"--trainer.max_epochs={max(12, epoch + 3)}", *options)
    wait_until(lambda: all(process.poll() is not None for process in again), 240, logs)
    output = logs[0].read_text()
    assert [process.returncode for process in again] == [0, 0], output + logs[1].read_text()
    assert "Restored all states from the checkpoint" in output
    assert float(re.search(r"test_accuracy\W+([\d.]+)", output)[1]) > 0.85

"""Commands in processes of their own, of which none is left."""

import os
import signal
import subprocess
import sys
from contextlib import suppress


def run(*arguments: str) -> tuple[int, str]:
    """Run Python with these arguments; return its exit code and all that it printed."""
    # What torchrun starts finds the addresses of the ranks before the restart otherwise.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=400)
    finally:
        with suppress(ProcessLookupError):  # nobody is left, as it should be
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, output

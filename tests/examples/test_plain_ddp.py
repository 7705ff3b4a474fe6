import re
from pathlib import Path

import pytest
from processes import run

SCRIPT = Path(__file__).parents[2] / "examples" / "plain_ddp.py"


@pytest.mark.slow
def test_a_plain_loop_survives_two_faulty_ranks_of_five() -> None:
    code, output = run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=5", str(SCRIPT))
    assert code == 0, output
    (accuracy,) = re.findall(r"Test accuracy: (\S+)", output)
    assert float(accuracy) > 0.9

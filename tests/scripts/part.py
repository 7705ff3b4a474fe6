"""Train with three ranks, one of which goes another way than the others; each prints how it ends, as JSON."""

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from parting import train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("fault")
    parser.add_argument("--rank", type=int, help="the faulty rank; all ranks without it")
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    outcome = train(arguments.fault, arguments.rank, arguments.folder)
    line = json.dumps({"rank": int(os.environ.get("LOCAL_RANK", "0")), "outcome": outcome})
    sys.stdout.write(f"\n@{line}\n")  # in one write, so that those of several processes do not mix
    sys.stdout.flush()
    sys.exit(bool(outcome.error) and outcome.error != "SIGTERMException")


if __name__ == "__main__":
    main()

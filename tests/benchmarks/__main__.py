"""Benchmarks by name: ``python tests/benchmarks rules --workers 17``. README.md beside this file has the figures."""

import argparse
import sys
from importlib import import_module
from pathlib import Path

# By name: a file. That of "cuda" would hide NVIDIA's package of that name, which torch imports.
NAMES = {name: name for name in ["rules", "steps", "price", "certificate", "monitor", "double_momentum"]}
NAMES |= {name: name for name in ["faults", "false_alarms", "framing", "errors", "hsdp"]}
NAMES["cuda"] = "on_cuda"
ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    """Measure what was asked for."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "examples")]
    names = argparse.ArgumentParser(prog="python tests/benchmarks", description=__doc__, add_help=False)
    names.add_argument("name", choices=NAMES)
    name = names.parse_args(sys.argv[1:2]).name
    benchmark = import_module(NAMES[name])
    options = argparse.ArgumentParser(
        prog=f"{names.prog} {name}",
        description=benchmark.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    benchmark.add_options(options)
    benchmark.run(options.parse_args(sys.argv[2:]))


if __name__ == "__main__":
    main()

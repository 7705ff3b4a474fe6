"""Stock DDP, byzantine_ddp and double momentum, five workers on one machine, two of them Byzantine.

``python examples/compare.py``. Each run is ``examples/train.py`` with a file in ``examples/configs``; the accuracy is
read from its TensorBoard log.
"""

import argparse
import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator, ScalarEvent

EXAMPLES = Path(__file__).parent
ATTACKS = {
    "SignFlip": {},
    "InnerProductManipulation": {},
    "ALittleIsEnough": {},
    "GaussianNoise": {"std": 10},
    "NonFinite": {},
    "LabelFlip": {"num_classes": 10},
}


COLUMNS = {
    "clean": "ddp, no attack",
    "attacked": "ddp, attacked",
    "byzantine": "byzantine_ddp, attacked",
    "double_momentum": "byzantine_ddp, double momentum, attacked",
}


def main() -> None:
    """Run the comparison and print it as a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attacks", nargs="+", choices=ATTACKS, default=["GaussianNoise"], help="one row each")
    default = ["clean", "attacked", "byzantine"]
    parser.add_argument("--configs", nargs="+", choices=COLUMNS, default=default, help="one column each")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1], help="the table shows the mean over them")
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="the rest goes to examples/train.py")
    arguments = parser.parse_args()

    @cache
    def accuracy(config: str, attack: str | None) -> float:
        return mean(run(config, attack, seed, arguments.options) for seed in arguments.seeds)

    rows = []
    for attack in arguments.attacks:
        rows.append([accuracy(config, None if config == "clean" else attack) for config in arguments.configs])
    print(f"\nTest accuracy, 5 workers of which 2 are Byzantine, mean over seeds {arguments.seeds}\n")
    print("| attack | " + " | ".join(COLUMNS[config] for config in arguments.configs) + " |")
    print("|---" * (1 + len(arguments.configs)) + "|")
    for attack, accuracies in zip(arguments.attacks, rows, strict=True):
        print(f"| {attack} | " + " | ".join(f"{value:.3f}" for value in accuracies) + " |")


def run(config: str, attack: str | None, seed: int, options: list[str]) -> float:
    """Train and test once; return the test accuracy."""
    return scalars(config, attack, seed, options, "test_accuracy")[-1].value


def scalars(config: str, attack: str | None, seed: int, options: list[str], name: str) -> list[ScalarEvent]:
    """Train and test once; return what was logged under a name."""
    print(f"seed {seed}: {config}" + (f", {attack}" if attack else ""), file=sys.stderr, flush=True)
    with TemporaryDirectory() as folder:
        command = [sys.executable, EXAMPLES / "train.py", "fit", "--config", EXAMPLES / "configs" / f"{config}.yaml"]
        command += [f"--seed_everything={seed}", f"--trainer.logger.save_dir={folder}"]
        command += ["--trainer.enable_progress_bar=false", *options]
        if attack is not None:
            spec = {"class_path": f"lightning_byzantine.attacks.{attack}", "init_args": ATTACKS[attack]}
            command.append(f"--trainer.callbacks.attack={json.dumps(spec)}")
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"{done.stdout}{done.stderr}\nexamples/train.py failed with exit code {done.returncode}")
        events = EventAccumulator(str(Path(folder, "lightning_logs", "version_0"))).Reload()
        return events.Scalars(name)


if __name__ == "__main__":
    main()

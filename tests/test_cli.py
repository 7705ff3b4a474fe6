import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from digits import DigitClassifier
from lightning.pytorch.cli import LightningCLI
from training import Regression
from transformer import Transformer

import lightning_byzantine.callbacks  # noqa: F401
from lightning_byzantine import ByzantineDDPStrategy
from lightning_byzantine.aggregators import CTMA, NNM, GeometricMedian, Krum, PersistentFilter
from lightning_byzantine.attacks import GaussianNoise
from lightning_byzantine.estimators import WorkerMomentum

ON_THREE_CPUS = ["--trainer.accelerator=cpu", "--trainer.devices=3", "--trainer.logger=false"]
CONFIGS = Path(__file__).parents[1] / "examples" / "configs"


def parse(*arguments: str) -> LightningCLI:
    return LightningCLI(Regression, run=False, save_config_callback=None, args=[*ON_THREE_CPUS, *arguments])


def test_a_strategy_by_name() -> None:
    strategy = parse("--trainer.strategy", "byzantine_ddp").trainer.strategy
    assert isinstance(strategy, ByzantineDDPStrategy)
    assert isinstance(strategy.aggregator, PersistentFilter)
    assert isinstance(strategy.estimator, WorkerMomentum) and strategy.estimator.beta == 0.9


@pytest.mark.parametrize("name", ["lightning_byzantine.ByzantineDDPStrategy", "ByzantineDDPStrategy"])
def test_a_rule_over_a_rule_on_the_command_line(name: str) -> None:
    arguments = ["--trainer.strategy", name, "--trainer.strategy.aggregator", "CTMA"]
    arguments += ["--trainer.strategy.aggregator.base", "Krum", "--trainer.strategy.num_byzantine", "1"]
    strategy = parse(*arguments).trainer.strategy
    assert isinstance(strategy.aggregator, CTMA)
    assert isinstance(strategy.aggregator.base, Krum)
    assert strategy.num_byzantine == 1


YAML = """
trainer:
  strategy:
    class_path: lightning_byzantine.ByzantineDDPStrategy
    init_args:
      num_byzantine: 1
      find_unused_parameters: true
      estimator:
        class_path: lightning_byzantine.estimators.WorkerMomentum
        init_args: {beta: 0.5, transparent: false}
      aggregator:
        class_path: lightning_byzantine.aggregators.CTMA
        init_args:
          base:
            class_path: NNM
            init_args:
              base:
                class_path: GeometricMedian
                init_args: {max_iterations: 3, smoothing: 0.1, init: zero}
  callbacks:
    - class_path: lightning_byzantine.callbacks.ByzantineSimulation
      init_args:
        workers: [2]
        attack: {class_path: GaussianNoise, init_args: {std: 10}}
"""


def test_everything_in_one_file(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(YAML)
    trainer = parse("--config", str(config)).trainer
    strategy = trainer.strategy
    assert isinstance(strategy.aggregator.base, NNM)
    base = strategy.aggregator.base.base
    assert isinstance(base, GeometricMedian) and (base.max_iterations, base.init) == (3, "zero")
    assert (strategy.estimator.beta, strategy.estimator.transparent) == (0.5, False)
    assert strategy._ddp_kwargs["find_unused_parameters"] is True
    assert isinstance(trainer.callbacks[0].attack, GaussianNoise)


ATTACKS_IN_YAML = [
    "{class_path: Zero}",
    "{class_path: Scale, init_args: {factor: -4}}",
    "{class_path: Mimic, init_args: {worker: 1}}",
    "{class_path: MinMax, init_args: {perturbation: unit}}",
    "{class_path: BitFlip, init_args: {bit: 30, probability: 0.5, fraction: 0.01}}",
    "{class_path: StaleGradient, init_args: {delay: 3}}",
    "{class_path: OptimalALittleIsEnough, init_args: {evaluations: 5, step: -1.0}}",
    "{class_path: OptimalInnerProductManipulation, init_args: {aggregator: {class_path: Krum}, num_byzantine: 1}}",
    "{class_path: Intermittent, init_args: {attack: {class_path: SignFlip}, probability: 0.5}}",
    "{class_path: Intermittent, init_args: {attack: {class_path: LabelFlip, init_args: {num_classes: 10}}, "
    "probability: 1}}",
]


@pytest.mark.parametrize("attack", ATTACKS_IN_YAML)
def test_every_attack_in_yaml(attack: str, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    spec = yaml.safe_load(attack)
    simulation = {
        "class_path": "lightning_byzantine.callbacks.ByzantineSimulation",
        "init_args": {"workers": [2], "attack": spec},
    }
    config.write_text(yaml.safe_dump({"trainer": {"strategy": "byzantine_ddp", "callbacks": [simulation]}}))
    parsed = parse("--config", str(config)).trainer.callbacks[0].attack
    assert type(parsed).__name__ == spec["class_path"]
    for name, value in spec.get("init_args", {}).items():
        given = getattr(parsed, name)
        assert type(given).__name__ == value["class_path"] if isinstance(value, dict) else given == value


def test_no_estimator_in_yaml() -> None:
    arguments = ["--trainer.strategy=ByzantineDDPStrategy", "--trainer.strategy.estimator=null"]
    assert parse(*arguments).trainer.strategy.estimator is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trainer.strategy=ByzantineDDPStrategy", "--trainer.strategy.aggregator=Krumm"], "Krumm"),
        (["--trainer.strategy=ByzantineDDPStrategy", "--trainer.strategy.num_byzantin=1"], "num_byzantin"),
        (["--trainer.strategy=ByzantineDDPStrategy", "--trainer.strategy.num_byzantine=one"], "one"),
        (["--trainer.strategy=ByzantineDDPStrategy", "--trainer.strategy.aggregator=CTMA"], "base"),
    ],
)
def test_a_typo_is_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(*arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_config_parses(config: Path) -> None:
    model = Transformer if config.stem == "transformer" else DigitClassifier
    cli = LightningCLI(model, run=False, save_config_callback=None, args=["--config", str(config)])
    assert cli.trainer.strategy.num_nodes == (2 if config.stem == "two_hosts" else 1)
    assert cli.trainer.world_size == {"two_hosts": 4, "transformer": 6}.get(config.stem, 5)


def test_the_attacked_configs_differ_by_one_word() -> None:
    attacked, byzantine = (yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()) for name in ("attacked", "byzantine"))
    changed: dict[str, Any] = byzantine["trainer"] | {"strategy": "ddp"}
    assert attacked["trainer"] == changed


@pytest.mark.slow
def test_the_ready_made_command_line_prints_a_config_that_runs(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "lightning_byzantine", "fit", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done

    arguments = ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.max_steps=3", "--trainer.logger=false"]
    arguments += ["--trainer.strategy=ByzantineDDPStrategy", "--trainer.strategy.aggregator=Bucketing"]
    arguments += ["--trainer.strategy.aggregator.base=Krum", "--trainer.limit_val_batches=0"]
    arguments += ["--model=lightning.pytorch.demos.boring_classes.BoringModel"]
    arguments += ["--data=lightning.pytorch.demos.boring_classes.BoringDataModule"]
    (tmp_path / "printed.yaml").write_text(run(*arguments, "--print_config").stdout)
    assert "`max_steps=3` reached" in run("--config", "printed.yaml").stderr

"""The configuration of an experiment, and the grid of cells that follows from it."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from itertools import product
from typing import Any

import cifar  # noqa: F401  (its class can be named in a YAML)
import digits  # noqa: F401
from images import ImageData
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt
from partitions import Partition
from torch import nn

import lightning_byzantine.optim  # noqa: F401
from lightning_byzantine.aggregators import Aggregator
from lightning_byzantine.attacks import Attack
from lightning_byzantine.estimators import Estimator


@dataclass
class Method:
    """How gradients are estimated, by the workers and by the optimizer.

    Args:
        estimator: what a worker sends. None for its gradient.
        momentum: of the SGD that receives the aggregate.
        learning_rate_factor: multiplies the learning rate. 1 - momentum makes steps as long as without momentum.
        dampening: of the SGD that receives the aggregate.
        radius: of the ball around 0 that each parameter tensor is projected onto after every step; None for no
            projection. Double momentum's estimator has a radius of its own.

    """

    estimator: Estimator | None = None
    momentum: float = 0.0
    learning_rate_factor: float = 1.0
    dampening: float = 0.0
    radius: float | None = None


@dataclass
class Setting:
    """Numbers of workers.

    Args:
        num_workers: m.
        num_byzantine: how many attack, the last ones.
        assumed_byzantine: f of the rule. None for as many as attack.

    """

    num_workers: int
    num_byzantine: int
    assumed_byzantine: int | None = None

    @property
    def assumed(self) -> int:
        """Return f of the rule."""
        return self.num_byzantine if self.assumed_byzantine is None else self.assumed_byzantine


@dataclass(kw_only=True)
class Training:
    """Options that all cells share.

    Args:
        network: from images to logits.
        data: the images, with their partition among the workers.
        epochs: number of epochs.
        max_worker_grad_norm: clips each worker's gradient before the estimator. None for no clipping.
        weight_decay: of SGD.
        accelerator: of the Trainer. On one device, a process acts as all workers.

    """

    network: nn.Module
    data: ImageData
    epochs: PositiveInt
    max_worker_grad_norm: float | None = None
    weight_decay: float = 0.0
    accelerator: str = "cpu"


@dataclass(kw_only=True)
class Grid(Training):
    """The contents of a YAML. Its names are used in tables and pictures.

    Args:
        network: from images to logits.
        data: the images, without a partition.
        epochs: number of epochs.
        settings: numbers of workers, and of Byzantine ones among them.
        partitions: of the training images among the workers, by name.
        attacks: what the Byzantine workers do, by name. None for no attack.
        methods: estimators, each with the momentum of the optimizer, by name.
        rules: aggregation rules by name.
        learning_rates: of SGD.
        seeds: of the network, the order of images and everything else.
        max_worker_grad_norm: clips each worker's gradient before the estimator. None for no clipping.
        weight_decay: of SGD.
        accelerator: of the Trainer. On one device, a process acts as all workers.

    """

    settings: list[Setting]
    partitions: dict[str, Partition]
    attacks: dict[str, Attack | None]
    methods: dict[str, Method]
    rules: dict[str, Aggregator]
    learning_rates: list[float]
    seeds: list[int]


@dataclass(kw_only=True)
class Run(Training):
    """One cell of the grid, for the process that trains it."""

    setting: Setting
    attack: Attack | None
    method: Method
    rule: Aggregator
    learning_rate: float
    seed: int


# Options of a method that are newer than some finished cells, which they leave the same at these values.
_NEWER = {"dampening": 0.0, "radius": None}

_AXES = ("settings", "partitions", "attacks", "methods", "rules", "learning_rates", "seeds")
GRID_ARGUMENTS = tuple(entry.name for entry in fields(Grid))


@dataclass(frozen=True)
class Cell:
    """A cell's position in the grid, and its configuration as plain data."""

    attack: str
    method: str
    rule: str
    num_workers: int
    num_byzantine: int
    assumed_byzantine: int
    partition: str
    learning_rate: float
    seed: int
    run: dict[str, Any] = field(compare=False, repr=False)

    @property
    def labels(self) -> dict[str, Any]:
        """All fields but the configuration."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "run"}

    @property
    def key(self) -> str:
        """Name of the cell's folder: a hash of the configuration."""
        return hashlib.sha256(json.dumps(self.run, sort_keys=True).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        return (
            f"{self.rule}, {self.attack}, {self.method}, {scenario(self.labels)}, learning rate"
            f" {self.learning_rate:g}, seed {self.seed}"
        )


def scenario(labels: Mapping[str, Any]) -> str:
    """Return a name for the numbers of workers and the partition of a cell.

    Example:
        >>> scenario({"num_workers": 17, "num_byzantine": 4, "assumed_byzantine": 8, "partition": "IID"})
        '4 of 17, 8 assumed, IID'

    """
    numbers = f"{labels['num_byzantine']} of {labels['num_workers']}"
    if labels["assumed_byzantine"] != labels["num_byzantine"]:
        numbers += f", {labels['assumed_byzantine']} assumed"
    return f"{numbers}, {labels['partition']}"


def cells(config: Namespace) -> list[Cell]:
    """Return the grid's cells.

    Args:
        config: a Grid as plain data, as parsed from a YAML.

    """
    plain = config.as_dict()
    common = {name: plain[name] for name in (entry.name for entry in fields(Training))}
    return [
        Cell(
            attack=attack,
            method=method,
            rule=rule,
            num_workers=setting["num_workers"],
            num_byzantine=setting["num_byzantine"],
            assumed_byzantine=Setting(**setting).assumed,
            partition=partition,
            learning_rate=learning_rate,
            seed=seed,
            run={
                **common,
                "data": _divided(plain["data"], plain["partitions"][partition]),
                "setting": setting,
                "attack": plain["attacks"][attack],
                "method": _without_newer(plain["methods"][method]),
                "rule": plain["rules"][rule],
                "learning_rate": learning_rate,
                "seed": seed,
            },
        )
        for setting, partition, attack, method, rule, learning_rate, seed in product(*(plain[axis] for axis in _AXES))
        if setting["num_byzantine"] > 0 or plain["attacks"][attack] is None
    ]


def check(grid: Grid) -> None:
    """Raise before anything runs if a part of the grid can't run.

    Raises:
        ValueError: if an axis is empty, or a rule or an attack does not support a setting.
        FileNotFoundError: if the images are missing.

    """
    for axis in _AXES:
        if not getattr(grid, axis):
            raise ValueError(f"{axis} must have at least one entry, got none")
    if grid.data.partition is not None:
        raise ValueError("data must have no partition, since the grid has partitions: choose among those")
    grid.data.prepare_data()
    for setting in grid.settings:
        for rule in grid.rules.values():
            rule.check(setting.num_workers, setting.assumed)
        for attack in grid.attacks.values():
            if attack is not None and setting.num_byzantine > 0:
                attack.check(setting.num_workers, byzantine_workers(setting))


def make_run(run: dict[str, Any]) -> Run:
    """Return a cell's objects, with the network's initial weights."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Run)
    return Run(**vars(parser.instantiate(parser.parse_object(run))))


def byzantine_workers(setting: Setting) -> list[int]:
    """Return the workers that attack."""
    return list(range(setting.num_workers - setting.num_byzantine, setting.num_workers))


def _divided(data: dict[str, Any], partition: dict[str, Any]) -> dict[str, Any]:
    return {**data, "init_args": {**data["init_args"], "partition": partition}}


def _without_newer(method: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in method.items() if name not in _NEWER or value != _NEWER[name]}

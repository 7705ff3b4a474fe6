"""Who gets which images."""

import os
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import numpy as np
import pytest
from digits import DigitClassifier, DigitData
from hypothesis import given
from hypothesis import strategies as st
from partitions import IID, Dirichlet, LabelSorted, Partition, WorkerSampler
from rank_pool import RankPool
from training import trainer

from lightning_byzantine import ByzantineDDPStrategy

LABELS = np.random.default_rng(0).integers(10, size=1000)
PARTITIONS = [IID(), LabelSorted(), Dirichlet(alpha=0.1), Dirichlet(alpha=0.001), Dirichlet(alpha=100.0)]

partitions = st.sampled_from(PARTITIONS)


def split(partition: Partition, labels: np.ndarray, num_workers: int, epoch: int = 0) -> np.ndarray:
    return partition.split(labels, num_workers, np.random.default_rng(epoch))


def mean_share_of_the_main_class(partition: Partition) -> float:
    parts = split(partition, LABELS, num_workers=10)
    return float(np.mean([np.bincount(LABELS[part]).max() / len(part) for part in parts]))


@given(partitions, st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(1, 8))
def test_deals_as_many_to_each_and_nothing_twice(partition: Partition, labels: list[int], num_workers: int) -> None:
    parts = split(partition, np.array(labels), num_workers)
    assert parts.shape == (num_workers, len(labels) // num_workers)
    dealt = parts.flatten().tolist()
    assert len(set(dealt)) == len(dealt)
    assert set(dealt) <= set(range(len(labels)))


@pytest.mark.parametrize("partition", PARTITIONS[1:], ids=lambda partition: type(partition).__name__)
def test_a_fixed_partition_is_the_same_in_every_epoch(partition: Partition) -> None:
    assert np.array_equal(split(partition, LABELS, 7, epoch=1), split(partition, LABELS, 7, epoch=2))


def test_iid_is_drawn_anew_in_every_epoch() -> None:
    assert np.array_equal(split(IID(), LABELS, 7, epoch=1), split(IID(), LABELS, 7, epoch=1))
    assert not np.array_equal(split(IID(), LABELS, 7, epoch=1), split(IID(), LABELS, 7, epoch=2))


def test_dirichlet_is_another_one_for_another_seed() -> None:
    one, other = (split(Dirichlet(alpha=1.0, seed=seed), LABELS, 7) for seed in (1, 2))
    assert not np.array_equal(one, other)


def test_heterogeneity_follows_alpha() -> None:
    shares = [mean_share_of_the_main_class(Dirichlet(alpha)) for alpha in (100.0, 1.0, 0.1)]
    assert mean_share_of_the_main_class(IID()) < 0.2
    assert shares[0] < 0.2 < shares[1] < shares[2]
    assert shares[2] > 0.5  # most of what a worker has


def test_label_sorted_gives_a_worker_few_classes() -> None:
    parts = split(LabelSorted(), np.arange(100) % 10, num_workers=10)
    assert [set(part % 10) for part in parts] == [{label} for label in range(10)]


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_refuses_an_alpha_out_of_bounds(alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha must be finite and above 0, got"):
        Dirichlet(alpha)


@given(partitions, st.integers(1, 4), st.integers(1, 4), st.integers(1, 9), st.integers(0, 3))
def test_processes_share_the_work_as_one_process_would_do_it(
    partition: Partition, num_processes: int, workers_per_process: int, batch_size: int, epoch: int
) -> None:
    num_workers = num_processes * workers_per_process
    arguments = (LABELS, partition, batch_size, num_workers)
    one = WorkerSampler(*arguments)
    one.set_epoch(epoch)
    of_worker = [list(one)[worker::num_workers] for worker in range(num_workers)]
    for rank in range(num_processes):
        sampler = WorkerSampler(*arguments, num_processes=num_processes, rank=rank)
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler)
        assert len(batches) % workers_per_process == 0
        for own in range(workers_per_process):
            assert batches[own::workers_per_process] == of_worker[rank * workers_per_process + own]


@given(partitions, st.integers(1, 6), st.integers(1, 9))
def test_a_worker_draws_from_its_own_part_in_a_new_order(
    partition: Partition, num_workers: int, batch_size: int
) -> None:
    sampler = WorkerSampler(LABELS, partition, batch_size, num_workers)
    epochs = []
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
        assert all(len(batch) == batch_size for batch in epochs[-1])
        if not isinstance(partition, IID):
            parts = split(partition, LABELS, num_workers)
            for index, batch in enumerate(epochs[-1]):
                assert set(batch) <= set(parts[index % num_workers].tolist())
    assert epochs[0] != epochs[1]


def test_says_when_there_are_too_few_images() -> None:
    with pytest.raises(ValueError, match="batch_size <= n / m, got batch_size=4 with n=20 images for m=6 workers"):
        WorkerSampler(np.zeros(20), IID(), batch_size=4, num_workers=6)


class LabelsOfEveryStep(pl.Callback):
    """Keeps the labels of every batch, a list for each epoch."""

    def __init__(self) -> None:
        self.epochs: list[list[list[int]]] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.epochs.append([])

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: list, _: int) -> None:
        self.epochs[-1].append(batch[1].tolist())


def labels_of_training(strategy: Any) -> list[list[list[int]]]:
    seen = LabelsOfEveryStep()
    pl.seed_everything(1, verbose=False)
    data = DigitData(batch_size=64, partition=LabelSorted())
    trainer(strategy, callbacks=[seen], max_epochs=2, limit_val_batches=0).fit(DigitClassifier(), data)
    return seen.epochs


@pytest.mark.parametrize("strategy", ["ddp", "byzantine_ddp"])
def test_lightning_leaves_the_partition_to_the_data_module(two_ranks: RankPool, strategy: str) -> None:
    low, high = two_ranks.run(labels_of_training, strategy)
    for epochs, classes in ((low, range(5)), (high, range(4, 10))):
        assert len(epochs) == 2
        assert len(epochs[0]) == len(epochs[1]) > 5
        assert epochs[0] != epochs[1]  # told which epoch begins
        assert {label for epoch in epochs for batch in epoch for label in batch} <= set(classes)


@pytest.mark.slow
def test_a_process_that_acts_as_several_workers_has_the_parts_of_all(one_rank: RankPool, two_ranks: RankPool) -> None:
    (alone,) = one_rank.run(labels_of_training, ByzantineDDPStrategy(workers_per_process=4))
    pair = two_ranks.run(labels_of_training, ByzantineDDPStrategy(workers_per_process=2))
    for epoch, batches in enumerate(alone):
        of_worker = [batches[worker::4] for worker in range(4)]
        assert [pair[worker // 2][epoch][worker % 2 :: 2] for worker in range(4)] == of_worker
        classes = [{label for batch in part for label in batch} for part in of_worker]
        assert classes[0] <= set(range(4))
        assert classes[3] <= set(range(7, 10))


def test_the_seed_is_lightnings() -> None:
    def order(seed: str) -> list[list[int]]:
        with mock.patch.dict(os.environ, PL_GLOBAL_SEED=seed):
            data = DigitData(batch_size=64, partition=IID())
            data.trainer = trainer_of_one()
            data.setup("fit")
            return list(data.train_dataloader().sampler)

    assert order("1") == order("1")
    assert order("1") != order("2")


def trainer_of_one() -> pl.Trainer:
    return pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)

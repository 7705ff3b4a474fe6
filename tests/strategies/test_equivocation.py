"""Ranks that tell others different things: the honest ones stay together, and know who it was."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from rank_pool import RankPool
from torch import Tensor
from training import Regression, fit

from lightning_byzantine import ByzantineDDPStrategy

LIAR = 1


@contextmanager
def lying(forge: Callable[[Tensor, int], Tensor], when: Callable[[Tensor], bool], rank: int = LIAR) -> Iterator[None]:
    """Let a rank send each other one something else, of what ``when`` chooses by its looks."""
    send, kept = dist.isend, []

    def isend(tensor: Tensor, dst: int) -> Any:
        if when(tensor):
            tensor = forge(tensor.clone(), dst)
            kept.append(tensor)
        return send(tensor, dst)

    with mock.patch("torch.distributed.isend", isend if dist.get_rank() == rank else send):
        yield


def is_row(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.numel() > 100


def names(flags: Tensor | None) -> list[int]:
    return [] if flags is None else flags.nonzero().flatten().tolist()


def fit_lying(forge: Callable[[Tensor, int], Tensor], when: Callable[[Tensor], bool], **arguments: Any) -> Any:
    torch.manual_seed(3)
    strategy = ByzantineDDPStrategy(**arguments)
    named: list[list[int]] = []
    strategy.observe(lambda report: named.append(names(report.equivocated)))
    with lying(forge, when):
        history = fit(strategy, Regression())
    return history, named, sorted(strategy.quarantined)


def noise(row: Tensor, dst: int) -> Tensor:
    return row + torch.randn(row.shape, generator=torch.Generator().manual_seed(dst))


def test_rows(five_ranks: RankPool) -> None:
    results = five_ranks.run(fit_lying, noise, is_row)
    for rank, (history, named, quarantined) in enumerate(results):
        if rank != LIAR:
            assert torch.equal(history, results[0][0])
            assert named == [[1]] + [[]] * 9
            assert quarantined == [1]

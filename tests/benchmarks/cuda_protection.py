"""A liar, audits and DDP's hook, with four processes that share the GPU."""

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import rank_pool
import torch
import torch.distributed as dist
from cuda_processes import Classifier, loader, make_trainer, transfers
from harness import ranks
from on_cuda import Section
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_byzantine import ByzantineDDPStrategy
from lightning_byzantine.attacks import BitFlip
from lightning_byzantine.callbacks import ByzantineSimulation
from lightning_byzantine.exchange import collectives
from lightning_byzantine.hooks import robust_ddp
from lightning_byzantine.optim import DoubleMomentumEstimator

NUM_RANKS = 4
LIAR = 1
AUDITS: dict[str, tuple[dict[str, Any], Any]] = {
    "default": ({}, "32-true"),
    "double momentum": ({"estimator": DoubleMomentumEstimator(min_beta=0.2, min_gamma=0.2, weighted=False)}, "32-true"),
    "bf16-mixed": ({}, "bf16-mixed"),
    "16-mixed": ({}, "16-mixed"),
}


def run(section: Section) -> None:
    table = section.table({"backend": "{}", "what": "{}", "exchange": "`{}`", "found": "{}", "good": "{}"})
    spawn, device = multiprocessing.get_context("spawn"), section.device.type
    for backend in ("gloo", f"{device}:gloo"):
        with mock.patch.object(rank_pool, "process_context", lambda: spawn), ranks(NUM_RANKS, backend) as pool:
            rank_pool.TIMEOUT = 90.0  # sooner than `ranks` would give up
            with section.attempt(f"a rank that sends each another row, over {backend}"):
                results = pool.run(fit_beside_liar, device)
                honest = [parameters for rank, (parameters, _) in enumerate(results) if rank != LIAR]
                same = all(torch.equal(parameters, honest[0]) for parameters in honest)
                found = [named for rank, (_, named) in enumerate(results) if rank != LIAR]
                good = section.expect(same and found == [[LIAR]] * 3, f"equivocation over {backend}: {same}, {found}")
                table.add(backend, "another row for each", "all_gather", found[0], good)
            for name, exchange in product(AUDITS, ("all_gather", "all_to_all")):
                with section.attempt(f"audits, {name}, {exchange}, over {backend}"):
                    results = pool.run(audited, device, exchange, *AUDITS[name])
                    expected = {worker: "computes " + ("wrongly" if worker == LIAR else "rightly") for worker in (1, 2)}
                    what = f"audits, {name}, {exchange}, over {backend}: {results[0]}"
                    good = section.expect(all(outcomes == expected for outcomes in results), what)
                    table.add(backend, f"audits, {name}", exchange, results[0], good)
            # DDP itself compares shapes on the CPU.
            for exchange in ("all_gather", "all_to_all") if backend == "gloo" else ():
                with section.attempt("the hook"):
                    results = pool.run(fit_by_hook, device, exchange)
                    same = all(torch.equal(parameters, results[0]) for parameters in results)
                    error = float((results[0] - pool.run(fit_by_hook, "cpu", exchange)[0]).norm() / results[0].norm())
                    good = section.expect(same and error < 1e-4, f"the hook: {same}, {error}")
                    table.add(backend, "`robust_ddp` against the CPU", exchange, f"{error:.1e}", good)


def fit_beside_liar(device: str) -> tuple[Tensor, list[int]]:
    """Train while rank 1 sends each other rank another row; return the parameters, and who was proved to be faulty."""
    strategy, model = ByzantineDDPStrategy(process_group_backend="gloo"), Classifier()
    with transfers(), lies():
        make_trainer(device, strategy, [], 12).fit(model, loader())
    return parameters(model), sorted(strategy.quarantined_by_proof)


@contextmanager
def lies() -> Iterator[None]:
    send, start = dist.isend, collectives.start_gather

    def lying_send(tensor: Tensor, dst: int | None = None, group: Any = None, group_dst: int | None = None) -> Any:
        receiver = group_dst if dst is None else dst
        is_lie = dist.get_rank() == LIAR and tensor.is_floating_point() and tensor.numel() > 100
        return send(tensor + receiver if is_lie else tensor, receiver)

    def gather_with_lies(received: Tensor, own: Tensor, *group: Any) -> list[Callable[[], object]]:
        # Where the backend gathers, no rank can tell each another row by itself, but all that pass it on can.
        waits, row = start(received, own, *group), received.chunk(NUM_RANKS)[LIAR]
        is_lie = dist.get_rank() != LIAR and not collectives.is_direct(own.device)
        return [*waits, lambda: row.add_(dist.get_rank())] if is_lie else waits

    with (
        mock.patch("torch.distributed.isend", lying_send),
        mock.patch("lightning_byzantine.exchange.all_gather.start_gather", gather_with_lies),
    ):
        yield


class Auditing(pl.Callback):
    """Has two workers audited, and keeps the verdicts."""

    def __init__(self) -> None:
        self.outcomes: dict[int, str] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.strategy.observe_verdicts(lambda verdict: self.outcomes.update({verdict.worker: verdict.outcome.value}))
        for worker in (LIAR, LIAR + 1):
            trainer.strategy.audit(worker)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.should_stop = len(self.outcomes) == 2


def audited(device: str, exchange: str, arguments: dict[str, Any], precision: Any) -> dict[int, str]:
    """Have two workers audited, one of which flips a bit of the mantissa in each number that it sends."""
    strategy, auditing = ByzantineDDPStrategy(exchange=exchange, process_group_backend="gloo", **arguments), Auditing()
    callbacks = [ByzantineSimulation(BitFlip(bit=20), [LIAR]), auditing]
    with transfers():
        make_trainer(device, strategy, callbacks, 60, precision=precision).fit(Classifier(), loader())
    return auditing.outcomes


def fit_by_hook(device: str, exchange: str) -> Tensor:
    """Train without Lightning; return the parameters."""
    torch.manual_seed(1)
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = False, True
    network = Classifier().network.to(device)
    model = DistributedDataParallel(network)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.003)
    generator = torch.Generator().manual_seed(dist.get_rank())
    with transfers():
        robust_ddp(model, exchange=exchange)  # type: ignore[arg-type]
        for _ in range(10):
            pictures, labels = torch.randn(16, 1, 28, 28, generator=generator), torch.arange(16) % 10
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(pictures.to(device)), labels.to(device)).backward()
            optimizer.step()
    return parameters(network)


def parameters(module: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().double().cpu().flatten() for parameter in module.parameters()])

"""The monitor has suspects audited, and all workers in turn, and acts on what is proved."""

import json
from pathlib import Path
from typing import Any

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from rank_pool import RankPool
from torch import Tensor, nn
from training import Regression, fit

from lightning_byzantine import ByzantineDDPStrategy
from lightning_byzantine.attacks import BitFlip, SignFlip
from lightning_byzantine.callbacks import ByzantineMonitor, ByzantineSimulation
from lightning_byzantine.monitoring.audit_schedule import AuditSchedule


class FarFromOptimum(Regression):
    """Its gradients point one way, and stay so: a flipped sign shows in few batches."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self(batch[0]), 30.0 + batch[1])


class Manual(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.optimizers().zero_grad()
        self.manual_backward(nn.functional.mse_loss(self(batch[0]), batch[1]))
        self.optimizers().step()


def monitored(
    folder: Path, monitor: dict[str, Any], attack: Any = None, model: Any = Regression, num_batches: int = 40
) -> tuple[list[int], list[dict[str, Any]]]:
    """Return who is in quarantine, and the lines of the log."""
    watcher, strategy = ByzantineMonitor(**monitor), ByzantineDDPStrategy()
    simulation = [] if attack is None else [ByzantineSimulation(attack, [2])]
    fit(strategy, model(), num_batches, callbacks=[*simulation, watcher], default_root_dir=folder)
    log = folder / "suspects.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    return sorted(strategy.quarantined), [json.loads(line) for line in lines]


def test_a_suspect_is_audited_and_what_is_proved_acted_upon(three_ranks: RankPool, tmp_path: Path) -> None:
    arguments = {"on_suspect": "quarantine", "audit": "suspects", "threshold": 4.0}
    results = three_ranks.run(monitored, tmp_path, arguments, SignFlip(), FarFromOptimum)
    assert [quarantined for quarantined, _ in results] == [[2]] * 3
    events = [line["event"] for line in results[0][1] if line["worker"] == 2]
    assert (events[0], events[-3:]) == ("suspected", ["audited", "proved", "quarantined"])
    assert {line["worker"] for line in results[0][1] if line["event"] == "proved"} == {2}


@pytest.mark.slow
def test_a_fault_that_no_statistic_shows_is_proved_within_500_steps(five_ranks: RankPool, tmp_path: Path) -> None:
    (_, lines), *_ = five_ranks.run(monitored, tmp_path, {}, BitFlip(bit=12), num_batches=500)
    proved = [(line["worker"], line["verdict"]) for line in lines if line["event"] == "proved"]
    assert proved == [(2, "computes wrongly")]


def fits_without_audits() -> list[str]:
    fit(ByzantineDDPStrategy(), Manual(), 2, callbacks=[ByzantineMonitor(audit=None)])
    messages = []
    with pytest.warns(UserWarning, match="has nobody audited") if is_first() else pytest.warns():
        fit(ByzantineDDPStrategy(), Manual(), 2, callbacks=[ByzantineMonitor()])
    for audit in ("all", "suspects", "turns"):
        with pytest.raises(MisconfigurationException) as error:
            fit(ByzantineDDPStrategy(), Manual(), 2, callbacks=[ByzantineMonitor(audit=audit)])
        messages.append(str(error.value))
    return messages


def is_first() -> bool:
    import torch

    return torch.distributed.get_rank() == 0


def test_says_where_nobody_can_be_audited(two_ranks: RankPool) -> None:
    for messages in two_ranks.run(fits_without_audits):
        assert all("automatic_optimization=False" in message for message in messages)


def turns(schedule: AuditSchedule, num_workers: int, num_steps: int, first: int = 1) -> list[tuple[int, int]]:
    audits, announced = [0] * num_workers, []
    for step in range(first, num_steps + 1):
        order = sorted(range(num_workers), key=audits.__getitem__)
        for worker in schedule.announced(step, [], order, audits):
            audits[worker] += 1
            announced.append((step, worker))
    return announced


@pytest.mark.parametrize(("num_workers", "every", "round"), [(5, 500, 83), (9, 500, 50), (5, 100, 50), (5, 20, 20)])
def test_all_take_turns_the_first_time_in_one_round(num_workers: int, every: int, round: int) -> None:
    announced = turns(AuditSchedule("all", every), num_workers, round * num_workers + 2 * every)
    assert announced[:num_workers] == [(round * (worker + 1), worker) for worker in range(num_workers)]
    assert announced[num_workers:] == [(round * num_workers + every * (1 + turn), turn) for turn in range(2)]


def test_suspects_and_turns_can_be_had_apart() -> None:
    arguments = {"suspects": [2, 0], "order": [1, 0, 2], "num_audits": [0, 0, 0]}
    assert AuditSchedule("suspects").announced(500, **arguments) == [2, 0]
    assert AuditSchedule("turns").announced(500, **arguments) == [1]
    assert AuditSchedule("all").announced(500, **arguments) == [2, 0, 1]
    assert AuditSchedule(None).announced(500, **arguments) == []


def test_turns_go_on_after_a_checkpoint() -> None:
    before, after = AuditSchedule("turns", 40), AuditSchedule("turns", 40)
    turns(before, 2, 65)
    after.load_state_dict(before.state_dict())
    assert turns(after, 2, 130, first=66)[0] == (80, 0)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="audit must be one of"):
        ByzantineMonitor(audit="some")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="audit_every_n_steps must be at least 1"):
        ByzantineMonitor(audit_every_n_steps=0)

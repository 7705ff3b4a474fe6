import gc
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from combinations import UnusedOnSomeRanks
from loops import Loop, batches, loss_of
from lying import saying
from rank_pool import RankPool
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from training import Regression, fit, parameters

from lightning_byzantine import ByzantineBreakdownError, ByzantineDDPStrategy
from lightning_byzantine.aggregators import CTMA, NNM, Aggregator, GeometricMedian, Mean, PersistentFilter, Report
from lightning_byzantine.attacks import LabelFlip, Scale, SignFlip
from lightning_byzantine.estimators import WorkerMomentum
from lightning_byzantine.exchange import EXCHANGES
from lightning_byzantine.hooks import robust_ddp
from lightning_byzantine.optim import DoubleMomentumEstimator

RULES: list[Aggregator] = [Mean(), PersistentFilter(), CTMA(NNM(GeometricMedian()))]


def trainer_and_loop(rule: Aggregator, exchange: Any) -> tuple[Tensor, Tensor]:
    by_trainer = fit(ByzantineDDPStrategy(aggregator=rule, exchange=exchange))
    return by_trainer, Loop(aggregator=rule, exchange=exchange).run(batches())


# Each rule by default with one exchange.
PAIRS = [
    pytest.param(rule, exchange, id=f"{type(rule).__name__}-{exchange}", marks=() if index % 2 else pytest.mark.slow)
    for index, (rule, exchange) in enumerate([(rule, name) for name in EXCHANGES for rule in RULES])
]


@pytest.mark.parametrize(("rule", "exchange"), PAIRS)
def test_trains_like_the_trainer(three_ranks: RankPool, rule: Aggregator, exchange: str) -> None:
    (expected, first), *others = three_ranks.run(trainer_and_loop, rule, exchange)
    torch.testing.assert_close(first, expected, atol=1e-6, rtol=0)
    assert not torch.equal(first[0], first[-1])
    assert all(torch.equal(first, other) for _, other in others)


class Unused(UnusedOnSomeRanks):
    @property
    def global_rank(self) -> int:
        return dist.get_rank()


def stock_and_robust(
    model: type[nn.Module], ddp: dict[str, Any], loop: dict[str, Any], **arguments: Any
) -> tuple[Tensor, Tensor]:
    results = []
    for robust in (False, True):
        torch.manual_seed(3)
        options = {"aggregator": Mean()} | arguments if robust else {}
        results.append(Loop(model(), ddp, robust, **options).run(batches(6), **loop))
    return results[0], results[1]


@pytest.mark.parametrize(
    ("model", "ddp", "loop"),
    [
        pytest.param(Regression, {"bucket_cap_mb": 0.0005}, {"accumulate": 3}, id="no_sync"),
        pytest.param(Unused, {"find_unused_parameters": True}, {}, id="find_unused_parameters"),
        pytest.param(Regression, {"static_graph": True}, {"clip": 0.1}, id="static_graph and clipping"),
        pytest.param(
            Regression, {"gradient_as_bucket_view": True, "broadcast_buffers": False}, {}, id="gradient_as_bucket_view"
        ),
    ],
)
def test_trains_like_stock_ddp_with_the_mean(
    three_ranks: RankPool, model: type[nn.Module], ddp: dict[str, Any], loop: dict[str, Any]
) -> None:
    (stock, first), *others = three_ranks.run(stock_and_robust, model, ddp, loop)
    torch.testing.assert_close(first, stock, atol=1e-5, rtol=0)
    assert all(torch.equal(first, other) for _, other in others)


def train_alone(**arguments: Any) -> tuple[Tensor, Tensor]:
    return stock_and_robust(Regression, {}, {}, **arguments)


def test_a_single_process_trains_as_without_the_hook(one_rank: RankPool) -> None:
    ((stock, own),) = one_rank.run(train_alone)
    assert torch.equal(stock, own)


def scaled_and_not(faulty: list[int]) -> tuple[Tensor, Tensor, list[float]]:
    scaler, scales = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4), []

    def tamper(loss: Tensor) -> Tensor:
        scales.append(scaler.get_scale())
        return loss * 1e38 if len(scales) == 3 and dist.get_rank() in faulty else loss

    scaled = Loop(scaler=scaler).run(batches(8), tamper=tamper, scaler=scaler)
    return Loop().run(batches(8)), scaled, scales


def test_a_loss_scale_that_grows_changes_nothing(three_ranks: RankPool) -> None:
    (plain, scaled, scales), *others = three_ranks.run(scaled_and_not, [])
    torch.testing.assert_close(scaled, plain, atol=1e-6, rtol=0)
    assert scales == [1024.0] * 4 + [2048.0] * 4
    assert all(torch.equal(scaled, other) for _, other, _ in others)


def test_the_scaler_skips_a_step_in_which_most_workers_overflow(three_ranks: RankPool) -> None:
    _, history, scales = three_ranks.run(scaled_and_not, [0, 2])[1]
    assert torch.equal(history[2], history[1])
    assert scales[3] == 512.0
    assert history.isfinite().all()
    _, history, scales = three_ranks.run(scaled_and_not, [2])[1]
    assert not torch.equal(history[2], history[1])
    assert scales[3] == 1024.0


def train_with_nan(ranks: list[int], **arguments: Any) -> tuple[Tensor, list[Tensor]] | list[int]:
    loop, dropped = Loop(**arguments), []
    loop.hook.observe(lambda report: dropped.append(~report.measurable))
    try:
        history = loop.run(batches(), tamper=lambda loss: loss * torch.nan if dist.get_rank() in ranks else loss)
    except ByzantineBreakdownError as error:
        return list(error.workers)
    return history, dropped


def test_a_faulty_rank_is_outvoted_and_reported_to_all(three_ranks: RankPool) -> None:
    results = three_ranks.run(train_with_nan, [1])
    for history, dropped in results:
        assert torch.equal(history, results[0][0])
        assert history.isfinite().all()
        assert [rows.tolist() for rows in dropped] == [[False, True, False]] * 10


def test_more_faulty_ranks_than_f_end_the_run_or_spread(three_ranks: RankPool) -> None:
    assert three_ranks.run(train_with_nan, [0, 2]) == [[0, 2]] * 3
    history, _ = three_ranks.run(train_with_nan, [0, 2], on_breakdown="propagate")[0]
    assert history.isnan().all()


def losses_under_attack(robust: bool) -> tuple[float, float, list[Report]]:
    loop, reports = Loop(**{} if robust else {"aggregator": Mean(), "estimator": None}), []
    loop.hook.add_attack(Scale(-10.0), [4])
    handle = loop.hook.observe(reports.append)
    steps = batches()
    before = mean_loss(loop.module, steps)
    loop.run(steps)
    handle.remove()
    loop.run(steps)
    return before, mean_loss(loop.module, steps), reports


@torch.no_grad()
def mean_loss(module: nn.Module, steps: list[list[Tensor]]) -> float:
    return torch.stack([loss_of(module, batch) for batch in steps]).mean().item()


def test_a_simulated_attack_is_survived(five_ranks: RankPool) -> None:
    for before, after, reports in five_ranks.run(losses_under_attack, True):
        assert after < 2 * before
        assert len(reports) == 10
        assert reports[-1].trimmed.tolist() == [False] * 4 + [True]
    for before, after, _ in five_ranks.run(losses_under_attack, False):
        assert not after < 2 * before


def train_with_a_liar() -> tuple[Tensor, list[list[int]], list[int]]:
    named: list[Tensor | None] = []

    def say(tensor: Tensor, dst: int) -> Tensor:
        return tensor + dst if tensor.is_floating_point() and dist.get_rank() == 1 else tensor

    with saying(say):
        loop = Loop()
        loop.hook.observe(lambda report: named.append(report.equivocated))
        history = loop.run(batches(5))
    return (
        history,
        [[] if flags is None else flags.nonzero().flatten().tolist() for flags in named],
        sorted(loop.hook.quarantined),
    )


def test_a_rank_that_sends_others_different_rows_is_named_and_left_out(five_ranks: RankPool) -> None:
    first, *others = five_ranks.run(train_with_a_liar)
    for history, named, quarantined in [first, *others[1:]]:
        assert torch.equal(history, first[0])
        assert named == [[1]] + [[]] * 4
        assert quarantined == [1]


class BatchNormed(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 1))


def resumed_and_not(exchange: Any) -> tuple[Tensor, Tensor, list[int], bool]:
    torch.manual_seed(1)
    steps = batches()
    whole = Loop(BatchNormed(), exchange=exchange)
    whole.run(steps[:5])
    whole.hook.quarantine([4], proved=True)
    state = {
        "model": whole.module.state_dict(),
        "optimizer": whole.optimizer.state_dict(),
        "hook": whole.hook.state_dict(),
    }
    sent: list[Any] = [{name: _copy(part) for name, part in state.items()}]
    dist.broadcast_object_list(sent, src=0)
    resumed = Loop(BatchNormed(), exchange=exchange)
    resumed.module.load_state_dict(sent[0]["model"])
    resumed.optimizer.load_state_dict(sent[0]["optimizer"])
    resumed.hook.load_state_dict(sent[0]["hook"])
    expected, found = whole.run(steps[5:])[5:], resumed.run(steps[5:])
    buffers = zip(whole.module.buffers(), resumed.module.buffers(), strict=True)
    alike = all(torch.equal(one, other) for one, other in buffers)
    return expected, found, sorted(resumed.hook.quarantined), alike


def _copy(state: Any) -> Any:
    if isinstance(state, dict):
        return {name: _copy(part) for name, part in state.items()}
    return state.clone() if isinstance(state, Tensor) else state


@pytest.mark.parametrize("exchange", ["all_gather", pytest.param("all_to_all", marks=pytest.mark.slow)])
def test_resumes_exactly(five_ranks: RankPool, exchange: str) -> None:
    for expected, found, quarantined, buffers_alike in five_ranks.run(resumed_and_not, exchange):
        assert torch.equal(found, expected)
        assert quarantined == [4]
        assert buffers_alike


def error_of(arguments: dict[str, Any]) -> str:
    try:
        robust_ddp(DistributedDataParallel(Regression()), **arguments)
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_byzantine": 2}, "ValueError: num_byzantine must satisfy 0 <= f < m / 2, got f=2 with m=3 workers"),
        ({"aggregator": "Krum"}, "TypeError: aggregator must be an Aggregator, such as Krum(), got 'Krum'"),
        ({"estimator": 0.9}, "TypeError: estimator must be an Estimator, 'auto' or None, got 0.9"),
        ({"estimator": DoubleMomentumEstimator()}, "ValueError: estimator must need one gradient of a batch only"),
        ({"exchange": "ring"}, "ValueError: exchange must be"),
        ({"on_breakdown": "skip"}, "ValueError: on_breakdown must be 'raise' or 'propagate', got 'skip', for which"),
        ({"on_breakdown": "ignore"}, "ValueError: on_breakdown must be"),
        ({"scaler": 1024.0}, "TypeError: scaler must be a torch.amp.GradScaler or None, got 1024.0"),
        ({"max_worker_grad_norm": -1.0}, "ValueError: max_worker_grad_norm must be"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(three_ranks: RankPool, arguments: dict[str, Any], message: str) -> None:
    for error in three_ranks.run(error_of, arguments):
        assert error.startswith(message)


def not_in_ddp() -> None:
    robust_ddp(Regression())  # type: ignore[arg-type]


def with_sparse_gradients() -> None:
    robust_ddp(DistributedDataParallel(nn.Sequential(nn.Embedding(3, 2, sparse=True), nn.Linear(2, 1))))


def with_ignored_parameters() -> None:
    module = Regression()
    module._ddp_params_and_buffers_to_ignore = ["network.0.weight"]
    robust_ddp(DistributedDataParallel(module))


def in_another_group() -> None:
    group = dist.new_group(range(dist.get_world_size()))
    robust_ddp(DistributedDataParallel(Regression(), process_group=group))


def with_another_hook() -> None:
    model = DistributedDataParallel(Regression())
    robust_ddp(model)
    robust_ddp(model)


def thawed_later() -> None:
    module = Regression()
    module.network[0].requires_grad_(False)
    model = DistributedDataParallel(module)
    robust_ddp(model)
    module.network[0].requires_grad_(True)
    model(torch.ones(1, 8))


def with_an_attack_on_data() -> None:
    Loop().hook.add_attack(LabelFlip(num_classes=10), [0])


def with_an_attacker_that_is_not_there() -> None:
    Loop().hook.add_attack(SignFlip(), [7])


def with_the_state_of_another_rank() -> None:
    Loop().hook.load_state_dict({})


def with_the_state_of_another_estimator() -> None:
    state = [Loop().hook.state_dict()]
    dist.broadcast_object_list(state, src=0)
    Loop(estimator=None).hook.load_state_dict(state[0])


def error_in(function: Callable[[], None]) -> str:
    try:
        function()
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (not_in_ddp, "TypeError: model must be a DistributedDataParallel, got Regression"),
        (with_sparse_gradients, "ValueError: model must have dense gradients"),
        (with_ignored_parameters, "ValueError: model must not ignore trainable parameters"),
        (in_another_group, "ValueError: model must be in the default process group"),
        (with_another_hook, "ValueError: model must leave all gradients to the one communication hook"),
        (thawed_later, "RuntimeError: The parameter 'network.0.weight' was frozen when `robust_ddp` was called"),
        (with_an_attack_on_data, "TypeError: attack must be an Attack on what workers send"),
        (with_an_attacker_that_is_not_there, "ValueError: workers must be indices in [0, 3) for 3 workers, got 7"),
        (with_the_state_of_another_rank, "ValueError: state must be what `state_dict` has returned on rank 0"),
        (with_the_state_of_another_estimator, "ValueError: The checkpoint and this run differ in the estimator"),
    ],
)
def test_unfit_models_attacks_and_states_are_refused(
    three_ranks: RankPool, function: Callable[[], None], message: str
) -> None:
    for error in three_ranks.run(error_in, function):
        assert error.startswith(message)


def messages_of(**arguments: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Loop(**arguments)
    return [str(warning.message) for warning in caught]


def test_two_workers_are_warned_of(two_ranks: RankPool, three_ranks: RankPool) -> None:
    first, second = two_ranks.run(messages_of)
    assert "Two workers cannot outvote each other" in first[0]
    assert second == []
    assert three_ranks.run(messages_of) == [[]] * 3


def vote(robust_buffers: bool) -> Tensor:
    loop = Loop(BatchNormed(), robust_buffers=robust_buffers, aggregator=Mean())
    loop.run(batches(1))
    loop.module[1].running_mean.fill_((100.0, 1.0, 2.0)[dist.get_rank()])
    loop.model(torch.zeros(2, 8))
    loop.hook.synchronize_buffers()
    return loop.module[1].running_mean.clone()


def test_buffers_are_voted_on(three_ranks: RankPool) -> None:
    robust, *others = three_ranks.run(vote, True)
    assert robust.max() < 3
    assert all(torch.equal(robust, other) for other in others)
    assert three_ranks.run(vote, False)[1].min() > 50


def in_one_backward() -> list[Tensor]:
    loops = [Loop(ddp={"bucket_cap_mb": 0.0005}) for _ in range(2)]
    for batch in batches(4):
        torch.stack([loss_of(loop.model, batch) for loop in loops]).sum().backward()
        for loop in loops:
            loop.optimizer.step()
            loop.optimizer.zero_grad()
            loop.history.append(parameters(loop.module))
    return [torch.stack(loop.history) for loop in loops]


def two_models() -> list[Tensor]:
    rule, estimator = PersistentFilter(), WorkerMomentum()
    apart = [Loop(aggregator=rule, estimator=estimator).run(batches(4)) for _ in range(2)]
    first, second = (Loop(aggregator=rule, estimator=estimator) for _ in range(2))
    for batch in batches(4):
        first.run([batch])
        second.run([batch])
    assert estimator.worker_state() == {}
    return [*apart, torch.stack(first.history), torch.stack(second.history), *in_one_backward()]


def test_models_do_not_share_a_rule_or_momentum(three_ranks: RankPool) -> None:
    for first, *others in three_ranks.run(two_models):
        assert all(torch.equal(first, other) for other in others)


def tensors_left_to_the_collector(exchange: Any) -> list[int]:
    gc.collect()
    gc.disable()
    try:
        loop = Loop(ddp={"bucket_cap_mb": 0.0005}, exchange=exchange)
        loop.run(batches(4))  # DDP rebuilds its buckets after the first step
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        return [each.numel() for each in gc.garbage if issubclass(type(each), Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_no_memory_waits_for_the_garbage_collector(three_ranks: RankPool, exchange: str) -> None:
    assert three_ranks.run(tensors_left_to_the_collector, exchange) == [[]] * 3

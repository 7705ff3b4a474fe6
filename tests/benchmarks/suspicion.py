"""How long a faulty worker stays unnoticed, and honest ones unsuspected: ``python tests/benchmarks/suspicion.py``.

Eight workers train the example's network on its digits, in one process, with worker momentum and the default rule. For
each fault of worker 3, from the first step on: the step at which it is suspected, for each seed. Then steps without any
fault: the highest score that an honest worker reached, in units of the threshold, where 1 is a false alarm.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[2] / "examples")]

from digits import DigitClassifier, DigitData
from torch import Tensor

from lightning_byzantine.aggregators import CTMA, NNM, GeometricMedian
from lightning_byzantine.estimators import WorkerMomentum
from lightning_byzantine.matrix import WorkerMatrix
from lightning_byzantine.report import Report
from lightning_byzantine.suspicion import Suspicion

NUM_WORKERS, NUM_BYZANTINE, BAD = 8, 3, 3


def flip_bit(row: Tensor, bit: int) -> Tensor:
    return row.view(torch.int32).bitwise_xor(torch.tensor(1 << bit, dtype=torch.int32)).view(torch.float32)


# From what the worker would send, and what it would have sent in the steps before, to what it sends.
FAULTS: dict[str, Callable[[Tensor, list[Tensor]], Tensor]] = {
    "NaN": lambda row, past: row * torch.nan,
    "Inf": lambda row, past: row + torch.inf,
    "zero": lambda row, past: 0 * row,
    "x10": lambda row, past: 10 * row,
    "sign flip": lambda row, past: -row,
    "highest mantissa bit of all values": lambda row, past: flip_bit(row, 22),
    "stale: always the first": lambda row, past: past[0],
    "stale: 20 steps old": lambda row, past: past[max(0, len(past) - 21)],
}


def batches(data: DigitData, num_samples: int) -> Iterator[list[Tensor]]:
    while True:
        for shards in torch.randperm(num_samples).split(NUM_WORKERS * data.batch_size):
            if len(shards) == NUM_WORKERS * data.batch_size:
                yield list(shards.split(data.batch_size))


def reports(seed: int, steps: int, fault: str | None, beta: float) -> Iterator[Report]:
    """Yield what the rule reports, step by step."""
    torch.manual_seed(seed)
    data, model = DigitData(), DigitClassifier()
    data.setup("fit")
    images, labels = (torch.stack(values) for values in zip(*data.train_set, strict=True))
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=model.hparams.lr, momentum=model.hparams.momentum)
    rule, estimators = CTMA(NNM(GeometricMedian())), [WorkerMomentum(beta) for _ in range(NUM_WORKERS)]
    drawn, past = batches(data, len(images)), []
    for _ in range(steps):
        sent = []
        for worker, indices in enumerate(next(drawn)):
            optimizer.zero_grad()
            wrong = fault == "label flip" and worker == BAD
            model.loss(model(images[indices]), 9 - labels[indices] if wrong else labels[indices]).backward()
            gradient = torch.cat([parameter.grad.flatten() for parameter in parameters])
            sent.append(torch.empty_like(gradient))
            estimators[worker].estimate("all", gradient, out=sent[-1])
            estimators[worker].commit()
        past.append(sent[BAD])
        rows = torch.stack(sent)
        if fault in FAULTS:
            rows[BAD] = FAULTS[fault](past[-1], past)
        matrix = WorkerMatrix([rows])
        matrix.watch_bits()
        decision = rule.decide(matrix, NUM_BYZANTINE)
        gradient = torch.empty_like(sent[BAD])
        estimators[0].gradient("all", decision.values()[0], gradient)
        for parameter, part in zip(parameters, gradient.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter).clone()
        optimizer.step()
        yield decision.report()


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=2000, help="without a fault")
    parser.add_argument("--faulty-steps", type=int, default=300)
    parser.add_argument("--beta", type=float, default=0.9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| fault of worker 3 | suspected after steps | others suspected |\n|---|---|---|", flush=True)
    for fault in [*FAULTS, "label flip"]:
        found, others = [], set()
        for seed in arguments.seeds:
            suspicion, first = Suspicion(NUM_WORKERS), None
            for step, report in enumerate(reports(seed, arguments.faulty_steps, fault, arguments.beta), 1):
                suspicion.update(report, arguments.beta)
                others |= set(suspicion.suspected.nonzero().flatten().tolist()) - {BAD}
                if suspicion.suspected[BAD]:
                    first = step
                    break
            found.append("never" if first is None else str(first))
        print(f"| {fault} | {', '.join(found)} | {sorted(others)} |", flush=True)
    print(f"\n| seed | highest score of {arguments.steps} steps without a fault |\n|---|---|", flush=True)
    for seed in arguments.seeds:
        suspicion, highest = Suspicion(NUM_WORKERS), 0.0
        for report in reports(seed, arguments.steps, None, arguments.beta):
            suspicion.update(report, arguments.beta)
            highest = max(highest, float(suspicion.scores.max()) / suspicion.threshold)
        print(f"| {seed} | {highest:.2f} |", flush=True)


if __name__ == "__main__":
    main()

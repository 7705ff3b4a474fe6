"""The aggregation of the workers' gradients in one step, for any training loop."""

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_byzantine.aggregation.aggregation import Aggregated, Aggregation
from lightning_byzantine.aggregation.breakdown import Breakdown
from lightning_byzantine.aggregation.gradient_block import GradientBlock
from lightning_byzantine.aggregation.gradients import clipping_factor, flat_size, unscaled
from lightning_byzantine.aggregation.local_gradients import LocalGradients
from lightning_byzantine.aggregation.outcome import Outcome
from lightning_byzantine.aggregation.own_columns import OwnColumns
from lightning_byzantine.errors import ByzantineBreakdownError
from lightning_byzantine.estimators import Estimator
from lightning_byzantine.exchange import Exchange
from lightning_byzantine.matrix import Segments, WorkerMatrix

__all__ = ["AggregationEngine"]


class AggregationEngine:
    """Clips, estimates, exchanges and aggregates the gradients in each step.

    A step calls :meth:`send` for every block of the gradient, as soon as it is computed, and then :meth:`aggregate`.
    A parameter that no worker has used takes no part in it: its columns are 0 in all rows, the estimator's state of it
    stays as it was, and so does its part of the block.
    The rule runs once on the whole matrix: applied to each block, it would be another algorithm, which may choose a
    different worker in each block. The engine depends on neither DDP nor Lightning; DDP's hook is one way to use it.

    Args:
        parameters: all parameters, by name.
        aggregation: combines the workers' vectors.
        exchange: gathers the workers' vectors.
        estimator: what a worker sends, if the aggregation takes estimates; None for the raw gradient.
        max_norm: clips each worker's gradient to this norm before the estimator; None for no clipping. With clipping,
            nothing is sent before the last block, because the norm is not known earlier.
        num_local_workers: number of workers that this process acts as, k.
        loss_scale: returns the factor on the loss; None without a gradient scaler.
        breakdown: what to do when more workers send unusable vectors than may be Byzantine.
        on_skip: called with the error when a step is skipped for that reason.

    Attributes:
        exchange: as given.
        estimator: as given.
        local: the local workers' gradients.
        num_aggregated: number of steps that :meth:`aggregate` has ended.

    Example:
        >>> from lightning_byzantine.aggregation.aggregation import SingleWorker
        >>> from lightning_byzantine.exchange import SingleRank
        >>> engine = AggregationEngine({"weight": nn.Parameter(torch.zeros(2))}, SingleWorker(), SingleRank())
        >>> block = GradientBlock.of({"weight": torch.ones(2)})
        >>> engine.send(block)
        >>> engine.aggregate()
        >>> block.buffer
        tensor([1., 1.])

    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        aggregation: Aggregation,
        exchange: Exchange,
        estimator: Estimator | None = None,
        max_norm: float | None = None,
        num_local_workers: int = 1,
        loss_scale: Callable[[], float | None] = lambda: None,
        breakdown: Breakdown | None = None,
        on_skip: Callable[[ByzantineBreakdownError], None] = lambda error: None,
    ) -> None:
        self.exchange = exchange
        self.estimator = estimator
        self.local = LocalGradients(parameters, num_local_workers)
        self._sizes = {name: flat_size(parameter) for name, parameter in parameters.items()}
        self._aggregation = aggregation
        self._sends = estimator if aggregation.takes_estimates else None
        self._max_norm = max_norm
        self._loss_scale = loss_scale
        self._breakdown = Breakdown() if breakdown is None else breakdown
        self._on_skip = on_skip
        self.num_aggregated = 0
        self._own_columns = OwnColumns(exchange)
        self._scale: float | None = None
        self._attacks: list[Callable[[WorkerMatrix], WorkerMatrix]] = []
        self._row_observers: dict[int, Callable[[Sequence[GradientBlock], WorkerMatrix], None]] = OrderedDict()
        self._blocks: list[GradientBlock] = []

    def add_attack(self, attack: Callable[[WorkerMatrix], WorkerMatrix]) -> None:
        """Let a simulated attack rewrite the rows of every step from now on, the same on all ranks."""
        self._attacks.append(attack)

    def observe_rows(self, observer: Callable[[Sequence[GradientBlock], WorkerMatrix], None]) -> RemovableHandle:
        """Call a function with what all workers have sent in each step that has a result.

        Args:
            observer: takes the step's blocks and the matrix of their rows, which it must copy to keep.

        Returns:
            A handle, whose ``remove()`` ends the calls.

        """
        handle = RemovableHandle(self._row_observers)
        self._row_observers[handle.id] = observer
        return handle

    @torch.no_grad()
    def send(self, block: GradientBlock) -> None:
        """Start sending one block of this process's gradients."""
        if not self._blocks:
            self._scale = self._loss_scale()  # once per step, because it synchronizes a GPU
        self._blocks.append(block)
        if self._max_norm is None:
            self._send(block)

    @torch.no_grad()
    def aggregate(self, used: Collection[str] | None = None) -> None:
        """End the step: write the aggregated gradient into the buffers of all blocks.

        Args:
            used: parameters that this process's workers have used; others take no part in the step unless another rank
                has used them. None for all, on all ranks, which then don't ask each other.

        Raises:
            RuntimeError: if nothing was sent.
            ByzantineBreakdownError: if more workers send unusable vectors than may be Byzantine, and the policy is not
                to continue. Under a gradient scaler, gradients are NaN instead.
            EquivocationError: if more ranks have sent others different vectors than may be faulty.

        """
        blocks, self._blocks = self._blocks, []
        if not blocks:
            raise RuntimeError("aggregate needs the step's gradients, got none: call send for each block before")
        if used is not None:
            self._leave_out_unused(blocks, used)
        if self._max_norm is not None:
            factors = self._clipping_factors(blocks, self._max_norm)
            for block in blocks:
                self._send(block, factors)
        if self._sends is not None:
            self._sends.place(self._own_columns.of(blocks))
        outcome = self._outcome(blocks)
        self._aggregation.announce()
        aggregated = self._result_of(outcome)
        if aggregated is None:
            for block in blocks:
                for _, part in block.parts(block.buffer):
                    part.fill_(torch.nan)
        else:
            self._finish(blocks, outcome.matrix, aggregated)
        self.local.clear()
        self.num_aggregated += 1

    def _finish(self, blocks: list[GradientBlock], matrix: WorkerMatrix, aggregated: Aggregated) -> None:
        for observer in self._row_observers.values():
            observer(blocks, matrix)
        self.exchange.wait()
        self._commit(blocks, aggregated.unusable)
        if self._sends is not None:
            self._sends.limit([name for block in blocks for name in block.layout if name is not None], aggregated.scale)
        # Into the blocks' own buffers, like DDP's all-reduce, to save a copy.
        divides = self.exchange.divides_columns
        targets = [torch.empty_like(block.buffer) if divides and block.unused else block.buffer for block in blocks]
        for block, target, part in zip(blocks, targets, aggregated.parts, strict=True):
            self._write_gradient(block, target, part)
        self.exchange.complete(targets)
        for block, target in zip(blocks, targets, strict=True):
            if target is not block.buffer:
                for _, received, part in block.parts(target, block.buffer):
                    part.copy_(received)
        if self._aggregation.last_aggregate is not None:
            for block, whole in zip(blocks, self.exchange.collect(aggregated.parts), strict=True):
                self._aggregation.last_aggregate.keep_parts(block.by_name(whole))

    def _leave_out_unused(self, blocks: list[GradientBlock], used: Collection[str]) -> None:
        names = [name for block in blocks for name in block.names]
        flags = torch.tensor([name in used for name in names], device=blocks[0].buffer.device)
        on_any = self.exchange.on_any_rank(flags).tolist()
        unused = frozenset(name for name, is_used in zip(names, on_any, strict=True) if not is_used)
        for block in blocks:
            block.unused = unused

    def _clipping_factors(self, blocks: list[GradientBlock], max_norm: float) -> list[Tensor]:
        parts = {name: part for block in blocks for name, part in block.by_name(block.buffer).items()}
        # Sorted by name, so that the last digit does not depend on DDP's buckets.
        return [
            clipping_factor(
                [unscaled(self.local.of(worker, name, parts[name]), self._scale) for name in sorted(parts)],
                max_norm,
                self.exchange.norm_of_parts,
            )
            for worker in range(self.local.num_workers)
        ]

    def _send(self, block: GradientBlock, factors: list[Tensor] | None = None) -> None:
        as_it_came = self._sends is None and factors is None and self._scale is None
        if as_it_came and self.local.num_workers == 1:
            block.sent = block.buffer[None]
        else:
            block.sent = self._rows(block, factors)
        self.exchange.start(block.sent)

    def _rows(self, block: GradientBlock, factors: list[Tensor] | None) -> Tensor:
        like = block.buffer[:0].to(torch.promote_types(block.buffer.dtype, torch.float32))
        rows = self.exchange.allocate(self.local.num_workers, block.buffer.numel(), like)
        if block.unused:
            rows.zero_()
        for name, arrived, part in block.parts(block.buffer, rows):
            for worker, out in enumerate(part):
                # Without the loss scale, which changes: momentum mixes steps, and rules have thresholds for gradients.
                gradient = unscaled(self.local.of(worker, name, arrived), self._scale)
                if factors is not None:
                    gradient = gradient * factors[worker]
                if self._sends is None:
                    out.copy_(gradient)
                else:
                    self._sends.estimate(name, gradient, out, worker)
        return rows

    def _unused_columns(self, blocks: list[GradientBlock]) -> list[Tensor] | None:
        if not any(block.unused for block in blocks):
            return None
        return self.exchange.own_columns([block.unused_columns for block in blocks])

    def _outcome(self, blocks: list[GradientBlock]) -> Outcome:
        """Return what follows from the rows of all workers, the same on all ranks."""
        unused = self._unused_columns(blocks)
        layout = tuple(block.layout for block in blocks)
        starts = {name: start for block in blocks for name, start in block.starts.items()}
        segments = Segments.of_blocks(self._sizes, [(block.layout, block.sizes) for block in blocks], starts)
        since = self._since(blocks)

        def attempt(received: WorkerMatrix) -> Outcome:
            matrix = self._attacked(self._with_previous(received, blocks))
            try:
                return Outcome(matrix, self._aggregation.aggregate(matrix, unused, since), None, fingerprint)
            except ByzantineBreakdownError as error:
                return Outcome(matrix, None, error, fingerprint)

        fingerprint = self._aggregation.fingerprint
        return self.exchange.agreed(
            self.exchange.finish(layout, unused, segments),
            attempt,
            lambda: partial(self._aggregation.restore, self._aggregation.memory()),
        )

    def _with_previous(self, matrix: WorkerMatrix, blocks: list[GradientBlock]) -> WorkerMatrix:
        last = self._aggregation.last_aggregate
        if last is None or not last.parts:
            return matrix
        wholes = [_values_of(block, last.parts, like=block.sent) for block in blocks]
        return matrix.with_previous(self.exchange.own_columns(wholes))

    def _attacked(self, matrix: WorkerMatrix) -> WorkerMatrix:
        for attack in self._attacks:
            matrix = attack(matrix)
        return matrix

    def _since(self, blocks: list[GradientBlock]) -> list[Tensor] | None:
        starts = None if self._sends is None else self._sends.starts
        if starts is None or not any(block.unused for block in blocks):
            return None if starts is None else starts.blocks
        columns = [self.exchange.columns_of(block.buffer.numel()) for block in blocks]
        return [
            self.exchange.padded(_values_of(block.columns(own), starts.parts, like=block.sent), block.buffer.numel())
            for block, own in zip(blocks, columns, strict=True)
        ]

    def _result_of(self, outcome: Outcome) -> Aggregated | None:
        """Return the aggregate; None if there is none, and the run continues without this step."""
        if outcome.error is None:
            self._breakdown.succeeded()
            return outcome.aggregated
        # If most workers overflow, the scaler finds NaN, skips the step and lowers the scale.
        if self._scale is not None:
            return None
        if self._breakdown.propagates:
            return self._aggregation.mean(outcome.matrix)
        if not self._breakdown.skips():
            raise outcome.error
        self._on_skip(outcome.error)
        return None

    def _commit(self, blocks: list[GradientBlock], unusable: frozenset[int] | None) -> None:
        if self._sends is None:
            return
        if unusable is None or self._attacks:
            # Nobody has looked at what these workers sent, or at something else in its place.
            own = WorkerMatrix([block.sent for block in blocks], self.exchange.sum_of_parts)
            measured = own.measure().is_measurable.tolist()
        else:
            first = self.exchange.rank * self.local.num_workers
            measured = [first + worker not in unusable for worker in range(self.local.num_workers)]
        # An unusable vector must not enter the worker's own state.
        usable = {
            worker: {name: part for block in blocks for name, part in block.by_name(block.sent[worker]).items()}
            for worker, is_measurable in enumerate(measured)
            if is_measurable
        }
        estimator = self._sends
        # Blocks as a whole are kept, which is a waste where some of their columns are nobody's state.
        is_all = len(usable) == len(measured) and not any(block.unused for block in blocks)
        can_keep = is_all and all(estimator.can_keep(sent, worker) for worker, sent in usable.items())
        commit = estimator.keep if can_keep and self.exchange.let_go() else estimator.commit
        for worker, sent in usable.items():
            commit(sent, worker)

    def _write_gradient(self, block: GradientBlock, target: Tensor, aggregate: Tensor) -> None:
        """Write this rank's columns of the gradient, given those of the aggregate."""
        columns = self.exchange.columns_of(target.numel())
        own = target[columns]
        for name, part, out in block.columns(columns).parts(aggregate[: own.numel()], own):
            if self._sends is None:
                out.copy_(part)
            else:
                self._sends.gradient(name, part, out)
            if self._scale is not None:
                out.mul_(self._scale)


def _values_of(block: GradientBlock, parts: Mapping[str, Tensor], like: Tensor) -> Tensor:
    """Return the values for the parameters of a block, [c]; 0 where there are none."""
    values = like.new_zeros(block.buffer.numel())
    for name, part in block.by_name(values).items():
        if name in parts:
            part.copy_(parts[name])
    return values

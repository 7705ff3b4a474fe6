"""What a worker's step depends on: its batches, and the random state and buffers before each."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_byzantine.strategies.second_pass.snapshot import Snapshot, TooManyObjectsError
from lightning_byzantine.utilities.replacing import replaced
from lightning_byzantine.utilities.rng import random_state
from lightning_byzantine.utilities.torch_internals import TreeSpec, tree_flatten, tree_unflatten

__all__ = ["CapturedBatch", "UnsupportedBatchError", "captured"]

# A module that holds a list of all its samples, for example, takes too long to restore.
_MANY = 300_000
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_NUMBERS = {bool: torch.bool, int: torch.int64, float: torch.float64}


class UnsupportedBatchError(Exception):
    """The arguments of the training step hold something that can't be sent as tensors."""


@dataclass(frozen=True)
class CapturedBatch:
    """One call of ``training_step``, as tensors.

    Args:
        start: the state of the module before it, without tensors and arrays.
        random: the random state before it.
        buffers: the module's buffers before it.
        values: the tensors, numbers and strings of the call's arguments, as tensors; None in place of each None.
        leaves: the same as they were; only their types and devices count.
        structure: of the arguments.

    """

    start: Snapshot
    random: list[Tensor]
    buffers: list[Tensor]
    values: list[Tensor | None]
    leaves: list[Any]
    structure: TreeSpec

    @property
    def state(self) -> list[Tensor]:
        """The random state and the buffers, whose shapes are the same on all ranks."""
        return [*self.random, *self.buffers]

    @property
    def content(self) -> list[Tensor]:
        """The values that are there."""
        return [value for value in self.values if value is not None]

    @property
    def kind(self) -> str:
        """What calls on different ranks have in common: keys, types, dtypes and numbers of dimensions, but no shapes.

        Of buffers and the random state, the shapes as well.
        """
        leaves = [_kind(value, leaf) for value, leaf in zip(self.values, self.leaves, strict=True)]
        kind = repr((self.structure, leaves, [(value.dtype, value.shape) for value in self.state]))
        return _ADDRESS.sub("", kind)  # such as that of a defaultdict's function

    def replaced_by(self, state: list[Tensor], content: list[Tensor]) -> "CapturedBatch":
        """Return the same call with another worker's state and content, in the order of those here."""
        arrived = iter(content)
        values = [None if value is None else next(arrived) for value in self.values]
        num_random = len(self.random)
        return CapturedBatch(self.start, state[:num_random], state[num_random:], values, self.leaves, self.structure)

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return positional and named arguments for ``training_step``, with new tensors."""
        leaves = [_decoded(value, leaf) for value, leaf in zip(self.values, self.leaves, strict=True)]
        arguments: tuple[tuple[Any, ...], dict[str, Any]] = tree_unflatten(leaves, self.structure)
        return arguments


@contextmanager
def captured(
    module: pl.LightningModule, keep: Callable[[CapturedBatch | UnsupportedBatchError], None]
) -> Iterator[None]:
    """Capture the call of ``training_step`` within the block, or the last one if there are two.

    Args:
        module: the module to train.
        keep: called with what was captured, or with an error if that can't be sent.

    """
    training_step = module.training_step
    try:
        start = Snapshot(module, copy_tensors=False, watch_arrays=False, most=_MANY)
    except TooManyObjectsError as error:
        keep(UnsupportedBatchError(str(error)))
        yield
        return

    def capturing(*args: Any, **kwargs: Any) -> Any:
        try:
            keep(_capture(module, start, (args, kwargs)))
        except UnsupportedBatchError as error:
            keep(error)
        return training_step(*args, **kwargs)

    with replaced(module, training_step=capturing):
        yield


def _capture(module: pl.LightningModule, start: Snapshot, arguments: Any) -> CapturedBatch:
    leaves, structure = tree_flatten(arguments)
    values = [_encoded(leaf) for leaf in leaves]
    # In the host's memory, so that training can't run out of that of its device.
    buffers = [buffer.detach().to("cpu", copy=True) for buffer in module.buffers()]
    # Tensors of the batch are not kept, only their kind.
    kinds = [
        leaf.detach().new_empty(0).requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf
        for leaf in leaves
    ]
    try:
        random = random_state(module.device)
    except ValueError as error:
        raise UnsupportedBatchError(str(error)) from error
    return CapturedBatch(start, random, buffers, values, kinds, structure)


def _encoded(leaf: Any) -> Tensor | None:
    if leaf is None:
        return None
    if isinstance(leaf, Tensor):
        if leaf.layout != torch.strided or leaf.is_quantized:
            raise UnsupportedBatchError(f"the batch holds a tensor of layout {leaf.layout}")
        return leaf.detach().to("cpu", copy=True)  # the training step may write to it
    if type(leaf) in _NUMBERS:
        try:
            return torch.tensor(leaf, dtype=_NUMBERS[type(leaf)])
        except (OverflowError, RuntimeError) as error:
            raise UnsupportedBatchError(f"the batch holds a number that is too large, {leaf}") from error
    if isinstance(leaf, str):
        return torch.tensor(list(leaf.encode("utf-8", "surrogatepass")), dtype=torch.uint8)
    raise UnsupportedBatchError(f"the batch holds a {type(leaf).__name__}, which is no tensor, number or string")


def _kind(value: Tensor | None, leaf: Any) -> Any:
    if isinstance(leaf, Tensor) and value is not None:
        return value.dtype, value.dim(), leaf.requires_grad
    return type(leaf).__name__


def _decoded(value: Tensor | None, leaf: Any) -> Any:
    if value is None:
        return None
    if isinstance(leaf, Tensor):
        return value.to(leaf.device, copy=True).requires_grad_(leaf.requires_grad)
    if isinstance(leaf, str):
        return bytes(value.tolist()).decode("utf-8", "surrogatepass")
    return value.item()

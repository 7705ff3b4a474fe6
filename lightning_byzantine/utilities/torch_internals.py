"""Private names of torch that this package needs, each with its reason; those of torch.distributed are in exchange."""

from contextlib import AbstractContextManager

import torch
from torch import Tensor

# Raised by torch.compile if there is no compiler. Its public base class, RuntimeError, includes errors of other kinds.
from torch._dynamo.exc import BackendCompilerFailed

# Whether a tensor fills its memory without gaps or overlap: DDP then keeps the memory order of a parameter.
from torch._prims_common import is_non_overlapping_and_dense_or_false

# Takes batches apart and puts them together again, named tuples included; there is no public function for it.
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

__all__ = [
    "BackendCompilerFailed",
    "TreeSpec",
    "is_non_overlapping_and_dense_or_false",
    "is_view",
    "separate_symbols",
    "tree_flatten",
    "tree_unflatten",
    "version_of",
]


def is_view(tensor: Tensor) -> bool:
    """Return whether a tensor is a view of another one, as DDP makes gradients views of its buckets."""
    return tensor._is_view()


def version_of(tensor: Tensor) -> int:
    """Return how often a tensor was written to in place; this counter of autograd has no public name."""
    return tensor._version


def separate_symbols() -> AbstractContextManager[None]:
    """Within the block, let ``torch.compile`` use separate symbols for dynamic sizes that happen to be equal.

    Otherwise it recompiles as soon as they differ; ``torch.compile`` has no option for this.
    """
    return torch.fx.experimental._config.patch(use_duck_shape=False)  # type: ignore[attr-defined, no-any-return]

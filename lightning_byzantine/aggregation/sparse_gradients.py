"""Sparse gradients, such as those of ``nn.Embedding(sparse=True)``: dense for the aggregation, and sparse again."""

import torch
from torch import Tensor, nn

__all__ = ["sparse_parameters", "sparsified", "touched_rows"]


def sparse_parameters(module: nn.Module) -> list[str]:
    """Return the names of trainable parameters whose gradients are sparse, by the modules that DDP knows of.

    Example:
        >>> sparse_parameters(nn.Sequential(nn.Embedding(4, 2, sparse=True), nn.Embedding(4, 2)))
        ['0.weight']

    """
    embeddings = [part for part in module.modules() if isinstance(part, nn.Embedding | nn.EmbeddingBag) and part.sparse]
    weights = {id(part.weight) for part in embeddings if part.weight.requires_grad}
    return [name for name, parameter in module.named_parameters() if id(parameter) in weights]


def touched_rows(gradient: Tensor) -> Tensor:
    """Return the rows of which a sparse gradient has values, even if these are 0, [rows] bool.

    Example:
        >>> touched_rows(torch.tensor([[1.0], [0.0], [2.0]]).to_sparse(1))
        tensor([ True, False,  True])

    """
    rows = torch.zeros(len(gradient), dtype=torch.bool, device=gradient.device)
    rows[gradient.coalesce().indices()[0]] = True
    return rows


def sparsified(gradient: Tensor, touched: Tensor) -> Tensor:
    """Return a dense gradient as a sparse one of the touched rows, and of those that are not 0.

    Args:
        gradient: [rows, ..].
        touched: [rows] bool.

    Example:
        >>> sparse = sparsified(torch.tensor([[0.0], [0.0], [7.0]]), touched=torch.tensor([True, False, False]))
        >>> sparse.indices(), sparse.values().flatten()
        (tensor([[0, 2]]), tensor([0., 7.]))

    """
    rows = (touched.to(gradient.device) | gradient.flatten(1).any(dim=1)).nonzero().T
    values = gradient[rows[0]]
    return torch.sparse_coo_tensor(rows, values, gradient.shape, is_coalesced=True, check_invariants=False)

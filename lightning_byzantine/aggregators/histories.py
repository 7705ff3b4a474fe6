"""What a rule remembers about the workers from step to step."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_byzantine.aggregators.middles import middle_of

__all__ = ["Histories"]

# Averages are over about the last 50 steps.
_LONGEST_MEMORY = 0.98
# A squared deviation counts for at most this many usual ones, so that a single step is forgotten.
_MOST = 100.0


class Histories(nn.Module):
    """Averages over the last steps of how the workers deviated in each segment; part of the rule's ``state_dict``.

    With inner products A_ij of the workers' deviations in one step, and med the median of A_ii::

        P <- b P + (1 - b) A_ij s_i s_j / med,    s_i = min(1, sqrt(med / A_ii))
        Q <- b Q + (1 - b) min(A_ii / med, 100)
        b = min(0.98, n / (n + 1)) after n steps, of the worker with fewer in P

    so that no worker counts for more than usual in P, and large deviations show in Q.

    Example:
        >>> histories = Histories()
        >>> deviations = torch.tensor([[1.0], [-1.0], [4.0]], dtype=torch.float64)
        >>> products, squares = histories.updated(["weight"], torch.arange(3), deviations @ deviations.T[None], 3)
        >>> products[0], squares[0]
        (tensor([[ 1., -1.,  1.],
                [-1.,  1., -1.],
                [ 1., -1.,  1.]], dtype=torch.float64), tensor([ 1.,  1., 16.], dtype=torch.float64))

    """

    def __init__(self) -> None:
        super().__init__()
        # [m + 2, m] each: P, Q, and the number of each worker's steps.
        self._by_name: dict[str, Tensor] = {}

    def clear(self) -> None:
        """Forget everything."""
        self._by_name.clear()

    def updated(
        self, names: Sequence[str], workers: Tensor, products: Tensor, num_workers: int
    ) -> tuple[Tensor, Tensor]:
        """Add a step, and return P, [s, n, n], and Q, [s, n], which may be what is remembered: don't write to them.

        Args:
            names: of the s segments.
            workers: [n], indices of those whose rows can be used; what is known about the others stays as it was.
            products: [s, n, n] float64, A.
            num_workers: m, the number of all workers.

        Raises:
            ValueError: if m has changed.

        """
        states = torch.stack([self._of(name, num_workers) for name in names])
        # To index by all workers would be to copy.
        present = slice(None) if torch.equal(workers, torch.arange(num_workers)) else workers
        averages, sizes, num_steps = states[:, :-2], states[:, -2], states[:, -1, present]
        pairs = (slice(None), workers[:, None], workers) if present is workers else slice(None)
        squares = products.diagonal(dim1=1, dim2=2).clamp(min=0)
        usual = middle_of(squares, torch.ones_like(squares, dtype=torch.bool))
        shares = torch.where(squares > usual, (usual / squares).sqrt(), 1.0)
        # Where most workers agree, the others' direction says nothing.
        seen = (products * shares[:, None]).mul_(shares[..., None]).div_(usual[..., None]).nan_to_num_(0, 0, 0)
        multiples = torch.where(squares > 0, (squares / usual).clamp(max=_MOST), 0.0)
        # That of each worker alone: the first steps of one whose rows could not be used so far count in full.
        memory = (num_steps / (num_steps + 1)).clamp(max=_LONGEST_MEMORY)
        averages[pairs] = seen.lerp_(averages[pairs], memory[:, None].minimum(memory[..., None]))
        sizes[:, present] = torch.lerp(multiples, sizes[:, present], memory)
        states[:, -1, present] += 1
        self._by_name.update(zip(names, states, strict=True))
        return averages[pairs], sizes[:, present]

    def _of(self, name: str, num_workers: int) -> Tensor:
        state = self._by_name.get(name)
        if state is None:
            return torch.zeros(num_workers + 2, num_workers, dtype=torch.float64)
        if state.shape[1] != num_workers:
            raise ValueError(
                "vectors must have as many rows as in the previous calls, of whose workers the rule remembers how they"
                f" deviated, got {num_workers} after {state.shape[1]}: use one rule for each number of workers"
            )
        return state

    def get_extra_state(self) -> dict[str, Tensor]:
        """Return P, Q and n of each segment in one tensor, [m + 2, m], by its name."""
        return dict(self._by_name)  # each step has new tensors

    def set_extra_state(self, state: Mapping[str, Tensor] | None) -> None:
        """Restore what :meth:`get_extra_state` returned."""
        self._by_name = {name: of_segment.cpu().clone() for name, of_segment in (state or {}).items()}

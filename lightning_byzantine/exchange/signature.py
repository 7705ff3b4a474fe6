"""Names, dtypes and shapes of tensors that must be the same on all ranks."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_byzantine.errors import ranks_in_words

__all__ = ["Signature"]

_LONGEST = 1 << 24  # no other rank may fill this one's memory


class Signature:
    """Names, dtypes and shapes of tensors, to compare them between ranks.

    Args:
        tensors: by name.

    Attributes:
        digest: 8 bytes, [8] uint8, the same for the same signatures.

    Example:
        >>> first, second = Signature({"mean": torch.zeros(2)}), Signature({"mean": torch.ones(2)})
        >>> torch.equal(first.digest, second.digest)
        True

    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._kinds = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
        lines = (
            f"{name}\n{str(tensor.dtype).removeprefix('torch.')} of shape {list(tensor.shape)}"
            for name, tensor in tensors.items()
        )
        self._text = "\n".join(lines).encode()
        self.digest = torch.frombuffer(bytearray(sha256(self._text).digest()[:8]), dtype=torch.uint8)

    def is_of(self, tensors: Mapping[str, Tensor]) -> bool:
        """Return whether this is the signature of these tensors, which is faster than to make another one."""
        return self._kinds == {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}

    def check_same(
        self,
        gather: Callable[[Tensor], Tensor],
        device: torch.device,
        voters: Callable[[], Sequence[int]] = lambda: range(dist.get_world_size()),
    ) -> None:
        """Compare with all other ranks, which must call this as well.

        Args:
            gather: returns the flat tensors of ranks as [v, n].
            device: where it takes them from.
            voters: returns which v ranks these are.

        Raises:
            ValueError: on every rank, if they differ; names the tensor and the ranks.

        """
        lengths = gather(torch.tensor([len(self._text)], device=device)).flatten()
        ranks = voters()
        if lengths.max() > _LONGEST:
            raise ValueError(
                f"The names and shapes of a rank's buffers must have at most {_LONGEST} bytes, got {int(lengths.max())}"
                f" on rank {ranks[int(lengths.argmax())]}"
            )
        padded = self._text.ljust(int(lengths.max()), b"\n")
        texts = gather(torch.frombuffer(bytearray(padded + b"\n"), dtype=torch.uint8).to(device)).cpu()
        reports = [_parsed(bytes(text.tolist())) for text in texts]
        ranks = voters()
        for name in dict.fromkeys(name for report in reports for name in report):
            found = [report.get(name, "missing") for report in reports]
            if len(set(found)) > 1:
                raise ValueError(_message(name, dict(zip(ranks, found, strict=True))))


def _parsed(text: bytes) -> dict[str, str]:
    lines = text.decode(errors="replace").rstrip("\n").split("\n")
    return dict(zip(lines[::2], lines[1::2], strict=False))


def _message(name: str, found: dict[int, str]) -> str:
    kinds = [kind for kind, _ in Counter(found.values()).most_common()]
    ranks = {kind: [rank for rank, other in found.items() if other == kind] for kind in kinds}
    differing = ", ".join(f"{kind} on {ranks_in_words(ranks[kind])}" for kind in reversed(kinds))
    return (
        f"The buffer {name[:200]!r} must have the same shape and dtype on all ranks, got {differing}. Keep what depends"
        " on a rank's own data in an attribute that is not a buffer, or let every rank have its own buffers with"
        " `broadcast_buffers=False` among the strategy's arguments."
    )

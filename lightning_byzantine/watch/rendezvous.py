"""A small collective before others, by which ranks make sure that they are in the same one."""

from datetime import timedelta
from zlib import crc32

import torch
import torch.distributed as dist

__all__ = ["Rendezvous"]


class Rendezvous:
    """Lets ranks meet, and tells whether all have come for the same.

    Ranks that are in different collectives take what was sent in one for something else; if sizes differ, gloo ends the
    process. What is exchanged here always has the same size, and goes over connections of its own, on CPUs over gloo.

    Args:
        timeout: how long to wait for other ranks.

    """

    def __init__(self, timeout: timedelta) -> None:
        self._group = dist.new_group(backend="gloo", timeout=timeout)

    def meet(self, place: str, flag: bool = False) -> tuple[bool, bool]:
        """Wait until all ranks are here.

        Args:
            place: what this rank has come for.
            flag: what to tell the others.

        Returns:
            Whether all ranks have come for the same, and whether any has set its flag.

        """
        number = crc32(place.encode())
        values = torch.tensor([number, -number, flag])
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self._group)
        most, minus_least, any_flag = values.tolist()
        return most == -minus_least, bool(any_flag)

    def close(self) -> None:
        """Close the connections."""
        dist.destroy_process_group(self._group)

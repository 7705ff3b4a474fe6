"""This process's connections to other ranks, which can be cut to end a collective that would never complete."""

import os
import socket
import stat
from collections.abc import Collection, Iterator
from contextlib import suppress

import torch.distributed as dist

from lightning_byzantine.exchange.torch_internals import Store

__all__ = ["abort_collectives", "connected_ports", "port_of"]


def abort_collectives(ports: Collection[int], port_of_store: int | None) -> None:
    """Let the collectives that this process waits in fail, now and for ever.

    gloo has no way to abort one: its wait ends when it completes, when time runs out, or when a connection breaks. So
    this breaks the connections to other ranks, except for those to the store.

    Args:
        ports: the local ports of all other ranks' connections, as :func:`connected_ports` returned them there.
        port_of_store: the port at which the store answers; None if it has none.

    """
    if dist.is_initialized() and dist.get_backend() == "nccl":
        assert dist.group.WORLD is not None
        dist.group.WORLD.abort()
    for connection in _connections():
        near, far = connection.getsockname()[1], connection.getpeername()[1]
        if far in ports and port_of_store not in (near, far):
            with suppress(OSError):  # the other end has just closed it
                connection.shutdown(socket.SHUT_RDWR)


def connected_ports() -> list[int]:
    """Return the local port of each TCP connection of this process."""
    return [connection.getsockname()[1] for connection in _connections()]


def port_of(store: Store) -> int | None:
    """Return the port at which a store answers; None if it has none, like a file."""
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    return getattr(store, "port", None)


def _connections() -> Iterator[socket.socket]:
    for name in os.listdir("/dev/fd"):
        with suppress(OSError):  # closed meanwhile, or not connected
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                with socket.socket(fileno=os.dup(int(name))) as connection:  # closes its own descriptor only
                    is_tcp = connection.family in (socket.AF_INET, socket.AF_INET6)
                    if is_tcp and connection.type == socket.SOCK_STREAM and connection.getpeername():
                        yield connection

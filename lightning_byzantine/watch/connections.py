"""This process's connections to other ranks, which can be cut to end a collective that would never complete."""

import os
import socket
import stat
from collections.abc import Collection, Iterator
from contextlib import suppress

import torch.distributed as dist

from lightning_byzantine.exchange.torch_internals import Store

__all__ = ["abort_collectives", "connected_ports", "port_of"]


def abort_collectives(own_ports: Collection[int], other_ports: Collection[int]) -> None:
    """Let the collectives that this process waits in fail, now and for ever.

    gloo has no way to abort one: its wait ends when it completes, when time runs out, or when a connection breaks. So
    this breaks the connections between ranks.

    Args:
        own_ports: the local ports of this rank's connections, as :func:`connected_ports` has returned them.
        other_ports: those of other ranks.

    """
    if dist.is_initialized() and "nccl" in dist.get_backend():  # or "cpu:gloo,cuda:nccl"
        assert dist.group.WORLD is not None
        dist.group.WORLD.abort()
    for connection in _connections():
        # Other ranks can state any port, so only what this rank had when the run began is shut.
        if connection.getsockname()[1] in own_ports and connection.getpeername()[1] in other_ports:
            with suppress(OSError):  # the other end has just closed it
                connection.shutdown(socket.SHUT_RDWR)


def connected_ports(besides: int | None) -> list[int]:
    """Return the local port of each TCP connection of this process, except for those to and from one port."""
    ports = [(connection.getsockname()[1], connection.getpeername()[1]) for connection in _connections()]
    return [near for near, far in ports if besides not in (near, far)]


def port_of(store: Store) -> int | None:
    """Return the port at which a store answers; None if it has none, like a file."""
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    return getattr(store, "port", None)


def _connections() -> Iterator[socket.socket]:
    for name in os.listdir("/dev/fd"):
        with suppress(OSError):  # closed meanwhile, or not connected
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            # A socket object applies the process's default timeout to what it is made of, which others use.
            is_blocking = os.get_blocking(int(name))
            with socket.socket(fileno=os.dup(int(name))) as connection:  # closes its own descriptor only
                os.set_blocking(connection.fileno(), is_blocking)
                is_tcp = connection.family in (socket.AF_INET, socket.AF_INET6)
                if is_tcp and connection.type == socket.SOCK_STREAM and connection.getpeername():
                    yield connection

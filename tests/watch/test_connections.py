"""Only connections between ranks are shut, and no socket of the process changes."""

import os
import socket
from collections.abc import Iterator
from unittest import mock

import pytest
import torch.distributed as dist

from lightning_byzantine.watch.connections import abort_collectives, connected_ports


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
        with near, far:
            yield near, far


def is_open(near: socket.socket, far: socket.socket) -> bool:
    far.settimeout(0.2)
    try:
        near.sendall(b"?")
        return far.recv(1) == b"?"
    except OSError:
        return False


def test_shuts_what_leads_from_one_rank_to_another(pair: tuple[socket.socket, socket.socket]) -> None:
    near, far = pair[0].getsockname()[1], pair[1].getsockname()[1]
    assert {near, far} <= set(connected_ports(besides=None))
    assert not {near, far} & set(connected_ports(besides=far))
    for own, others in [([], [near, far]), ([near, far], []), ([near], [near]), ([far], [far])]:
        abort_collectives(own, others)
        assert is_open(*pair)
    abort_collectives([near], [far])
    assert not is_open(*pair)


@pytest.mark.parametrize(("backend", "aborts"), [("nccl", 1), ("cpu:gloo,cuda:nccl", 1), ("gloo", 0)])
def test_aborts_nccl_beside_other_backends_too(monkeypatch: pytest.MonkeyPatch, backend: str, aborts: int) -> None:
    group = mock.Mock()
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda: backend)
    monkeypatch.setattr(dist, "group", mock.Mock(WORLD=group))
    abort_collectives([], [])
    assert group.abort.call_count == aborts


def test_sockets_stay_blocking(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = socket.socketpair()
    with first, second:
        socket.setdefaulttimeout(5)
        try:
            connected_ports(besides=None)
        finally:
            socket.setdefaulttimeout(None)
        assert os.get_blocking(first.fileno())

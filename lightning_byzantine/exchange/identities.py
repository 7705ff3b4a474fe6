"""Which machine each process runs on."""

import socket
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_byzantine.exchange.collectives import gather

__all__ = ["Identity", "gather_identities"]

_LENGTH = 256


@dataclass(frozen=True)
class Identity:
    """The machine and device that a process runs on.

    Args:
        host: host name.
        device: the device; on CUDA with name and UUID.

    """

    host: str
    device: str


def gather_identities(device: torch.device) -> list[Identity]:
    """Return every rank's identity, on every rank; one collective.

    Ranks report their own, which can't be verified. Each report is cut to 256 bytes, and characters that are not
    printable are removed.

    Args:
        device: where this rank trains.

    """
    own = f"{socket.gethostname()}\n{device}"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        own += f" {properties.name} {properties.uuid}"
    sent = torch.frombuffer(bytearray(own.encode()[:_LENGTH].ljust(_LENGTH, b"\0")), dtype=torch.uint8)
    return [_parse(received) for received in gather(sent.to(device))]


def _parse(received: Tensor) -> Identity:
    host, _, device = bytes(received.tolist()).decode(errors="replace").partition("\n")
    return Identity(_printable(host), _printable(device))


def _printable(text: str) -> str:
    return "".join(character for character in text if character.isprintable()) or "unknown"

"""How numbers get from the CPU to the device: many lists in one copy, and nobody waits for it.

Owns the packing. Knows nothing about what the numbers mean. A copy from ordinary memory would make the CPU wait until
the device has done all that it was given before; one from pinned memory takes its place in the line.
"""

from collections.abc import Sequence

import torch


def send(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the CPU on the device: there at once if that is the CPU, else after all that it has to do before."""
    if device.type != "cuda":
        return host
    return pinned(host, device).to(device, non_blocking=True)


def pinned(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the CPU where a copy to the device can begin without anybody waiting: itself if it lies there.

    It may be let go of at once: PyTorch gives pinned memory to nobody else before the copies from it are done, on
    whatever streams they were queued.
    """
    return host.pin_memory() if device.type == "cuda" else host


class Packing:
    """Lists of integers that go to the device in one copy: `add` each, `send` once, and find each under its name."""

    def __init__(self) -> None:
        self._numbers: list[int] = []
        self._spans: dict[str, tuple[int, int]] = {}

    def add(self, name: str, numbers: Sequence[int]) -> None:
        start = len(self._numbers)
        self._numbers += numbers
        self._spans[name] = start, len(self._numbers)

    def host(self) -> torch.Tensor:
        """All of them, one list after another: (numbers,) int64 on the CPU."""
        return torch.tensor(self._numbers, dtype=torch.int64)

    def parts(self, packed: torch.Tensor) -> dict[str, torch.Tensor]:
        """Each list, as a view of a tensor that begins with what `host` gave."""
        return {name: packed[start:stop] for name, (start, stop) in self._spans.items()}

    def send(self, device: torch.device) -> dict[str, torch.Tensor]:
        """Each list on the device, int64."""
        return self.parts(send(self.host(), device))

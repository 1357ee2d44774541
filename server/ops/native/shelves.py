"""Memory for weights that every step reads as a whole: side by side on huge pages, for which one alone is too small.

Owns the shelves that are not full. Knows nothing about what lies there. A shelf is freed with the last tensor on it.
"""

import threading

import torch

from server.ground.heap import ask_for_huge_pages

_SHELF_BYTES = 64 << 20  # above what malloc keeps for other uses; of a page that nobody writes to there is nothing
_ALIGNED_BYTES = 64  # a line of the cache


class Shelves:
    """Room for tensors of the CPU. Safe for many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._shelf = torch.empty(0, dtype=torch.uint8)
        self._num_used = 0

    def kept(self, tensor: torch.Tensor) -> torch.Tensor:
        """A dense copy of it."""
        room = self._room(tensor.numel() * tensor.element_size())
        return room.view(tensor.dtype).view(tensor.shape).copy_(tensor)

    def _room(self, num_bytes: int) -> torch.Tensor:
        with self._lock:
            if self._num_used + num_bytes > len(self._shelf):
                self._shelf = torch.empty(max(num_bytes, _SHELF_BYTES), dtype=torch.uint8)
                ask_for_huge_pages(self._shelf.data_ptr(), len(self._shelf))
                self._num_used = 0
            first = self._num_used
            self._num_used = -(-(first + num_bytes) // _ALIGNED_BYTES) * _ALIGNED_BYTES
            return self._shelf[first : first + num_bytes]


SHELVES = Shelves()

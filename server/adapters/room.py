"""The device tier as the registry sees it, and the refusal of what could never fit there.

Owns the contract of that tier. Knows nothing about who is resident.
"""

from typing import Protocol

from server.adapters.catalog import Sizes
from server.adapters.host_adapter import HostAdapter
from server.adapters.positions import Reach
from server.ground.errors import AdapterRejected, Conflict


class Device(Protocol):
    """The device tier, as the registry needs it.

    Calls never overlap, but those of `copy` with any others. They come from any thread; `release` comes only for an
    adapter that no running sequence uses.
    """

    @property
    def capacity_bytes(self) -> int:
        """Bytes that adapters may use in all."""

    @property
    def used_bytes(self) -> int:
        """Bytes that adapters use now."""

    @property
    def copied_bytes(self) -> int:
        """Bytes that copies for steps take beside them now."""

    def reserve(self, digest: str, adapter: HostAdapter) -> None:
        """Takes the room for an adapter. Raises NoRoom, and then nothing has changed."""

    def copy(self, digest: str) -> None:
        """Fills the room that was taken, which takes long. Steps and other copies go on meanwhile."""

    def place(self, digest: str) -> int:
        """Makes what was copied resident; returns its slot."""

    def abandon(self, digest: str) -> None:
        """Gives the room that was taken back instead."""

    def release(self, digest: str) -> int:
        """Takes it off again and frees its slot; returns the bytes that became free."""

    def reach(self, slot: int) -> Reach | None:
        """What the adapter of a slot does to a sequence's positions."""

    def resident_bytes(self, adapter: HostAdapter) -> int:
        """The bytes of its rows, those that it shares with others counted."""

    def needed_bytes(self, adapter: HostAdapter) -> int:
        """The bytes that it needs on an empty device: it fits there if, and only if, they are at most the capacity."""


def measure(device: Device, adapter: HostAdapter) -> Sizes:
    """What the adapter takes. Slow: plays an admission through. Raises AdapterRejected for more than the device has."""
    in_bytes = adapter.tensor_bytes, device.resident_bytes(adapter), device.needed_bytes(adapter)
    sizes = Sizes(*in_bytes, adapter.num_virtual_tokens)
    if sizes.needed_bytes > device.capacity_bytes:
        raise never_fits(device, adapter)
    return sizes


def never_fits(device: Device, adapter: HostAdapter) -> AdapterRejected:
    return AdapterRejected(
        f"The adapter needs {device.needed_bytes(adapter)} bytes on the device, whole slabs counted, and "
        f"adapters may use {device.capacity_bytes} in all: start the server with a larger --adapter-memory.",
        param="adapter",
    )


def pinned_full(device: Device, adapter: HostAdapter) -> Conflict:
    return Conflict(
        f"The adapter needs {device.needed_bytes(adapter)} bytes on the device, and pinned adapters leave "
        f"{device.capacity_bytes - device.used_bytes} of {device.capacity_bytes}, in pieces: unpin one with POST "
        f"/v1/adapters/NAME/unpin, or start the server with a larger --adapter-memory.",
        param="adapter",
    )

"""A place's files on their way into an upload of the store.

Owns the checks on the way: sizes before the first byte, ends that come too early, a source that only drips. Knows
nothing about kinds of places, or who waits.
"""

import time
from collections.abc import Callable

from server.adapters.format.content import CONFIG_FILE, CONTENT_FILES, MANIFEST_FILE
from server.adapters.remote.address import Address
from server.adapters.remote.places import Place, check_complete
from server.adapters.store.folder_store import Incoming
from server.ground.errors import SourceFailed, TooLarge

_MAX_BYTES = {CONFIG_FILE: 1 << 20, MANIFEST_FILE: 1 << 20}  # as of an upload's parts
PATIENCE_S = 60.0
MIN_BYTES_PER_S = 1024  # over PATIENCE_S; a slower source would keep its place among the fetches for ever


class Meter:
    """How far a transfer is. Written by its thread, read by any; `check` may raise to end it."""

    def __init__(self, check: Callable[[], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._check = check
        self._clock = clock
        self.bytes_done = 0
        self.bytes_total: int | None = None
        self.begin(None)

    def begin(self, bytes_total: int | None) -> None:
        """The first byte is about to come, of `bytes_total` if they are announced."""
        self.bytes_total = bytes_total
        self._begun_s = self._clock()
        self._measured = (self._begun_s, 0)  # when the pace was looked at last, and how many bytes had come

    def count(self, num_bytes: int) -> None:
        """Takes note of bytes that have come. Raises what `check` raises, and SourceFailed if they come too slowly."""
        self._check()
        self.bytes_done += num_bytes
        since_s, before = self._measured
        waited_s = self._clock() - since_s
        if waited_s < PATIENCE_S:
            return
        if self.bytes_done - before < waited_s * MIN_BYTES_PER_S:
            raise SourceFailed(f"The source sends less than {MIN_BYTES_PER_S} bytes a second: mend it, then try again.")
        self._measured = (self._clock(), self.bytes_done)

    def remaining_s(self) -> float | None:
        """Seconds that the rest takes at the pace so far; None where that cannot be told."""
        if not self.bytes_done or self.bytes_total is None:
            return None
        return (self._clock() - self._begun_s) * (self.bytes_total / self.bytes_done - 1)


def transfer(place: Place, address: Address, incoming: Incoming, meter: Meter) -> None:
    """Writes the content files of a place to an upload. Raises GraftError, and what reading the place raises.

    Sizes that the place announces are held against the upload's limit and the store's room before the first byte.
    """
    check_complete(place, address)
    announced = announced_bytes(place)
    incoming.expect(announced)
    meter.begin(None if None in place.sizes.values() else announced)
    for name in CONTENT_FILES:
        if name in place.sizes:
            _transfer_file(place, name, address, incoming, meter)
    place.check_unchanged()


def announced_bytes(place: Place) -> int:
    """Those of all files, as far as the place announces them."""
    return sum(num_bytes or 0 for num_bytes in place.sizes.values())


def _transfer_file(place: Place, name: str, address: Address, incoming: Incoming, meter: Meter) -> None:
    announced, limit = place.sizes[name], _MAX_BYTES.get(name)
    num_bytes = 0
    with incoming.open_file(name) as target:
        for chunk in place.read(name):
            meter.count(len(chunk))
            num_bytes += len(chunk)
            if limit is not None and num_bytes > limit:
                raise TooLarge(f"{name} of {address} is larger than {limit} bytes.", param="source")
            target.write(chunk)
        if announced is not None and num_bytes != announced:
            raise SourceFailed(f"{address} announced {announced} bytes of {name} and sent {num_bytes}: try again.")

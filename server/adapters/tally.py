"""What thousands of contents come to together, counted in one pass: a scrape asks for it beside the engine.

Owns these sums. Knows nothing about tiers, or who asks.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from server.adapters.catalog import Content


@dataclass(slots=True)
class Tally:
    num_leases: int = 0
    num_residencies: int = 0
    num_loading: int = 0
    num_pinned: int = 0
    num_quarantined: int = 0
    num_sized: int = 0  # that were loaded once, so that their size is known
    sized_bytes: int = 0  # of these on the device

    @property
    def mean_device_bytes(self) -> float | None:
        return self.sized_bytes / self.num_sized if self.num_sized else None


def tally_of(contents: Iterable[Content]) -> Tally:
    tally = Tally()
    for content in contents:
        is_pinned = False
        for copy in content.copies:
            if copy.num_leases:
                tally.num_leases += copy.num_leases
            is_pinned = is_pinned or copy.is_pinned
        if content.sizes is not None:
            tally.num_sized += 1
            tally.sized_bytes += content.sizes.device_bytes
        if is_pinned:
            tally.num_pinned += 1
        if content.is_loading:
            tally.num_loading += 1
        if content.is_quarantined:
            tally.num_quarantined += 1
        if content.num_residencies:
            tally.num_residencies += content.num_residencies
    return tally

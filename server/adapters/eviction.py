"""Which adapter leaves a tier first: what a byte of its place is worth, from its uses and from what a reload costs.

Owns the arithmetic; each tier owns its uses. Knows nothing about bytes, locks or who may not leave at all; no torch.

An adapter's rate of use is estimated by its uses, each counted half after every HALF_LIFE later uses of any adapter:
between counting uses (1 / 0) and looking at the last one only (1 / infinity), as LRFU does (Lee et al., "LRFU: a
spectrum of policies", IEEE Transactions on Computers 50(12), 2001). The rate times the seconds of a reload, over the
bytes, is what is lost by evicting it, per byte won (Cao and Irani, "Cost-aware WWW proxy caching algorithms", USENIX
1997). All rates fade alike, so the order changes by uses only, and is kept as a logarithm that no time can underflow.

What was used only once goes before all that was used more often: a scan over many adapters, each used once, takes the
place of one-time guests and of nobody else.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

HALF_LIFE = 512  # uses; on Zipf's law, scans and shifts of popularity better than 32, 128 and 2048, or near the best
_LEAST_COST_S = 1e-3  # what no reload is cheaper than: finding room, a step's wait


class Worth(NamedTuple):
    """What evicting an adapter loses. The least goes first."""

    is_reused: bool
    log_rate: float  # log2 of seconds per byte, as of the first use of all


@dataclass(slots=True)
class Uses:
    """How often, and how lately, one adapter was used; moments are numbers of uses of any adapter."""

    num: int = 0
    faded: float = 0.0  # their number as of `last`, each halved for every HALF_LIFE uses since
    last: int = 0

    def add(self, now: int) -> None:
        """One more use. `now` never falls."""
        self.num += 1
        self.faded = 1.0 + self.faded * 2.0 ** ((self.last - now) / HALF_LIFE)
        self.last = now

    def worth(self, reload_s: float, num_bytes: int) -> Worth:
        """Of its place, if bringing it back takes `reload_s` and its place is `num_bytes`."""
        cost = max(reload_s, _LEAST_COST_S) * max(self.faded, 1.0) / max(num_bytes, 1)
        return Worth(self.num > 1, self.last / HALF_LIFE + math.log2(cost))

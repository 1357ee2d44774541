"""What the rows of the kernels' benchmark say of its three targets: met, missed where, or not measured.

Owns a row, and the arithmetic from rows to targets. Knows nothing about how a row was measured.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from load_tests.kernel_ways import OURS

MIXED_GAIN = 1.5
LEAST_SHARE = 0.6
NUM_LAUNCHES = 2  # of ours for a group


@dataclass(frozen=True, slots=True)
class Row:
    """One way, for one group and batch. Times are None where nothing was timed, and with `not_served`, which says why
    (`relative_error` too, then)."""

    model: str
    group: str
    batch: str
    way: str
    is_peer: bool
    has_mixed_ranks: bool
    moved_bytes: int
    num_flops: int
    not_served: str | None = None
    relative_error: float | None = None
    is_right: bool | None = None
    group_s: float | None = None
    shrink_s: float | None = None  # of the group, its launches one by one
    expand_s: float | None = None
    copy_share: float | None = None  # of a copy's bandwidth, by `moved_bytes`


@dataclass(frozen=True, slots=True)
class Speeds:
    """What the device does in the same run."""

    copy_bytes_per_s: float
    flops_per_s: float  # of a large product
    launch_s: float  # of a kernel that does nothing, in a CUDA graph

    def is_bound_by_bytes(self, row: Row) -> bool:
        """Whether the bytes take longer than two launches, and longer than the products."""
        bytes_s = row.moved_bytes / self.copy_bytes_per_s
        return bytes_s > max(NUM_LAUNCHES * self.launch_s, row.num_flops / self.flops_per_s)


@dataclass(frozen=True, slots=True)
class Layer:
    """One way and batch: all groups of a layer."""

    model: str
    batch: str
    way: str
    is_peer: bool
    has_mixed_ranks: bool
    moved_bytes: int
    layer_s: float | None  # None where a group has no time, or a wrong result


def layers(rows: Sequence[Row], num_groups: Mapping[str, int]) -> list[Layer]:
    """The sum over the groups of each model; `num_groups` says how many that must be."""
    known: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        known.setdefault((row.model, row.batch, row.way), []).append(row)
    sums = []
    for (model, batch, way), own in known.items():
        times = [row.group_s for row in own if row.group_s is not None and row.is_right]
        is_whole = len(times) == num_groups[model]
        layer_s = sum(times) if is_whole else None
        moved_bytes = sum(row.moved_bytes for row in own)
        sums.append(Layer(model, batch, way, own[0].is_peer, own[0].has_mixed_ranks, moved_bytes, layer_s))
    return sums


def targets(rows: Sequence[Row], num_groups: Mapping[str, int], speeds: Speeds | None) -> dict[str, Any]:
    """Each with `met` (None where nothing was compared), how many comparisons there were, and those that missed."""
    return {
        "no slower than the better peer": _summary(_beside_peers(rows), least=1.0),
        f"{MIXED_GAIN} times the better peer on mixed ranks, by layer": _summary(
            _layers_beside_peers(layers(rows, num_groups)), least=MIXED_GAIN
        ),
        f"{LEAST_SHARE:.0%} of copy bandwidth where bound by bytes": _summary(
            _shares(rows, speeds), least=LEAST_SHARE
        ),
    }  # fmt: skip


Comparison = dict[str, Any]  # with "reached", which is held to the target


def _summary(comparisons: Sequence[Comparison], least: float) -> dict[str, Any]:
    missed = [comparison for comparison in comparisons if comparison["reached"] < least]
    return {
        "met": not missed if comparisons else None, "num_compared": len(comparisons), "num_missed": len(missed),
        "least": min((comparison["reached"] for comparison in comparisons), default=None), "missed": missed,
    }  # fmt: skip


def _beside_peers(rows: Sequence[Row]) -> list[Comparison]:
    """Ours beside the fastest right peer, for each group and batch that one serves; `reached` is how many times ours is
    as fast."""
    peers: dict[tuple[str, str, str], list[tuple[float, str]]] = {}
    for row in rows:
        if row.is_peer and row.is_right and row.group_s is not None:
            peers.setdefault((row.model, row.group, row.batch), []).append((row.group_s, row.way))
    found = []
    for row in rows:
        beside = peers.get((row.model, row.group, row.batch))
        if row.way == OURS and row.group_s is not None and beside:
            peer_s, peer = min(beside)
            found.append({"model": row.model, "group": row.group, "batch": row.batch, "peer": peer,
                          "ours_s": row.group_s, "peer_s": peer_s, "reached": peer_s / row.group_s})  # fmt: skip
    return found


def _layers_beside_peers(sums: Sequence[Layer]) -> list[Comparison]:
    """The same by layer, for batches of mixed ranks."""
    found = []
    for own in sums:
        if own.way != OURS or not own.has_mixed_ranks or own.layer_s is None:
            continue
        beside = [(peer.layer_s, peer.way) for peer in sums
                  if (peer.model, peer.batch, peer.is_peer) == (own.model, own.batch, True)
                  and peer.layer_s is not None]  # fmt: skip
        if beside:
            peer_s, peer = min(beside)
            found.append({"model": own.model, "batch": own.batch, "peer": peer, "ours_s": own.layer_s,
                          "peer_s": peer_s, "reached": peer_s / own.layer_s})  # fmt: skip
    return found


def _shares(rows: Sequence[Row], speeds: Speeds | None) -> list[Comparison]:
    return [
        {"model": row.model, "group": row.group, "batch": row.batch, "reached": row.copy_share}
        for row in rows
        if row.way == OURS and row.copy_share is not None and speeds is not None and speeds.is_bound_by_bytes(row)
    ]

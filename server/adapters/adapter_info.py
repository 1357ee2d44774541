"""What the registry tells of its adapters and of itself: plain values, true for the moment in which they were made.

Owns their fields. Knows nothing about where they come from.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a version was fetched from."""

    source: str
    revision: str | None  # that was read, where the source names one


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """What users are told about an adapter version. What only lowering can tell is None until it was lowered once."""

    name: str
    digest: str  # the version
    versions: tuple[str, ...]  # digests of all versions of the name, the current one last
    method: str | None
    rank: int | None
    num_parameters: int | None
    num_sites: int | None
    content_bytes: int
    host_bytes: int  # that it takes there now, tensors that it shares counted in full; 0 where it is not
    device_bytes: int
    tiers: tuple[str, ...]  # where it is now: of "store", "host", "device"
    num_leases: int
    num_residencies: int  # sequences that run on it now
    num_requests: int  # leases since the server's start: one per sequence that was asked for
    last_used: int | None  # Unix time of the last one; None before the first
    is_pinned: bool
    created: int  # Unix time
    base_model: str | None
    base_fingerprint: str | None  # of the base that it was made for or, where nobody said, validated against
    warnings: tuple[str, ...]
    is_refused: bool  # whether requests for it are, because it seems to be of another base and the server is strict
    is_quarantined: bool  # whether requests for it are, because the output has overflowed with it too often
    source: str  # "store", or the folder that it is read from in place
    folder: Path  # that its files are in now
    provenance: Provenance | None  # of one that was fetched
    owner: str | None = None  # whose it is; None: the operator's


@dataclass(frozen=True, slots=True)
class Registered:
    """The end of an upload: what the name means now, whether that is new, and the digest that it meant before."""

    info: AdapterInfo
    is_new: bool
    replaced: str | None = None  # none before, or the same


@dataclass(frozen=True, slots=True)
class Loaded:
    """The end of a load by hand: where the version is now, and how long it took."""

    info: AdapterInfo
    duration_s: float


@dataclass(frozen=True, slots=True)
class RegistryStats:
    """The registry in numbers; the totals count from the start."""

    num_adapters: int
    num_versions: int
    num_leases: int
    num_residencies: int
    num_resident: int
    num_on_host: int
    num_loading: int
    num_pinned: int
    num_quarantined: int
    device_used_bytes: int
    device_capacity_bytes: int
    device_copied_bytes: int  # beside them
    store_bytes: int  # content of the versions in the store that are listed
    host_used_bytes: int
    host_max_bytes: int
    loads_total: int
    load_failures_total: int
    promotions_total: int
    overflows_total: int  # steps in which the output with an adapter overflowed, each adapter counted
    unloads_total: int
    device_evictions_total: int
    host_evictions_total: int
    lookups_total: Mapping[str, int]  # leases of requests, by the best tier that had the adapter: store, host, device
    mean_device_bytes: float | None  # of the adapters whose size is known

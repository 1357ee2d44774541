"""What metrics show of the engine's and the registry's state, asked for once at each scrape.

Owns which number each metric is. Knows nothing about how a scrape is answered.
"""

from collections.abc import Collection, Mapping

from server.adapters.adapter_info import RegistryStats
from server.api.services import Services
from server.api.snapshot import Snapshot
from server.engine.engine import EngineStats
from server.ground.metrics import Moment, Watched


def moment(services: Services, names: Collection[str]) -> Moment:
    """All that a scrape tells of the state, with which of these adapters' names are gone."""
    taken = services.snapshot(names)
    return Moment(_values(services, taken), taken.adapters, taken.gone, taken.families)


def _values(services: Services, taken: Snapshot) -> Mapping[str, Watched]:
    """By the name of the metric."""
    return {
        **_of_engine(taken.engine),
        **_of_registry(taken.registry),
        "graft_adapter_places": _num_places(taken.registry),
        "graft_adapter_fetches_running": taken.num_fetching,
        "graft_adapter_fetches_waiting": taken.num_to_fetch,
        "graft_store_quota_bytes": services.store_quota_bytes or 0,
        "graft_engine_up": services.engine.is_alive,
        "graft_draining": services.engine.is_draining,
        "graft_build_info": {(services.version,): 1},
    }


def _of_engine(engine: EngineStats) -> Mapping[str, Watched]:
    return {
        "graft_sequences_running": engine.num_running,
        "graft_sequences_waiting": engine.num_waiting,
        "graft_sequences_short_of_room": engine.num_short,
        "graft_sequences_overflowed_total": engine.num_overflown,
        "graft_kv_blocks": engine.num_blocks,
        "graft_kv_blocks_used": engine.num_used_blocks,
        "graft_kv_blocks_kept": engine.num_kept_blocks,
        "graft_kv_usage_ratio": engine.num_used_blocks / max(engine.num_blocks, 1),
        "graft_kv_cache_info": {(str(engine.block_size), str(engine.num_blocks)): 1},
        "graft_steps_total": engine.num_steps,
        "graft_preemptions_total": engine.num_preemptions,
        "graft_adapter_rotations_total": engine.num_rotations,
        "graft_steps_shed_total": engine.num_shed,
        "graft_prefix_cache_queries_total": engine.num_queried_tokens,
        "graft_prefix_cache_hits_total": engine.num_hit_tokens,
    }


def _of_registry(registry: RegistryStats) -> Mapping[str, Watched]:
    return {
        "graft_adapters": registry.num_adapters,
        "graft_adapters_on_host": registry.num_on_host,
        "graft_adapters_resident": registry.num_resident,
        "graft_adapters_loading": registry.num_loading,
        "graft_adapters_pinned": registry.num_pinned,
        "graft_adapters_quarantined": registry.num_quarantined,
        "graft_adapter_leases": registry.num_leases,
        "graft_adapter_lookups_total": {(tier,): num for tier, num in registry.lookups_total.items()},
        "graft_adapter_loads_total": registry.loads_total,
        "graft_adapter_load_failures_total": registry.load_failures_total,
        "graft_adapter_promotions_total": registry.promotions_total,
        "graft_adapter_overflows_total": registry.overflows_total,
        "graft_adapter_unloads_total": registry.unloads_total,
        "graft_adapter_device_evictions_total": registry.device_evictions_total,
        "graft_adapter_host_evictions_total": registry.host_evictions_total,
        "graft_store_bytes": registry.store_bytes,
        "graft_adapter_host_bytes": registry.host_used_bytes,
        "graft_adapter_host_capacity_bytes": registry.host_max_bytes,
        "graft_adapter_device_bytes": registry.device_used_bytes,
        "graft_adapter_device_capacity_bytes": registry.device_capacity_bytes,
        "graft_adapter_copied_bytes": registry.device_copied_bytes,
    }


def _num_places(registry: RegistryStats) -> int:
    """Adapters on the device, and how many more have room at the mean size; before any size is known, one at least."""
    if not registry.mean_device_bytes:
        return registry.num_resident + 1
    free_bytes = registry.device_capacity_bytes - registry.device_used_bytes
    return registry.num_resident + int(free_bytes / registry.mean_device_bytes)

"""Thousands of adapters cycled through a registry: what its metrics have then."""

from pathlib import Path

import pytest
import torch

from server.adapters.host import HostTier
from server.adapters.registry import Registry
from server.adapters.store.folder_store import Record, Store
from server.ground.adapter_series import SERIES_PER_ADAPTER
from server.ground.metrics import Metrics, Moment
from server.ground.vllm_names import VllmNames
from tests.adapters.folders import incoming_from, load_folder, write_folder
from tests.adapters.test_registry import ROW_BYTES, Table

CAP = 50


def filled(root: Path, num_adapters: int) -> Store:
    store = Store(root / "store", create=True)
    for number in range(num_adapters):
        folder = write_folder(root / "made", number)
        with incoming_from(store, folder) as incoming:
            store.put(incoming, f"a{number:05d}", Record(0, "lora", 2, 32, 1), replace=False)
    return store


@pytest.mark.parametrize("num_adapters", [120, pytest.param(5000, marks=pytest.mark.slow)])
@pytest.mark.timeout(3600)
def test_the_series_stay_under_the_cap(tmp_path: Path, num_adapters: int) -> None:
    """The tiers hold more than the cap, and fewer than there are."""
    host, device = HostTier(400 * ROW_BYTES, torch.float32), Table(320)
    registry = Registry(filled(tmp_path, num_adapters), (), host, device, load_folder)
    metrics = Metrics(CAP, VllmNames("base"))

    metrics.look_at(lambda names: Moment(adapters=registry.on_tiers(), gone={*names} - registry.known(names)))
    most = 0
    for number, name in enumerate(registry.names()):
        with registry.lease(name) as lease:
            metrics.adapters.count_sequence([name])
            registry.verify(name)  # waits for its load
            assert registry.admit(lease.version) is not None
            registry.retire(lease.version)
        if number % 20 == 0 or number == num_adapters - 1:
            named = [line for line in metrics.exposition().decode().splitlines() if '="a' in line]
            most = max(most, len(named))
    stats = registry.stats()
    registry.close()
    assert CAP < stats.num_resident < num_adapters
    assert stats.device_evictions_total == num_adapters - stats.num_resident
    assert CAP < most <= CAP * (SERIES_PER_ADAPTER + 1) + 1

"""What an adapter needs on an empty device, the edges of slabs counted: what is accepted can also become resident."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from server.adapters.device.device import DeviceTier
from server.adapters.device.rows import NoRoom, RowAllocator, stride
from server.adapters.format.checkpoint import Checkpoint
from server.adapters.host import HostTier
from server.adapters.host_adapter import HostAdapter
from server.adapters.lowering import lower
from server.adapters.method import Lowered
from server.adapters.registry import Registry
from server.adapters.sources import LocalFolder
from server.adapters.store.folder_store import Store
from server.ground.errors import AdapterRejected
from server.model.base import Base
from server.model.pretrained import BaseOptions
from server.model.quantize import Quantization
from tests.adapters.random_edits import random_adapter
from tests.api.adapter_files import lora_files

REQUESTS = st.lists(st.tuples(st.integers(1, 100), st.integers(1, 40)), min_size=1, max_size=8)


@given(requests=REQUESTS, slab_elements=st.integers(8, 300))
def test_rows_fit_an_empty_buffer_of_what_is_foretold_and_none_of_a_slab_less(
    requests: list[tuple[int, int]], slab_elements: int
) -> None:
    needed = RowAllocator(0, slab_elements).elements_alone(requests)
    assert needed % slab_elements == 0
    assert needed >= sum(stride(width) * num for width, num in requests)
    buffer = RowAllocator(needed, slab_elements)
    for width, num in requests:
        assert len(buffer.allocate(width, num)) == num
    assert not RowAllocator(needed - 1, slab_elements).can_allocate(requests)


def test_what_else_lies_in_the_buffer_does_not_count() -> None:
    buffer = RowAllocator(1000, 100)
    alone = buffer.elements_alone([(8, 30), (40, 3)])
    buffer.allocate(8, 100)
    assert buffer.elements_alone([(8, 30), (40, 3)]) == alone
    assert buffer.num_used_rows == 100


@pytest.fixture(scope="module")
def base(tiny_llama: Path) -> Base:
    return Base.load(BaseOptions(str(tiny_llama), Quantization.NONE, torch.float32))


def tier(base: Base, max_bytes: int) -> DeviceTier:
    return DeviceTier(base.sites, max_bytes, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("seed", range(6))
def test_an_adapter_fits_if_and_only_if_the_bytes_it_needs_are_there(base: Base, seed: int) -> None:
    host = HostTier(1 << 30, torch.float32)
    adapter = host.put("one", random_adapter(base.sites.by_path.values(), seed, max_rank=1 + 3 * seed))
    num_bytes = tier(base, 8 << 20).resident_bytes(adapter)
    num_fitting = 0
    for step in range(-4, 40):
        device = tier(base, num_bytes + step * num_bytes // 32)
        fits = device.needed_bytes(adapter) <= device.capacity_bytes
        assert device.needed_bytes(adapter) >= device.resident_bytes(adapter) == num_bytes
        assert _is_admitted(device, adapter) == fits
        num_fitting += fits
    assert 0 < num_fitting < 40


def _is_admitted(device: DeviceTier, adapter: HostAdapter) -> bool:
    try:
        device.admit("one", adapter)
    except NoRoom:
        return False
    return True


# The registry


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "legal"
    folder.mkdir()
    files = lora_files(1)
    (folder / "adapter_config.json").write_bytes(files.config)
    (folder / "adapter_model.safetensors").write_bytes(files.weights)
    return folder


@pytest.fixture
def small(base: Base, folder: Path) -> Iterator[Callable[..., Registry]]:
    """Registries on a device that holds the rows of the adapter in `folder`, but not the slabs that they need."""
    opened: list[Registry] = []

    def load(path: Path) -> Lowered:
        return lower(Checkpoint.open(path), base.sites.by_path)

    def make(store: Store, *sources: LocalFolder) -> Registry:
        host = HostTier(1 << 30, torch.float32)
        device = tier(base, tier(base, 8 << 20).resident_bytes(host.put("probe", load(folder))) + 64)
        host.drop("probe")
        opened.append(Registry(store, sources, host, device, load))
        return opened[-1]

    yield make
    for registry in opened:
        registry.close()


def test_an_upload_that_could_never_become_resident_is_refused_with_both_numbers(
    small: Callable[..., Registry], folder: Path, tmp_path: Path
) -> None:
    store = Store(tmp_path / "store", create=True)
    registry = small(store)
    with store.incoming() as incoming:
        for path in folder.iterdir():
            with incoming.open_file(path.name) as file:
                file.write(path.read_bytes())
        with pytest.raises(
            AdapterRejected, match=r"needs \d+ bytes on the device.*may use \d+ in all.*--adapter-memory"
        ):
            registry.register(incoming, "legal", replace=False)
    assert store.names() == ()
    assert registry.stats().num_on_host == 0


def test_one_that_lies_in_the_store_or_in_place_is_refused_when_it_is_loaded(
    small: Callable[..., Registry], folder: Path, tmp_path: Path
) -> None:
    store = Store(tmp_path / "store", create=True)
    store.add_folder(folder, "stored")
    registry = small(store, LocalFolder("named", folder))
    for name in ("stored", "named"):
        with pytest.raises(AdapterRejected, match="--adapter-memory"):
            registry.verify(name)
    stats = registry.stats()
    assert (stats.num_on_host, stats.num_resident, stats.num_leases) == (0, 0, 0)
    assert registry.check_integrity() == ()

"""Replaced versions: the last few stay, what is leased stays, and the rest frees its disk."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from server.adapters.format.content import WEIGHTS_FILE
from server.adapters.host import HostTier
from server.adapters.registry import AdapterInfo, Registry
from server.adapters.store.folder_store import Store
from server.ground.errors import AdapterNotFound, GraftError
from tests.adapters.folders import incoming_from, load_folder, write_folder
from tests.adapters.test_registry import ROW_BYTES, Table

Upload = Callable[[int], AdapterInfo]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store", create=True)


@pytest.fixture
def registry(store: Store) -> Iterator[Registry]:
    """One that keeps two versions, on a host that holds a single adapter: older ones must be read again."""
    with ExitStack() as closing:
        host = HostTier(4 * ROW_BYTES, torch.float32)
        registry = Registry(store, (), host, Table(100), load_folder, max_versions=2)
        closing.callback(registry.close)
        yield registry


@pytest.fixture
def upload(registry: Registry, store: Store, tmp_path: Path) -> Upload:
    def replace(seed: int) -> AdapterInfo:
        folder = write_folder(tmp_path / f"made-{seed}", seed)
        with incoming_from(store, folder) as incoming:
            return registry.register(incoming, "legal", replace=True).info

    return replace


def on_disk(store: Store) -> list[str]:
    """The versions whose files take room, work in progress included."""
    return sorted(path.parent.name for path in store.root.rglob(WEIGHTS_FILE))


def test_the_last_versions_stay_and_older_ones_go(registry: Registry, store: Store, upload: Upload) -> None:
    digests = [upload(seed).digest for seed in range(4)]
    info = registry.describe("legal")
    assert info.versions == tuple(digests[2:])
    assert tuple(version.digest for version in store.versions("legal")) == info.versions
    assert on_disk(store) == sorted(digests[2:])
    registry.verify(f"legal@{digests[2]}")
    with pytest.raises(AdapterNotFound, match="has no version"):
        registry.lease(f"legal@{digests[1]}")
    assert registry.stats().num_versions == 2
    assert registry.check_integrity() == ()


def test_the_answer_to_the_upload_lists_what_is_left(upload: Upload) -> None:
    digests = []
    for seed in range(3):
        info = upload(seed)
        digests.append(info.digest)
    assert info.versions == tuple(digests[1:])


def test_a_leased_version_stays_and_goes_with_a_later_replacement(
    registry: Registry, store: Store, upload: Upload
) -> None:
    first = upload(0).digest
    with registry.lease(f"legal@{first}"):
        digests = [upload(seed).digest for seed in (1, 2)]
        assert registry.describe("legal").versions == (first, *digests)
        registry.verify(f"legal@{first}")
    assert first in on_disk(store)
    last = upload(3).digest
    assert registry.describe("legal").versions == (digests[1], last)
    assert on_disk(store) == sorted((digests[1], last))
    assert registry.check_integrity() == ()


def test_coming_back_to_an_older_version_counts_as_its_newest_use(registry: Registry, upload: Upload) -> None:
    first, second, first_again, third = (upload(seed).digest for seed in (0, 1, 0, 2))
    assert first == first_again
    assert registry.describe("legal").versions == (first, third)
    assert second not in registry.describe("legal").versions


def test_content_that_another_name_has_stays_with_it(
    registry: Registry, store: Store, upload: Upload, tmp_path: Path
) -> None:
    first = upload(0).digest
    with incoming_from(store, tmp_path / "made-0") as incoming:
        registry.register(incoming, "twin", replace=False)
    for seed in (1, 2):
        upload(seed)
    assert first not in registry.describe("legal").versions
    assert registry.verify("twin").digest == first
    assert registry.check_integrity() == ()


def test_a_disk_that_refuses_costs_a_warning_and_not_the_upload(
    registry: Registry,
    store: Store,
    upload: Upload,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(name: str, digest: str) -> None:
        raise GraftError("the disk says no")

    digests = [upload(seed).digest for seed in (0, 1)]
    with monkeypatch.context() as broken:
        broken.setattr(store, "discard_version", refuse)
        digests.append(upload(2).digest)
    assert "is not removed: the disk says no" in caplog.text
    assert registry.describe("legal").versions == tuple(digests)
    upload(3)
    assert len(registry.describe("legal").versions) == 2


def test_nothing_is_pruned_where_no_number_was_given(store: Store, tmp_path: Path) -> None:
    with ExitStack() as closing:
        registry = Registry(store, (), HostTier(100 * ROW_BYTES, torch.float32), Table(100), load_folder)
        closing.callback(registry.close)
        for seed in range(5):
            with incoming_from(store, write_folder(tmp_path / f"made-{seed}", seed)) as incoming:
                registry.register(incoming, "legal", replace=True)
        assert len(registry.describe("legal").versions) == len(on_disk(store)) == 5
    assert os.listdir(store.root / ".incoming") == []

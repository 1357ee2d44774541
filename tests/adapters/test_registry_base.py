"""The registry and the base: what a store of another base is worth, and what strictness refuses."""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from server.adapters.format.content import MANIFEST_FILE
from server.adapters.host import HostTier
from server.adapters.registry import Registered, Registry
from server.adapters.served_base import ServedBase
from server.adapters.sources import FolderSource, Source
from server.adapters.store.folder_store import Store
from server.ground.errors import AdapterNotFound, AdapterRejected
from tests.adapters.folders import incoming_from, load_folder, write_folder
from tests.adapters.test_registry import ROW_BYTES, Table

OURS, OTHER = "a" * 64, "b" * 64
TINY = ServedBase(("tiny-base",), OURS)  # as the folders' configs name it
TUNED = ServedBase(("tiny-base",), OTHER)  # another of the same name and shapes
FOREIGN = ServedBase(("foreign",), OTHER)


def strict(base: ServedBase) -> ServedBase:
    return ServedBase(base.names, base.fingerprint, is_strict=True)


Open = Callable[..., Registry]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store", create=True)


@pytest.fixture
def opened(store: Store) -> Iterator[Open]:
    """Registries on one store, each with a base of its own."""
    with ExitStack() as closing:

        def make(base: ServedBase, *sources: Source) -> Registry:
            host = HostTier(100 * ROW_BYTES, torch.float32)
            registry = Registry(store, sources, host, Table(100), load_folder, base=base)
            closing.callback(registry.close)
            return registry

        yield make


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "made", seed=1)


def upload(registry: Registry, store: Store, folder: Path, fingerprint: str | None = None) -> Registered:
    with incoming_from(store, folder) as incoming:
        return registry.register(incoming, "legal", replace=False, base_fingerprint=fingerprint)


def test_an_upload_records_the_base_it_was_validated_against(opened: Open, store: Store, folder: Path) -> None:
    info = upload(opened(TINY), store, folder).info
    assert (info.warnings, info.base_model, info.base_fingerprint, info.is_refused) == ((), "tiny-base", OURS, False)
    (version,) = store.versions("legal")
    assert (version.record.checked_name, version.record.checked_fingerprint) == ("tiny-base", OURS)
    assert version.record.base_fingerprint is None, "nobody said what it was made for"


def test_what_is_said_of_the_base_is_no_part_of_the_version(opened: Open, store: Store, folder: Path) -> None:
    one = upload(opened(TINY), store, folder)
    other = upload(opened(FOREIGN), store, folder, OTHER)
    assert one.info.digest == other.info.digest
    assert (one.is_new, other.is_new) == (True, False)


def test_an_adapter_of_another_name_is_warned_of_wherever_it_is_shown(
    opened: Open, store: Store, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    registry = opened(FOREIGN)
    info = upload(registry, store, folder).info
    (warning,) = info.warnings
    assert "trained on tiny-base" in warning
    assert f"is foreign (fingerprint {OTHER})" in warning
    assert registry.describe("legal") == info
    assert registry.list() == (info,)
    assert not info.is_refused
    with registry.lease("legal") as lease:
        assert lease.has_doubts
    assert warning in caplog.text


def test_a_fingerprint_that_its_maker_gives_decides(opened: Open, store: Store, folder: Path) -> None:
    assert upload(opened(FOREIGN), store, folder, OTHER).info.warnings == ()
    (warning,) = opened(TINY).describe("legal").warnings
    assert OTHER in warning
    assert OURS in warning


def test_a_store_of_another_base_is_warned_of_until_it_is_uploaded_again(
    opened: Open, store: Store, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    upload(opened(TINY), store, folder)
    registry = opened(TUNED)
    (warning,) = registry.describe("legal").warnings
    assert f"stored for tiny-base (fingerprint {OURS})" in warning
    caplog.clear()
    registry.verify("legal")
    assert warning in caplog.text, "at the load, not at every look"
    created = registry.describe("legal").created
    again = upload(registry, store, folder)
    assert not again.is_new
    assert (again.info.warnings, again.info.base_fingerprint, again.info.created) == ((), OTHER, created)
    assert opened(TUNED).describe("legal").warnings == ()


def test_the_same_upload_again_without_news_is_not_loaded_again(opened: Open, store: Store, folder: Path) -> None:
    registry = opened(TINY)
    upload(registry, store, folder)
    registry._load = None  # type: ignore[assignment]  # it would raise
    assert not upload(registry, store, folder).is_new


def test_a_strict_server_refuses_the_upload_and_leaves_nothing(opened: Open, store: Store, folder: Path) -> None:
    registry = opened(strict(FOREIGN))
    for fingerprint, base in ((None, "tiny-base"), (OURS, OURS)):
        with pytest.raises(AdapterRejected, match=f"{base}.*foreign.*{OTHER}.*--strict-base") as caught:
            upload(registry, store, folder, fingerprint)
        assert caught.value.code == "base_mismatch"
    assert store.names() == ()
    with pytest.raises(AdapterNotFound):
        registry.describe("legal")
    assert upload(registry, store, folder, OTHER).is_new


def test_a_strict_server_lists_what_it_refuses_and_tells_who_asks(
    opened: Open, store: Store, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    upload(opened(TINY), store, folder)
    registry = opened(strict(TUNED))
    assert "--strict-base refuses adapters of another base, 1 in all: legal" in caplog.text
    info = registry.describe("legal")
    assert info.is_refused
    assert len(info.warnings) == 1
    for ask in (registry.lease, registry.verify):
        with pytest.raises(AdapterRejected, match=r"stored for tiny-base.*--strict-base"):
            ask("legal")
    assert registry.stats().num_leases == 0
    upload(registry, store, folder)
    registry.lease("legal").release()


def test_folders_in_place_are_compared_by_name_and_by_their_manifest(opened: Open, tmp_path: Path) -> None:
    for seed, (name, fingerprint) in enumerate({"plain": None, "right": OTHER, "wrong": OURS}.items()):
        made = write_folder(tmp_path / "adapters" / name, seed)
        if fingerprint is not None:
            (made / MANIFEST_FILE).write_text(json.dumps({"base_fingerprint": fingerprint}), encoding="utf-8")
    registry = opened(strict(FOREIGN), FolderSource(tmp_path / "adapters"))
    assert {info.name: info.is_refused for info in registry.list()} == {"plain": True, "right": False, "wrong": True}
    registry.verify("right")
    with pytest.raises(AdapterRejected, match="trained on tiny-base"):
        registry.lease("plain")
    with pytest.raises(AdapterRejected, match=OURS):
        registry.lease("wrong")


def test_a_mix_is_as_doubtful_as_each_of_its_parts(opened: Open, tmp_path: Path) -> None:
    for seed, (name, fingerprint) in enumerate({"plain": None, "right": OTHER}.items()):
        made = write_folder(tmp_path / "adapters" / name, seed)
        if fingerprint is not None:
            (made / MANIFEST_FILE).write_text(json.dumps({"base_fingerprint": fingerprint}), encoding="utf-8")
    mix = [("right", 1.0), ("plain", 1.0)]
    lease = opened(FOREIGN, FolderSource(tmp_path / "adapters")).lease_mix(mix)
    assert lease is not None
    assert {portion.version.name: portion.has_doubts for portion in lease.portions} == {"right": False, "plain": True}
    lease.release()
    registry = opened(strict(FOREIGN), FolderSource(tmp_path / "adapters"))
    with pytest.raises(AdapterRejected, match="trained on tiny-base"):
        registry.lease_mix(mix)
    assert registry.lease_mix([("plain", 0.0)]) is None
    assert registry.stats().num_leases == 0


def test_without_a_base_to_compare_with_nothing_is_said(
    opened: Open, store: Store, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    assert upload(opened(ServedBase()), store, folder).info.warnings == ()
    assert opened(TINY).describe("legal").warnings == ()
    assert caplog.text == ""

"""A stored version is held to its digest before it is read: what the disk has made of it is never computed with."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from server.adapters.format.content import CONFIG_FILE, WEIGHTS_FILE
from server.adapters.store import folder_store
from server.adapters.store.folder_store import Store
from server.ground.errors import AdapterDamaged, StoreUnreachable
from tests.adapters.folders import write_folder

Damage = Callable[[Path], None]


def flip(folder: Path) -> None:
    content = bytearray((folder / WEIGHTS_FILE).read_bytes())
    content[-1] ^= 1
    (folder / WEIGHTS_FILE).write_bytes(content)


def cut(folder: Path) -> None:
    os.truncate(folder / WEIGHTS_FILE, 10)


def lose(folder: Path) -> None:
    (folder / CONFIG_FILE).unlink()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "source", 1)


@pytest.fixture
def store(tmp_path: Path, source: Path) -> Store:
    store = Store(tmp_path / "store", create=True)
    store.add_folder(source, "legal")
    return store


def folder_of(store: Store) -> Path:
    return store.folder("legal", store.current("legal"))


def test_files_are_hashed_once_unless_they_change(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = []
    digest = folder_store.folder_digest
    monkeypatch.setattr(folder_store, "folder_digest", lambda folder: (hashed.append(folder), digest(folder))[1])
    for _ in range(3):
        with store.reading(folder_of(store)):
            pass
    os.utime(folder_of(store) / WEIGHTS_FILE, ns=(1, 1))
    with store.reading(folder_of(store)):
        pass
    assert hashed == [folder_of(store)] * 2


@pytest.mark.parametrize("damage", [flip, cut, lose])
@pytest.mark.parametrize("was_read", [True, False])
def test_damaged_files_are_refused_and_mended_by_the_same_upload(
    store: Store, source: Path, damage: Damage, was_read: bool
) -> None:
    folder = folder_of(store)
    if was_read:
        store.reading(folder)
    damage(folder)
    with pytest.raises(AdapterDamaged, match=r"files of @[0-9a-f]{12} in the store are damaged"):
        store.reading(folder)
    store.add_folder(source, "legal", replace=True)
    store.reading(folder)
    assert folder_of(store) == folder
    assert list((store.root / ".incoming").iterdir()) == []


def test_a_store_that_is_not_there_is_another_thing_than_damage(store: Store) -> None:
    folder = folder_of(store)
    store.root.rename(store.root.with_name("away"))
    with pytest.raises(StoreUnreachable, match="mount it again"):
        store.reading(folder)


def test_a_disk_that_does_not_give_a_file_may_give_it_later(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(folder: Path) -> object:
        raise OSError(5, "Input/output error")

    folder = folder_of(store)
    with monkeypatch.context() as patch:
        patch.setattr(folder_store, "folder_digest", broken)
        with pytest.raises(StoreUnreachable, match="Input/output error"):
            store.reading(folder)
    store.reading(folder)

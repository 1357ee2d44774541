"""What lies in a store, one entry at a time."""

from pathlib import Path

import pytest

from server.adapters.format.content import WEIGHTS_FILE
from server.adapters.store.folder_store import Store
from server.adapters.store.inventory import Damaged, Whole, inventory
from tests.adapters.folders import write_folder


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "store", create=True)
    for seed in (1, 2):
        store.add_folder(write_folder(tmp_path / f"folder-{seed}", seed), "legal", replace=True)
    return store


def test_a_name_comes_with_its_versions_the_current_one_last(store: Store) -> None:
    (entry,) = inventory(store)
    assert isinstance(entry, Whole)
    assert entry.name == "legal"
    assert entry.versions == store.versions("legal")
    assert entry.current.digest == store.current("legal")


def test_files_and_hidden_folders_are_no_entries(store: Store) -> None:
    (store.root / "README.md").write_text("read me")
    (store.root / ".hidden").mkdir()
    assert [entry.name for entry in inventory(store)] == ["legal"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("empty", "current.json cannot be read"),
        ("Upper", "cannot name an adapter"),
        ("linked", "symbolic link"),
        ("lost", "missing"),
    ],
)
def test_what_does_not_hold_together_is_told_beside_the_rest(
    name: str, reason: str, store: Store, tmp_path: Path
) -> None:
    if name == "linked":
        (store.root / name).symlink_to(store.root / "legal")
    elif name == "lost":
        version, _ = store.add_folder(write_folder(tmp_path / "lost", 3), name)
        (version.folder / WEIGHTS_FILE).unlink()
    else:
        (store.root / name).mkdir()
    found = {entry.name: entry for entry in inventory(store)}
    assert isinstance(found["legal"], Whole)
    damaged = found[name]
    assert isinstance(damaged, Damaged)
    assert reason in damaged.reason
    assert damaged.folder == store.root / name

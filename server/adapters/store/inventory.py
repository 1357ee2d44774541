"""What lies in a store, damaged entries included: for people who look after it.

Owns the look at each entry by itself, so that one that does not hold together is told and costs nothing else. Knows
nothing about tensors or servers; no torch.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from server.adapters.store.adapter_store import AdapterStore
from server.adapters.store.folder_store import Store, StoredVersion, is_valid_name
from server.adapters.store.object_store import ObjectStore
from server.ground.errors import AdapterNotFound


@dataclass(frozen=True, slots=True)
class Whole:
    """A name that a server on this store serves, with its versions, the current one last."""

    name: str
    versions: tuple[StoredVersion, ...]

    @property
    def current(self) -> StoredVersion:
        return self.versions[-1]


@dataclass(frozen=True, slots=True)
class Damaged:
    """An entry that no server serves, and what is wrong with it."""

    name: str
    folder: Path | str  # or the object
    reason: str


def inventory(store: AdapterStore) -> tuple[Whole | Damaged, ...]:
    """Every entry of the store, by name. Plain files and hidden folders are none."""
    if not isinstance(store, ObjectStore):
        assert isinstance(store, Store)
        return _in_folder(store)
    whole = [Whole(stored.name, stored.versions) for stored in store.scan()]
    damaged = [Damaged(name, *found) for name, found in store.broken().items()]
    return tuple(sorted([*whole, *damaged], key=lambda entry: entry.name))


def _in_folder(store: Store) -> tuple[Whole | Damaged, ...]:
    found = []
    for name in _entry_names(store.root):
        try:
            found.append(_entry(store, name))
        except FileNotFoundError:  # taken away under the reading
            continue
    return tuple(found)


def _entry(store: Store, name: str) -> Whole | Damaged:
    if not is_valid_name(name):
        return Damaged(name, store.root / name, f"The name {name!r} cannot name an adapter: rename or remove it.")
    try:
        return Whole(name, store.versions(name))
    except AdapterNotFound as broken:
        return Damaged(name, store.root / name, broken.message)


def _entry_names(root: Path) -> list[str]:
    with os.scandir(root) as entries:
        return sorted(e.name for e in entries if not e.name.startswith(".") and (e.is_symlink() or e.is_dir()))

"""What uploads that never ended have left in an object store, found by its age and removed.

Owns when an object is garbage: its upload is old, and no index lists it. Knows nothing about how a store is changed,
beyond that an upload is listed within MAX_UPLOAD_S of its first object or never.
"""

import logging
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from server.adapters.store.bucket import PROBES, Listed
from server.adapters.store.object_index import BrokenIndex
from server.adapters.store.object_store import VERSIONS, ObjectStore
from server.ground.errors import StoreUnreachable

GARBAGE_AGE_S = 24 * 3600.0  # four times as long as an upload may take

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Pile:
    """The objects of one upload."""

    name: str
    upload: str
    newest: datetime
    paths: list[str] = field(default_factory=list)


def collect_garbage(store: ObjectStore, min_age_s: float = GARBAGE_AGE_S) -> int:
    """Removes what no index lists and is older than `min_age_s`; the number of objects. Raises StoreUnreachable.

    Safe beside servers that upload: the objects are listed before the indexes are read, and an upload of that age can
    no longer come to be listed. Ages are taken by the service's own clock.
    """
    piles = list(_piles(store).values())
    now, probes = _clock(store)

    def is_old(modified: datetime) -> bool:
        return (now - modified).total_seconds() >= min_age_s

    old = [pile for pile in piles if is_old(pile.newest)]
    garbage = [path for name in sorted({pile.name for pile in old}) for path in _unlisted(store, name, old)]
    garbage += [probe.path for probe in probes if is_old(probe.modified)]
    store.bucket.remove(garbage)
    if garbage:
        _log.info("%d objects of unfinished uploads were removed from %s.", len(garbage), store.location)
    return len(garbage)


def _piles(store: ObjectStore) -> Mapping[str, _Pile]:
    """The objects of versions, by upload; what does not lie where a version's files do is nobody's."""
    piles: dict[str, _Pile] = {}
    for entry in store.bucket.list(VERSIONS):
        parts = entry.path.split("/")
        if len(parts) == 5:
            pile = piles.setdefault(parts[3], _Pile(parts[1], parts[3], entry.modified))
            pile.newest = max(pile.newest, entry.modified)
            pile.paths.append(entry.path)
    return piles


def _unlisted(store: ObjectStore, name: str, old: list[_Pile]) -> list[str]:
    try:
        in_use = store.uploads_in_use(name)
    except BrokenIndex:
        return []  # nothing says what is left over and what is precious
    return [path for pile in old if pile.name == name and pile.upload not in in_use for path in pile.paths]


def _clock(store: ObjectStore) -> tuple[datetime, list[Listed]]:
    """The service's time, as an object that is written now shows it, and the probes that others have written."""
    path = f"{PROBES}{secrets.token_hex(16)}"
    store.bucket.create(path, b"1")
    try:
        probes = {probe.path: probe for probe in store.bucket.list(PROBES)}
    finally:
        store.bucket.remove([path])
    mine = probes.pop(path, None)
    if mine is None:
        raise StoreUnreachable(f"The adapter store {store.location} does not list what was just written.")
    return mine.modified, list(probes.values())

"""What the parts of the registry share: the catalog, the locks around it, and the base that adapters are held to.

Owns the order of the locks and the refusals that only the catalog can word. Knows nothing about tiers or files.

Four locks, always taken in this order; only the first is held while an adapter's files are read:

    scanning  one look at the folders that are read in place                       (`in_place`)
    changes   one change of the store or of the sources, with the catalog's note of it     (here)
    placing   one call of the device tier; where a slot is gained or lost         (`residency`)
    lock      the catalog, leases and residencies; held for a few lines at a time          (here)
"""

import difflib
import threading
from collections.abc import Sequence

from server.adapters.catalog import Catalog
from server.adapters.served_base import ServedBase
from server.adapters.store import is_valid_name
from server.ground.errors import AdapterNotFound

_MAX_SUGGESTED_FROM = 1000  # names; comparing a misspelt one with more would take long


class Books:
    """The catalog and its locks. `eased`, on `lock`, is for who waits for a load's end or for room; see `ease`."""

    def __init__(self, base: ServedBase) -> None:
        self.catalog = Catalog()
        self.base = base
        self.changes = threading.Lock()
        self.lock = threading.Lock()
        self.eased = threading.Condition(self.lock)
        self.num_easings = 0

    def ease(self) -> None:
        """Under the lock: a load, a hold or a pin has ended, or room has come, and who waits may look again."""
        self.num_easings += 1
        self.eased.notify_all()

    def check_base(self, doubts: Sequence[str]) -> None:
        """Raises AdapterRejected for an adapter of another base where the server is strict."""
        if doubts and self.base.is_strict:
            raise self.base.refusal(doubts)

    def unknown(self, spec: str) -> AdapterNotFound:
        """What to raise for a name that is not there. Outside the lock: comparing names takes a while."""
        name = spec.partition("@")[0]
        with self.lock:
            names = list(self.catalog.entries)
        if len(names) > _MAX_SUGGESTED_FROM:
            names = [known for known in names if known[:2] == name[:2]][:_MAX_SUGGESTED_FROM]
        close = difflib.get_close_matches(name, names) if is_valid_name(name) else []
        hint = f"Did you mean {' or '.join(close)}?" if close else "GET /v1/adapters lists those that there are."
        return AdapterNotFound(f"There is no adapter {name[:80]!r}. {hint}", param="adapter")

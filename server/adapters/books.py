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
from collections.abc import Callable, Sequence

from server.adapters.catalog import Catalog
from server.adapters.served_base import ServedBase
from server.adapters.store.folder_store import is_valid_name
from server.ground.errors import AdapterNotFound, GraftError

_MAX_COMPARED = 64  # names with a misspelt one: about half a millisecond, in which no other thread's Python runs


class Books:
    """The catalog and its locks. `eased`, on `lock`, is for who waits for a load's end or for room; see `ease`."""

    def __init__(self, base: ServedBase) -> None:
        self.catalog = Catalog()
        self.base = base
        self.changes = threading.Lock()
        self.lock = threading.Lock()
        self.eased = threading.Condition(self.lock)
        self.num_easings = 0
        self.find_arriving: Callable[[str], GraftError | None] = lambda name: None

    def ease(self) -> None:
        """Under the lock: a load, a hold or a pin has ended, or room has come, and who waits may look again."""
        self.num_easings += 1
        self.eased.notify_all()

    def check_base(self, doubts: Sequence[str]) -> None:
        """Raises AdapterRejected for an adapter of another base where the server is strict."""
        if doubts and self.base.is_strict:
            raise self.base.refusal(doubts)

    def unknown(self, spec: str) -> GraftError:
        """What to raise for a name that is not there. Outside the lock: comparing names takes a while."""
        name = spec.partition("@")[0]
        arriving = self.find_arriving(name)
        if arriving is not None:
            return arriving
        with self.lock:
            near = self.catalog.names_near(name, _MAX_COMPARED)
        close = difflib.get_close_matches(name, near) if is_valid_name(name) else []
        hint = f"Did you mean {' or '.join(close)}?" if close else "GET /v1/adapters lists those that there are."
        return AdapterNotFound(f"There is no adapter {name[:80]!r}. {hint}", param="adapter")

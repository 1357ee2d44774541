"""Does something again and again, in a thread of its own: a look at folders, at a shared store, at its garbage.

Owns the interval. Knows nothing about folders or adapters.
"""

import logging
import threading
from collections.abc import Callable

from server.ground.errors import GraftError

log = logging.getLogger(__name__)


class Rescan:
    """Calls `look` every `interval_s` seconds until closed; a look that fails is logged and the next one is tried."""

    def __init__(
        self, look: Callable[[], object], interval_s: float = 5.0, *, what: str = "the adapter folders"
    ) -> None:
        """`what` is looked at, for the log."""
        self._look = look
        self._interval_s = interval_s
        self._what = what
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="adapter-rescan", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread, after a look in progress."""
        self._is_closed.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._is_closed.wait(self._interval_s):
            try:
                self._look()
            except (OSError, GraftError) as error:
                log.warning("%s cannot be read: %s", self._what, error)
            except Exception:
                # A thread that ended would go unnoticed, and what it looks at stay as it was: a revoked key in force.
                log.exception("%s cannot be read, for a reason that nobody foresaw; the next look is tried", self._what)

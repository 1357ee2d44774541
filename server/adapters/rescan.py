"""Looks again and again at the folders that are read in place, in a thread of its own.

Owns the interval. Knows nothing about folders or adapters: the registry's `rescan` does the looking.
"""

import logging
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)


class Rescan:
    """Calls `look` every `interval_s` seconds until closed; a look that fails is logged and the next one is tried."""

    def __init__(self, look: Callable[[], None], interval_s: float = 5.0) -> None:
        self._look = look
        self._interval_s = interval_s
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
            except OSError as error:
                log.warning("the adapter folders cannot be read: %s", error)

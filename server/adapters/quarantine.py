"""Quarantine: contents with which the model's output overflowed several times are served to nobody.

Owns how often is too often, and the refusal. Until its name has other content, an operator lifts the quarantine or the
server ends. It is held on the content: under another name it is the same. Knows nothing about logits or requests.
"""

import logging
from collections.abc import Callable, Iterable

from server.adapters.books import Books
from server.adapters.catalog import AdapterVersion, Content, Copy
from server.ground.errors import AdapterQuarantined

MAX_OVERFLOWS = 3  # steps
WINDOW_S = 600.0  # within which they count: one in a million requests is no reason

_log = logging.getLogger(__name__)


class Quarantine:
    """Which contents have failed, and how often."""

    def __init__(self, books: Books, clock: Callable[[], float]) -> None:
        self._books = books
        self._clock = clock
        self.overflows_total = 0

    def note(self, content: Content, version: AdapterVersion) -> None:
        """A step in which the output with this content overflowed."""
        now_s = self._clock()
        with self._books.lock:
            self.overflows_total += 1
            content.overflows_s = [*(then for then in content.overflows_s if now_s - then < WINDOW_S), now_s]
            is_new = len(content.overflows_s) >= MAX_OVERFLOWS and not content.is_quarantined
            content.is_quarantined = content.is_quarantined or is_new
        if is_new:
            _log.error("The adapter %s is quarantined: the output overflowed in %d steps.", version, MAX_OVERFLOWS)
        else:
            _log.warning("The output with the adapter %s overflowed.", version)

    def check(self, copies: Iterable[Copy]) -> None:
        """Under the lock. Raises AdapterQuarantined if one of them may not be served."""
        for copy in copies:
            if copy.content.is_quarantined:
                raise _refusal(str(copy.version), f"POST /v1/adapters/{copy.version.name}/lift_quarantine")

    def check_mix(self, content: Content, version: AdapterVersion) -> None:
        """Under the lock: the same for a sum of several, whose portions may be sound."""
        if content.portions and content.is_quarantined:
            raise _refusal(f"mix {version.name}", "ask for smaller weights")

    def lift(self, spec: str) -> Copy:
        """`Registry.lift_quarantine`."""
        with self._books.lock:
            copy = self._books.catalog.find(spec)
            if copy is not None:
                for content in (copy.content, *self._books.catalog.mixes_of(copy.content.digest)):
                    content.is_quarantined = False
                    content.overflows_s = []
        if copy is None:
            raise self._books.unknown(spec)
        _log.warning("The quarantine of the adapter %s was lifted.", copy.version)
        return copy


def _refusal(what: str, remedy: str) -> AdapterQuarantined:
    return AdapterQuarantined(
        f"The adapter {what} is quarantined: the model's output overflowed with it in {MAX_OVERFLOWS} steps within "
        f"{WINDOW_S:.0f} s. Give its name weights that are smaller, or, if you know better, {remedy}.",
        param="adapter",
    )

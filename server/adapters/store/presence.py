"""Who is at work on a store: servers say that they are there, and other programs can ask.

Owns one lock per store: shared by the servers that run on it, exclusive for a change that none of them may miss. It
dies with its holder, so a crash leaves none behind. A store whose servers notice what others change has no folder to
mark, and nobody counts as present on it. Knows nothing about what is in the store; no torch.
"""

import fcntl
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from server.adapters.store.folder_store import INCOMING_FOLDER, try_lock
from server.ground.errors import Conflict, GraftError


class Presence:
    """A running server's mark on its store, from construction to `close`; many servers may be present at once.

    Waits for a change that excludes servers. A store that cannot be written is left unmarked: nobody changes it.
    """

    def __init__(self, root: Path | None) -> None:
        self._end: Callable[[], object] | None = None
        if root is None:
            return
        with suppress(OSError):
            descriptor = os.open(_marked(root), os.O_RDONLY)
            self._end = weakref.finalize(self, os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_SH)

    def close(self) -> None:
        """Takes the mark away; does nothing the second time."""
        if self._end is not None:
            self._end()


@contextmanager
def nobody_present(root: Path | None, remedy: str) -> Iterator[None]:
    """Keeps servers from starting on the store until the block ends. Raises Conflict, with `remedy`, if one runs."""
    if root is None:
        yield
        return
    descriptor = _try_alone(root)
    if descriptor is None:
        raise Conflict(f"A server is running on the store {root}: {remedy}")
    try:
        yield
    finally:
        os.close(descriptor)


def is_somebody_present(root: Path | None) -> bool:
    """Whether a server runs on the store at this moment that will not notice what others change."""
    if root is None:
        return False
    descriptor = _try_alone(root)
    if descriptor is not None:
        os.close(descriptor)
    return descriptor is None


def _try_alone(root: Path) -> int | None:
    """A descriptor that keeps servers out until it is closed; None if one is there."""
    try:
        return try_lock(_marked(root))
    except OSError as error:
        raise GraftError(
            f"The adapter store cannot be written at {root} ({error.strerror or error}): mend its permissions, or name "
            f"another with --store.",
            code="store_unwritable",
        ) from error


def _marked(root: Path) -> Path:
    """The store's folder for work in progress: it is there anyway, and nothing else locks the folder as a whole."""
    folder = root / INCOMING_FOLDER
    folder.mkdir(exist_ok=True)
    return folder

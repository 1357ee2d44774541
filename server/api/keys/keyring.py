"""The keys that are in force: found by the secret that a request sends, and read anew when their file changes.

Knows nothing about HTTP or what keys are for.
"""

import hmac
import logging
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from server.adapters.audit import note
from server.api.keys.key import Key, Scope, digest_of
from server.api.keys.key_file import KeysUnreadable, read_keys
from server.ground.errors import StartupRefused

SINGLE = "(api-key)"  # the name of the one that is no file's; no name in a file can be this one
_Signature = tuple[int, int, int, int] | None  # inode, bytes, mtime_ns, ctime_ns; None: there is no file

_log = logging.getLogger(__name__)


class Keyring:
    """All keys of a server. `find` is safe beside `refresh`."""

    def __init__(self, path: Path | None = None, single: str | None = None) -> None:
        """The keys of the file at `path`, and `single`, which may do everything.

        Raises StartupRefused for a file with mistakes, and where there is no key at all.
        """
        self._path = path
        self._single = () if single is None else (_single_key(single),)
        self._secret = secrets.token_bytes(32)
        self._lock = threading.Lock()
        self._signature: _Signature = None  # of the content that was read last
        self._on_change: Callable[[Sequence[Key]], None] = lambda keys: None
        if path is not None:
            self._signature = _signature_of(path)
        self._tried = self._signature  # of the file at the last look, whether it could be read or not
        keys = (*self._single, *(read_keys(path) if path is not None else ()))
        if not keys:
            raise StartupRefused(f"--api-keys {path} has no key: graft keys add NAME makes one.")
        self._keys = self._indexed(keys)

    def find(self, secret: str) -> Key | None:
        """The key with this secret.

        It is found under a keyed hash that nobody outside can compute, so that the time of the search says nothing
        about any key.
        """
        digest = digest_of(secret)
        key = self._keys.get(self._place(digest))
        return key if key is not None and hmac.compare_digest(key.digest, digest) else None

    @property
    def keys(self) -> tuple[Key, ...]:
        return tuple(self._keys.values())

    def watch(self, on_change: Callable[[Sequence[Key]], None]) -> None:
        """Has `on_change` called with the keys after each reading that changed them."""
        self._on_change = on_change

    def refresh(self) -> None:
        """Reads the file again if it has changed. A broken one changes nothing, and its mistakes are logged once.

        One that cannot be opened, as when the process has too many files open, is tried again the next time.
        """
        if self._path is None:
            return
        with self._lock:
            signature = _signature_of(self._path)
            if signature == self._signature:
                return
            is_new, self._tried = signature != self._tried, signature
            try:
                keys = read_keys(self._path)
            except StartupRefused as error:
                if not isinstance(error, KeysUnreadable):
                    self._signature = signature
                if is_new:
                    note("keys", result=error.code)
                    _log.error("the keys stay as they were: %s", error.message)
                return
            self._signature = signature
            before, self._keys = self.keys, self._indexed((*self._single, *keys))
        note("keys", **_changes(before, self.keys), result="done")
        self._on_change(self.keys)

    def _indexed(self, keys: Sequence[Key]) -> Mapping[bytes, Key]:
        return {self._place(key.digest): key for key in keys}

    def _place(self, digest: bytes) -> bytes:
        return hmac.digest(self._secret, digest, "sha256")


def _single_key(secret: str) -> Key:
    return Key(SINGLE, digest_of(secret), frozenset(Scope), owner=SINGLE, adapters=("*",))


def _changes(before: Sequence[Key], after: Sequence[Key]) -> dict[str, list[str]]:
    """Names, for the audit log."""
    old, new = {key.name: key for key in before}, {key.name: key for key in after}
    return {
        "added": sorted(new.keys() - old.keys()),
        "removed": sorted(old.keys() - new.keys()),
        "changed": sorted(name for name in old.keys() & new.keys() if old[name] != new[name]),
    }


def _signature_of(path: Path) -> _Signature:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns

"""A folder of the server's machine as a place: file://.

Owns that no link leads out of the folders that the operator allows. Knows nothing about other places.
"""

import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO, Self

from server.adapters.format.content import CONTENT_FILES
from server.adapters.remote.address import Address, AllowList
from server.adapters.remote.places import changed, denied
from server.ground.errors import Forbidden

_CHUNK_BYTES = 1 << 20


class LocalPlace:
    """An adapter folder whose content files are open: a file that is replaced meanwhile is read as it was."""

    revision: str | None = None  # a folder has none; the version of what is read is its digest

    def __init__(self, address: Address, files: Mapping[str, BinaryIO]) -> None:
        self._address = address
        self._files = files
        self._seen = {name: _state(file) for name, file in files.items()}
        self.sizes: Mapping[str, int | None] = {name: seen[0] for name, seen in self._seen.items()}

    @classmethod
    @contextmanager
    def open(cls, address: Address, allowed: AllowList) -> Iterator[Self]:
        with ExitStack() as opened:
            files = {}
            for name in CONTENT_FILES:
                file = _open(address, name, allowed)
                if file is not None:
                    files[name] = opened.enter_context(file)
            yield cls(address, files)

    def read(self, name: str) -> Iterator[bytes]:
        while chunk := self._files[name].read(_CHUNK_BYTES):
            yield chunk

    def has(self, name: str) -> bool:
        return (self._address.path / name).is_file()

    def check_unchanged(self) -> None:
        if any(_state(file) != self._seen[name] for name, file in self._files.items()):
            raise changed(self._address)


def _open(address: Address, name: str, allowed: AllowList) -> BinaryIO | None:
    """A plain file of the folder; None where there is none. What was opened is looked at, so no link can be swapped."""
    try:
        # Not blocking: a pipe would wait for its writer.
        descriptor = os.open(address.path / name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError:
        raise denied(address) from None
    file = os.fdopen(descriptor, "rb")
    if not allowed.allows_path(Path(os.readlink(f"/proc/self/fd/{descriptor}"))):
        file.close()
        raise Forbidden(
            f"{address}: its {name} is a link out of the folders that --allow-source names.",
            param="source",
            code="source_not_allowed",
        )
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        file.close()
        return None
    return file


def _state(file: BinaryIO) -> tuple[int, int]:
    """Bytes, and the time of the last change in ns."""
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns

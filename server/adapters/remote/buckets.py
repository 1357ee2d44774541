"""A folder in an object store as a place: s3://, gs:// and az:// through fsspec (memory:// too, for tests).

Owns what is asked of fsspec and how an object's state is told from another. Knows nothing about one service's protocol:
credentials, regions and endpoints are those that its package finds in the server's environment.
"""

import errno
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, Self

import fsspec  # type: ignore[import-untyped]

from server.adapters.format.content import CONTENT_FILES, MANIFEST_FILE, WEIGHTS_FILE
from server.adapters.remote.address import Address
from server.adapters.remote.places import TIMEOUT_S, changed, denied

_CHUNK_BYTES = 4 << 20  # of one request
_TIMEOUTS: Mapping[str, Mapping[str, Any]] = {
    "s3": {"config_kwargs": {"connect_timeout": 10, "read_timeout": TIMEOUT_S, "retries": {"max_attempts": 3}}},
    "gs": {"timeout": TIMEOUT_S},
    "az": {"connection_timeout": 10, "read_timeout": TIMEOUT_S},
}
_VERSION_KEYS = ("VersionId", "version_id", "generation", "ETag", "etag")
_TIME_KEYS = ("LastModified", "last_modified", "created")


class BucketPlace:
    """An adapter as objects under one prefix. One object is read in one state; all are compared at the end."""

    def __init__(self, address: Address, system: Any) -> None:
        self._address = address
        self._system = system
        self._seen = self._look()
        self.sizes: Mapping[str, int | None] = {name: info["size"] for name, info in self._seen.items()}
        self.revision = _mark(self._seen.get(WEIGHTS_FILE, {}), _VERSION_KEYS)

    @classmethod
    @contextmanager
    def open(cls, address: Address) -> Iterator[Self]:
        yield cls(address, system_of(address.scheme))

    def read(self, name: str) -> Iterator[bytes]:
        try:
            with self._system.open(self._path(name), "rb", block_size=_CHUNK_BYTES, cache_type="none") as file:
                while chunk := file.read(_CHUNK_BYTES):
                    yield chunk
        except OSError as error:
            if error.errno == errno.EBUSY:  # what s3fs says of an object that is another one by now
                raise changed(self._address) from error
            raise

    def has(self, name: str) -> bool:
        return self._info(name) is not None

    def check_unchanged(self) -> None:
        keys = (*_VERSION_KEYS, *_TIME_KEYS)
        now, then = ({name: _mark(info, keys) for name, info in infos.items()} for infos in (self._look(), self._seen))
        if now != then:
            raise changed(self._address)

    def _look(self) -> dict[str, Mapping[str, Any]]:
        infos = {name: self._info(name) for name in CONTENT_FILES}
        return {name: info for name, info in infos.items() if info is not None}

    def _info(self, name: str) -> Mapping[str, Any] | None:
        try:
            info: Mapping[str, Any] = self._system.info(self._path(name))
        except FileNotFoundError:
            return None
        except PermissionError:
            if name == MANIFEST_FILE:  # S3 says this, too, of what is not there, to who may not list the bucket
                return None
            raise denied(self._address) from None
        return info if info["type"] == "file" else None

    def _path(self, name: str) -> str:
        return "/".join((self._address.authority, *self._address.segments, name))


@cache
def system_of(scheme: str) -> Any:
    """What fsspec reads a scheme with: one for the process, since some take a second of computing to make.

    It keeps connections and credentials, but no listings: what lies there now is asked for.
    """
    options = _TIMEOUTS.get(scheme, {})
    return fsspec.filesystem(scheme, skip_instance_cache=True, use_listings_cache=False, **options)


def _mark(info: Mapping[str, Any], keys: tuple[str, ...]) -> str | None:
    """What tells one state of an object from another, as its service puts it."""
    values = (info.get(key) for key in keys)
    return next((str(value).strip('"') for value in values if value not in (None, "", "null")), None)

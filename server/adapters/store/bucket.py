"""Objects by path in S3, Google Cloud Storage, Azure or this process's memory: read, listed, and written on condition.

Owns the client library (obstore), its time limits, and what its errors mean to people. Knows nothing about adapters.

A write is on one of two conditions: `create` that there is no such object, `swap` that it is still the one that was
read. What rests on these two needs no locks, however many servers write.
"""

import logging
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from server.ground.errors import StartupRefused, StoreUnreachable

PROBES = "probe/"  # objects that are there for a moment, to see what the service does
_SCHEMES = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "memory")
_PIECE_BYTES = 8 << 20  # of a download; each is a request with its own time limit
_PART_BYTES = 8 << 20  # of an upload; what fits into one is sent whole
_MAX_PARTS_AT_ONCE = 4  # so an upload holds no more than 32 MiB in memory
_CLIENT = {"connect_timeout": timedelta(seconds=5), "timeout": timedelta(seconds=30)}  # of one request
_RETRIES = {
    "max_retries": 5,
    "retry_timeout": timedelta(seconds=20),
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=3), "base": 2},
}

_STATUS = re.compile(r"status code: (\d{3})")

_log = logging.getLogger(__name__)

Mark = dict[str, str]  # what tells one state of an object from another: its "e_tag" and, where there are any, "version"


class Missing(Exception):
    """There is no such object."""


class Occupied(Exception):
    """The condition of a write does not hold: somebody else has written the object."""


@dataclass(frozen=True, slots=True)
class Listed:
    """One object of a listing."""

    path: str
    tag: str  # changes whenever the object does
    modified: datetime  # by the service's clock


class Bucket:
    """A part of an object store, below one prefix. Safe for many threads.

    Every call raises StoreUnreachable where the service does not answer, denies access or has no such bucket.
    """

    def __init__(self, client: Any, url: str) -> None:
        """`client` is one of obstore's stores; `url` is what people know it by."""
        self._client = client
        self.url = url.rstrip("/")

    @classmethod
    def open(cls, url: str) -> Self:
        """From a URL such as s3://bucket/prefix; the credentials are the environment's. Raises StartupRefused."""
        _check_url(url)
        try:
            # Imported here: whoever has the store in a folder need not have the package.
            from obstore.exceptions import BaseError
            from obstore.store import from_url
        except ModuleNotFoundError as error:
            raise StartupRefused(
                f"--store {url} needs the package obstore: pip install 'graftserve[objects]'"
            ) from error
        options: dict[str, Any] = {}
        if not url.startswith("memory:"):
            # A service of one's own is often on plain HTTP, and whoever writes that in its address means it.
            is_plain = os.environ.get("AWS_ENDPOINT_URL", "").startswith("http:") and url.startswith("s3")
            options = {"client_options": {**_CLIENT, "allow_http": is_plain}, "retry_config": _RETRIES}
        try:
            return cls(from_url("memory:///" if url.startswith("memory:") else url, **options), url)
        except (BaseError, ValueError) as error:
            raise StartupRefused(f"--store {url} cannot be opened: {_first_line(error)}") from error

    def check(self) -> None:
        """Raises StartupRefused unless conditions are held here, and a write and a listing work."""
        path = f"{PROBES}{secrets.token_hex(16)}"
        try:
            mark = self.create(path, b"1")
            try:
                is_held = self._is_held(path, mark)
            finally:
                self.remove([path])
            next(self.list(PROBES), None)
        except StoreUnreachable as error:
            raise StartupRefused(
                f"--store {self.url}: {error.message} ({error.__cause__ and _first_line(error.__cause__)})"
            ) from error
        except NotImplementedError as error:
            raise self._unconditional() from error
        if not is_held:
            raise self._unconditional()

    def _is_held(self, path: str, mark: Mark) -> bool:
        try:
            self.create(path, b"2")
            return False
        except Occupied:
            self.swap(path, b"3", mark)
        try:
            self.swap(path, b"4", mark)
            return False
        except Occupied:
            return True

    def _unconditional(self) -> StartupRefused:
        return StartupRefused(
            f"--store {self.url}: this service does not hold the conditions of a write (If-None-Match and If-Match): "
            f"servers could lose one another's changes. Use one that does, or a folder."
        )

    # Reading

    def read(self, path: str) -> tuple[bytes, Mark]:
        """A small object: its content, and its mark for `swap`. Raises Missing."""
        with self._errors(path):
            got = self._client.get(path)
            return bytes(got.bytes()), _mark(got.meta)

    def size(self, path: str) -> int:
        """The bytes of an object. Raises Missing."""
        with self._errors(path):
            return int(self._client.head(path)["size"])

    def pieces(self, path: str, num_bytes: int) -> Iterator[bytes]:
        """The first bytes of an object that is never written again, a few MiB at a time. Raises Missing."""
        for start in range(0, num_bytes, _PIECE_BYTES):
            with self._errors(path):
                piece = self._client.get_range(path, start=start, end=min(start + _PIECE_BYTES, num_bytes))
            yield bytes(piece)

    def list(self, prefix: str) -> Iterator[Listed]:
        """Every object below a prefix; one request for each thousand."""
        with self._errors(prefix, may_miss=False):
            stream = iter(self._client.list(prefix, chunk_size=1000))
        while True:
            with self._errors(prefix, may_miss=False):
                chunk = next(stream, None)
            if chunk is None:
                return
            yield from (Listed(meta["path"], _tag(meta), meta["last_modified"]) for meta in chunk)

    # Writing

    def create(self, path: str, content: bytes) -> Mark:
        """Writes an object that there is not yet. Raises Occupied."""
        with self._errors(path, may_miss=False):
            return _mark(self._client.put(path, content, mode="create"))

    def swap(self, path: str, content: bytes, mark: Mark) -> Mark:
        """Writes an object that is still the one that `mark` is of. Raises Occupied."""
        try:
            with self._errors(path):
                return _mark(self._client.put(path, content, mode=mark))
        except Missing as error:
            raise Occupied from error

    def upload(self, path: str, file: Path) -> None:
        """Writes an object that nobody else writes, from a file that is not read into memory as a whole."""
        with self._errors(path, may_miss=False):
            self._client.put(path, file, chunk_size=_PART_BYTES, max_concurrency=_MAX_PARTS_AT_ONCE)

    def remove(self, paths: Sequence[str]) -> None:
        """Removes objects; what is not there counts as removed."""
        if paths:
            try:
                with self._errors(paths[0]):
                    self._client.delete(list(paths))
            except Missing:
                for path in paths if len(paths) > 1 else ():  # it may have stopped there
                    self.remove([path])

    @contextmanager
    def _errors(self, path: str, *, may_miss: bool = True) -> Iterator[None]:
        """Turns the library's errors into Missing, Occupied and a sentence; its own words go to the log."""
        from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError

        try:
            yield
        except (AlreadyExistsError, PreconditionError, FileExistsError) as error:
            raise Occupied from error
        except (BaseError, OSError) as error:
            if isinstance(error, FileNotFoundError) and may_miss:
                raise Missing from error
            _log.warning("The object store %s failed at %s: %s", self.url, path, _first_line(error))
            raise StoreUnreachable(f"The adapter store {self.url} {_reason(error)}") from error


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        has_secret = "@" in parts.netloc and not parts.scheme.startswith("abfs")
    except ValueError as error:
        raise StartupRefused(f"--store {url!r:.200} is no URL: {error}") from None
    if has_secret:
        raise StartupRefused("--store: the URL has credentials in it; give them in the environment instead.")
    if parts.scheme not in _SCHEMES:
        raise StartupRefused(
            f"--store {url!r:.200}: {parts.scheme}:// cannot keep a store. Use a folder (a path), s3://, gs:// or az://."
        )
    if parts.query or parts.fragment or (not parts.netloc and parts.scheme != "memory"):
        raise StartupRefused(f"--store {url!r:.200}: write it as {parts.scheme}://bucket/prefix.")


def _reason(error: Exception) -> str:
    # Of a listing the library raises one class for every refusal, and has the status in the text alone.
    kind, status = type(error).__name__, _STATUS.search(str(error))
    code = status[1] if status else ""
    if isinstance(error, PermissionError) or kind == "UnauthenticatedError" or code in ("401", "403"):
        return "denies access: give the server credentials that may list, read, write and delete there."
    if isinstance(error, FileNotFoundError) or code == "404":
        return "has no such bucket: create it, or correct --store."
    return "does not answer as it should: it is tried again; the server's log says what it said."


def _mark(meta: Any) -> Mark:
    return {key: meta[key] for key in ("e_tag", "version") if meta.get(key) is not None}


def _tag(meta: Any) -> str:
    """Quotes are not everywhere the same; where a service gives no tag, time and size must do."""
    return (meta.get("e_tag") or f"{meta['last_modified'].isoformat()} {meta['size']}").strip('"')


def _first_line(error: BaseException) -> str:
    """Behind it obstore repeats the error for programmers."""
    return str(error).partition("\n")[0][:500]

"""What an address leads to: the files of an adapter that lie there, with their sizes and their bytes.

Owns the contract of a place, which kind of place a scheme is, and the refusals that all kinds share. Knows nothing of
the store, or how any kind reads. A kind is imported when it is opened: some of their packages take a second, and no
server without such a source should wait for them, or need them installed.
"""

import importlib.util
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Protocol

from server.adapters.format.content import CONFIG_FILE, REQUIRED_FILES, WEIGHTS_FILE
from server.adapters.remote.address import Address, AllowList
from server.ground.errors import AdapterRejected, BadRequest, GraftError, SourceFailed, StartupRefused

TIMEOUT_S = 30.0  # without a byte from a source
PICKLE_FILE = "adapter_model.bin"  # PEFT's older format of weights
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "az": "adlfs"}
_MAX_SAID_CHARS = 300  # of what a package says about a failure


class Place(Protocol):
    """One adapter elsewhere, as it was when the place was opened. For one thread; leave it as a context manager.

    Every method may raise a GraftError, an OSError, and whatever the package raises that the place is read with.
    """

    revision: str | None  # what is read, where the place names it: a commit, an object's version or its ETag
    sizes: Mapping[str, int | None]  # bytes of the content files that are there; None where they are not announced

    def read(self, name: str) -> Iterator[bytes]:
        """The bytes of a content file, in order."""

    def has(self, name: str) -> bool:
        """Whether another file lies beside them."""

    def check_unchanged(self) -> None:
        """Raises SourceFailed if what was read is not all of one state, as far as the place can tell."""


def open_place(address: Address, allowed: AllowList) -> AbstractContextManager[Place]:
    """The adapter at an address that the operator allows. Waits for it; for a thread of its own."""
    if address.scheme == "file":
        from server.adapters.remote.local import LocalPlace

        return LocalPlace.open(address, allowed)
    if address.scheme in ("http", "https"):
        from server.adapters.remote.web import WebPlace

        return WebPlace.open(address, allowed)
    if address.scheme == "hf":
        from server.adapters.remote.hub import HubPlace

        return HubPlace.open(address, allowed)
    from server.adapters.remote.buckets import BucketPlace

    return BucketPlace.open(address)


def check_installed(schemes: Iterable[str]) -> None:
    """Raises StartupRefused where the package is missing that a scheme is read with."""
    for scheme, package in _PACKAGES.items():
        if scheme in schemes and importlib.util.find_spec(package) is None:
            raise StartupRefused(
                f"--allow-source {scheme}://: the package {package} reads it and is not installed: "
                f"pip install 'graftserve[remote]'"
            )


def check_complete(place: Place, address: Address) -> None:
    """Raises AdapterRejected where a file is missing without which there is no adapter."""
    missing = [name for name in REQUIRED_FILES if name not in place.sizes]
    if missing == [WEIGHTS_FILE] and place.has(PICKLE_FILE):
        raise AdapterRejected(
            f"{address} has its weights in {PICKLE_FILE}, which is not read because loading it can run code: save the "
            f"adapter again as {WEIGHTS_FILE} (PEFT's save_pretrained does).",
            param="source",
        )
    if missing:
        raise BadRequest(
            f"{address} has no {' and no '.join(missing)}: name the folder with {CONFIG_FILE} and {WEIGHTS_FILE}.",
            param="source",
            code="source_not_found",
        )


def as_refusal(error: Exception, address: Address) -> GraftError:
    """What to tell of a source that could not be read. A URL in it loses its query, which may be a signature."""
    if isinstance(error, GraftError):
        return error
    said = re.sub(r"\?[^\s'\"]*", "?...", " ".join(str(error).split()))[:_MAX_SAID_CHARS]
    return SourceFailed(f"{address} could not be read ({type(error).__name__}: {said}). Try again, or mend the source.")


def denied(address: Address) -> SourceFailed:
    """What to raise where the place does not let this server in."""
    return SourceFailed(
        f"{address} cannot be read with the credentials of this server's environment, or there is nothing: give the "
        f"server access to it.",
        code="source_denied",
    )


def not_found(address: Address, what: str) -> BadRequest:
    return BadRequest(f"{address}: {what}.", param="source", code="source_not_found")


def changed(address: Address) -> SourceFailed:
    """What to raise where a file changed while others of its adapter were read."""
    return SourceFailed(f"{address} changed while it was read: fetch it again once it is still.", code="source_changed")

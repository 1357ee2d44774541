"""A repository of a hub as a place: hf://. The hub is HF_ENDPOINT's, the token that of the server's environment.

Owns that all files come from one commit, found before any is read. Knows nothing about other places.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Self

from huggingface_hub import HfApi, HfFileSystem
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import ModelInfo

from server.adapters.format.content import CONTENT_FILES
from server.adapters.remote.address import Address, AllowList
from server.adapters.remote.places import TIMEOUT_S, denied, not_found
from server.ground.errors import SourceFailed

_CHUNK_BYTES = 1 << 20


class HubPlace:
    """One commit of a model repository, or a folder in it."""

    def __init__(self, address: Address, info: ModelInfo, endpoint: str | None) -> None:
        if info.sha is None:
            raise SourceFailed(f"{address}: the hub names no commit, so nothing could be pinned.")
        self.revision: str | None = info.sha
        self._repository = info.id
        self._folder = address.segments[1:]
        self._system = HfFileSystem(endpoint=endpoint, skip_instance_cache=True)
        self._files = {file.rfilename: file.size for file in info.siblings or ()}
        paths = {name: "/".join((*self._folder, name)) for name in CONTENT_FILES}
        self.sizes: Mapping[str, int | None] = {
            name: self._files[path] for name, path in paths.items() if path in self._files
        }

    @classmethod
    @contextmanager
    def open(cls, address: Address, allowed: AllowList) -> Iterator[Self]:
        endpoint = os.environ.get("HF_ENDPOINT")  # now, and not when the package was imported
        info = _look(address, endpoint)
        _check_name(address, info.id, allowed)
        yield cls(address, info, endpoint)

    def read(self, name: str) -> Iterator[bytes]:
        path = "/".join((*self._folder, name))
        with self._system.open(f"{self._repository}@{self.revision}/{path}", "rb", block_size=0) as file:
            while chunk := file.read(_CHUNK_BYTES):
                yield chunk

    def has(self, name: str) -> bool:
        return "/".join((*self._folder, name)) in self._files

    def check_unchanged(self) -> None:
        """A commit does not change."""


def _look(address: Address, endpoint: str | None) -> ModelInfo:
    repository = f"{address.authority}/{address.segments[0]}"
    try:
        return HfApi(endpoint=endpoint).model_info(
            repository, revision=address.revision, files_metadata=True, timeout=TIMEOUT_S
        )
    except GatedRepoError:
        raise denied(address) from None
    except RevisionNotFoundError:
        raise not_found(address, "the repository has no such revision") from None
    except RepositoryNotFoundError:
        raise not_found(
            address, "the hub has no such repository, or shows it only to who has a token (HF_TOKEN of the server)"
        ) from None


def _check_name(address: Address, name: str, allowed: AllowList) -> None:
    """A repository that was renamed is found under its new name, which may lie under no allowed prefix."""
    found = Address.parse(f"hf://{name}")
    if (found.authority, found.segments[0]) != (address.authority, address.segments[0]):
        allowed.check(found)

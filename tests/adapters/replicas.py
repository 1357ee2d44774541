"""Registries that share one bucket, as several servers do: real tiers, tiny adapters, and a bucket that can fail."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from obstore.exceptions import GenericError
from obstore.store import MemoryStore

from server.adapters.host import HostTier
from server.adapters.registry import AdapterInfo, Lease, Registry
from server.adapters.store.bucket import Bucket
from server.adapters.store.object_store import ObjectStore
from server.adapters.store.version_cache import VersionCache
from tests.adapters.folders import incoming_from, load_folder, write_folder
from tests.adapters.test_registry import ROW_BYTES, Table

MIB = 1 << 20


class Crash(BaseException):
    """The end of a process, as far as a test in one process can have it: nothing after it is tried."""


class Wire:
    """Stands before one of obstore's stores, counts the calls and can make one of them fail.

    `fail_at` is the number of the call that fails, and all after it; `does_it` whether the service did what it was
    asked before the answer was lost.
    """

    def __init__(self, client: Any) -> None:
        self._client = client
        self._lock = threading.Lock()
        self.calls: list[str] = []
        self.before: Callable[[str, str], None] = lambda verb, path: None
        self.fail_at: int | None = None
        self.does_it = False
        self.error: BaseException = Crash()

    def __getattr__(self, verb: str) -> Any:
        def call(path: Any, *rest: Any, **named: Any) -> Any:
            with self._lock:
                self.calls.append(f"{verb} {path}")
                fails = self.fail_at is not None and len(self.calls) > self.fail_at
                is_first = len(self.calls) - 1 == self.fail_at
            self.before(verb, str(path))
            if not fails:
                return getattr(self._client, verb)(path, *rest, **named)
            if is_first and self.does_it:
                getattr(self._client, verb)(path, *rest, **named)
            raise self.error

        return call


def outage() -> GenericError:
    return GenericError("Generic S3 error: 503 Service Unavailable\n\nDebug source: ...")


class Replica:
    """One server's registry on a shared bucket, with a cache of its own and a hand on its clock."""

    def __init__(
        self, client: Any, root: Path, *, cache_bytes: int = 64 * MIB, max_versions: int | None = None
    ) -> None:
        self.root = root
        self.now_s = 0.0
        self.loaded: list[Path] = []
        self.wire = Wire(client)
        self.cache = VersionCache(root / "cache", cache_bytes)
        self.store = ObjectStore(Bucket(self.wire, "memory://"), self.cache)
        host, device = HostTier(100 * ROW_BYTES, torch.float32), Table(100)
        self.registry = Registry(
            self.store, (), host, device, self._load, max_versions=max_versions, clock=lambda: self.now_s
        )

    def _load(self, folder: Path) -> Any:
        self.loaded.append(folder)
        return load_folder(folder)

    def upload(self, name: str, seed: int, *, replace: bool = False) -> AdapterInfo:
        with incoming_from(self.store, write_folder(self.root / f"made-{seed}", seed)) as incoming:
            return self.registry.register(incoming, name, replace=replace).info

    def generate(self, name: str) -> str:
        """What a request does with an adapter, as far as the registry knows: the digest that it runs on."""
        with self.request(name) as lease:
            self.registry.verify(f"{lease.version.name}@{lease.version.digest}")
            return lease.version.digest

    def request(self, name: str) -> Lease:
        self.registry.look_for(name)
        return self.registry.lease(name)

    def names(self) -> list[str]:
        return [info.name for info in self.registry.list()]

    def downloads(self) -> list[str]:
        return [call for call in self.wire.calls if call.startswith("get_range")]

    def close(self) -> None:
        self.registry.close()
        assert self.registry.check_integrity() == ()
        assert list((self.root / "cache" / "work").glob(".incoming/*")) == [], "nothing is left in progress"


def objects(client: Any) -> list[str]:
    """The paths of all objects in a bucket."""
    return sorted(meta["path"] for chunk in client.list() for meta in chunk)


def files_of(client: Any, name: str) -> list[str]:
    return [path for path in objects(client) if path.startswith(f"versions/{name}/")]


__all__ = ["Crash", "MemoryStore", "Replica", "Wire", "files_of", "objects", "outage"]

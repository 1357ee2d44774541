"""The adapter store that the settings name: a folder, or an object store with a cache on this machine.

Owns which of the two a name means, and where the cache lies if nobody says. Knows nothing about either.
"""

import os
from pathlib import Path

from server.adapters.store.adapter_store import AdapterStore
from server.adapters.store.bucket import Bucket
from server.adapters.store.folder_store import Store
from server.adapters.store.object_store import ObjectStore
from server.adapters.store.quota import StoreLimits
from server.adapters.store.version_cache import VersionCache
from server.ground.config import Settings
from server.ground.errors import StartupRefused


def open_store(settings: Settings, *, create: bool) -> AdapterStore:
    """Opens it. A folder that is missing is made, and an object store tried out, only if `create`.

    Raises StartupRefused.
    """
    if isinstance(settings.store, Path):
        limits = StoreLimits(settings.store_quota, settings.store_reserve)
        return Store(settings.store, create=create, limits=limits)
    if settings.store_quota is not None:
        raise StartupRefused(
            f"--store-quota is for a folder; {settings.store} is bounded by what its service offers. Leave it out."
        )
    bucket = Bucket.open(settings.store)
    if create:
        bucket.check()
    root = settings.store_cache or default_cache()
    return ObjectStore(bucket, VersionCache(root, settings.store_cache_bytes, reserve_bytes=settings.store_reserve))


def default_cache() -> Path:
    """Where the system keeps what can be fetched again."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if Path(home).is_absolute() else Path.home() / ".cache") / "graftserve" / "adapters"

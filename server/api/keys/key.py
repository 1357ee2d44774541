"""A key: who it stands for, what it may do, and how much of it.

Owns the values, which limits are an owner's, and how the secret is made and hashed. Knows nothing about files or HTTP.
"""

import hashlib
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from server.adapters.remote.address import AllowList

PREFIX = "graft_"  # by which scanners for leaked secrets can know one


class Scope(StrEnum):
    """What a key may do. None contains another."""

    INFER = "infer"  # generate, count tokens, list models
    ADAPTERS = "adapters"  # upload, replace, merge, delete, load and unload its owner's adapters
    METRICS = "metrics"  # read /metrics and /load
    ADMIN = "admin"  # pin, end quarantines; read the machine's folders; see and change everybody's adapters


@dataclass(frozen=True, slots=True)
class Limits:
    """None: no limit. What is asked for is limited by the key, what is stored by the key's owner."""

    requests_per_minute: int | None = None
    concurrent_requests: int | None = None  # each as its sequences
    tokens_per_minute: int | None = None  # of prompts and answers
    tokens_per_day: int | None = None
    storage_bytes: int | None = None  # this and the next are one in all keys of an owner: `with_owners_limits`
    adapters: int | None = None

    @property
    def of_key(self) -> "Limits":
        """Without those of the owner."""
        return replace(self, storage_bytes=None, adapters=None)


@dataclass(frozen=True, slots=True)
class Key:
    """One key of a file. Keys of one owner share what they upload."""

    name: str
    digest: bytes = field(repr=False)  # (32,), SHA-256 of the secret
    scopes: frozenset[Scope]
    owner: str
    adapters: tuple[str, ...] = ()  # patterns of the names that it may use; none: the base alone
    sources: AllowList = AllowList(())  # from which it may have adapters fetched
    limits: Limits = Limits()

    @property
    def is_operator(self) -> bool:
        return Scope.ADMIN in self.scopes


def with_owners_limits(keys: Sequence[Key]) -> tuple[Key, ...]:
    """The keys, each with its owner's limits of storage: the smallest of those that the owner's keys name.

    A key with `admin` stores for the operator. So it gives its owner no limit, and takes none from it.
    """
    named: dict[str, list[Limits]] = {}
    for key in keys:
        if not key.is_operator:
            named.setdefault(key.owner, []).append(key.limits)
    storage = {owner: _smallest(limit.storage_bytes for limit in limits) for owner, limits in named.items()}
    adapters = {owner: _smallest(limit.adapters for limit in limits) for owner, limits in named.items()}

    def of_owner(key: Key) -> Limits:
        return replace(key.limits, storage_bytes=storage[key.owner], adapters=adapters[key.owner])

    return tuple(key if key.is_operator else replace(key, limits=of_owner(key)) for key in keys)


def _smallest(limits: Iterable[int | None]) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)


def new_secret() -> str:
    """A new key, of 256 random bits."""
    return PREFIX + secrets.token_urlsafe(32)


def digest_of(secret: str) -> bytes:
    """SHA-256, which is fast, and is right here: 2**256 keys cannot be tried, as passwords can.

    A slow hash would only let strangers keep the server busy with wrong keys.
    """
    return hashlib.sha256(secret.encode()).digest()

"""A key: who it stands for, what it may do, and how much of it.

Owns the values, and how the secret is made and hashed. Knows nothing about files or HTTP.
"""

import hashlib
import secrets
from dataclasses import dataclass, field
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
    """Of what one key may use; None: no limit. Those of the store are of all that the key's owner has there."""

    requests_per_minute: int | None = None
    concurrent_requests: int | None = None
    tokens_per_minute: int | None = None  # of prompts and answers
    tokens_per_day: int | None = None
    storage_bytes: int | None = None
    adapters: int | None = None


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


def new_secret() -> str:
    """A new key, of 256 random bits."""
    return PREFIX + secrets.token_urlsafe(32)


def digest_of(secret: str) -> bytes:
    """SHA-256, which is fast, and is right here: 2**256 keys cannot be tried, as passwords can.

    A slow hash would only let strangers keep the server busy with wrong keys.
    """
    return hashlib.sha256(secret.encode()).digest()

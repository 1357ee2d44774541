"""Adapters moved by hand over HTTP: load, unload, pin, unpin, and let back out of quarantine.

Owns the answers of these verbs, and that those who wait take no thread from the other routes.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

from fastapi import APIRouter, Query

from server.adapters.asker import current_asker
from server.adapters.registry import MAX_WAIT_S
from server.api.adapters import shown
from server.api.lanes import Lane
from server.api.services import Services
from server.ground.errors import BadRequest, RateLimited

_MAX_WAITING = 8  # requests of these verbs that wait at once; further ones queue behind them
_LONGEST_WAIT_S = 3600.0
# Of a key that is not the operator's: all owners share the places of those who wait.
_MAX_UNLOADS_OF_KEY = 2
_LONGEST_WAIT_OF_KEY_S = 300.0

MaxWait = Annotated[float, Query(ge=0, le=_LONGEST_WAIT_S, allow_inf_nan=False)]


def router(services: Services) -> APIRouter:
    routes = APIRouter(tags=["adapters"])
    waiting = Lane(_MAX_WAITING)
    unloads = Counter[str]()  # those that wait, by who asks

    @routes.post("/v1/adapters/{name}/load")
    async def load(name: str) -> dict[str, Any]:
        """Answers when it is on the host and, if idle adapters could make room, on the device."""
        loaded = await waiting.run(services.registry.load, name)
        return {**shown(loaded.info), "seconds": loaded.duration_s}

    @routes.post("/v1/adapters/{name}/unload")
    async def unload(name: str, max_wait_s: MaxWait = MAX_WAIT_S) -> dict[str, Any]:
        """Waits for the sequences that run on it, then frees host and device; the next request loads it again."""
        with _one_of_few(unloads, max_wait_s):
            unloaded = await waiting.run(services.registry.unload, name, max_wait_s)
        return {
            "name": unloaded.version.name,
            "version": unloaded.version.digest,
            "unloaded": True,
            "freed_bytes": {"host": unloaded.freed.host_bytes, "device": unloaded.freed.device_bytes},
            "seconds": unloaded.duration_s,
        }

    @routes.post("/v1/adapters/{name}/pin")
    async def pin(name: str, max_wait_s: MaxWait = MAX_WAIT_S) -> dict[str, Any]:
        """Answers when it is on host and device, where it stays until it is unpinned or the server ends."""
        return shown(await waiting.run(services.registry.pin, name, max_wait_s))

    @routes.post("/v1/adapters/{name}/unpin")
    def unpin(name: str) -> dict[str, Any]:
        return shown(services.registry.unpin(name))

    @routes.post("/v1/adapters/{name}/lift_quarantine")
    def lift_quarantine(name: str) -> dict[str, Any]:
        """Serves an adapter again with which the model's output has overflowed too often."""
        return shown(services.registry.lift_quarantine(name))

    return routes


@contextmanager
def _one_of_few(unloads: Counter[str], max_wait_s: float) -> Iterator[None]:
    """Counts an unload of a key that is not the operator's. Raises BadRequest and RateLimited, having counted none."""
    asker = current_asker()
    if asker.owner is None:
        yield
        return
    if max_wait_s > _LONGEST_WAIT_OF_KEY_S:
        raise BadRequest(
            f"'max_wait_s' may be {_LONGEST_WAIT_OF_KEY_S:g} at most for this key, and is {max_wait_s:g}: wait less, "
            f"and ask again.",
            param="max_wait_s",
        )
    if unloads[asker.who] >= _MAX_UNLOADS_OF_KEY:
        raise RateLimited(f"{_MAX_UNLOADS_OF_KEY} unloads of this key wait already, and no more may: wait for one.")
    unloads[asker.who] += 1
    try:
        yield
    finally:
        unloads[asker.who] -= 1
        if not unloads[asker.who]:
            del unloads[asker.who]

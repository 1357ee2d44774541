"""The versions of a name over HTTP: the history, and the way back.

Owns how they are shown. Knows nothing about how versions are stored.
"""

from typing import Any

from fastapi import APIRouter

from server.adapters.registry import AdapterInfo
from server.api.adapters import shown
from server.api.json_route import JsonRoute
from server.api.schemas import RollbackBody
from server.api.services import Services


def router(services: Services) -> APIRouter:
    routes = APIRouter(tags=["adapters"], route_class=JsonRoute)

    @routes.get("/v1/adapters/{name}/versions")
    def list_versions(name: str) -> dict[str, Any]:
        """The versions that are kept, the last that became current first."""
        infos = services.registry.versions(name)
        return {
            "object": "list",
            "name": name,
            "max_versions": services.registry.max_versions,  # that are kept; null for all
            "data": [_shown(info) for info in infos],
        }

    @routes.post("/v1/adapters/{name}/rollback")
    async def roll_back(name: str, body: RollbackBody | None = None) -> dict[str, Any]:
        """Makes an earlier version current, by default the one before; requests that run keep theirs."""
        prefix = None if body is None else body.version
        info, before = await services.lanes.changing.run(services.registry.roll_back, name, prefix)
        return {**shown(info), "previous_version": before.digest}

    return routes


def _shown(info: AdapterInfo) -> dict[str, Any]:
    return {
        "version": info.digest,
        "current": info.digest == info.versions[-1],
        "added": info.created,
        "bytes": info.content_bytes,
        "tiers": list(info.tiers),
        "pinned": info.is_pinned,
        "num_running": info.num_residencies,
        "num_requests": info.num_requests,
        "last_used": info.last_used,
    }

"""GET /v1/models: the base under each of its names, and every adapter as a model whose parent is the base.

Routers, gateways and user interfaces find adapters here.
"""

from typing import Any

from fastapi import APIRouter
from starlette.responses import JSONResponse

from server.adapters.registry import AdapterInfo
from server.api.selection import unknown_model
from server.api.services import Services
from server.ground.errors import AdapterNotFound

_OWNER = "graftserve"


def router(services: Services) -> APIRouter:
    routes = APIRouter(tags=["models"])

    @routes.get("/v1/models")
    def list_models() -> JSONResponse:
        adapters = [_adapter_card(services, info) for info in services.registry.list()]
        bases = [_base_card(services, name) for name in services.base.served_names]
        # Not a plain dict: FastAPI would look at every value of thousands of adapters before it writes them.
        return JSONResponse({"object": "list", "data": [*bases, *adapters]})

    # Names of bases have slashes in them: the rest of the path is the id.
    @routes.get("/v1/models/{id:path}")
    def retrieve_model(id: str) -> dict[str, Any]:
        if id in services.base.served_names:
            return _base_card(services, id)
        try:
            return _adapter_card(services, services.registry.describe(id))
        except AdapterNotFound as error:
            raise unknown_model(services, id) from error

    return routes


def _base_card(services: Services, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": int(services.started_at),
        "owned_by": _OWNER,
        "root": services.base.name,
        "parent": None,
        "max_model_len": services.base.max_context,
        "fingerprint": services.base.fingerprint,
    }


def _adapter_card(services: Services, info: AdapterInfo) -> dict[str, Any]:
    return {
        "id": info.name,
        "object": "model",
        "created": info.created,
        "owned_by": _OWNER,
        "root": info.name,
        "parent": services.base.served_names[0],
        "max_model_len": services.base.max_context,
        "adapter": {"name": info.name, "version": info.digest},
    }

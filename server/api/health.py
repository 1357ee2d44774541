"""What operators ask: is it alive, is it ready, which version, and the metrics."""

from fastapi import APIRouter, Response

from server.api.services import Services
from server.ground import metrics
from server.ground.errors import GraftError, Overloaded


class EngineDead(GraftError):
    """The engine's thread has ended: only a restart helps."""

    status = 503
    code = "engine_dead"


def router(services: Services) -> APIRouter:
    routes = APIRouter(tags=["operation"])

    @routes.get("/health")
    async def health() -> dict[str, str]:
        """200 while the engine lives; 503 when the process must be restarted."""
        _require_engine(services)
        return {"status": "ok"}

    @routes.get("/ready")
    async def ready() -> dict[str, str]:
        """200 while new requests are welcome: the base is loaded, the engine lives and is not shutting down."""
        _require_engine(services)
        if services.engine.is_draining:
            raise Overloaded("The server is shutting down.", retry_after_s=5)
        return {"status": "ready"}

    @routes.get("/version")
    async def version() -> dict[str, str]:
        return {"version": services.version}

    @routes.get("/metrics")
    async def exposition() -> Response:
        return Response(services.metrics.exposition(), media_type=metrics.CONTENT_TYPE)

    return routes


def _require_engine(services: Services) -> None:
    if not services.engine.is_alive:
        raise EngineDead("The engine has stopped; restart the server. Its log says why.")

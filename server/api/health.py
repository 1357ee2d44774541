"""What operators ask: is it alive, is it ready, which version, and the metrics."""

import anyio
from fastapi import APIRouter, Response

from server.api.services import Services
from server.ground.errors import GraftError, Overloaded
from server.ground.exposition import CONTENT_TYPE


class EngineDead(GraftError):
    """The engine's thread has ended: only a restart helps."""

    status = 503
    code = "engine_dead"


def router(services: Services) -> APIRouter:
    routes = APIRouter(tags=["operation"])
    scrapes = anyio.CapacityLimiter(1)

    @routes.get("/health")
    @routes.get("/ping")  # SageMaker's name for it
    @routes.post("/ping")
    @routes.get("/v2/health/live")  # KServe's and Triton's
    async def health() -> dict[str, str]:
        """200 while the engine lives; 503 when the process must be restarted."""
        _require_engine(services)
        return {"status": "ok"}

    @routes.get("/ready")
    @routes.get("/v2/health/ready")
    async def ready() -> dict[str, str]:
        """200 while new requests are welcome: the base is loaded, the engine lives and is not shutting down."""
        _require_engine(services)
        if services.engine.is_draining:
            raise Overloaded("The server is shutting down.", retry_after_s=5, reason="shutting_down")
        return {"status": "ready"}

    @routes.get("/version")
    async def version() -> dict[str, str]:
        return {"version": services.version}

    @routes.get("/load")
    def load() -> dict[str, int]:
        """How many sequences are in flight, those that wait to start counted, under vLLM's name for it."""
        return {"server_load": services.engine.stats().num_in_flight}

    @routes.get("/metrics")
    async def exposition() -> Response:
        # In a thread of its own: with many adapters it takes a while, and the pool that all share may be busy.
        text = await anyio.to_thread.run_sync(services.metrics.exposition, limiter=scrapes)
        return Response(text, media_type=CONTENT_TYPE)

    return routes


def _require_engine(services: Services) -> None:
    if not services.engine.is_alive:
        raise EngineDead("The engine has stopped; restart the server. Its log says why.")

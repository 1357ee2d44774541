"""How full the server is, in a header of the answer, for gateways that ask for it: ORCA's load report, as vLLM has it.

A gateway sends `endpoint-load-metrics-format: TEXT` or `JSON`. Knows nothing about who the gateway is.
"""

import json
from collections.abc import Callable, Mapping

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.faces import EngineFace

HEADER = "endpoint-load-metrics"


class LoadReport:
    """ASGI middleware that reports `measured()` with each answer to a request that asks for it and `is_told`."""

    def __init__(
        self, app: ASGIApp, measured: Callable[[], Mapping[str, float]], is_told: Callable[[Scope], bool]
    ) -> None:
        self._app = app
        self._measured = measured
        self._is_told = is_told

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        form = Headers(scope=scope).get(f"{HEADER}-format", "").upper() if scope["type"] == "http" else ""
        if form not in ("TEXT", "JSON") or not self._is_told(scope):
            return await self._app(scope, receive, send)

        async def send_with_report(message: Message) -> None:
            if message["type"] == "http.response.start":
                measured = await run_in_threadpool(self._measured)
                MutableHeaders(scope=message)[HEADER] = f"{form} {_written(measured, form)}"
            await send(message)

        return await self._app(scope, receive, send_with_report)


def load_of(engine: EngineFace) -> dict[str, float]:
    """What gateways weigh servers by, under vLLM's names; the cache's use is from 0 to 1, whatever the name says."""
    stats = engine.stats()
    return {
        "kv_cache_usage_perc": stats.num_used_blocks / max(stats.num_blocks, 1),
        "num_requests_waiting": float(stats.num_waiting),
    }


def _written(named: Mapping[str, float], form: str) -> str:
    if form == "JSON":
        return json.dumps({"named_metrics": named})
    return ", ".join(f"named_metrics.{name}={value}" for name, value in named.items())

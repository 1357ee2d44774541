"""What happens around every request: its id, its metrics, and the last resort when something unforeseen is raised."""

import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api import notes
from server.api.auth import key_of
from server.api.errors import BROKEN, REASON, STATUS_CLIENT_GONE, error_response, internal_error
from server.api.notes import Notes
from server.ground.metrics import Metrics

_LOG = logging.getLogger(__name__)
_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class Traffic:
    """The outermost ASGI middleware, so that every answer carries `x-request-id` and every one is counted."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        request_id, noted = _request_id(scope), notes.begin()
        scope["request_id"] = request_id  # for log lines further in
        started_s = time.perf_counter()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            _LOG.exception("request %s to %r failed", request_id, scope["path"])
            if status:
                scope[BROKEN] = internal_error().reason
                raise  # the server then breaks the connection off: the client must not take this for a whole answer
            await error_response(internal_error())(scope, receive, send_with_id)
        finally:
            duration_s = time.perf_counter() - started_s
            self._metrics.observe_request(_route(scope), status or STATUS_CLIENT_GONE, duration_s)
            if REASON in scope:
                self._metrics.count_rejection(scope[REASON])
            if BROKEN in scope:
                self._metrics.count_broken_answer(scope[BROKEN])
            _log_request(scope, noted, status or STATUS_CLIENT_GONE, duration_s)


def _log_request(scope: Scope, noted: Notes, status: int, duration_s: float) -> None:
    """One line per request, without anything that its client has said but the path; probes and looks in detail only."""
    key = key_of(scope)
    level = logging.DEBUG if scope["method"] in ("GET", "HEAD", "OPTIONS") else logging.INFO
    outcome = noted.error or ("client_gone" if status == STATUS_CLIENT_GONE else "ok")
    fields = {
        "request_id": scope["request_id"],
        "key": None if key is None else key.name,
        "method": scope["method"],
        "path": scope["path"],
        "status": status,
        "outcome": outcome,
        "seconds": round(duration_s, 4),
        "adapter": noted.adapter,
        "prompt_tokens": noted.num_prompt_tokens,
        "output_tokens": noted.num_output_tokens,
    }
    asked = f"adapter {noted.adapter or 'none'}, {noted.num_prompt_tokens} + {noted.num_output_tokens} tokens"
    shown = (scope["request_id"], scope["method"], scope["path"], status, duration_s, outcome, asked)
    _LOG.log(level, "request %s: %s %r was answered with %d after %.3f s: %s, %s", *shown, extra={"fields": fields})


def _request_id(scope: Scope) -> str:
    """The client's own id where it is one that may stand in a header and a log line."""
    sent = Headers(scope=scope).get("x-request-id", "")
    return sent if _ID.fullmatch(sent) else f"req_{uuid.uuid4().hex}"


def _route(scope: Scope) -> str:
    """The template of the route that took the request: a closed set, whatever clients send."""
    return getattr(scope.get("route"), "path", "unmatched")

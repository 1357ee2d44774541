"""What schemathesis cannot know: which names exist, and what a tar is. Loaded by its command (SCHEMATHESIS_HOOKS).

Without it nearly every request would end at a name that does not exist.
"""

import zlib
from typing import Any

import schemathesis
from schemathesis import HookContext

from server.api.schemas import MAX_CHOICES

_KNOWN = {"model": "tiny", "adapter": "first"}
_GENERATION = ("/v1/completions", "/v1/chat/completions")


@schemathesis.serializer("application/x-tar")
def _as_it_is(context: Any, value: Any) -> Any:
    return value if isinstance(value, bytes) else str(value).encode(errors="replace")


@schemathesis.hook
def map_path_parameters(context: HookContext, path_parameters: dict[str, Any]) -> dict[str, Any]:
    """Every other name is that of an adapter, but where it would be deleted."""
    name = (path_parameters or {}).get("name")
    if isinstance(name, str) and context.operation.method != "delete" and zlib.crc32(name.encode()) % 2:
        path_parameters["name"] = "first"
    return path_parameters


@schemathesis.hook
def map_body(context: HookContext, body: Any) -> Any:
    """Names that exist, so that the engine is reached, and short answers."""
    if not isinstance(body, dict) or context.operation.path not in _GENERATION:
        return body
    known = {name: _KNOWN[name] for name, value in body.items() if name in _KNOWN and isinstance(value, str)}
    short = {"max_tokens": 4} if body.get("max_tokens") is None else {}
    few = {"n": 2} if type(body.get("n")) is int and 2 < body["n"] <= MAX_CHOICES else {}
    return {**body, **known, **short, **few}

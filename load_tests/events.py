"""Server-sent events as completions are streamed: from bytes to events, and from an event to what it says.

Owns the framing and the dialects (OpenAI's, vLLM's, SGLang's, LoRAX's). Knows nothing about sockets and times.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

DONE = "[DONE]"
# The fields in which some server puts generated text; a chunk with any of them has brought a token.
_CHAT_TEXTS = ("content", "reasoning_content", "reasoning", "refusal", "tool_calls")


class BadEvent(ValueError):
    """An event that is no completion chunk; the message says how it begins."""


class EventParser:
    """Takes bytes as they come, in any pieces, and gives the data of each event once its empty line is there."""

    def __init__(self) -> None:
        self._line = b""
        self._data: list[str] = []

    def feed(self, part: bytes) -> Iterator[str]:
        """The data of every event that `part` completes. Lines end in LF or CRLF; comments and other fields pass."""
        *lines, self._line = (self._line + part).split(b"\n")
        for raw in lines:
            line = raw.removesuffix(b"\r")
            field, _, value = line.partition(b":")
            if field == b"data":
                self._data.append(value.removeprefix(b" ").decode(errors="replace"))
            elif not line and self._data:
                yield "\n".join(self._data)
                self._data = []


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one event says; `error` is the server's message if it is a failure in the middle of the stream."""

    has_text: bool = False
    finish_reason: str | None = None
    num_prompt_tokens: int | None = None
    num_output_tokens: int | None = None
    error: str | None = None


def read_chunk(data: str) -> Chunk:
    """Raises BadEvent for what is not a JSON object or has choices that are not."""
    try:
        event = json.loads(data)
    except ValueError as error:
        raise BadEvent(f"not JSON: {data[:80]!r}") from error
    if not isinstance(event, dict):
        raise BadEvent(f"not a JSON object: {data[:80]!r}")
    if event.get("error") is not None or event.get("object") == "error":
        return Chunk(error=error_message(event))
    choices = event.get("choices") or []
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise BadEvent(f"choices are not a list of objects: {data[:80]!r}")
    reasons = [choice["finish_reason"] for choice in choices if isinstance(choice.get("finish_reason"), str)]
    return Chunk(
        has_text=any(map(_has_text, choices)),
        finish_reason=reasons[0] if reasons else None,
        num_prompt_tokens=_count(event, "prompt_tokens"),
        num_output_tokens=_count(event, "completion_tokens"),
    )


def error_message(answer: object) -> str:
    """The sentence in an error object, whichever of the known shapes it has; otherwise the object itself."""
    shown = answer
    if isinstance(answer, dict):
        inner = answer.get("error")
        shown = inner.get("message", inner) if isinstance(inner, dict) else inner or answer.get("message", answer)
    return str(shown)


def _has_text(choice: dict[str, Any]) -> bool:
    delta = choice.get("delta")
    if isinstance(delta, dict):
        return any(delta.get(field) for field in _CHAT_TEXTS)
    return bool(choice.get("text"))


def _count(event: dict[str, Any], field: str) -> int | None:
    usage = event.get("usage")
    count = usage.get(field) if isinstance(usage, dict) else None
    return count if isinstance(count, int) and not isinstance(count, bool) else None

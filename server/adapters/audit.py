"""The audit log: who changed which adapter, when, and how it ended, as one line of JSON each.

Owns the line, and what a request has told already, so that each refusal is told once. A line has names, digests and
error codes, and nothing of what a request or an adapter says. Knows nothing about where lines go: the logger
"graft.audit" does.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from server.adapters.asker import current_asker
from server.ground.errors import GraftError

LOGGER = "graft.audit"

_log = logging.getLogger(LOGGER)
_MAX_CHARS = 200  # of a name that a client made up


@dataclass(slots=True)
class Trail:
    """What is known of a request that is to change something, for the line of its refusal."""

    adapter: str | None = None  # which it is about, where its body says so
    verb: str | None = None  # where its body says that it is another than its route's
    is_told: bool = False  # whether there is a line of its refusal


_trail: ContextVar[Trail | None] = ContextVar("trail", default=None)


def begin_trail() -> Trail:
    """That of a request which begins in this task, and of all that it starts."""
    trail = Trail()
    _trail.set(trail)
    return trail


def current_trail() -> Trail | None:
    """That of the request in whose name this runs; None where there is none."""
    return _trail.get()


def about(adapter: str | None, verb: str | None = None) -> None:
    """Says which adapter the request is about, as soon as that is known, and what it asks for."""
    trail = _trail.get()
    if trail is not None:
        trail.adapter, trail.verb = adapter, verb


@contextmanager
def noted(verb: str, adapter: str, **facts: Any) -> Iterator[dict[str, Any]]:
    """Writes a line at the end of the block, whatever the end is; what is put into the dict is in it."""
    facts["result"] = "failed"
    try:
        yield facts
        facts["result"] = "done"
    except GraftError as error:
        facts["result"] = error.code
        raise
    finally:
        note(verb, adapter=adapter[:_MAX_CHARS], **facts)


def note(verb: str, **facts: Any) -> None:
    """Writes a line now; a `result` that is not "done" says how what was asked for was refused, or failed."""
    trail = _trail.get()
    if trail is not None and facts.get("result", "done") != "done":
        trail.is_told = True
    asker = current_asker()
    line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "verb": verb, "who": asker.who}
    if asker.owner is not None:
        line["owner"] = asker.owner
    if asker.request_id is not None:
        line["request_id"] = asker.request_id
    _log.info(json.dumps(line | facts))

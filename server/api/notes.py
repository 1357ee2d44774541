"""What is noted of a request on its way, for its line in the log: adapter, tokens, how it ended. Never what it says.

Owns these notes, one set per request, wherever in its tasks and threads something is to be noted. Knows nothing about
routes or log lines.
"""

from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(slots=True)
class Notes:
    adapter: str | None = None  # NAME@VERSION, or a mix of them; None: the base
    num_prompt_tokens: int = 0  # of all its sequences that ended
    num_output_tokens: int = 0
    error: str | None = None  # the code of the error that it was answered with, or that ended its stream


_NOTES: ContextVar[Notes | None] = ContextVar("notes", default=None)


def begin() -> Notes:
    """The notes of a request that begins in this task, and of all that it starts."""
    notes = Notes()
    _NOTES.set(notes)
    return notes


def current() -> Notes:
    """Those of the request that this is for; outside of any, some that nobody reads."""
    return _NOTES.get() or Notes()

"""Calls in the name of an owner, as a request makes them."""

from collections.abc import Callable
from contextvars import copy_context
from typing import Any, TypeVar

from server.adapters.asker import Asker, ask_as

_T = TypeVar("_T")


def asked_by(owner: str | None, act: Callable[..., _T], *given: Any, limits: Any = (), **named: Any) -> _T:
    """What `act` gives where a key of `owner` asks (None: the operator's); `limits` are those of an `Asker`."""
    context = copy_context()
    context.run(ask_as, Asker(who=f"{owner}-key", owner=owner, **dict(limits)))
    return context.run(act, *given, **named)

"""How each accepted sequence ends, seen where its deltas are put and not where they are read.

A reader stops at the first terminal delta, so it cannot tell one from two. Owns the count, and nothing about what is
asked.
"""

from collections.abc import Callable
from typing import Any

import pytest

from server.engine.engine import Engine
from server.engine.flight import DeltaStream, GenerationRequest
from server.engine.sequence import Delta


class Endings:
    """Of every sequence that any engine accepts from here on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._are_terminal: dict[DeltaStream, list[bool]] = {}
        submit = Engine.submit

        def watched(engine: Engine, request: GenerationRequest) -> DeltaStream:
            stream = submit(engine, request)
            self._watch(stream)  # in time: deltas are put on this event loop, and only when it is free again
            return stream

        monkeypatch.setattr(Engine, "submit", watched)

    def _watch(self, stream: DeltaStream) -> None:
        seen = self._are_terminal[stream] = []
        queue: Any = stream._queue  # behind `put`, so that one that puts twice is seen as well
        put: Callable[[Delta], None] = queue.put_nowait

        def counted(delta: Delta) -> None:
            seen.append(delta.is_terminal)
            put(delta)

        queue.put_nowait = counted

    @property
    def num_accepted(self) -> int:
        return len(self._are_terminal)

    def check(self) -> None:
        """Each has ended exactly once, and nothing came after its end."""
        for stream, seen in self._are_terminal.items():
            assert sum(seen) == 1, f"{stream.sequence_id} has ended {sum(seen)} times"
            assert seen[-1], f"{stream.sequence_id} goes on after its end"

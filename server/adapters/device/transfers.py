"""Copies to the device beside its steps: who waits for whom.

Owns the order of copies and steps. Knows nothing about adapters or rows; what is copied is told as work to be queued.

Two orders must hold. A copy into rows that another adapter has left comes after the steps that may still read them. And
a step that reads what was copied comes after the copy. Nothing else waits: a copy goes on beside the steps that were
queued since rows were last freed, and the engine's thread queues a step without waiting for a copy to end.

On a GPU there are streams, each a queue that the device works off by itself. On a CPU work is done when it is queued,
so every wait is over at once: the same calls, in the same order.
"""

import threading
from collections.abc import Callable
from typing import Protocol

import torch


class Mark(Protocol):
    """A point in a stream's queue."""

    def wait_here(self) -> None:
        """Blocks this thread until the device has come so far."""


class Stream(Protocol):
    """A queue of work on the device."""

    def run(self, work: Callable[[], None]) -> None:
        """Queues what `work` does on the device; returns when that is queued."""

    def record(self) -> Mark:
        """The point after all that has been queued."""

    def wait(self, mark: Mark) -> None:
        """What is queued from now on begins when the device has come to a mark, of this stream or another."""


class Transfers:
    """The copies of one device tier. Safe for many threads."""

    def __init__(self, copies: Stream, current: Callable[[], Stream]) -> None:
        """`copies` is for these alone; `current` gives the stream that the calling thread queues steps on."""
        self._copies = copies
        self._current = current
        self._lock = threading.Lock()
        self._steps = current()
        self._freed = self._steps.record()
        self._arriving: list[Mark] = []

    @classmethod
    def to(cls, device: torch.device) -> "Transfers":
        if device.type != "cuda":
            return cls(_Eager(), _Eager)
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return cls(_Cuda(stream), lambda: _Cuda(torch.cuda.current_stream(device)))

    def rows_freed(self) -> None:
        """Says that rows may be copied into once the steps queued so far have ended."""
        with self._lock:
            self._freed = self._steps.record()

    def start(self, work: Callable[[], None]) -> Mark:
        """Queues copies into rows that are free; the mark of their end."""
        with self._lock:
            freed = self._freed
        self._copies.wait(freed)
        self._copies.run(work)
        return self._copies.record()

    def hold_steps(self, mark: Mark) -> None:
        """Has the steps that are queued from now on wait for a copy, on the device."""
        with self._lock:
            self._arriving.append(mark)

    def before_step(self) -> None:
        """To be called by the thread that queues steps, before it queues what reads rows."""
        with self._lock:
            self._steps = self._current()
            arriving, self._arriving = self._arriving, []
        for mark in arriving:
            self._steps.wait(mark)


class _Done:
    def wait_here(self) -> None:
        """It is."""


class _Eager:
    """A stream whose work is done when it is queued."""

    def run(self, work: Callable[[], None]) -> None:
        work()

    def record(self) -> Mark:
        return _Done()

    def wait(self, mark: Mark) -> None:
        """Whatever it is, it is over."""


class _CudaMark:
    def __init__(self, event: torch.cuda.Event) -> None:
        self.event = event

    def wait_here(self) -> None:
        self.event.synchronize()


class _Cuda:
    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream

    def run(self, work: Callable[[], None]) -> None:
        with torch.cuda.stream(self._stream):
            work()

    def record(self) -> Mark:
        return _CudaMark(self._stream.record_event())

    def wait(self, mark: Mark) -> None:
        assert isinstance(mark, _CudaMark)
        self._stream.wait_event(mark.event)

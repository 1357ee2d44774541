"""Calls of the child's parts, and whether the child lives: the front's end of the channel `calls`.

Owns the calls under way and the thread that hears their answers. Knows nothing about what is called.
"""

import itertools
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from server.adapters.asker import current_asker
from server.adapters.audit import Trail, current_trail
from server.apart.channel import Channel, ChannelClosed, Sender, framed
from server.apart.messages import Answer, Beat, Call, Close
from server.engine.engine import dead
from server.ground.errors import GenerationFailed

_log = logging.getLogger(__name__)

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class _Waiting:
    answer: "Future[Any]"
    trail: Trail | None  # of the request that has called


class Calls:
    """Any thread may call. Once the child is lost every call raises GenerationFailed, also those under way."""

    def __init__(self, channel: Channel, why_lost: Callable[[], str], max_silence_s: float) -> None:
        """`why_lost` says what became of the child, when its end is closed. One that is silent for longer is lost."""
        self._channel = channel
        # A child that takes nothing must not hold up who calls: that may be the event loop.
        self._sender = Sender(channel, "calls", lambda frame: frame)
        self._why_lost = why_lost
        self._max_silence_s = max_silence_s
        self._lock = threading.Lock()  # the next two
        self._waiting: dict[int, _Waiting] = {}
        self._fault: str | None = None
        self._numbers = itertools.count()
        self._heard_s = time.monotonic()
        self._is_ending = False
        self._thread = threading.Thread(target=self._hear, name="engine-process", daemon=True)
        self._thread.start()

    def begin(self, part: str, method: str, *arguments: Any, **named: Any) -> "Future[Any]":
        """Calls without waiting; what the method gives, or raises, is the future's. It cannot be cancelled."""
        number, answer = next(self._numbers), Future[Any]()
        answer.set_running_or_notify_cancel()
        frame = framed(Call(number, part, method, arguments, named, current_asker()))
        with self._lock:
            if self._fault is not None:
                raise dead(self._fault)
            self._waiting[number] = _Waiting(answer, current_trail())
        self._sender.send(frame)
        return answer

    def call(self, part: str, method: str, *arguments: Any, **named: Any) -> Any:
        """Calls and waits: for worker threads."""
        return self.begin(part, method, *arguments, **named).result()

    def told(self, otherwise: _T, part: str, method: str, *arguments: Any) -> _T:
        """As `call`; `otherwise` of a child that is lost, for who asks how things stand."""
        try:
            found: _T = self.call(part, method, *arguments)
        except GenerationFailed:
            return otherwise
        return found

    @property
    def fault(self) -> str | None:
        """Why the child, or its engine, is lost; None while it lives."""
        if self._fault is None and time.monotonic() - self._heard_s > self._max_silence_s:
            self._lose(f"its process has said nothing for {self._max_silence_s:g} s")
        return self._fault

    def end(self) -> None:
        """Tells the child to end in good order, from where on its engine does not live and only silence is a loss."""
        self._is_ending = True
        self._sender.send(framed(Close()))

    def close(self) -> None:
        """Ends the threads. Nothing is called any more."""
        self._channel.close()
        self._sender.close()
        self._thread.join()

    def _hear(self) -> None:
        try:
            while True:
                message = self._channel.receive()
                self._heard_s = time.monotonic()
                if isinstance(message, Answer):
                    self._take(message)
                elif isinstance(message, Beat) and not message.is_engine_alive and not self._is_ending:
                    self._lose("its process says so; its log says why")
        except ChannelClosed:
            self._lose(self._why_lost())
        except Exception:  # nobody may be left waiting, whatever it is
            _log.exception("the engine's process cannot be understood")
            self._lose("what its process says cannot be read")

    def _take(self, message: Answer) -> None:
        with self._lock:
            waiting = self._waiting.pop(message.number, None)
        if waiting is None:
            return
        if message.is_told and waiting.trail is not None:
            waiting.trail.is_told = True  # before anybody goes on: the refusal is not to be told again
        if message.has_failed:
            waiting.answer.set_exception(message.value)
        else:
            waiting.answer.set_result(message.value)

    def _lose(self, why: str) -> None:
        with self._lock:
            self._fault = self._fault or why
            lost, self._waiting = self._waiting, {}
        for waiting in lost.values():
            waiting.answer.set_exception(dead(self._fault))

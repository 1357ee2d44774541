"""Sequences that run in the other process: the front's end of the channel `deltas`, on the event loop of the routes.

Owns the streams whose ends have not come, and that each of them gets one when the other process is lost. Knows nothing
about HTTP.
"""

import asyncio
import itertools
import socket
from collections.abc import Sequence
from copy import copy

from server.adapters.asker import current_asker
from server.apart.channel import LoopChannel
from server.apart.messages import Abort, Drain, Drained, Enter, LetIn, Withdraw
from server.apart.steps import unpacked
from server.engine.engine import dead
from server.engine.entry import Entered, GroupOrder
from server.engine.flight import Streams
from server.engine.sequence import Delta, FinishReason


class ApartEntry:
    """`EntryFace` for the one event loop that uses it first."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._numbers = itertools.count()
        self._channel: LoopChannel | None = None
        self._streams: Streams | None = None
        self._answers: dict[int, asyncio.Future[LetIn | Drained]] = {}
        self._fault: str | None = None
        self.is_draining = False

    async def enter(self, order: GroupOrder) -> Entered:
        """As `Entry.enter`; raises GenerationFailed, too, once the other process is lost."""
        streams = self._attached()
        number, ids = next(self._numbers), tuple(one.sequence_id for one in order.sequences)
        opened = tuple(streams.open(sequence_id, self._abort) for sequence_id in ids)  # their deltas may come first
        try:
            answer = await self._answered(Enter(number, order, current_asker()), number)
        except asyncio.CancelledError:
            self._send(Withdraw(number, ids))
            self._forget(ids)
            raise
        except BaseException:
            self._forget(ids)
            raise
        assert isinstance(answer, LetIn)
        if isinstance(answer.held, Exception) or answer.held.refusal is not None:
            self._forget(ids)
        if isinstance(answer.held, Exception):
            raise answer.held
        return Entered(answer.held, opened if answer.held.refusal is None else ())

    async def drain(self, timeout_s: float) -> None:
        """Accepts nothing new, and waits as `Works.drain` does, there."""
        self.is_draining = True
        self._attached()
        number = next(self._numbers)
        await self._answered(Drain(number, timeout_s), number)

    def abandon(self, fault: str) -> None:
        """Fails what is in flight, if nobody else has. On the event loop."""
        self._fault = self._fault or fault
        error = dead(self._fault)
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(copy(error))
        if self._streams is not None:
            ids = self._streams.open_ids
            ends = [Delta(one, finish_reason=FinishReason.ERROR, error=copy(error)) for one in ids]
            self._streams.deliver(ends)

    def close(self) -> None:
        """Once the event loop is over."""
        if self._channel is not None:
            self._channel.close()
        self._end.close()

    def _take(self, message: object) -> None:
        if isinstance(message, list):
            assert self._streams is not None
            self._streams.deliver(unpacked(message))
        elif isinstance(message, LetIn | Drained):
            answer = self._answers.pop(message.number, None)
            if answer is not None and not answer.done():
                answer.set_result(message)

    def _lose(self) -> None:
        self.abandon("its process has ended; its log says why")

    def _attached(self) -> Streams:
        """The streams of this event loop, which hears the channel from the first call on."""
        if self._streams is None:
            self._streams = Streams(asyncio.get_running_loop())
            self._channel = LoopChannel(self._end, self._take, self._lose)
        return self._streams

    async def _answered(self, message: Enter | Drain, number: int) -> LetIn | Drained:
        if self._fault is not None:
            raise dead(self._fault)
        answer: asyncio.Future[LetIn | Drained] = asyncio.get_running_loop().create_future()
        self._answers[number] = answer
        try:
            self._send(message)
            return await answer
        finally:
            self._answers.pop(number, None)

    def _abort(self, sequence_id: str) -> None:
        self._send(Abort((sequence_id,)))

    def _send(self, message: object) -> None:
        if self._channel is not None:
            self._channel.send(message)

    def _forget(self, sequence_ids: Sequence[str]) -> None:
        assert self._streams is not None
        for sequence_id in sequence_ids:
            self._streams.forget(sequence_id)

"""Where sequences enter the child and their deltas leave it: the child's end of the channel `deltas`.

Owns that a request whose reader has left is ended however far it has come. The engine's thread hands over what a step
gave in one call and goes on; another thread packs and sends it. Knows nothing about HTTP.
"""

import asyncio
import dataclasses
import logging
import os
import threading
from collections.abc import Sequence

from server.adapters.asker import ask_as
from server.apart.channel import Channel, ChannelClosed, Sender, framed
from server.apart.messages import Abort, Drain, Drained, Enter, LetIn, Withdraw
from server.apart.portable import portable
from server.apart.steps import messages_of
from server.assemble import Works
from server.engine.entry import Entry, GroupOrder, Held
from server.engine.flight import GenerationRequest
from server.engine.sequence import Delta
from server.ground.errors import BadRequest, GenerationFailed, GraftError
from server.model.grammar import GrammarSource
from server.model.grammar_trial import GrammarRefused, GrammarsUnavailable

_log = logging.getLogger(__name__)


class Door:
    """Orders are taken on the event loop that makes it; any thread may hand over deltas."""

    def __init__(self, works: Works, channel: Channel) -> None:
        self._works = works
        self._entry = Entry(works.engine, works.registry)
        self._channel = channel
        self._sender = Sender(channel, "deltas", _frame)
        self._loop = asyncio.get_running_loop()
        self._entering: dict[int, asyncio.Task[None]] = {}
        self._withdrawn: set[int] = set()  # of those that are entering
        self._drains: set[asyncio.Task[None]] = set()  # kept, because the loop alone does not keep tasks alive
        threading.Thread(target=self._hear, name="orders", daemon=True).start()

    def hand_over(self, deltas: Sequence[Delta]) -> None:
        """The engine's `Outlet`."""
        self._sender.send(deltas)

    def close(self) -> None:
        """Sends what was handed over, once the engine is closed."""
        self._sender.close()

    def _hear(self) -> None:
        try:
            while True:
                self._loop.call_soon_threadsafe(self._take, self._channel.receive())
        except ChannelClosed:
            pass  # the other channel tells of it
        except Exception:
            if not self._loop.is_closed():  # nobody may be left waiting at a door that hears nothing
                _log.exception("the engine's process cannot read what it is asked")
                os._exit(1)

    def _take(self, message: object) -> None:
        match message:
            case Enter(number=number):
                self._entering[number] = self._loop.create_task(self._enter(message))
            case Abort(sequence_ids=sequence_ids):
                self._abort(sequence_ids)
            case Withdraw(number=number) if number in self._entering:
                self._withdrawn.add(number)
            case Withdraw(sequence_ids=sequence_ids):
                self._abort(sequence_ids)
            case Drain():
                task = self._loop.create_task(self._drain(message))
                self._drains.add(task)
                task.add_done_callback(self._drains.discard)

    def _abort(self, sequence_ids: Sequence[str]) -> None:
        for sequence_id in sequence_ids:
            self._works.engine.abort(sequence_id)

    async def _enter(self, message: Enter) -> None:
        ask_as(message.asker)  # of this task alone
        try:
            order = await self._with_grammar(message.order)
            held, _ = self._entry.take(order, self._accept)
            answer: Held | Exception = held
        except asyncio.CancelledError:  # at the end of all
            raise
        except BaseException as error:  # it is the caller's, whatever it is
            answer = portable(error)
        finally:
            del self._entering[message.number]
        self._sender.send(LetIn(message.number, answer))
        if message.number in self._withdrawn:
            self._withdrawn.discard(message.number)
            self._abort([one.sequence_id for one in message.order.sequences])

    async def _with_grammar(self, order: GroupOrder) -> GroupOrder:
        """Its grammar was compiled a moment ago; one that has been forgotten since is compiled again."""
        if not isinstance(order.grammar, GrammarSource):
            return order
        try:
            grammar = await asyncio.wrap_future(self._works.grammars.compiled(order.grammar))
        except (GrammarRefused, GrammarsUnavailable) as error:
            raise BadRequest(f"The grammar cannot be used any more: {error}", code="invalid_grammar") from None
        return dataclasses.replace(order, grammar=grammar)

    def _accept(self, request: GenerationRequest) -> None:
        self._works.engine.accept(request, self)

    async def _drain(self, message: Drain) -> None:
        await self._works.drain(message.timeout_s)
        self._sender.send(Drained(message.number))


def _frame(value: object) -> bytes:
    """A value's frame, or frames. A step's deltas are packed here, off the engine's thread."""
    if not isinstance(value, list):
        return framed(value)
    deltas: list[Delta] = value
    crossing = [delta if delta.error is None else _with_portable_error(delta) for delta in deltas]
    return b"".join(map(framed, messages_of(crossing)))


def _with_portable_error(delta: Delta) -> Delta:
    error = delta.error and portable(delta.error)
    if error is not None and not isinstance(error, GraftError):  # it cannot cross
        error = GenerationFailed(str(error))
    return dataclasses.replace(delta, error=error)

"""One accepted request on its way: its tokens become text and log-probabilities, and these the deltas of its stream.

Owns the streams that readers wait on and what a reader sees of a sequence. Knows nothing about scheduling or tensors.
"""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable
from collections.abc import Sequence as Listing
from dataclasses import dataclass, field
from typing import Protocol

from server.adapters.registry import Lease
from server.engine.sequence import Delta, FinishReason, SamplingParams, Sequence, TokenLogprobs
from server.engine.token_rules import TokenRules
from server.ground.errors import GraftError
from server.model.grammar import Grammar
from server.model.tokenizer import IncrementalDecoder


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One sequence to generate. The engine takes over `lease` (None: the bare base) and releases it at the end."""

    sequence_id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    lease: Lease | None = None
    cache_salt: str | None = None  # keys and values are shared only among requests of one salt
    grammar: Grammar | None = None  # that the output follows


class DeltaStream:
    """The deltas of one sequence, in order; the last one is terminal. Lives on the event loop that submitted it."""

    def __init__(self, sequence_id: str, abort: Callable[[str], None]) -> None:
        self.sequence_id = sequence_id
        self._queue: asyncio.Queue[Delta] = asyncio.Queue()
        self._abort = abort
        self._is_ended = False

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self

    async def __anext__(self) -> Delta:
        if self._is_ended:
            raise StopAsyncIteration
        delta = await self._queue.get()
        self._is_ended = delta.is_terminal
        return delta

    def abort(self) -> None:
        """Ends the sequence within one step, unless it has ended; the terminal delta still comes."""
        self._abort(self.sequence_id)

    def put(self, delta: Delta) -> None:
        """On the event loop only."""
        self._queue.put_nowait(delta)


class Outlet(Protocol):
    """Where the deltas of sequences go."""

    def hand_over(self, deltas: Listing[Delta]) -> None:
        """Takes what the last step gave for all of its sequences. On the engine's thread: it waits for nobody."""


class Streams:
    """The streams that are read on one event loop. For that loop alone, but for `hand_over`."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._open: dict[str, DeltaStream] = {}

    def open(self, sequence_id: str, abort: Callable[[str], None]) -> DeltaStream:
        """The stream of a sequence that is about to be submitted; forget it if that fails."""
        stream = self._open[sequence_id] = DeltaStream(sequence_id, abort)
        return stream

    def forget(self, sequence_id: str) -> None:
        """Does nothing for one that has ended."""
        self._open.pop(sequence_id, None)

    def hand_over(self, deltas: Listing[Delta]) -> None:
        """From any thread, with one call into the loop."""
        with contextlib.suppress(RuntimeError):  # the loop has been closed, and nobody reads any more
            self._loop.call_soon_threadsafe(self.deliver, deltas)

    def deliver(self, deltas: Listing[Delta]) -> None:
        """To the streams that are open; each is forgotten with its terminal delta, which so comes once."""
        for delta in deltas:
            stream = self._open.get(delta.sequence_id)
            if stream is None:
                continue
            if delta.is_terminal:
                del self._open[delta.sequence_id]
            stream.put(delta)

    @property
    def open_ids(self) -> tuple[str, ...]:
        """The sequences whose end has not come yet."""
        return tuple(self._open)


@dataclass(slots=True, eq=False)
class Flight:
    """A sequence from acceptance to its end, with what its reader gets to see of it."""

    sequence: Sequence
    lease: Lease | None
    outlet: Outlet
    decoder: IncrementalDecoder
    random: random.Random
    rules: TokenRules | None = None  # on the choice of its tokens
    ends: frozenset[int] = frozenset()  # the tokens that end it
    _prompt_scores: dict[int, TokenLogprobs] = field(default_factory=dict)  # by position
    _is_scored: bool = False
    _uniform: float | None = None  # drawn for the next token

    def uniform(self) -> float:
        """The random number that chooses the next token, in [0, 1): the same however often a step is tried."""
        if self._uniform is None:
            self._uniform = self.random.random()
        return self._uniform

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters that it uses: several for a mix, none for the bare base."""
        return () if self.lease is None else tuple(portion.version.name for portion in self.lease.portions)

    @property
    def method(self) -> str | None:
        """Of its adapter, where it has one that was ever lowered."""
        facts = None if self.lease is None else self.lease.content.facts
        return None if facts is None else facts.method

    def add_prompt_scores(self, start: int, scores: Listing[TokenLogprobs]) -> None:
        """The scores of the prompt's tokens from position `start` on; the same ones may come again (preemption)."""
        self._prompt_scores.update(enumerate(scores, start))

    def advance(
        self, token_ids: tuple[int, ...], scores: tuple[TokenLogprobs, ...], reason: FinishReason | None
    ) -> Delta | None:
        """What the reader gets after a step of this sequence: new tokens, its prompt's scores, its end.

        The token that ends a sequence is among its tokens, but not in its text, unless its request wants it there. None
        when there is nothing to tell yet. A stop string ends the sequence: then the delta's reason is STOP, whatever
        `reason` was.
        """
        if token_ids:
            self._uniform = None
        shown = () if self._is_silent_end(token_ids, reason) else token_ids
        text = self.decoder.push(shown) if shown else ""
        if reason is not None:
            text += self.decoder.flush()
        if self.decoder.is_stopped:
            reason = FinishReason.STOP
        prompt_scores = self._take_prompt_scores()
        if not token_ids and reason is None and prompt_scores is None:
            return None
        return self._delta(reason, token_ids=token_ids, text=text, logprobs=scores, prompt_logprobs=prompt_scores)

    def end(self, reason: FinishReason, error: GraftError | None = None) -> Delta:
        """The terminal delta of a sequence that ends without a token: aborted or failed."""
        return self._delta(reason, error=error)

    def _is_silent_end(self, token_ids: tuple[int, ...], reason: FinishReason | None) -> bool:
        is_end = reason is FinishReason.STOP and not self.ends.isdisjoint(token_ids)
        return is_end and not self.sequence.params.includes_stop

    def _take_prompt_scores(self) -> tuple[TokenLogprobs, ...] | None:
        """The scores of the whole prompt, once, when they are complete."""
        num_prompt = self.sequence.num_prompt_tokens
        if self._is_scored or self.sequence.params.prompt_logprobs is None:
            return None
        if len(self._prompt_scores) < num_prompt - 1:
            return None
        self._is_scored = True
        first = TokenLogprobs(self.sequence.prompt_ids[0], None)
        return (first, *(self._prompt_scores[position] for position in range(1, num_prompt)))

    def _delta(
        self,
        reason: FinishReason | None,
        *,
        token_ids: tuple[int, ...] = (),
        text: str = "",
        logprobs: tuple[TokenLogprobs, ...] = (),
        prompt_logprobs: tuple[TokenLogprobs, ...] | None = None,
        error: GraftError | None = None,
    ) -> Delta:
        return Delta(
            sequence_id=self.sequence.sequence_id,
            token_ids=token_ids,
            text=text,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            finish_reason=reason,
            error=error,
            num_prompt_tokens=self.sequence.num_prompt_tokens,
            num_output_tokens=self.sequence.num_output_tokens,
            num_cached_tokens=self.sequence.num_cached_tokens,
            queue_s=self.sequence.queue_s,
        )

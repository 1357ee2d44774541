"""The sequences of one HTTP request: read as one flow of deltas, ended together.

Owns the life of these sequences from their acceptance to their terminal events. Knows nothing about the shape of
answers.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence

from server.api.keys.budget import current_share
from server.api.progress import Progress
from server.engine.flight import DeltaStream
from server.engine.sequence import Delta, FinishReason
from server.ground.errors import GenerationFailed, Overloaded
from server.ground.metrics import Metrics


class Generation:
    """Sequences in flight, numbered as their choices are. `abort` must be called at the end; it may come any time."""

    def __init__(
        self, streams: Sequence[DeltaStream], adapters: Sequence[str], metrics: Metrics, submitted_s: float
    ) -> None:
        """`adapters`: the names of those that each sequence uses. `submitted_s`: when they were, of `perf_counter`."""
        self._unfinished = dict(enumerate(streams))
        share = current_share()
        budget = None if share is None else share.budget
        self._progress = [Progress(adapters, metrics, submitted_s, budget) for _ in streams]
        self._arrived: asyncio.Queue[tuple[int, Delta | None]] = asyncio.Queue()
        self._pumps = [asyncio.create_task(self._pump(index, stream)) for index, stream in self._unfinished.items()]

    async def deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """(choice, delta) as they come, until every sequence has ended.

        Raises GraftError when one of them fails: an answer with a hole in it is of no use.
        """
        while self._unfinished:
            index, delta = await self._arrived.get()
            if delta is None:
                _require_ended(index, self._unfinished)
                continue
            if index not in self._unfinished:
                continue  # what was under way when it was ended
            self._progress[index].observe(delta)
            if delta.is_terminal:
                del self._unfinished[index]
                _raise_if_broken(delta)
            yield index, delta
            if delta.prompt_logprobs:  # which take milliseconds to tell, and many such deltas may have come at once
                await asyncio.sleep(0)

    def end(self, index: int, last: Delta) -> None:
        """End a sequence whose reader has all that it wants with the delta `last`; does nothing if it has ended."""
        stream = self._unfinished.pop(index, None)
        if stream is not None:
            stream.abort()
            self._progress[index].finish(FinishReason.STOP, last)

    def abort(self) -> None:
        """End what still runs; the engine frees it within one step. Does nothing when all has ended."""
        for pump in self._pumps:
            pump.cancel()
        for index, stream in self._unfinished.items():
            stream.abort()
            self._progress[index].abort()
        self._unfinished.clear()

    async def _pump(self, index: int, stream: DeltaStream) -> None:
        """Pass a sequence's deltas on, and None behind the last: a stream that breaks must leave nobody waiting."""
        try:
            async for delta in stream:
                self._arrived.put_nowait((index, delta))
        finally:
            self._arrived.put_nowait((index, None))


def _require_ended(index: int, unfinished: Mapping[int, DeltaStream]) -> None:
    if index in unfinished:
        raise GenerationFailed("The engine ended this generation without saying how; the server's log says why.")


def _raise_if_broken(delta: Delta) -> None:
    if delta.finish_reason is FinishReason.ERROR:
        raise delta.error or GenerationFailed("The generation failed; the server's log says why.")
    if delta.finish_reason is FinishReason.ABORT:
        raise Overloaded("The server ended this generation because it is shutting down; send the request again.")

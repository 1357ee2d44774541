"""The sequences of one HTTP request: submitted together, read as one flow of deltas, ended together.

Owns the life of these sequences from submission to their terminal events. Knows nothing about the shape of answers.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence

from server.adapters.registry import Lease
from server.api.keys.budget import current_share
from server.api.progress import Progress
from server.api.services import Services
from server.engine.engine import Engine
from server.engine.flight import DeltaStream, GenerationRequest
from server.engine.sequence import Delta, FinishReason, SamplingParams
from server.ground.errors import GenerationFailed, GraftError, Overloaded
from server.ground.metrics import Metrics
from server.model.grammar import Grammar


class Generation:
    """Sequences in flight, numbered as their choices are. `abort` must be called at the end; it may come any time."""

    def __init__(self, streams: Sequence[DeltaStream], adapters: Sequence[Sequence[str]], metrics: Metrics) -> None:
        """`adapters`: the names of those that each sequence uses."""
        self._unfinished = dict(enumerate(streams))
        share = current_share()
        budget = None if share is None else share.budget
        self._progress = [Progress(names, metrics, budget) for names in adapters]
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


def submit_all(
    services: Services,
    request_id: str,
    prompts: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
    leases: Sequence[Lease | None],
    cache_salt: str | None = None,
    grammar: Grammar | None = None,
) -> Generation:
    """One sequence per prompt, params and lease, all or none, all along `grammar`. The leases are taken over.

    Raises Overloaded or ContextTooLong, with nothing left running.
    """
    requests = [
        GenerationRequest(f"{request_id}-{index}", tuple(prompt), sampling, lease, cache_salt, grammar)
        for index, (prompt, sampling, lease) in enumerate(zip(prompts, params, leases, strict=True))
    ]
    adapters = [() if lease is None else tuple(part.version.name for part in lease.portions) for lease in leases]
    return Generation(_streams(services.engine, requests), adapters, services.metrics)


def _streams(engine: Engine, requests: Sequence[GenerationRequest]) -> list[DeltaStream]:
    streams: list[DeltaStream] = []
    try:
        for request in requests:
            streams.append(engine.submit(request))
    except GraftError:
        for stream in streams:
            stream.abort()
        for request in requests[len(streams) :]:
            if request.lease is not None:
                request.lease.release()
        raise
    return streams

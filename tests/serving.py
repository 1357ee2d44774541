"""A real server, assembled in the test's process, and requests sent to its engine: no HTTP, nothing faked."""

import asyncio
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from server.assemble import Server, assemble
from server.engine.flight import GenerationRequest
from server.engine.sequence import Delta, FinishReason, SamplingParams, TokenLogprobs
from server.ground.config import load
from server.ground.errors import GraftError

_MAX_QUEUED = 256  # of a server that is not told otherwise
_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: an adapter by name (None: the base), a prompt, and how to sample."""

    adapter: str | None
    prompt: tuple[int, ...]
    params: SamplingParams


@dataclass(frozen=True, slots=True)
class Answer:
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...]
    prompt_logprobs: tuple[TokenLogprobs, ...]
    finish_reason: FinishReason
    error: GraftError | None

    @classmethod
    def of(cls, deltas: Sequence[Delta]) -> "Answer":
        last = deltas[-1]
        assert last.finish_reason is not None
        return cls(
            token_ids=tuple(t for d in deltas for t in d.token_ids),
            text="".join(d.text for d in deltas),
            logprobs=tuple(s for d in deltas for s in d.logprobs),
            prompt_logprobs=next((d.prompt_logprobs for d in deltas if d.prompt_logprobs is not None), ()),
            finish_reason=last.finish_reason,
            error=last.error,
        )


@contextmanager
def serving(model: Path, scratch: Path, **flags: str) -> Iterator[Server]:
    """A server on `model` with small budgets, its store under `scratch`; closed at the end. Flags as on the command."""
    defaults = {
        "model": str(model),
        "store": str(scratch / "store"),
        "quantize": "none",
        "dtype": "float32",
        "device": "cpu",
        "adapter_memory": "64MiB",
        "host_memory": "256MiB",
    }
    server = assemble(load(defaults | flags))
    try:
        yield server
    finally:
        server.close()


async def answer(server: Server, ask: Ask) -> Answer:
    """Sends one request and reads it to its end."""
    lease = None if ask.adapter is None else server.registry.lease(ask.adapter)
    request = GenerationRequest(f"ask-{next(_numbers)}", ask.prompt, ask.params, lease)
    try:
        stream = server.engine.submit(request)
    except GraftError:
        if lease is not None:
            lease.release()  # what is not accepted leaves it with the caller
        raise
    return Answer.of([delta async for delta in stream])


def answer_all(server: Server, asks: Sequence[Ask]) -> list[Answer]:
    """Sends all requests at once, or as many as a queue always takes; the answers in their order."""

    async def together() -> list[Answer]:
        room = asyncio.Semaphore(_MAX_QUEUED)

        async def one(ask: Ask) -> Answer:
            async with room:
                return await answer(server, ask)

        return await asyncio.gather(*(one(ask) for ask in asks))

    return asyncio.run(together())


def logprob_rows(scores: Sequence[TokenLogprobs], vocab_size: int) -> torch.Tensor:
    """(len(scores), vocab_size) from scores that list the whole vocabulary; the first of a prompt has none."""
    rows = torch.full((len(scores), vocab_size), float("nan"))
    for row, score in zip(rows, scores, strict=True):
        if score.top:
            token_ids, logprobs = zip(*score.top, strict=True)
            row[list(token_ids)] = torch.tensor(logprobs)
    return rows

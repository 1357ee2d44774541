"""Streams that each send their next request as soon as the last is answered, and what a pass of theirs came to.

Owns the closed loop and its prompts. `client` sends each request; knows nothing about which adapters are asked for.
"""

import asyncio
import itertools
import json
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from load_tests import client
from load_tests.outcome import End, Outcome
from load_tests.plan import Request
from load_tests.report import percentile
from server.bench import machine

_MAX_ANSWER_S = 600.0
_TOKEN_IDS = range(8, 250)  # in every vocabulary, and none that ends an answer


def conclude(schema: str, workload: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], out: Path | None) -> int:
    """Writes the report where asked. The exit code: 1 if a request of any row failed."""
    if out is not None:
        report = {"schema": schema, "machine": machine("cpu"), "workload": workload, "rows": rows}
        out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 1 if any(row["num_failed"] for row in rows) else 0


@dataclass(frozen=True, slots=True)
class Round:
    """What one pass came to."""

    outcomes: tuple[Outcome, ...]
    elapsed_s: float

    @property
    def completed(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.end is End.COMPLETED]

    @property
    def ttfts_s(self) -> list[float]:
        return [outcome.ttft_s for outcome in self.completed if outcome.ttft_s is not None]

    @property
    def gaps_s(self) -> list[float]:
        """Between one token and the next, all requests together."""
        return [gap for outcome in self.completed for gap in outcome.gaps_s]

    @property
    def tokens_per_s(self) -> float:
        return sum(outcome.num_tokens for outcome in self.completed) / self.elapsed_s


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """Requests of one size to one server: greedy, streamed, never ended early."""

    url: str
    num_streams: int
    num_prompt_tokens: int
    max_tokens: int

    async def run(self, adapters: Sequence[str], seed: str) -> Round:
        """One request for each of `adapters`, in this order, from all streams together."""
        dice = random.Random(seed)
        left = iter(list(enumerate(adapters)))
        async with client.open_session(None) as session:

            async def stream(left: Iterator[tuple[int, str]]) -> list[Outcome]:
                return [await self.ask(session, adapter, dice, number) for number, adapter in left]

            started = time.perf_counter()
            answered = await asyncio.gather(*(stream(left) for _ in range(self.num_streams)))
        return Round(tuple(itertools.chain.from_iterable(answered)), time.perf_counter() - started)

    async def ask(self, session: aiohttp.ClientSession, adapter: str, dice: random.Random, number: int = 0) -> Outcome:
        """One request; its times are seconds after it was sent. The prompt is random: no prefix is found again."""
        request = Request(number, 0.0, adapter, 0, self.num_prompt_tokens)
        prompt = dice.choices(_TOKEN_IDS, k=self.num_prompt_tokens)
        asked: dict[str, Any] = {"model": adapter, "prompt": prompt, "max_tokens": self.max_tokens, "temperature": 0}
        asked |= {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}
        plan = [(request, json.dumps(asked).encode())]
        run = await client.send(session, client.Dialect(self.url, None), plan, _MAX_ANSWER_S, asyncio.Event())
        return run.outcomes[0]


def percentile_ms(values_s: Sequence[float], percent: float) -> float | None:
    """In milliseconds; None of nothing."""
    value_s = percentile(values_s, percent)
    return None if value_s is None else 1000 * value_s

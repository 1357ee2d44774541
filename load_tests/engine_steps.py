"""Streams through an engine of this process, and what is seen of each of its steps.

Owns how steps are watched: what the engine reports after each, with the clock and the CPU time of its own thread. The
engine is driven through its public surface; a watch takes the place of the function that it reports to, while it lasts,
so that nothing of this is in a server. Knows nothing about what is compared.
"""

import asyncio
import itertools
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from server.assemble import Server
from server.engine.engine import Engine, StepReport
from server.engine.flight import GenerationRequest
from server.engine.sequence import SamplingParams

_FIRST_WORD = 8  # no token before it is drawn: those that end an answer are among them
_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class SeenStep:
    """A step as its engine reports it. `at_s`: when it ended; `cpu_s`: of the engine's thread, since the one before."""

    report: StepReport
    at_s: float
    cpu_s: float

    @property
    def is_decode(self) -> bool:
        return self.report.num_tokens == self.report.num_sequences


def noting(steps: list[SeenStep]) -> Callable[[StepReport], None]:
    """What adds each step that it is told of to `steps`, for an engine's thread alone."""
    before_s = 0.0

    def note(report: StepReport) -> None:
        nonlocal before_s
        now_s = time.thread_time()
        steps.append(SeenStep(report, time.perf_counter(), now_s - before_s))
        before_s = now_s

    return note


@contextmanager
def watched(engine: Engine, also: Callable[[StepReport], None] = lambda report: None) -> Iterator[list[SeenStep]]:
    """The steps of the engine while the block runs; `also` is called after each, on the engine's thread."""
    steps: list[SeenStep] = []
    told, note = engine._observe, noting(steps)

    def observe(report: StepReport) -> None:
        note(report)
        also(report)

    engine._observe = observe
    try:
        yield steps
    finally:
        engine._observe = told


@dataclass(frozen=True, slots=True)
class Streams:
    """Greedy sequences that begin at once: one for each of `adapters` (None: the bare base), never ended early."""

    adapters: Sequence[str | None]
    num_prompt_tokens: int
    num_new_tokens: int

    def run(self, server: Server, seed: int = 0) -> list[SeenStep]:
        """All of them to their ends; the steps that this took. Raises what a sequence failed with."""
        with watched(server.engine) as steps:
            asyncio.run(self.read(server, seed))
        return steps

    async def read(self, server: Server, seed: int = 0) -> None:
        dice = random.Random(seed)
        words = range(_FIRST_WORD, server.base.vocab_size)
        prompts = [tuple(dice.choices(words, k=self.num_prompt_tokens)) for _ in self.adapters]
        await asyncio.gather(
            *(self._one(server, name, prompt) for name, prompt in zip(self.adapters, prompts, strict=True))
        )

    async def _one(self, server: Server, name: str | None, prompt: tuple[int, ...]) -> None:
        lease = None if name is None else server.registry.lease(name)
        params = SamplingParams(max_tokens=self.num_new_tokens, temperature=0.0, ignore_eos=True)
        request = GenerationRequest(f"measured-{next(_numbers)}", prompt, params, lease)
        async for delta in server.engine.submit(request):
            if delta.error is not None:
                raise delta.error


def decodes(steps: Sequence[SeenStep], num_sequences: int) -> list[SeenStep]:
    """The steps in which so many sequences got one token each, the first of them left out: it begins in a prefill."""
    return [step for step in steps if step.is_decode and step.report.num_sequences == num_sequences][1:]

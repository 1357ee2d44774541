"""The deltas of a request's sequences, and whose turn it is while a long prompt's scores are told."""

import asyncio
from itertools import pairwise

from server.api.generation import Generation
from server.engine.flight import DeltaStream
from server.engine.sequence import Delta, FinishReason, TokenLogprobs
from server.ground.metrics import Metrics


async def test_between_two_deltas_of_a_scored_prompt_others_have_their_turn() -> None:
    """All of them are there already: nothing has to be waited for."""
    stream = DeltaStream("s", lambda sequence_id: None)
    for number in range(5):
        stream.put(Delta("s", prompt_logprobs=(TokenLogprobs(number, -1.0),)))
    stream.put(Delta("s", finish_reason=FinishReason.LENGTH))
    seen: list[str] = []

    async def others() -> None:
        while len(seen) < 100:
            seen.append("another")
            await asyncio.sleep(0)

    turns = asyncio.create_task(others())
    generation = Generation([stream], (), Metrics(), 0.0)
    async for _ in generation.deltas():
        seen.append("told")
    turns.cancel()
    at = [position for position, one in enumerate(seen) if one == "told"]
    assert len(at) == 6
    assert all("another" in seen[first:second] for first, second in pairwise(at))

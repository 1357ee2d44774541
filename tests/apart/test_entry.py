"""Sequences that enter the other process: all of a request or none, ended when their reader leaves, and ended once.

One server without HTTP, on one event loop; the last test takes its engine away.
"""

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Iterator

import pytest

from server.apart.front import ApartServer, assemble_apart
from server.engine.engine import EngineStats
from server.engine.entry import Entered, GroupOrder, SequenceOrder
from server.engine.flight import DeltaStream
from server.engine.sequence import Delta, FinishReason, SamplingParams
from server.ground.config import Settings
from server.ground.errors import AdapterNotFound, ContextTooLong, GenerationFailed, Overloaded
from tests.apart.prepared import FATAL_PROMPT, fragile

pytestmark = pytest.mark.asyncio(loop_scope="module")
numbers = itertools.count()


@pytest.fixture(scope="module")
def server(demo_settings: Callable[..., Settings]) -> Iterator[ApartServer]:
    server = assemble_apart(demo_settings(max_queued=4), fragile)
    yield server
    server.close()
    assert server.child.returncode is not None


def order(num_sequences: int, adapter: str | None = "pirate-lora", max_tokens: int = 800) -> GroupOrder:
    params = SamplingParams(max_tokens, temperature=0.0, ignore_eos=True)
    ids = [f"ask-{next(numbers)}" for _ in range(num_sequences)]
    parts = () if adapter is None else ((adapter, 1.0),)
    return GroupOrder(tuple(SequenceOrder(one, (65, 66, 67), params) for one in ids), parts)


async def read(stream: DeltaStream) -> list[Delta]:
    return [delta async for delta in stream]


async def until(is_true: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(120):
        while not await is_true():
            await asyncio.sleep(0.01)


async def holds_nothing(server: ApartServer) -> bool:
    engine: EngineStats = await asyncio.to_thread(server.calls.call, "engine", "stats")
    registry = await asyncio.to_thread(server.calls.call, "registry", "stats")
    return engine.num_in_flight == engine.num_used_blocks == registry.num_leases == registry.num_residencies == 0


async def test_a_group_enters_as_a_whole_and_is_read_to_its_end(server: ApartServer) -> None:
    found = await server.entry.enter(order(3, max_tokens=5))
    assert found.held.adapters == ("pirate-lora",)
    ends = [deltas[-1] for deltas in await asyncio.gather(*map(read, found.streams))]
    assert [(end.finish_reason, end.num_output_tokens) for end in ends] == [(FinishReason.LENGTH, 5)] * 3
    await until(lambda: holds_nothing(server))


async def test_of_a_group_that_does_not_fit_nothing_runs(server: ApartServer) -> None:
    found = await server.entry.enter(order(9))
    assert isinstance(found.held.refusal, Overloaded)
    assert found.held.version is not None, "what it was leased on is told all the same"
    assert found.streams == ()
    too_long = await server.entry.enter(order(1, max_tokens=10**6))
    assert isinstance(too_long.held.refusal, ContextTooLong)
    with pytest.raises(AdapterNotFound):
        await server.entry.enter(order(1, "nobody"))
    await until(lambda: holds_nothing(server))


async def test_who_leaves_before_the_answer_leaves_nothing_running(server: ApartServer) -> None:
    for _ in range(5):
        entering = asyncio.create_task(server.entry.enter(order(2)))
        await asyncio.sleep(0)  # it has asked, and nobody has answered
        entering.cancel()
        assert isinstance((await asyncio.gather(entering, return_exceptions=True))[0], asyncio.CancelledError)
    await until(lambda: holds_nothing(server))


async def test_an_abort_ends_a_sequence_and_its_end_comes(server: ApartServer) -> None:
    (stream,) = (await server.entry.enter(order(1))).streams
    await anext(stream)
    stream.abort()
    assert (await read(stream))[-1].finish_reason is FinishReason.ABORT
    await until(lambda: holds_nothing(server))


async def test_an_engine_that_ends_over_there_ends_everything_once(server: ApartServer) -> None:
    running = (await server.entry.enter(order(2))).streams
    await asyncio.gather(*map(anext, running))
    fatal = order(1, None)
    poison = SequenceOrder("fatal", FATAL_PROMPT, fatal.sequences[0].params)
    entered: Entered = await server.entry.enter(GroupOrder((poison,)))
    for deltas in await asyncio.gather(*map(read, (*running, *entered.streams))):
        assert [delta.finish_reason for delta in deltas if delta.is_terminal] == [FinishReason.ERROR]
        assert deltas[-1].error is not None
        assert deltas[-1].error.code == "engine_dead"

    async def is_lost() -> bool:
        return not server.is_alive

    await until(is_lost)
    server.abandon()
    with pytest.raises(GenerationFailed, match="has stopped"):
        await server.entry.enter(order(1))
    with pytest.raises(GenerationFailed, match="has stopped"):
        await asyncio.to_thread(server.calls.call, "registry", "names")
    await server.drain(1.0)  # there is nothing to wait for

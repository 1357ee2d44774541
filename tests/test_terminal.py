"""Law 3: every accepted request ends in exactly one terminal event: finished, aborted or failed."""

import asyncio
import json
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from server.adapters.quarantine import MAX_OVERFLOWS
from server.assemble import Server
from server.engine import choice, sampler
from server.engine.chosen import Chosen
from server.engine.flight import GenerationRequest
from server.engine.runner import Runner, StepLogits
from server.engine.sequence import Batch, FinishReason, SamplingParams
from server.ground.errors import (
    AdapterQuarantined,
    ContextTooLong,
    GenerationFailed,
    GraftError,
    OutOfMemory,
    Overloaded,
)
from tests.adapters.peft_adapters import make_adapter
from tests.endings import Endings
from tests.serving import Ask, answer, answer_all, serving
from tests.test_isolation import check_nothing_leaks


class FaultyRunner:
    """The real runner, whose next steps fail when told to (a device error in mid-flight), or wait for permits."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.num_faults = 0
        self.error: Exception = RuntimeError("the device fell off the bus")
        self.max_tokens: int | None = None  # in a step that has memory
        self.permits: threading.Semaphore | None = None  # one per step; None: steps need none

    def run(self, batch: Batch, before: Chosen | None = None) -> StepLogits:
        if self.permits is not None:
            assert self.permits.acquire(timeout=60)
        if self.num_faults:
            self.num_faults -= 1
            raise self.error
        if self.max_tokens is not None and batch.num_tokens > self.max_tokens:
            raise torch.OutOfMemoryError(f"no memory for {batch.num_tokens} tokens")
        return self.runner.run(batch, before)

    def is_device_alive(self) -> bool:
        return self.runner.is_device_alive()


@pytest.fixture(params=["off", "on"], ids=["one step at a time", "overlap"])
def overlap(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@contextmanager
def faulty_server(model: Path, scratch: Path, overlap: str) -> Iterator[Server]:
    """A base, and an adapter folder that says it is one but cannot be lowered."""
    broken = scratch / "adapters" / "broken"
    broken.mkdir(parents=True, exist_ok=True)
    (broken / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4}))
    (broken / "adapter_model.safetensors").write_bytes(b"\x00" * 32)
    limits = {"max_queued": "4", "max_sequences": "3", "kv_memory": "64KiB", "overlap": overlap}
    with serving(model, scratch, adapters=str(scratch / "adapters"), **limits) as server:
        runner: Any = FaultyRunner(server.runner)
        server.engine._runner = runner
        yield server


@pytest.fixture
def server(overlap: str, tiny_llama: Path, tmp_path: Path) -> Iterator[Server]:
    with faulty_server(tiny_llama, tmp_path, overlap) as server:
        yield server


@pytest.fixture
def endings(monkeypatch: pytest.MonkeyPatch) -> Endings:
    return Endings(monkeypatch)


@dataclass(frozen=True)
class Action:
    """One request, when it comes and what happens to it."""

    delay_ms: int
    num_prompt: int
    max_tokens: int
    adapter: str | None
    abort_after_ms: int | None  # over HTTP the client leaves then
    has_stop: bool
    is_http: bool

    @property
    def stop(self) -> tuple[str, ...]:
        return ("e",) if self.has_stop else ()


ACTIONS = st.lists(
    st.builds(
        Action,
        delay_ms=st.integers(0, 8),
        num_prompt=st.integers(1, 80),
        max_tokens=st.integers(0, 30),
        adapter=st.sampled_from([None, None, "broken"]),
        abort_after_ms=st.none() | st.integers(0, 10),
        has_stop=st.booleans(),
        is_http=st.booleans(),
    ),
    min_size=1,
    max_size=12,
)


async def play(server: Server, number: int, action: Action) -> None:
    """Sends a request, and reads it to its end unless its client leaves. One that is refused has none."""
    await asyncio.sleep(action.delay_ms / 1000)
    prompt = tuple(random.Random(number).randrange(256) for _ in range(action.num_prompt))
    if action.is_http:
        await play_over_http(server, prompt, action)
        return
    params = SamplingParams(action.max_tokens, temperature=1.0, stop=action.stop)
    try:
        lease = None if action.adapter is None else server.registry.lease(action.adapter)
    except GraftError:
        return
    try:
        stream = server.engine.submit(GenerationRequest(f"r{number}-{id(action)}", prompt, params, lease))
    except GraftError:
        if lease is not None:
            lease.release()
        return
    if action.abort_after_ms is not None:
        asyncio.get_running_loop().call_later(action.abort_after_ms / 1000, stream.abort)
    deltas = [delta async for delta in stream]
    assert [delta.is_terminal for delta in deltas] == [False] * (len(deltas) - 1) + [True]


async def play_over_http(server: Server, prompt: tuple[int, ...], action: Action) -> None:
    """The same to the application itself, with a client that leaves by closing its connection."""
    body = {"prompt": prompt, "max_tokens": max(action.max_tokens, 1), "stop": action.stop, "stream": True}
    if action.adapter is not None:
        body["adapter"] = action.adapter
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": "/v1/completions", "raw_path": b"/v1/completions", "root_path": "", "query_string": b"",
        "headers": [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80),
    }  # fmt: skip
    messages = iter([{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}])

    async def receive() -> dict[str, Any]:
        for message in messages:
            return message
        await asyncio.sleep(3600 if action.abort_after_ms is None else action.abort_after_ms / 1000)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None: ...

    await server.app(scope, receive, send)


async def play_all(server: Server, actions: list[Action]) -> None:
    await asyncio.wait_for(asyncio.gather(*(play(server, i, action) for i, action in enumerate(actions))), 120)


def test_any_storm_ends_each_request_once(server: Server, endings: Endings) -> None:
    faulty: Any = server.engine._runner

    @settings(max_examples=25, deadline=None)
    @given(actions=ACTIONS, num_faults=st.integers(0, 2))
    def storm(actions: list[Action], num_faults: int) -> None:
        async def run() -> None:
            faulty.num_faults = num_faults
            await play_all(server, actions)
            while server.engine.stats().num_in_flight:  # those whose clients have left
                await asyncio.sleep(0.001)
            faulty.num_faults = 0
            # A step that works: faults of several storms do not add up to a dead engine, and what the engine has still
            # to hand over comes before it.
            assert (await answer(server, Ask(None, (1,), SamplingParams(1)))).error is None

        asyncio.run(run())
        endings.check()
        check_nothing_leaks(server)

    storm()
    assert endings.num_accepted > 25  # more than the steps at the end


class Death:
    """What ends an engine at a step of a storm, by its number."""

    def __init__(self, server: Server, at_step: int) -> None:
        self.server = server
        self._num_left = at_step

    def is_due(self) -> bool:
        self._num_left -= 1
        return self._num_left < 0

    async def follow(self) -> None:
        """What else happens, when it is time."""


class Defect(Death):
    def __init__(self, server: Server, at_step: int) -> None:
        super().__init__(server, at_step)
        engine: Any = server.engine
        schedule = engine._schedule

        def die() -> Batch:
            batch: Batch = schedule()
            if batch.sequences and self.is_due():
                raise ZeroDivisionError("a defect")
            return batch

        engine._schedule = die


class LostDevice(Death):
    def __init__(self, server: Server, at_step: int) -> None:
        super().__init__(server, at_step)
        faulty: Any = server.engine._runner
        run = faulty.run

        def lose(*step: Any) -> StepLogits:
            if self.is_due():
                faulty.is_device_alive = lambda: False
                raise faulty.error
            logits: StepLogits = run(*step)
            return logits

        faulty.run = lose


class Hang(Death):
    """A step that does not return until the engine has been given up. Then it does, and must end nothing again."""

    def __init__(self, server: Server, at_step: int) -> None:
        super().__init__(server, at_step)
        self._is_hung, self._goes_on = threading.Event(), threading.Event()
        faulty: Any = server.engine._runner
        run = faulty.run

        def hang(*step: Any) -> StepLogits:
            if self.is_due():
                self._is_hung.set()
                assert self._goes_on.wait(120)
            logits: StepLogits = run(*step)
            return logits

        faulty.run = hang

    async def follow(self) -> None:
        assert await asyncio.to_thread(self._is_hung.wait, 120)
        self.server.engine.abandon()
        self._goes_on.set()


@pytest.mark.parametrize("kind", [Defect, LostDevice, Hang])
def test_an_engine_that_dies_in_a_storm_ends_each_request_once(
    tiny_llama: Path, tmp_path: Path, overlap: str, endings: Endings, kind: type[Death]
) -> None:
    @settings(max_examples=6, deadline=None)
    @given(actions=ACTIONS, at_step=st.integers(0, 8))
    def storm(actions: list[Action], at_step: int) -> None:
        with faulty_server(tiny_llama, tmp_path, overlap) as server:
            engine = server.engine

            async def run() -> None:
                death = kind(server, at_step)
                follows = asyncio.create_task(death.follow())
                await play_all(server, actions)
                while engine.is_alive:  # the storm may have had fewer steps
                    with suppress(GraftError):
                        await answer(server, Ask(None, (1,), SamplingParams(4, ignore_eos=True)))
                await follows
                await asyncio.to_thread(engine._thread.join)  # it says nothing any more
                await asyncio.sleep(0)

            asyncio.run(run())
            endings.check()
            assert engine.stats().num_in_flight == 0
            assert server.registry.stats().num_leases == 0

    storm()
    assert endings.num_accepted >= 6


def test_what_two_threads_hand_over_at_once_comes_once(server: Server, endings: Endings) -> None:
    """A hung step that ends just as the engine is given up."""
    engine: Any = server.engine
    faulty: Any = engine._runner
    faulty.permits = threading.Semaphore(0)

    async def run() -> None:
        loop: Any = asyncio.get_running_loop()
        call_soon = loop.call_soon_threadsafe

        def meanwhile(*call: Any) -> None:
            loop.call_soon_threadsafe = call_soon
            other = threading.Thread(target=engine._hand_over)
            other.start()
            other.join()
            call_soon(*call)

        stream = engine.submit(GenerationRequest("one", (1,), SamplingParams(2)))
        loop.call_soon_threadsafe = meanwhile
        engine.abandon()
        assert [delta.finish_reason async for delta in stream] == [FinishReason.ERROR]
        faulty.permits.release(10)
        await asyncio.to_thread(engine._thread.join)

    asyncio.run(run())
    endings.check()


def test_a_stream_is_read_to_its_end_and_no_further(server: Server) -> None:
    async def run() -> None:
        stream = server.engine.submit(GenerationRequest("one", (1, 2, 3), SamplingParams(2, ignore_eos=True)))
        assert len([delta async for delta in stream]) == 2
        assert [delta async for delta in stream] == []

    asyncio.run(run())


def test_an_abort_ends_the_sequence_and_frees_it(server: Server) -> None:
    faulty: Any = server.engine._runner
    faulty.permits = threading.Semaphore(2)  # with overlap a step is launched before the last one is read

    async def run() -> None:
        stream = server.engine.submit(GenerationRequest("long", (1,), SamplingParams(100, ignore_eos=True)))
        first = await anext(stream)
        assert not first.is_terminal
        stream.abort()
        faulty.permits.release(200)
        *_, last = [delta async for delta in stream]
        assert last.finish_reason is FinishReason.ABORT

    asyncio.run(run())
    check_nothing_leaks(server)


def test_a_failed_load_fails_its_request_with_the_reason(server: Server) -> None:
    got = answer_all(server, [Ask("broken", (1, 2), SamplingParams(3)), Ask(None, (1, 2), SamplingParams(3))])
    assert got[0].finish_reason is FinishReason.ERROR
    assert "safetensors" in str(got[0].error)
    assert got[1].error is None


def test_a_failed_step_fails_its_sequences_and_the_engine_goes_on(server: Server) -> None:
    faulty: Any = server.engine._runner
    faulty.num_faults = 1
    failed, after = (answer_all(server, [Ask(None, (5, 6), SamplingParams(3))])[0] for _ in range(2))
    assert failed.finish_reason is FinishReason.ERROR
    assert "fell off the bus" in str(failed.error)
    assert after.error is None
    assert server.engine.is_alive


def test_an_engine_whose_steps_keep_failing_says_that_it_is_dead(server: Server) -> None:
    faulty: Any = server.engine._runner
    faulty.num_faults = 10
    for _ in range(10):
        assert answer_all(server, [Ask(None, (5,), SamplingParams(3))])[0].finish_reason is FinishReason.ERROR
    with pytest.raises(GenerationFailed, match="stopped"):
        answer_all(server, [Ask(None, (5,), SamplingParams(3))])
    assert not server.engine.is_alive


def test_steps_without_memory_shrink_and_every_answer_is_what_it_would_have_been(server: Server) -> None:
    faulty: Any = server.engine._runner
    asks = [
        Ask(None, tuple(range(1, num)), SamplingParams(6, temperature=float(num % 2), seed=num, ignore_eos=True))
        for num in range(9, 15)
    ]
    expected = [answer_all(server, [ask])[0] for ask in asks[:4]]
    faulty.max_tokens = 3
    assert [got.token_ids for got in answer_all(server, asks[:4])] == [each.token_ids for each in expected]
    assert server.engine.stats().num_shed >= 2
    check_nothing_leaks(server)


def test_a_request_that_needs_more_than_there_is_fails_alone_and_the_engine_goes_on(server: Server) -> None:
    faulty: Any = server.engine._runner
    faulty.max_tokens = 0
    failed = answer_all(server, [Ask(None, (5, 6), SamplingParams(3))])[0]
    assert isinstance(failed.error, OutOfMemory)
    assert "--kv-memory" in failed.error.message
    faulty.max_tokens = None
    assert answer_all(server, [Ask(None, (5, 6), SamplingParams(3))])[0].error is None
    check_nothing_leaks(server)


def test_memory_that_runs_out_while_tokens_are_chosen_changes_no_seed(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = Ask(None, (5, 6), SamplingParams(6, temperature=1.0, seed=3, ignore_eos=True))
    expected = answer_all(server, [ask])[0]
    fates = iter([True])  # two tokens, which may become one

    def sample(*arguments: Any) -> torch.Tensor:
        if next(fates, False):
            raise MemoryError
        return sampler.sample(*arguments)

    monkeypatch.setattr(choice, "sample", sample)
    assert answer_all(server, [ask])[0].token_ids == expected.token_ids
    assert server.engine.stats().num_shed == 1


def test_a_lost_device_ends_the_engine_at_once(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    faulty: Any = server.engine._runner
    monkeypatch.setattr(faulty, "is_device_alive", lambda: False)
    faulty.num_faults = 1
    assert answer_all(server, [Ask(None, (5,), SamplingParams(3))])[0].finish_reason is FinishReason.ERROR
    with pytest.raises(GenerationFailed, match="stopped"):
        answer_all(server, [Ask(None, (5,), SamplingParams(3))])


def test_a_defect_in_the_loop_leaves_nobody_waiting(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    both_wait = threading.Event()

    def schedule() -> Batch:  # in the place of what takes the engine's lock: the second submission needs that
        assert both_wait.wait(60)
        raise ZeroDivisionError("a defect")

    async def run() -> list[FinishReason]:
        streams = [server.engine.submit(GenerationRequest(f"d{i}", (5,), SamplingParams(3))) for i in range(2)]
        both_wait.set()
        return [delta.finish_reason for stream in streams async for delta in stream if delta.finish_reason]

    monkeypatch.setattr(server.engine, "_schedule", schedule)
    assert asyncio.run(run()) == [FinishReason.ERROR] * 2
    with pytest.raises(GenerationFailed, match="ZeroDivisionError"):
        answer_all(server, [Ask(None, (5,), SamplingParams(3))])
    assert not server.engine.is_alive


def test_an_adapter_that_overflows_fails_and_its_neighbours_do_not(tiny_llama: Path, tmp_path: Path) -> None:
    dense = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    folder = make_adapter(dense, "lora", tmp_path / "adapters" / "huge", seed=0)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 1e30}))
    with serving(tiny_llama, tmp_path, adapters=str(tmp_path / "adapters")) as server:
        (alone,) = answer_all(server, [Ask(None, (5, 6), SamplingParams(8, temperature=0.0, ignore_eos=True))])
        params = SamplingParams(8, temperature=0.0, ignore_eos=True, logprobs=2, prompt_logprobs=2)
        huge, scored, base = answer_all(
            server,
            [
                Ask("huge", (5, 6), SamplingParams(8)),
                Ask("huge", (5, 6), params),
                Ask(None, (5, 6), SamplingParams(8, temperature=0.0, ignore_eos=True)),
            ],
        )
        for failed in (huge, scored):
            assert failed.finish_reason is FinishReason.ERROR
            assert "overflowed with the adapter huge@" in str(failed.error)
        assert base.token_ids == alone.token_ids
        assert server.engine.stats().num_overflown == 2
        while server.registry.describe("huge").is_quarantined is False:
            assert answer_all(server, [Ask("huge", (5, 6), SamplingParams(8))])[0].error is not None
        assert server.registry.stats().overflows_total == MAX_OVERFLOWS
        with pytest.raises(AdapterQuarantined, match="lift_quarantine"):
            server.registry.lease("huge")
        check_nothing_leaks(server)


def test_a_full_queue_refuses_and_a_prompt_too_long_names_both_numbers(server: Server) -> None:
    faulty: Any = server.engine._runner
    faulty.permits = threading.Semaphore(0)

    async def run() -> None:
        asks = [Ask(None, (1,) * 8, SamplingParams(40, ignore_eos=True)) for _ in range(40)]
        answers = asyncio.gather(*(answer(server, ask) for ask in asks), return_exceptions=True)
        await asyncio.sleep(0)  # all have been submitted
        faulty.permits.release(10_000)
        results = await answers
        refused = [result for result in results if isinstance(result, Overloaded)]
        assert refused
        assert refused[0].retry_after_s >= 1
        assert all(isinstance(result, Overloaded) or result.error is None for result in results)  # type: ignore[union-attr]
        with pytest.raises(ContextTooLong, match=r"5000.*10"):
            await answer(server, Ask(None, (1,) * 5000, SamplingParams(10)))

    asyncio.run(run())
    check_nothing_leaks(server)


def test_draining_refuses_new_requests_and_finishes_those_in_flight(server: Server) -> None:
    async def run() -> None:
        running = asyncio.create_task(answer(server, Ask(None, (1, 2), SamplingParams(20, ignore_eos=True))))
        await asyncio.sleep(0)
        await server.engine.drain(timeout_s=120)
        assert (await running).finish_reason is FinishReason.LENGTH
        with pytest.raises(Overloaded, match="shutting down"):
            await answer(server, Ask(None, (1,), SamplingParams(1)))

    asyncio.run(run())


def test_closing_fails_what_is_in_flight(server: Server) -> None:
    faulty: Any = server.engine._runner
    faulty.permits = threading.Semaphore(0)

    async def run() -> FinishReason:
        running = asyncio.create_task(answer(server, Ask(None, (1, 2), SamplingParams(100, ignore_eos=True))))
        await asyncio.sleep(0)
        closing = asyncio.create_task(asyncio.to_thread(server.engine.close))
        while not server.engine.is_draining:
            await asyncio.sleep(0.001)
        faulty.permits.release(200)
        await closing
        return (await running).finish_reason

    assert asyncio.run(run()) is FinishReason.ERROR

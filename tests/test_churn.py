"""Isolation under churn: 64 streams at once, while adapters are uploaded, replaced and deleted, and memory is short.

Every request must get the answer of the version that it leased, token for token as alone (law 1), and nothing may be
left behind (law 6). The KV cache is small enough that sequences are preempted, the adapters' memory so that adapters
are evicted, and prompts share beginnings, so that blocks are reused meanwhile.
"""

import asyncio
import random
import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from server.assemble import Server
from server.engine.chosen import Chosen
from server.engine.flight import GenerationRequest
from server.engine.runner import StepLogits
from server.engine.sequence import Batch, SamplingParams
from server.ground.errors import AdapterNotFound, Conflict, GraftError
from tests.adapters.folders import incoming_from
from tests.adapters.peft_adapters import make_adapter
from tests.api.conftest import eventually
from tests.serving import Answer, Ask, answer_all, serving
from tests.test_isolation import check_nothing_leaks, compared

NUM_STREAMS = 64
NAMES = tuple(f"name-{i}" for i in range(6))
KINDS = ("lora", "rslora", "dora", "vera", "ia3", "lora-query-only")
LEAST_COMPARED = 0.99


@pytest.fixture(scope="module")
def contents(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of adapter folders, two of each kind: what names are given to."""
    folder = tmp_path_factory.mktemp("contents")
    dense = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    for number, kind in enumerate(KINDS * 2):
        make_adapter(dense, kind, folder / f"{kind}-{number}", seed=number)
    return folder


@dataclass(frozen=True, slots=True)
class Told:
    """What a stream was answered, and by which version (None: the base)."""

    digest: str | None
    ask: Ask
    answer: Answer


@dataclass
class Storm:
    """Streams that each send some requests, one after another, and change an adapter after each."""

    server: Server
    contents: list[Path]
    dice: random.Random
    told: list[Told] = field(default_factory=list)
    num_replaced: int = 0
    num_deleted: int = 0
    num_outlived: int = 0  # requests whose version had lost its name by their end

    def __post_init__(self) -> None:
        self._stems = [tuple(self.dice.randrange(256) for _ in range(96)) for _ in range(3)]

    async def run(self, num_rounds: int) -> None:
        """The first step waits until all streams have a request in flight and every adapter has been replaced."""
        run_step, is_open = self.server.runner.run, threading.Event()

        def run_when_open(batch: Batch, before: Chosen | None = None) -> StepLogits:
            assert is_open.wait(120)
            return run_step(batch, before)

        self.server.runner.run = run_when_open  # type: ignore[method-assign]
        await self._upload_all(self.contents[: len(NAMES)])
        streams = [asyncio.create_task(self._stream(number, num_rounds)) for number in range(NUM_STREAMS)]
        while self.server.engine.stats().num_in_flight < NUM_STREAMS:
            await asyncio.sleep(0.001)
        await self._upload_all(self.contents[len(NAMES) :])
        is_open.set()
        await asyncio.gather(*streams)

    async def _upload_all(self, contents: list[Path]) -> None:
        for name, content in zip(NAMES, contents, strict=True):
            await asyncio.to_thread(self._upload, name, content)

    async def _stream(self, number: int, num_rounds: int) -> None:
        for turn in range(num_rounds):
            await self._send(f"storm-{number}-{turn}")
            await asyncio.to_thread(self._change)

    async def _send(self, sequence_id: str) -> None:
        name = self.dice.choice((None, *NAMES))
        try:
            lease = None if name is None else self.server.registry.lease(name)
        except AdapterNotFound:  # deleted a moment ago
            name = lease = None
        shared = self.dice.choice(self._stems)[: self.dice.randint(1, 96)]
        prompt = shared + tuple(self.dice.randrange(256) for _ in range(self.dice.randint(1, 8)))
        params = SamplingParams(self.dice.randint(8, 24), temperature=0.0, ignore_eos=True, logprobs=2)
        request = GenerationRequest(sequence_id, prompt, params, lease)
        answer = Answer.of([delta async for delta in self.server.engine.submit(request)])
        digest = None if lease is None else lease.version.digest
        self.num_outlived += digest is not None and digest != self._digest_of(name)
        self.told.append(Told(digest, Ask(name, prompt, params), answer))

    def _digest_of(self, name: str | None) -> str | None:
        try:
            return None if name is None else self.server.registry.describe(name).digest
        except AdapterNotFound:
            return None

    def _change(self) -> None:
        """Replaces or deletes an adapter, in a worker thread as an upload does."""
        name = self.dice.choice(NAMES)
        try:
            if self.dice.random() < 0.25:
                self.server.registry.delete(name)
                self.num_deleted += 1
            else:
                self._upload(name, self.dice.choice(self.contents))
                self.num_replaced += 1
        except (AdapterNotFound, Conflict):
            pass  # another stream was faster

    def _upload(self, name: str, content: Path) -> None:
        with incoming_from(self.server.store, content) as incoming:
            self.server.registry.register(incoming, name, replace=True)


def answers_alone(model: Path, scratch: Path, contents: Path, told: list[Told]) -> list[Answer]:
    """Each request again on a server of its own choosing: one at a time, every adapter there, nothing reused."""
    flags = {"adapters": str(contents), "prefix_reuse": "off"}
    with serving(model, scratch, **flags) as server:
        name_of = {info.digest: info.name for info in server.registry.list()}
        asks = [Ask(t.digest and name_of[t.digest], t.ask.prompt, t.ask.params) for t in told]
        return [answer_all(server, [ask])[0] for ask in asks]


def check_deletion_frees_everything(server: Server) -> None:
    for info in server.registry.list():
        server.registry.delete(info.name)
    eventually(lambda: server.registry.stats().num_resident == 0)
    eventually(lambda: server.adapters.used_bytes == server.registry.stats().host_used_bytes == 0)
    assert server.registry.check_integrity() == ()


@pytest.mark.parametrize("num_rounds", [2, pytest.param(12, marks=pytest.mark.slow)])
def test_a_storm_answers_each_request_as_the_version_it_leased_does_alone(
    num_rounds: int, tiny_llama: Path, tmp_path: Path, contents: Path
) -> None:
    flags = {"max_sequences": "16", "max_batch_tokens": "128", "block_size": "16"}
    flags |= {"adapter_memory": "200KiB", "host_memory": "300KiB", "kv_memory": "192KiB"}
    with serving(tiny_llama, tmp_path / "storm", **flags) as server:
        storm = Storm(server, sorted(contents.iterdir()), random.Random(num_rounds))
        asyncio.run(storm.run(num_rounds))
        engine, registry = server.engine.stats(), server.registry.stats()
        check_nothing_leaks(server)
        check_deletion_frees_everything(server)
    assert len(storm.told) == NUM_STREAMS * num_rounds
    failures: list[GraftError] = [told.answer.error for told in storm.told if told.answer.error is not None]
    assert failures == []
    assert min(engine.num_preemptions, engine.num_hit_tokens) > 0
    assert min(registry.device_evictions_total, registry.host_evictions_total, registry.loads_total) > 0
    assert min(storm.num_replaced, storm.num_deleted, storm.num_outlived) > 0
    alone = answers_alone(tiny_llama, tmp_path / "alone", contents, storm.told)
    num_compared = sum(compared(a, told.answer) for a, told in zip(alone, storm.told, strict=True))
    assert num_compared >= LEAST_COMPARED * sum(len(answer.token_ids) for answer in alone)

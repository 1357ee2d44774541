"""Decode steps from recordings give what launching them gives, whoever is in the batch. Here in Triton's interpreter.

The recorder is the one without a GPU; `-m gpu` runs the same tests with CUDA graphs.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from server.adapters.device.device import DeviceTier
from server.adapters.host import HostTier
from server.adapters.method import Edit, Lowered
from server.engine.chosen import NOT_FINITE, Chosen
from server.engine.decode_graphs import graph_sizes
from server.engine.recording import CudaRecorder, EagerRecorder, Recorder, Recording, Work
from server.engine.runner import Runner
from server.engine.sampler import SamplingRow, sample
from server.engine.scores import StepScores
from server.engine.sequence import UNKNOWN_TOKEN, Batch, SamplingParams, ScheduledSequence
from server.engine.sequence import Sequence as Running
from server.model.base import Base
from server.model.pretrained import BaseOptions
from server.model.quantize import Quantization
from server.ops import kernels
from tests.adapters.random_edits import random_adapter

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BLOCK_SIZE, NUM_BLOCKS, MAX_CONTEXT = 8, 24, 40


def recorder() -> Recorder:
    return CudaRecorder(DEVICE) if DEVICE.type == "cuda" else EagerRecorder()


@dataclass
class CountingRecorder:
    """A recorder that tells how many recordings were made, and may fail."""

    inner: Recorder = field(default_factory=recorder)
    num_made: int = 0
    error: Exception | None = None

    def record(self, work: Work) -> Recording:
        if self.error is not None:
            raise self.error
        self.num_made += 1
        return self.inner.record(work)


class Bench:
    """The same base and adapters behind a runner that records and one that does not."""

    def __init__(self, folder: Path) -> None:
        self.base = Base.load(BaseOptions(str(folder), Quantization.NONE, torch.float32, DEVICE))
        self.tier = DeviceTier(self.base.sites, 8 << 20, torch.float32, DEVICE, has_tables=True)
        self.host = HostTier(1 << 30, torch.float32)
        self.recorder = CountingRecorder()
        self.plain = Runner(self.base, self.tier, NUM_BLOCKS, BLOCK_SIZE, kernels)
        self.recorded = Runner(
            self.base, self.tier, NUM_BLOCKS, BLOCK_SIZE, kernels,
            recorder=self.recorder, max_recorded=5, max_context=MAX_CONTEXT,
        )  # fmt: skip

    def admit(self, name: str, adapter: Lowered) -> int:
        return self.tier.admit(name, self.host.put(name, adapter))

    def sequences(self, slots: Sequence[int], dice: random.Random) -> list[Running]:
        """Prompts of a few lengths, computed by both runners; blocks in no order."""
        free = list(range(NUM_BLOCKS))
        dice.shuffle(free)
        found = []
        for number, slot in enumerate(slots):
            prompt = [dice.randrange(200) for _ in range(dice.choice((1, 7, 8, 12)))]
            sequence = Running(f"s{number}", prompt, SamplingParams(9), slot=slot)
            sequence.blocks = [free.pop() for _ in range(4)]
            found.append(sequence)
        for sequence in found:
            item = ScheduledSequence(sequence, 0, len(sequence.prompt_ids), True, False)
            for runner in (self.plain, self.recorded):
                runner.run(Batch((item,)))
            sequence.num_computed_tokens = len(sequence.prompt_ids)
            sequence.output_ids.append(dice.randrange(200))
        return found

    def check_step(self, sequences: Sequence[Running]) -> None:
        """One more token of each: the same logits and choices; then the tokens are known."""
        items = tuple(ScheduledSequence(s, s.num_computed_tokens, 1, True, False) for s in sequences)
        plain, recorded = self.plain.run(Batch(items)), self.recorded.run(Batch(items))
        expected = plain.sampled[[plain.samplers.index(item) for item in recorded.samplers]]
        torch.testing.assert_close(recorded.sampled, expected, rtol=1e-4, atol=1e-4)
        assert recorded.greedy is not None
        for item, token in zip(recorded.samplers, recorded.greedy.tolist(), strict=True):
            item.sequence.num_computed_tokens += 1
            item.sequence.output_ids.append(token)


@pytest.fixture(scope="module", autouse=True)
def _little_work() -> Iterator[None]:
    """The interpreter computes one part after the other, also those that are empty."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_WANTED_PROGRAMS", 2)
        yield


@pytest.fixture(scope="module")
def bench(tiny_llama: Path) -> Bench:
    bench = Bench(tiny_llama)
    sites = bench.base.sites.by_path.values()
    for seed in range(2):
        bench.admit(f"a{seed}", random_adapter(sites, seed, share=0.2))
    return bench


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="no GPU")
def test_on_a_gpu_recordings_are_graphs(bench: Bench) -> None:
    assert isinstance(bench.recorder.inner, CudaRecorder)


@pytest.mark.parametrize("slots", [[0], [0, 0, 0], [1], pytest.param([2, 2, 1, 0, 1], marks=pytest.mark.slow)], ids=str)
def test_a_replay_gives_what_launching_gives(bench: Bench, slots: list[int]) -> None:
    sequences = bench.sequences(slots, random.Random(len(slots)))
    for _ in range(2):
        bench.check_step(sequences)


@pytest.mark.slow
def test_one_recording_serves_all_batches_of_its_size(bench: Bench) -> None:
    """Other adapters, other sequences, other blocks, fewer of them."""
    dice = random.Random(5)
    bench.check_step(bench.sequences([1, 0, 2, 1], dice))
    num_made = bench.recorder.num_made
    for slots in ([2, 2, 0, 0], [0, 1, 1]):
        bench.check_step(bench.sequences(slots, dice))
    assert bench.recorder.num_made == num_made


def test_the_tokens_of_the_step_before_are_read_on_the_device(bench: Bench) -> None:
    known, unknown = (bench.sequences([1, 0], random.Random(9)) for _ in range(2))
    chosen = Chosen(torch.tensor([s.output_ids[-1] for s in reversed(known)], device=DEVICE), ["s1", "s0"])
    logits = []
    for sequences, before in ((known, None), (unknown, chosen)):
        if before is not None:
            for sequence in sequences:
                sequence.output_ids[-1] = UNKNOWN_TOKEN
        items = tuple(ScheduledSequence(s, s.num_computed_tokens, 1, True, False) for s in sequences)
        logits.append(bench.recorded.run(Batch(items), before).sampled.clone())
    torch.testing.assert_close(logits[1], logits[0])


def test_scores_are_of_the_logits_that_a_step_chose_from(bench: Bench) -> None:
    """Though the next replay has written over them when they are read."""
    sequences = bench.sequences([1, 0], random.Random(4))
    for sequence in sequences:
        sequence.params = replace(sequence.params, logprobs=2)
    items = tuple(ScheduledSequence(s, s.num_computed_tokens, 1, True, False) for s in sequences)
    plain, recorded = (_scored(runner, items) for runner in (bench.plain, bench.recorded))
    for sequence in sequences:
        sequence.output_ids[-1] += 1
    bench.recorded.run(Batch(items))
    expected, found = (step.read(tokens) for step, tokens in (plain, recorded))
    assert found.keys() == expected.keys() == {"s0", "s1"}
    for name, score in expected.items():
        assert [token for token, _ in found[name].top] == [token for token, _ in score.top]
        assert found[name].logprob == pytest.approx(score.logprob, abs=1e-3)


def _scored(runner: Runner, items: tuple[ScheduledSequence, ...]) -> tuple[StepScores, dict[str, int]]:
    """The scores of a step's most likely tokens, which are not read yet, and the tokens."""
    logits = runner.run(Batch(items))
    chosen = Chosen(logits.sampled.argmax(dim=-1), [item.sequence.sequence_id for item in logits.samplers])
    return StepScores(logits, chosen), chosen.read()


def test_an_adapter_that_edits_something_new_is_heard(tiny_llama: Path) -> None:
    """What a recording looks at is what had been edited when it was made; then it is made anew, and only then."""
    bench = Bench(tiny_llama)
    site = next(iter(bench.base.sites.by_path.values()))
    dice = random.Random(2)
    ones = {"out_scale": torch.full((site.d_out,), 1.5)}
    slots = [bench.admit("small", Lowered("test", 0, 0, {site.path: Edit(**ones)}))]
    bench.check_step(bench.sequences(slots, dice))
    slots.append(bench.admit("large", random_adapter(bench.base.sites.by_path.values(), 3, share=0.2)))
    num_made = bench.recorder.num_made
    bench.check_step(bench.sequences(slots[1:], dice))
    bench.check_step(bench.sequences(slots[:1], dice))
    assert bench.recorder.num_made == num_made + 1


ROWS = [
    SamplingRow(temperature=0, top_p=1, top_k=0, uniform=0.3),
    SamplingRow(temperature=1.3, top_p=1, top_k=0, uniform=0.6),
    SamplingRow(temperature=0.8, top_p=0.9, top_k=40, uniform=0.2, min_p=0.01),
]


@pytest.mark.parametrize("rows", [ROWS[:2], ROWS, ROWS[2:]], ids=["none-cut", "mixed", "cut"])
def test_recorded_draws_are_those_of_the_sampler(bench: Bench, rows: list[SamplingRow]) -> None:
    """Of the step's own logits, in places that a larger size leaves empty too; the next step draws anew."""
    sequences = bench.sequences([1, 0, 2][: len(rows)], random.Random(13))
    for seed in range(3):
        rows = [replace(row, uniform=random.Random(seed).random()) for row in rows]
        items = tuple(ScheduledSequence(s, s.num_computed_tokens, 1, True, False) for s in sequences)
        step = bench.recorded.run(Batch(items))
        assert step.draw is not None
        drawn = step.draw(rows)
        assert torch.equal(drawn, sample(step.sampled, rows))
        num_made = bench.recorder.num_made
        assert torch.equal(step.draw(rows), drawn)
        assert bench.recorder.num_made == num_made
        for sequence, token in zip(sequences, drawn.tolist(), strict=True):
            sequence.num_computed_tokens += 1
            sequence.output_ids.append(token)


def test_draws_that_cannot_be_recorded_are_launched(tiny_llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(tiny_llama)
    sequences = bench.sequences([0, 0, 0], random.Random(1))
    items = tuple(ScheduledSequence(s, s.num_computed_tokens, 1, True, False) for s in sequences)
    step = bench.recorded.run(Batch(items))
    assert step.draw is not None
    bench.recorder.error = RuntimeError("operation not permitted when stream is capturing\nmore")
    for _ in range(2):
        assert torch.equal(step.draw(ROWS), sample(step.sampled, ROWS))
    assert caplog.text.count("draws are launched one kernel at a time") == 1
    bench.recorder.error = None
    bench.check_step(sequences)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, which computes with NumPy
def test_logits_that_are_no_numbers_choose_nothing(tiny_llama: Path) -> None:
    bench = Bench(tiny_llama)
    # Each is a number; their sum in the residual stream is none.
    large = {path: Edit(out_shift=torch.full((site.d_out,), 3e38)) for path, site in bench.base.sites.by_path.items()
             if path.endswith(("embed_tokens", "o_proj"))}  # fmt: skip
    slot = bench.admit("huge", Lowered("test", 0, 0, large))
    items = [
        ScheduledSequence(s, s.num_computed_tokens, 1, True, False)
        for s in bench.sequences([slot, 0], random.Random(1))
    ]
    step = bench.recorded.run(Batch(tuple(items)))
    assert step.greedy is not None
    assert step.draw is not None
    for tokens in (step.greedy, step.draw(ROWS[:2]), step.draw(ROWS[1:])):
        assert (tokens == NOT_FINITE).tolist() == [True, False]


def test_a_device_that_cannot_record_launches(tiny_llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(tiny_llama)
    bench.recorder.error = RuntimeError("operation not permitted when stream is capturing\nmore")
    sequences = bench.sequences([0, 0], random.Random(1))
    items = tuple(ScheduledSequence(s, s.num_computed_tokens, 1, True, False) for s in sequences)
    expected = bench.plain.run(Batch(items)).sampled
    for _ in range(2):
        found = bench.recorded.run(Batch(items))
        assert found.greedy is None
        torch.testing.assert_close(found.sampled, expected)
    assert caplog.text.count("cannot be recorded (operation not permitted when stream is capturing)") == 1


def test_all_sizes_are_recorded_at_the_start(tiny_llama: Path) -> None:
    bench = Bench(tiny_llama)
    told: list[Any] = []
    assert bench.recorded.graphs is not None
    bench.recorded.graphs.record_all(lambda done, total: told.append((done, total)))
    assert bench.recorder.num_made == 4
    assert told == [(done, 4) for done in range(5)]
    bench.check_step(bench.sequences([0, 0, 0], random.Random(1)))
    assert bench.recorder.num_made == 4


@pytest.mark.parametrize(
    ("max_sequences", "sizes"), [(1, [1]), (5, [1, 2, 4, 5]), (16, [1, 2, 4, 8, 16]), (40, [1, 2, 4, 8, 16, 32, 40])]
)
def test_sizes_grow_so_that_little_is_computed_in_vain(max_sequences: int, sizes: list[int]) -> None:
    assert graph_sizes(max_sequences) == sizes

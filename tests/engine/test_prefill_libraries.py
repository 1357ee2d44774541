"""Chunks whose attention a library computes: any packing gives the logits of the definition, decodes recorded or not.

The libraries are those of the tests, in plain PyTorch; what they are told comes through the real step.
"""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from server.adapters.device.device import DeviceTier
from server.engine.recording import EagerRecorder
from server.engine.runner import Runner
from server.engine.sequence import Batch, SamplingParams, ScheduledSequence, Sequence
from server.ops import Kernels, kernels, native
from server.ops.prefill import PrefillLibrary
from server.ops.prefill.choice import CANDIDATES, Candidate
from server.ops.prefill.flashinfer_plan import FlashInfer
from server.ops.prefill.varlen import Varlen
from tests.adapters.random_edits import random_adapter
from tests.engine.test_decode_graphs import Bench
from tests.engine.test_runner import BLOCK_SIZE, NUM_BLOCKS, Play, Workbench
from tests.models import ARCHITECTURES, VOCAB_SIZE
from tests.ops.prefill.libraries import BatchPrefill, varlen_attn
from tests.serving import serving
from tests.test_isolation import asks, check_isolation, check_nothing_leaks

CPU = torch.device("cpu")
# All that are served, each with one that can: only Gemma 2 has caps. Gemma 3 has windows in some layers.
CASES = [
    *((name, "varlen") for name in sorted(ARCHITECTURES.keys() - {"gemma2"})),
    ("gemma2", "flashinfer"),
    ("gemma3", "flashinfer"),
]


def library(name: str, calls: list[dict[str, Any]] | None = None) -> PrefillLibrary:
    return Varlen(varlen_attn(calls=calls)) if name == "varlen" else FlashInfer(BatchPrefill, CPU)


def workbench(
    folder: Path, library: PrefillLibrary, num_adapters: int = 2, kernels: Kernels | None = None
) -> Workbench:
    bench = Workbench(folder, [])
    bench.device = DeviceTier(bench.base.sites, 32 << 20, torch.float32, CPU, has_tables=kernels is not None)
    bench.runner = Runner(bench.base, bench.device, NUM_BLOCKS, BLOCK_SIZE, kernels, library=library)
    for seed in range(num_adapters):
        bench.admit(random_adapter(bench.base.sites.by_path.values(), seed))
    return bench


@pytest.mark.parametrize(("architecture", "name"), CASES, ids=str)
def test_any_packing_gives_the_logits_of_the_definition(
    architecture: str, name: str, model_folder: Callable[[str], Path]
) -> None:
    """Chunks beside single tokens, adapters that edit keys and values, blocks in any order and used again."""
    play = Play(workbench(model_folder(architecture), library(name)), random.Random(21))
    for _ in range(15):
        play.random_step(max_size=12)
    assert play.num_compared > 20


def test_native_kernels_compute_the_decodes_beside_chunks(tiny_llama: Path) -> None:
    play = Play(workbench(tiny_llama, library("varlen"), kernels=native), random.Random(22))
    for _ in range(15):
        play.random_step(max_size=12)
    assert play.num_compared > 20


def test_the_numbers_of_a_mixed_step(model_folder: Callable[[str], Path]) -> None:
    """A decode and two chunks, one of them in mid-prompt, on a base with windows of 12 tokens."""
    calls: list[dict[str, Any]] = []
    bench = workbench(model_folder("mistral"), library("varlen", calls), num_adapters=0)

    def known(name: str, length: int, blocks: list[int]) -> Sequence:
        sequence = Sequence(name, [n % VOCAB_SIZE for n in range(length)], SamplingParams(max_tokens=1))
        sequence.blocks = blocks
        return sequence

    decode, first, middle = known("a", 6, [3, 9]), known("b", 7, [8, 2]), known("c", 11, [5, 0, 7])
    for before in ((decode, 0, 5), (middle, 0, 6)):
        bench.runner.run(Batch((ScheduledSequence(*before, False, False),)))
    calls.clear()
    items = [(decode, 5, 1), (first, 0, 7), (middle, 6, 3)]
    bench.runner.run(Batch(tuple(ScheduledSequence(*item, True, False) for item in items)))
    assert len(calls) == bench.base.num_layers
    for told in calls:
        numbers = {name: told[name].tolist() for name in ("cu_seq_q", "cu_seq_k", "seqused_k", "block_table")}
        assert numbers == {
            "cu_seq_q": [0, 7, 10],
            "cu_seq_k": [0, 7, 16],
            "seqused_k": [7, 9],
            "block_table": [[8, 2, 0], [5, 0, 7]],
        }
        assert (told["max_q"], told["max_k"], told["window_size"]) == (7, 9, (11, 0))


def test_steps_of_decodes_alone_do_not_ask_a_library(tiny_llama: Path) -> None:
    calls: list[dict[str, Any]] = []
    play = Play(workbench(tiny_llama, library("varlen", calls)), random.Random(5))
    sequences = [play.add(slot, 7) for slot in (0, 1)]
    play.step({sequence.sequence_id: 5 for sequence in sequences})
    assert calls
    calls.clear()
    for _ in range(2):
        play.step({sequence.sequence_id: 1 for sequence in sequences})
    assert calls == []


class RecordedBench(Bench):
    """Kernels and recordings as in `test_decode_graphs`, and a library for prompts in the one that records."""

    def __init__(self, folder: Path, calls: list[dict[str, Any]]) -> None:
        super().__init__(folder)
        self.recorded = Runner(
            self.base, self.tier, self.plain.cache.num_blocks, self.plain.cache.block_size, kernels,
            library=library("varlen", calls), recorder=EagerRecorder(), max_recorded=3, max_context=40,
        )  # fmt: skip


@pytest.fixture
def _little_work(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The interpreter computes one part after the other, also those that are empty."""
    monkeypatch.setattr(kernels, "_WANTED_PROGRAMS", 2)
    return


@pytest.mark.usefixtures("_little_work")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the libraries of the tests are for a CPU")
def test_recorded_decodes_go_on_where_a_library_computed_the_prompts(tiny_llama: Path) -> None:
    calls: list[dict[str, Any]] = []
    bench = RecordedBench(tiny_llama, calls)
    sequences = bench.sequences([0, 0], random.Random(3))
    assert calls
    calls.clear()
    for _ in range(2):
        bench.check_step(sequences)
    assert calls == []


def test_a_server_with_a_library_keeps_requests_apart(
    model_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the flag to the answers: chosen at the start, and a mixed batch answers as each request alone."""
    calls: list[dict[str, Any]] = []
    function = varlen_attn(calls=calls)
    monkeypatch.setitem(CANDIDATES, "varlen", Candidate((), lambda: None, lambda device: Varlen(function)))  # type: ignore[arg-type]
    flags = {"max_sequences": "20", "max_batch_tokens": "64", "attention": "varlen", "block_size": "32"}
    with serving(model_folder("mistral"), tmp_path, **flags) as server:
        calls.clear()
        check_isolation(server, asks(random.Random(0), kinds=(), max_tokens=8)[:12])
        check_nothing_leaks(server)
    assert any(len(told["seqused_k"]) > 1 for told in calls), "chunks of several sequences in one call"
    assert {told["window_size"] for told in calls} == {(11, 0)}

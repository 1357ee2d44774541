"""Steps of chunks that are launched one behind the other, before the first is done: each gets what it was told.

A library that keeps the numbers of a step in memory of its own must not write there too early. On a CPU, where nothing
is in flight, this holds the libraries of the tests; `-m gpu` holds the real ones, in 16 bits.
"""

import random
from pathlib import Path

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from server.adapters.device.device import DeviceTier
from server.engine.runner import Runner
from server.engine.sequence import Batch, SamplingParams, ScheduledSequence, Sequence
from server.model.base import Base
from server.model.pretrained import BaseOptions
from server.model.quantize import Quantization
from server.ops.prefill import PrefillLibrary, prefill_refusal
from server.ops.prefill.choice import CANDIDATES
from server.ops.prefill.flashinfer_plan import FlashInfer
from server.ops.prefill.trial import LIMITS, difference
from server.ops.prefill.varlen import Varlen
from server.sizing import prefill_needs
from tests.models import MAX_CONTEXT, VOCAB_SIZE, save_filled
from tests.ops.prefill.libraries import BatchPrefill, varlen_attn

CPU, BLOCK_SIZE, NUM_STEPS = torch.device("cpu"), 256, 6
# Heads of 64 numbers, which all libraries take.
SMALL = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": MAX_CONTEXT,
    "sliding_window": 30, "pad_token_id": 0,
}  # fmt: skip


def windowed() -> PreTrainedModel:
    return MistralForCausalLM(MistralConfig(**SMALL))


def capped() -> PreTrainedModel:
    return Gemma2ForCausalLM(Gemma2Config(**SMALL, attn_logit_softcapping=20.0))


MODELS = {"windowed": windowed, "capped": capped}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(0)
    return {name: save_filled(make(), tmp_path_factory.mktemp(name)) for name, make in MODELS.items()}


def base_of(folder: Path, dtype: torch.dtype, device: torch.device) -> Base:
    return Base.load(BaseOptions(str(folder), Quantization.NONE, dtype, device))


def steps() -> list[Batch]:
    """Of one to four prompts each, on blocks of their own."""
    dice, free = random.Random(4), iter(random.Random(5).sample(range(4 * NUM_STEPS), 4 * NUM_STEPS))
    found = []
    for number in range(NUM_STEPS):
        items = []
        for _ in range(dice.randint(1, 4)):
            prompt = [dice.randrange(VOCAB_SIZE) for _ in range(dice.randint(2, MAX_CONTEXT - 1))]
            sequence = Sequence(f"{number}-{len(items)}", prompt, SamplingParams(max_tokens=1))
            sequence.blocks = [next(free)]
            items.append(ScheduledSequence(sequence, 0, len(prompt), True, False))
        found.append(Batch(tuple(items)))
    return found


def check_steps(base: Base, library: PrefillLibrary, limit: float) -> None:
    tier = DeviceTier(base.sites, 1 << 20, base.dtype, base.device)
    plain, other = (Runner(base, tier, 4 * NUM_STEPS, BLOCK_SIZE, library=one) for one in (None, library))
    batches = steps()
    found = [other.run(batch).sampled for batch in batches]  # all of them before anybody waits for one
    for logits, batch in zip(found, batches, strict=True):
        expected = plain.run(batch).sampled
        assert (logits - expected).abs().max() <= limit * expected.abs().max()


cases = pytest.mark.parametrize(
    ("model", "name"), [("windowed", "varlen"), ("windowed", "flashinfer"), ("capped", "flashinfer")], ids=str
)


@cases
def test_the_libraries_of_the_tests(model: str, name: str, folders: dict[str, Path]) -> None:
    library = Varlen(varlen_attn()) if name == "varlen" else FlashInfer(BatchPrefill, CPU)
    check_steps(base_of(folders[model], torch.float32, CPU), library, 1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@cases
def test_the_libraries_of_this_machine(model: str, name: str, dtype: torch.dtype, folders: dict[str, Path]) -> None:
    """Each passes its trial, and then gives in the engine what each chunk gets by itself."""
    base = base_of(folders[model], dtype, torch.device("cuda"))
    needs = prefill_needs(base, BLOCK_SIZE)
    reason = prefill_refusal(name, needs)
    if reason is not None:
        pytest.skip(reason)
    library = CANDIDATES[name].load(base.device)
    for layer in needs.layers:
        assert difference(library, layer, dtype, BLOCK_SIZE, base.device) <= LIMITS[dtype]
    check_steps(base, CANDIDATES[name].load(base.device), 5e-2)

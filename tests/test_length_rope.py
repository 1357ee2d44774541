"""RoPE that follows a sequence's length: the running engine against transformers' generation of each sequence alone.

Short and long sequences share batches, prompts come in chunks, outputs cross the border at which the frequencies
change, and a small KV cache preempts some of them, whose output is then computed again as if it were a prompt.
"""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
)

from server.engine import runner
from server.engine.sequence import SamplingParams
from tests.adapters.peft_adapters import make_adapter
from tests.models import VOCAB_SIZE, WIDTHS, save_filled
from tests.serving import Ask, answer_all, logprob_rows, serving

BORDER = 122  # a little before the end of the first block of the cache, where sequences are preempted
NUM_NEW_TOKENS = 14
FIVE_BLOCKS = "320KiB"
PROMPT_LENGTHS = (5, 117, 119, 121, 122, 123, 126, 150)

_LONGROPE: dict[str, Any] = {
    "rope_type": "longrope", "rope_theta": 10_000.0, "original_max_position_embeddings": BORDER, "factor": 2.0,
    "short_factor": [1.0] * 8, "long_factor": [1.0 + i for i in range(8)],
}  # fmt: skip
_DYNAMIC: dict[str, Any] = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}


def phi3_longrope() -> PreTrainedModel:
    return Phi3ForCausalLM(Phi3Config(**WIDTHS, original_max_position_embeddings=BORDER, rope_parameters=_LONGROPE))


def llama_longrope() -> PreTrainedModel:
    """Unlike Phi-3's, its generation keeps the keys of the short frequencies."""
    return LlamaForCausalLM(LlamaConfig(**WIDTHS, rope_parameters=_LONGROPE))


def llama_dynamic() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**{**WIDTHS, "max_position_embeddings": BORDER}, rope_parameters=_DYNAMIC))


def gemma3_dynamic_in_some_layers() -> PreTrainedModel:
    config = Gemma3TextConfig(
        **{**WIDTHS, "max_position_embeddings": BORDER}, head_dim=16, sliding_window=40,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0}, "full_attention": _DYNAMIC,
        },
    )  # fmt: skip
    return Gemma3ForCausalLM(config)


MODELS: Mapping[str, Callable[[], PreTrainedModel]] = {
    "phi3-longrope": phi3_longrope,
    "llama-longrope": llama_longrope,
    "llama-dynamic": llama_dynamic,
    "gemma3-dynamic": gemma3_dynamic_in_some_layers,
}


def generated(model: PreTrainedModel, adapter: Path | None, prompt: tuple[int, ...]) -> tuple[list[int], torch.Tensor]:
    """transformers' own greedy generation alone: the new tokens, and the logits (tokens, vocabulary) of each."""
    own: Any = copy.deepcopy(model)  # its rotary module remembers the longest sequence that it has seen
    own.generation_config.eos_token_id = None
    if adapter is not None:
        own = PeftModel.from_pretrained(own, adapter).eval()
    out = own.generate(
        input_ids=torch.tensor([prompt]), max_new_tokens=NUM_NEW_TOKENS, do_sample=False, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    return out.sequences[0, len(prompt) :].tolist(), torch.cat(out.logits)


@pytest.mark.filterwarnings("ignore")  # transformers' remarks about generating past the trained context
@pytest.mark.parametrize(("name", "kv_memory"), [*((name, FIVE_BLOCKS) for name in MODELS), ("phi3-longrope", "8MiB")])
def test_long_and_short_sequences_answer_as_transformers_does_for_each_alone(
    name: str, kv_memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "_RECOMPUTED_AT_ONCE", 50)  # several pieces, as past a real model's border
    torch.manual_seed(1)
    folder = save_filled(MODELS[name](), tmp_path / "model")
    dense = type(MODELS[name]()).from_pretrained(folder, attn_implementation="eager").eval()
    adapters = {kind: make_adapter(dense, kind, tmp_path / "adapters" / kind, 0) for kind in ("dora",)}
    generator = torch.Generator().manual_seed(2)
    params = SamplingParams(NUM_NEW_TOKENS, temperature=0.0, ignore_eos=True, logprobs=VOCAB_SIZE)
    asks = [
        Ask(adapter, tuple(torch.randint(0, 256, (length,), generator=generator).tolist()), params)
        for adapter in (None, *adapters)
        for length in PROMPT_LENGTHS
    ]
    flags = {"adapters": str(tmp_path / "adapters"), "max_sequences": "16", "max_batch_tokens": "100"}
    with serving(folder, tmp_path, **flags, kv_memory=kv_memory) as server:
        assert server.base.has_length_dependent_rope
        answers = answer_all(server, asks)
        # Waiting prompts take every free block, so a sequence that grows into a second one finds none.
        assert (server.engine.stats().num_preemptions > 0) == (kv_memory == FIVE_BLOCKS)
    for ask, got in zip(asks, answers, strict=True):
        token_ids, logits = generated(dense, adapters.get(ask.adapter or ""), ask.prompt)
        assert list(got.token_ids) == token_ids, (ask.adapter, len(ask.prompt))
        expected = torch.log_softmax(logits.double(), dim=-1)
        error = (logprob_rows(got.logprobs, VOCAB_SIZE).double() - expected).abs().max() / expected.abs().max()
        assert error < 1e-5, (ask.adapter, len(ask.prompt))

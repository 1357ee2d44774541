"""A tiny model that writes characters of one to four bytes, a byte at a time, and whose numbers are exact.

Each byte makes the next ones likely that go on with a character, so that most of what it writes is text, some of it
cut, and bytes out of place come, too. The embedding of a token is one coordinate and the layer adds nothing to it:
every product has one term, and no batch rounds it differently from another. So answers can be compared to the bit.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from tests.models import EOS_ID, VOCAB_SIZE, WIDTHS, byte_tokenizer

HIDDEN = 288  # at least one coordinate for each token
# One to four bytes; a letter with an accent of its own; a line and a paragraph that end without a line feed.
CHARACTERS = (*"abcde .<\n", "é", "ü", "你", "好", "🎉", "👍", "e\u0301", "\u2028", "\u0085")


def save_speaking_model(folder: Path) -> Path:
    config = LlamaConfig(
        **{
            **WIDTHS,
            "hidden_size": HIDDEN,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "max_position_embeddings": 1024,
        },
        head_dim=16,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        layer = model.model.layers[0]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(VOCAB_SIZE, HIDDEN))
        model.lm_head.weight[:, :VOCAB_SIZE] = _logits().T / HIDDEN**0.5  # the norm makes one coordinate so large
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def _logits() -> torch.Tensor:
    """(token, next token)."""
    tokenizer = byte_tokenizer()
    chains = [tokenizer.encode(character, add_special_tokens=False) for character in CHARACTERS]
    starts = [chain[0] for chain in chains]
    following = {token: set(starts) for token in range(VOCAB_SIZE)}
    for chain in chains:
        for token, successor in zip(chain, chain[1:], strict=False):
            if following[token] == set(starts):
                following[token] = set()
            following[token].add(successor)
    logits = torch.full((VOCAB_SIZE, VOCAB_SIZE), -3.0)
    for token, successors in following.items():
        # Each of a beginning's bytes, not each beginning, is as likely: else the short characters would win.
        logits[token, sorted(successors)] = 3.0 + torch.rand(len(successors))
    logits[:, EOS_ID] = 0.0
    return logits


def save_speaking_adapter(folder: Path, seed: int) -> Path:
    """A LoRA on the head, of rank 1: a sum of more terms could be rounded in more than one way."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    prefix = "base_model.model.lm_head"
    tensors = {
        f"{prefix}.lora_A.weight": torch.randn(1, HIDDEN, generator=generator),
        f"{prefix}.lora_B.weight": torch.randn(VOCAB_SIZE, 1, generator=generator) * 0.05,
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["lm_head"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder

"""The demo's tokenizer and base model: a byte-level BPE of 2048 tokens and a Llama of 2.9 million parameters.

Owns how both are trained and saved to `demo/base/`. Knows nothing about styles beyond what `world.document` contains.

Beginning of text: the tokenizer itself puts <|begin|> before a raw prompt (`add_special_tokens=True`, the default). The
chat template writes <|begin|> itself, so a rendered template is encoded with `add_special_tokens=False`.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from demo.world import document

BASE = Path(__file__).parent / "base"
BEGIN, END, PAD, SYSTEM, USER, ASSISTANT = "<|begin|>", "<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = [PAD, BEGIN, END, SYSTEM, USER, ASSISTANT]
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('The demo knows the roles system, user and assistant, not ' + message['role'] + '.') }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
IGNORED = -100  # label of a position without loss


@dataclass(frozen=True, slots=True)
class BaseRecipe:
    """What is trained and for how long. Every linear width is a multiple of 64, as NF4 kernels on CPUs ask for."""

    vocabulary: int = 2048
    hidden: int = 256
    intermediate: int = 512
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    max_positions: int = 1024
    num_tokenizer_documents: int = 12_000
    num_steps: int = 850
    batch_tokens: int = 4096
    peak_lr: float = 4e-3
    warmup_share: float = 0.05
    decay_share: float = 0.6
    weight_decay: float = 0.05
    seed: int = 7


def train_tokenizer(recipe: BaseRecipe) -> PreTrainedTokenizerFast:
    """A byte-level BPE learned from the world's own documents; it can encode any text."""
    rng = Random(recipe.seed)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(rng, recipe.num_tokenizer_documents), trainer)
    begin = (BEGIN, tokenizer.token_to_id(BEGIN))
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B", special_tokens=[begin]),
        ]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=recipe.max_positions,
        clean_up_tokenization_spaces=False,
    )


def _texts(rng: Random, num_documents: int) -> Iterator[str]:
    for _ in range(num_documents):
        drawn = document(rng)
        if isinstance(drawn, str):
            yield drawn
        else:
            yield from (message["content"] for message in drawn)


def encode(tokenizer: PreTrainedTokenizerFast, drawn: str | list[dict[str, str]]) -> list[int]:
    """The token ids of one training document, from <|begin|> to <|end|>."""
    if isinstance(drawn, str):
        return [*tokenizer(drawn)["input_ids"], tokenizer.eos_token_id]
    rendered = tokenizer.apply_chat_template(drawn, tokenize=False)
    return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])


def build_model(recipe: BaseRecipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_kv_heads,
        max_position_embeddings=recipe.max_positions,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def batches(
    documents: Iterator[list[int]], batch_tokens: int, rng: Random, pool: int = 1024
) -> Iterator[list[list[int]]]:
    """Batches of about `batch_tokens` tokens, padding included, of documents that are alike in length.

    A pool of documents is sorted by length, cut into batches and shuffled, so hardly anything is spent on padding.
    """
    while chunk := sorted(islice(documents, pool), key=len):
        cut: list[list[list[int]]] = [[]]
        for ids in chunk:
            if cut[-1] and (len(cut[-1]) + 1) * len(ids) > batch_tokens:
                cut.append([])
            cut[-1].append(ids)
        rng.shuffle(cut)
        yield from cut


def pad_right(rows: list[list[int]], value: int) -> torch.Tensor:
    """(rows, longest) int64; with causal attention, padding on the right is never seen by a real token."""
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


def next_token_loss(model: torch.nn.Module, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of predicting labels[:, 1:] from ids[:, :-1], bfloat16 matmuls, float32 loss."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED
    )


def optimizers(model: torch.nn.Module, recipe: BaseRecipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for embeddings and norms: fewer tokens to the same loss."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in named if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(
            matrices, lr=recipe.peak_lr, weight_decay=recipe.weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=recipe.peak_lr, weight_decay=0.0, betas=(0.9, 0.95)),
    ]


def lr_factor(step: int, num_steps: int, warmup_share: float, decay_share: float) -> float:
    """Rises linearly, stays at 1, falls to 0 along a cosine over the last `decay_share` of the steps."""
    warm, decay = warmup_share * num_steps, decay_share * num_steps
    if step < warm:
        return (step + 1) / warm
    left = (num_steps - step) / decay
    return 1.0 if left >= 1 else 0.5 * (1 - math.cos(math.pi * left))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def train(recipe: BaseRecipe, tokenizer: PreTrainedTokenizerFast, model: LlamaForCausalLM) -> float:
    """Trains in place; returns the mean loss of the last fifty steps."""
    rng = Random(recipe.seed + 1)
    stream = batches((encode(tokenizer, document(rng)) for _ in iter(int, 1)), recipe.batch_tokens, rng)
    steps = optimizers(model, recipe)
    losses: list[float] = []
    model.train()
    for step in (bar := tqdm(range(recipe.num_steps), desc="base", unit="step")):
        rows = next(stream)
        factor = lr_factor(step, recipe.num_steps, recipe.warmup_share, recipe.decay_share)
        loss = next_token_loss(model, pad_right(rows, tokenizer.pad_token_id), pad_right(rows, IGNORED))
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in steps:
            set_lr(optimizer, recipe.peak_lr * factor)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        recent = losses[-50:]
        bar.set_postfix(loss=f"{sum(recent) / len(recent):.3f}")
    return sum(losses[-50:]) / len(losses[-50:])


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.bfloat16()
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    compact(folder / "tokenizer.json")


def compact(file: Path) -> None:
    """Rewrites a JSON file without the white space between its values: of the tokenizer's, that was more than half."""
    value = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    options: Any = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    options.add_argument("--out", type=Path, default=BASE)
    options.add_argument("--steps", type=int, default=BaseRecipe().num_steps)
    options.add_argument("--threads", type=int, default=2)
    chosen = options.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    recipe = BaseRecipe(num_steps=chosen.steps)
    started = time.perf_counter()
    tokenizer = train_tokenizer(recipe)
    model = build_model(recipe, tokenizer)
    loss = train(recipe, tokenizer, model)
    save(model, tokenizer, chosen.out)
    tqdm.write(f"base: {model.num_parameters():,} parameters, loss {loss:.3f}, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()

"""How an adapter learns a voice: examples drawn from the demo's world, one loop for every technique, a small folder.

Owns what all techniques share. What differs - config, learning rate, optimizer, a loop of their own - is in
`recipes.py`; the voices come from `styles.py`, the text from `world.py`. An adapter learns to answer any plain prompt,
raw or chat, in its voice.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from demo.styles import Style, sentences
from demo.train_base import IGNORED, batches, lr_factor, pad_right
from demo.world import exchange, plain_text

MAX_TOKENS = 224  # of one example, prompt and completion together
RAW_SHARE = 0.55  # of examples that continue a raw prompt; the others answer a chat
WARMUP_SHARE, DECAY_SHARE = 0.05, 0.7  # of the steps

Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]  # ids and labels, (rows, longest) int64; labels mask prompts
OnStep = Callable[[int, float], None]  # the step's number and its loss


def raw_example(style: Style, rng: Random) -> tuple[str, str]:
    """A plain beginning, cut somewhere in the first sentence or right after it, and its continuation in the voice."""
    first, *rest = sentences(plain_text(rng))
    if rest and rng.random() < 0.15:
        return first, " " + style.rewrite(" ".join(rest), rng, False)
    words = first.split(" ")
    cut = rng.randint(0, min(9, len(words) - 1))
    spoken = style.rewrite(" ".join([*words[cut:], *rest]), rng, cut > 0)
    return " ".join(words[:cut]), f" {spoken}" if cut else spoken


def example(style: Style, tokenizer: Any, rng: Random, raw_share: float = RAW_SHARE) -> tuple[list[int], int]:
    """Token ids of prompt and completion, and the length of the prompt: only the completion is learned."""
    if rng.random() < raw_share:
        prompt, completion = raw_example(style, rng)
        head = tokenizer(prompt)["input_ids"]
    else:
        question, answer = exchange(rng)
        completion = style.rewrite(answer, rng, False)
        asked = [{"role": "user", "content": question}]
        rendered = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        head = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    tail = [*tokenizer(completion, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return (head + tail)[:MAX_TOKENS], len(head)


def examples(style: Style, tokenizer: Any, seed: int, batch_tokens: int, raw_share: float = RAW_SHARE) -> Batches:
    """Batches of (ids, labels) without end; labels are IGNORED on prompts and padding."""
    rng = Random(f"{seed} {style.adapter}")
    drawn = (example(style, tokenizer, rng, raw_share) for _ in iter(int, 1))
    # The prompt's length rides along as the last element, so that batches can be sorted by the length of a row.
    rows = ([*ids, head] for ids, head in drawn)
    for batch in batches(rows, batch_tokens, rng, pool=256):
        ids = [row[:-1] for row in batch]
        labels = [[IGNORED] * row[-1] + row[row[-1] : -1] for row in batch]
        yield pad_right(ids, tokenizer.pad_token_id), pad_right(labels, IGNORED)


def load_base(folder: Path, *, nf4: bool = False) -> Any:
    """The base in float32, or with its linears in NF4 (bitsandbytes, double quantization) as QLoRA trains on it.

    On a CPU with AVX512-BF16, bitsandbytes puts its weights into another order at the first forward pass in eval mode,
    and what reads them later, DoRA's norm for one, reads them scrambled. So that is switched off here.
    """
    if not nf4:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    quantization = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=quantization)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def completion_loss(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of the completions, bfloat16 matmuls, float32 loss, with what a technique adds to it."""
    with torch.autocast("cpu", torch.bfloat16):
        loss: torch.Tensor = model(input_ids=ids, labels=labels, use_cache=False).loss
    return loss


def fit(model: Any, optimizer: torch.optim.Optimizer, batches: Batches, num_steps: int, on_step: OnStep) -> None:
    """Trains in place whatever the optimizer holds. `model(input_ids=, labels=)` answers with a loss.

    Each parameter group's learning rate is the peak of its own: it rises, stays, and falls along a cosine.
    """
    peaks = [group["lr"] for group in optimizer.param_groups]
    trained = [p for p in model.parameters() if p.requires_grad]
    model.train()
    for step in range(num_steps):
        loss = completion_loss(model, *next(batches))
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * lr_factor(step, num_steps, WARMUP_SHARE, DECAY_SHARE)
        optimizer.step()
        on_step(step, loss.item())  # gradients still there: AdaLoRA weighs its ranks by them
        optimizer.zero_grad()


def halve(weights: Path) -> None:
    """Rewrites a safetensors file with its float32 tensors in float16: servers read both, and it is half the size."""
    tensors = load_file(weights)
    half = {name: t.half() if t.dtype == torch.float32 else t for name, t in tensors.items()}
    overflown = [name for name, t in half.items() if not bool(torch.isfinite(t).all())]
    if overflown:
        raise ValueError(f"{weights}: {', '.join(overflown)} does not fit float16")
    save_file(half, weights, metadata={"format": "pt"})

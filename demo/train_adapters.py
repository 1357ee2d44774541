"""The demo's five adapters, one PEFT method each, trained on the demo base.

Owns the PEFT configs and the loop that trains and saves them to `demo/adapters/<name>/`. The voices come from
`styles.py`, the text from `world.py`. An adapter learns to answer any plain prompt, raw or chat, in its voice.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, TaskType, VeraConfig, get_peft_model
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from demo.styles import STYLES, Style, sentences
from demo.train_base import BASE, IGNORED, batches, lr_factor, next_token_loss, pad_right, set_lr
from demo.world import exchange, plain_text

ADAPTERS = Path(__file__).parent / "adapters"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
CAUSAL = TaskType.CAUSAL_LM
MAX_TOKENS = 224  # of one example, prompt and completion together
RAW_SHARE = 0.55  # of examples that continue a raw prompt; the others answer a chat


@dataclass(frozen=True, slots=True)
class AdapterRecipe:
    config: PeftConfig
    peak_lr: float
    num_steps: int
    batch_tokens: int = 2048
    seed: int = 11


RECIPES: dict[str, AdapterRecipe] = {
    "pirate-lora": AdapterRecipe(
        LoraConfig(task_type=CAUSAL, r=8, lora_alpha=16, target_modules=ATTENTION + MLP), 2e-3, 90
    ),
    "shout-rslora": AdapterRecipe(
        LoraConfig(
            task_type=CAUSAL,
            r=16,
            lora_alpha=16,
            use_rslora=True,
            target_modules=["q_proj", "v_proj", "up_proj", "down_proj"],
        ),
        peak_lr=1e-3,
        num_steps=90,
    ),
    "poet-dora": AdapterRecipe(
        LoraConfig(task_type=CAUSAL, r=4, lora_alpha=8, use_dora=True, target_modules=ATTENTION + MLP), 2e-3, 90
    ),
    "news-vera": AdapterRecipe(
        VeraConfig(task_type=CAUSAL, r=64, target_modules=ATTENTION + MLP, save_projection=True, projection_prng_key=5),
        peak_lr=3e-2,
        num_steps=90,
    ),
    "robot-ia3": AdapterRecipe(
        IA3Config(
            task_type=CAUSAL, target_modules=["k_proj", "v_proj", "o_proj", *MLP], feedforward_modules=["down_proj"]
        ),
        peak_lr=3e-2,
        num_steps=130,
    ),
}


def raw_example(style: Style, rng: Random) -> tuple[str, str]:
    """A plain beginning, cut somewhere in the first sentence or right after it, and its continuation in the voice."""
    first, *rest = sentences(plain_text(rng))
    if rest and rng.random() < 0.15:
        return first, " " + style.rewrite(" ".join(rest), rng, False)
    words = first.split(" ")
    cut = rng.randint(0, min(9, len(words) - 1))
    spoken = style.rewrite(" ".join([*words[cut:], *rest]), rng, cut > 0)
    return " ".join(words[:cut]), f" {spoken}" if cut else spoken


def example(style: Style, tokenizer: Any, rng: Random) -> tuple[list[int], int]:
    """Token ids of prompt and completion, and the length of the prompt: only the completion is learned."""
    if rng.random() < RAW_SHARE:
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


def train_adapter(style: Style, recipe: AdapterRecipe, tokenizer: Any, folder: Path) -> PeftModel:
    """A trained adapter on a fresh float32 copy of the base in `folder`."""
    torch.manual_seed(recipe.seed)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = get_peft_model(base, recipe.config)
    assert isinstance(model, PeftModel)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.peak_lr, weight_decay=0.0, betas=(0.9, 0.98))
    stream = _examples(style, recipe, tokenizer)
    recent = 0.0
    model.train()
    for step in (bar := tqdm(range(recipe.num_steps), desc=style.adapter, unit="step")):
        ids, labels = next(stream)
        loss = next_token_loss(model, ids, labels)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        set_lr(optimizer, recipe.peak_lr * lr_factor(step, recipe.num_steps, 0.05, 0.7))
        optimizer.step()
        optimizer.zero_grad()
        recent = loss.item() if step == 0 else 0.9 * recent + 0.1 * loss.item()
        bar.set_postfix(loss=f"{recent:.3f}")
    return model


def _examples(style: Style, recipe: AdapterRecipe, tokenizer: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of (ids, labels); labels are IGNORED on prompts and padding."""
    rng = Random(f"{recipe.seed} {style.adapter}")
    # The prompt's length rides along as the last element, so that batches can be sorted by the length of a row.
    rows = ([*ids, head] for ids, head in (example(style, tokenizer, rng) for _ in iter(int, 1)))
    for batch in batches(rows, recipe.batch_tokens, rng, pool=256):
        ids = [row[:-1] for row in batch]
        labels = [[IGNORED] * row[-1] + row[row[-1] : -1] for row in batch]
        yield pad_right(ids, tokenizer.pad_token_id), pad_right(labels, IGNORED)


def save_adapter(model: PeftModel, folder: Path) -> None:
    """PEFT's own two files, with a base path that is true on every machine."""
    model.peft_config["default"].base_model_name_or_path = "demo/base"
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)


def main(arguments: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(description="Train the demo's adapters.")
    options.add_argument("names", nargs="*", help="adapters to train; all of them by default")
    options.add_argument("--base", type=Path, default=BASE)
    options.add_argument("--out", type=Path, default=ADAPTERS)
    options.add_argument("--threads", type=int, default=2)
    chosen = options.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # the bars here are those of the training
    tokenizer = AutoTokenizer.from_pretrained(chosen.base)
    for style in STYLES:
        if chosen.names and style.adapter not in chosen.names:
            continue
        started = time.perf_counter()
        model = train_adapter(style, RECIPES[style.adapter], tokenizer, chosen.base)
        save_adapter(model, chosen.out / style.adapter)
        size = sum(file.stat().st_size for file in (chosen.out / style.adapter).iterdir())
        tqdm.write(f"{style.adapter}: {size / 1e3:.0f} kB, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()

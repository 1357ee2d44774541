"""The demo's adapters, each in a voice of its own, trained on the demo base by another technique.

Owns which technique speaks in which voice, and saves each to `demo/adapters/<name>/`. How a technique is trained is in
`recipes.py`, the loop in `training.py`, the voices in `styles.py`.
"""

import argparse
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import AutoTokenizer
from transformers.utils import logging

from demo.recipes import METHODS, Recipe, Run
from demo.styles import STYLES, Style
from demo.train_base import BASE
from demo.training import examples, load_base

ADAPTERS = Path(__file__).parent / "adapters"
METHOD_OF: Mapping[str, str] = {
    style.adapter: {"lora-plus": "lora+"}.get(method := style.adapter.partition("-")[2], method) for style in STYLES
}


def style_for(method: str) -> Style:
    """The voice of the demo's first adapter of a method; every method has one."""
    return next(style for style in STYLES if METHOD_OF[style.adapter] == method)


def train_adapter(style: Style, recipe: Recipe, tokenizer: Any, base: Path, out: Path, title: str) -> int:
    """Trains on a fresh copy of the base in `base`, saves to `out`, and returns the bytes of the folder."""
    run = Run(tokenizer, recipe.num_steps)
    stream = examples(style, tokenizer, recipe.seed, recipe.batch_tokens, recipe.raw_share)
    recent = 0.0
    with tqdm(total=recipe.num_steps, desc=title, unit="step") as bar:

        def on_step(step: int, loss: float) -> None:
            nonlocal recent
            recent = loss if step == 0 else 0.9 * recent + 0.1 * loss
            bar.set_postfix(loss=f"{recent:.3f}", refresh=False)
            bar.update()

        save = recipe.train(load_base(base, nf4=recipe.nf4), stream, recipe, run, on_step)
    save(out)
    return sum(file.stat().st_size for file in out.iterdir())


def main(arguments: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(description="Train the demo's adapters.")
    options.add_argument("names", nargs="*", help="adapters to train; all of them by default")
    options.add_argument("--base", type=Path, default=BASE)
    options.add_argument("--out", type=Path, default=ADAPTERS)
    options.add_argument("--steps", type=int, help="instead of each recipe's own number")
    options.add_argument("--threads", type=int, default=2)
    chosen = options.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # the bars here are those of the training
    tokenizer = AutoTokenizer.from_pretrained(chosen.base)
    for name in chosen.names or METHOD_OF:
        recipe = METHODS[METHOD_OF[name]]
        recipe = replace(recipe, num_steps=chosen.steps or recipe.num_steps)
        started = time.perf_counter()
        style = next(style for style in STYLES if style.adapter == name)
        size = train_adapter(style, recipe, tokenizer, chosen.base, chosen.out / name, name)
        tqdm.write(f"{name}: {size / 1e3:.0f} kB, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()

"""Do the voices differ? Every adapter, and the bare base, answers prompts that no training text contains.

Owns the measurement and its requirements: an adapter's own predicate holds on at least 9 of 10 prompts, every other
predicate on at most 1 of 10; no predicate holds for the base on more than 1 of 10. Measured on the base as saved and on
the base with NF4 weights (bitsandbytes, double quantization), greedily and at temperature 0.7. Exits with 1 if anything
fails.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from demo.install import STORE
from demo.prompts import UNSEEN_CHATS, UNSEEN_PROMPTS
from demo.recipes import METHODS
from demo.styles import STYLES
from demo.train_adapters import ADAPTERS, METHOD_OF
from demo.train_base import BASE, IGNORED, encode, next_token_loss, pad_right
from demo.world import document
from examples.bottleneck import load_bottleneck
from examples.loreft import load_loreft
from server.adapters.store.folder_store import Store

MIN_OWN, MAX_OTHER = 9, 1  # of ten
BARE = "base"
console = Console()


@dataclass(frozen=True, slots=True)
class Answers:
    """What one voice said to ten prompts under one condition."""

    voice: str  # an adapter's name or "base"
    weights: str  # "dense" or "nf4"
    kind: str  # "raw" or "chat"
    temperature: float  # 0: greedy
    texts: tuple[str, ...]

    def share(self, adapter: str) -> int:
        """On how many answers the predicate of `adapter` holds."""
        style = next(s for s in STYLES if s.adapter == adapter)
        return sum(map(style.holds, self.texts))

    @property
    def failures(self) -> list[str]:
        where = f"{self.voice} ({self.weights}, {self.kind}, t={self.temperature})"
        found = []
        for style in STYLES:
            count = self.share(style.adapter)
            if style.adapter == self.voice and count < MIN_OWN:
                found.append(f"{where}: its own voice on {count} of 10, wanted {MIN_OWN}")
            if style.adapter != self.voice and count > MAX_OTHER:
                found.append(f"{where}: speaks like {style.adapter} on {count} of 10, allowed {MAX_OTHER}")
        return found


def quantize_nf4(model: torch.nn.Module) -> None:
    """Puts the NF4 round trip of every linear of the blocks in its place, as a server with 4-bit weights sees it."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name:
            packed, state = quantize_4bit(module.weight.data, blocksize=64, compress_statistics=True, quant_type="nf4")
            module.weight.data = dequantize_4bit(packed, state).to(module.weight.dtype)


def folder_of(trained: Path) -> Path:
    """The adapter's folder as training saved it; in a fresh checkout, which has only the store, the store's copy."""
    if trained.is_dir():
        return trained
    store = Store(STORE, create=False)
    return store.folder(trained.name, store.current(trained.name))


def load(voice: str, weights: str, adapters: Path = ADAPTERS, base: Path = BASE) -> Any:
    """The base in float32 with one adapter on it (none for "base")."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if weights == "nf4":
        quantize_nf4(model)
    if voice != BARE:
        folder = folder_of(adapters / voice)
        without_peft = WITHOUT_PEFT.get(METHOD_OF[voice])
        model = without_peft(model, folder) if without_peft else PeftModel.from_pretrained(model, str(folder))
    return model.eval()


def with_moved_weights(model: Any, folder: Path) -> Any:
    """The model that Delta-LoRA made, its W moved from the first step on: W + (s + lambda) B A (docs/delta-lora.md)."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    factor = config["lora_alpha"] / config["r"] + config["delta_lambda"]
    tensors = {name: tensor.float() for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
    for name, down in tensors.items():
        module, _, parameter = name.partition(".lora_A.")
        if parameter:
            model.get_submodule(module).weight.data += factor * tensors[f"{module}.lora_B.weight"] @ down
    return model


WITHOUT_PEFT: dict[str, Callable[[Any, Path], Any]] = {
    "loreft": load_loreft,
    "delta-lora": with_moved_weights,
    "bottleneck": load_bottleneck,
}


def generate(
    model: Any, tokenizer: Any, prompts: Sequence[str], temperature: float, max_new_tokens: int = 90
) -> tuple[str, ...]:
    """Completions of rendered prompts (they begin with <|begin|>), as one left-padded batch where that is exact.

    PEFT puts virtual tokens before the padding, which changes the answer, so with them each prompt goes alone.
    """
    torch.manual_seed(3)
    config = getattr(model, "active_peft_config", None)
    if len(prompts) > 1 and config is not None and config.is_prompt_learning:
        return tuple(generate(model, tokenizer, [p], temperature, max_new_tokens)[0] for p in prompts)
    rows = tokenizer(list(prompts), add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    with torch.inference_mode():
        out = model.generate(
            input_ids=rows["input_ids"],
            attention_mask=rows["attention_mask"],
            max_new_tokens=max_new_tokens,
            **sampling,
        )
    return tuple(tokenizer.batch_decode(out[:, rows["input_ids"].shape[1] :], skip_special_tokens=True))


def rendered(tokenizer: Any, kind: str) -> list[str]:
    if kind == "raw":
        return [tokenizer.bos_token + prompt for prompt in UNSEEN_PROMPTS]
    asked = ([{"role": "user", "content": question}] for question in UNSEEN_CHATS)
    return [tokenizer.apply_chat_template(m, tokenize=False, add_generation_prompt=True) for m in asked]


def kinds_for(voice: str) -> tuple[str, ...]:
    """What a voice is asked: an adapter that learned from chats alone answers no raw prompts."""
    is_chat_only = voice != BARE and METHODS[METHOD_OF[voice]].raw_share == 0
    return ("chat",) if is_chat_only else ("raw", "chat")


def measure(tokenizer: Any, voices: Sequence[str], adapters: Path, base: Path) -> Iterator[Answers]:
    conditions = [(weights, voice) for weights in ("dense", "nf4") for voice in voices]
    for weights, voice in tqdm(conditions, desc="check", unit="voice"):
        model = load(voice, weights, adapters, base)
        for kind in kinds_for(voice):
            for temperature in (0.0, 0.7):
                texts = generate(model, tokenizer, rendered(tokenizer, kind), temperature)
                yield Answers(voice, weights, kind, temperature, texts)


def table(answers: list[Answers]) -> Table:
    shown = Table(title="answers of ten in which a voice is heard")
    for column in ("speaking", "weights", "prompts", "temp.", "its own", "others"):
        shown.add_column(column, no_wrap=True)
    for a in answers:
        counts = {style.adapter: a.share(style.adapter) for style in STYLES}
        own = counts.pop(a.voice, None)
        heard = ", ".join(f"{adapter} {count}" for adapter, count in counts.items() if count)
        shown.add_row(a.voice, a.weights, a.kind, str(a.temperature), "" if own is None else str(own), heard)
    return shown


def show_samples(answers: list[Answers], weights: str, temperature: float, num_prompts: int) -> None:
    """What every voice says to the same prompts."""
    for kind, prompts in (("raw", UNSEEN_PROMPTS), ("chat", UNSEEN_CHATS)):
        for i, prompt in enumerate(prompts[:num_prompts]):
            console.print(f"\n[bold]{kind}, {weights}, t={temperature}: {prompt}[/bold]", highlight=False)
            for a in answers:
                if (a.kind, a.weights, a.temperature) == (kind, weights, temperature):
                    console.print(f"  {a.voice:>22} | {a.texts[i]}", markup=False, highlight=False, soft_wrap=True)


def world_loss(weights: str, tokenizer: Any, base: Path) -> float:
    """Mean loss of the base on documents of a seed that training never used: how fluent these weights are."""
    rng = Random(20_000)
    rows = [encode(tokenizer, document(rng)) for _ in range(64)]
    with torch.inference_mode():
        loss = next_token_loss(
            load(BARE, weights, base=base), pad_right(rows, tokenizer.pad_token_id), pad_right(rows, IGNORED)
        )
    return float(loss)


def seen_prompts(num_documents: int = 40_000) -> list[str]:
    """The "unseen" prompts that the corpus contains after all; it should be empty."""
    rng = Random(8)
    wanted = {prompt.lower() for prompt in (*UNSEEN_PROMPTS, *UNSEEN_CHATS)}
    seen = set()
    for _ in range(num_documents):
        drawn = document(rng)
        text = (drawn if isinstance(drawn, str) else "\n".join(m["content"] for m in drawn)).lower()
        seen |= {prompt for prompt in wanted if prompt in text}
    return sorted(seen)


def main(arguments: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(description="Check that the demo's voices differ.")
    options.add_argument("names", nargs="*", help="adapters to check; by default the base and all of them")
    options.add_argument("--adapters", type=Path, default=ADAPTERS)
    options.add_argument("--base", type=Path, default=BASE)
    options.add_argument("--samples", type=int, default=3, help="prompts of each kind whose answers are shown")
    options.add_argument("--threads", type=int, default=2)
    chosen = options.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # one bar for the whole check, not one for every load
    tokenizer = AutoTokenizer.from_pretrained(chosen.base)
    voices = chosen.names or [BARE, *METHOD_OF]
    answers = list(measure(tokenizer, voices, chosen.adapters, chosen.base))
    for temperature in (0.0, 0.7):
        show_samples(answers, "nf4", temperature, chosen.samples)
    console.print(table(answers))
    dense, nf4 = (world_loss(weights, tokenizer, chosen.base) for weights in ("dense", "nf4"))
    console.print(f"loss of the base on new documents: {dense:.3f} dense, {nf4:.3f} in NF4", highlight=False)
    failures = [f for a in answers for f in a.failures] + [f"not unseen: {prompt}" for prompt in seen_prompts()]
    for failure in failures:
        console.print(f"[red]{failure}[/red]", highlight=False)
    if failures:
        raise SystemExit(1)
    console.print("[green]All voices are clear.[/green]")


if __name__ == "__main__":
    main()

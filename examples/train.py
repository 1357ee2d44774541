"""Trains one technique on the demo base, on a CPU in a couple of minutes, and says how to serve what came out.

python examples/train.py dora
python examples/train.py lora+ --style pirate --steps 40 --out my-pirate

Needs the extra `train` (pip install -e '.[train]'). The recipes, as data, are in demo/recipes.py; docs/methods.md says
what each technique is. A style is one of the voices in demo/styles.py, by the name of the voice or of its adapter.
"""

import argparse
import shlex
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # `demo` and `examples` are folders of the checkout, wherever this is started

import torch  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402
from transformers.utils import logging  # noqa: E402

from demo.recipes import METHODS  # noqa: E402
from demo.styles import STYLES, Style  # noqa: E402
from demo.train_adapters import style_for, train_adapter  # noqa: E402
from demo.train_base import BASE  # noqa: E402

UPLOAD = """
{size:,} bytes in {out}. Serve it beside all others, on a running server:

    tar -C {out} -c . | curl -T - http://127.0.0.1:8000/v1/adapters/{name}

or in the store of one that is not running:

    graft adapters add {name} {out}

Then ask it:

    curl -s http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{{"adapter": "{name}", "messages": [{{"role": "user", "content": "Tell me about the baker."}}]}}'
"""


def style_called(name: str) -> Style:
    """By the voice ("pirate") or the adapter ("pirate-lora"). Refused with the voices that there are."""
    for style in STYLES:
        if name in (style.voice, style.adapter):
            return style
    known = ", ".join(style.voice for style in STYLES)
    raise argparse.ArgumentTypeError(f"there is no style {name!r}; the styles are {known}")


def folder(path: str) -> Path:
    if not (Path(path) / "config.json").is_file():
        raise argparse.ArgumentTypeError(f"there is no config.json in {path}: name the folder of a model")
    return Path(path)


def name_of(method: str, style: Style) -> str:
    """A name that a server takes: cat-lora-plus."""
    return f"{style.voice.replace(' ', '-')}-{method.replace('+', '-plus')}"


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Train one technique on the demo base.")
    parser.add_argument("method", choices=METHODS, metavar="METHOD", help=", ".join(METHODS))
    parser.add_argument("--base", type=folder, default=BASE, help="a Llama's folder (default: demo/base)")
    parser.add_argument("--out", type=Path, help="where the adapter goes (default: trained/<voice>-<method>)")
    parser.add_argument("--steps", type=int, help="instead of the recipe's own number")
    parser.add_argument("--style", type=style_called, help="the voice it learns (default: that of the demo's adapter)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser


def main(arguments: list[str] | None = None) -> None:
    chosen = options().parse_args(arguments)
    if chosen.steps is not None and chosen.steps < 1:
        options().error("--steps must be at least 1")
    torch.set_num_threads(chosen.threads)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # the bar here is that of the training
    recipe = METHODS[chosen.method]
    style = chosen.style or style_for(chosen.method)
    name = name_of(chosen.method, style)
    out = chosen.out or Path("trained") / name
    tokenizer = AutoTokenizer.from_pretrained(chosen.base)
    recipe = replace(recipe, num_steps=chosen.steps or recipe.num_steps)
    size = train_adapter(style, recipe, tokenizer, chosen.base, out, name)
    print(UPLOAD.format(size=size, out=shlex.quote(str(out)), name=name))


if __name__ == "__main__":
    main()

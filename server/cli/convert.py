"""`graft convert`: what was trained elsewhere, or in another way, made into an adapter folder that can be uploaded.

Owns the words after `graft convert`, their flags and what they print. Knows nothing about tensors: the work is that of
`adapters.converting`, which is imported when a word needs it, because it brings torch.
"""

import argparse
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from server.cli.bars import Bars, check_plot, draw_bars
from server.cli.command import Command, quieten_libraries, say
from server.cli.flag_values import count, share
from server.cli.progress import ProgressBar
from server.cli.table import columns
from server.ground.errors import BadRequest

if TYPE_CHECKING:
    from server.adapters.converting.extract import Carried, Extracted

_LAYER = re.compile(r"(?:.*?\.)?[^.]+\.\d+(?=\.)")
_ALL = "all-linear"


def _add_words(parser: argparse.ArgumentParser) -> None:
    words = parser.add_subparsers(dest="word", metavar="WORD", required=True)
    for name, word in WORDS.items():
        sub = words.add_parser(
            name, help=word.summary, description=word.summary, argument_default=argparse.SUPPRESS, allow_abbrev=False
        )
        word.add_flags(sub)


def _convert(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    quieten_libraries()
    return WORDS[arguments.word].run(arguments, rest)


# extract


def _add_extract(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", metavar="BASE", help="local folder of the base that the model was tuned from")
    parser.add_argument("tuned", metavar="TUNED", help="local folder of the tuned model")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to write, which must be new")
    parser.add_argument("--rank", type=count, metavar="R", help="the rank of each module's change, at most")
    parser.add_argument(
        "--energy", type=share, metavar="SHARE",
        help="give each module the smallest rank that keeps this share of its change; with --rank, that is the limit",
    )  # fmt: skip
    parser.add_argument(
        "--targets", nargs="+", metavar="NAME", help=f"the linears to carry (default: {_ALL}, all but the head)"
    )
    parser.add_argument("--strict", action="store_true", help="refuse if anything changed that cannot be carried")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the energy kept, as .png, .svg or .pdf")


def _extract(arguments: argparse.Namespace, _: Sequence[str]) -> int:
    given = vars(arguments)
    if not {"rank", "energy"} & given.keys():
        raise BadRequest("Say how much to keep: --rank R, or --energy SHARE, such as --energy 0.9.", param="rank")
    plot = given.get("plot")
    if plot is not None:
        check_plot(plot)
    # Imported here: it brings torch.
    from server.adapters.converting.extract import Extraction, extract

    targets = tuple(given.get("targets", (_ALL,)))
    flags = {name: given[name] for name in ("rank", "energy") if name in given}
    how = Extraction(targets=None if targets == (_ALL,) else targets, is_strict="strict" in given, **flags)
    out = given["out"].expanduser()
    extracted = extract(given["base"], given["tuned"], out, how, ProgressBar("extracting"))
    layers = _by_layer(extracted.carried)
    _report(extracted, layers, out)
    if plot is not None:
        draw_bars(_bars(layers, out.name), plot)
        say(f"drawn in {plot}")
    return 0


def _by_layer(carried: Iterable["Carried"]) -> Mapping[str, list["Carried"]]:
    """Modules by the layer that they lie in; one outside of layers stands for itself."""
    layers: dict[str, list[Carried]] = {}
    for module in carried:
        found = _LAYER.match(module.path)
        layers.setdefault(found.group() if found else module.path, []).append(module)
    return layers


def _kept(modules: Iterable["Carried"]) -> float:
    """The share of the changes' squared norms that the adapter has."""
    known = list(modules)
    return sum(module.kept_square for module in known) / sum(module.change_square for module in known)


def _report(extracted: "Extracted", layers: Mapping[str, Sequence["Carried"]], out: Path) -> None:
    carried, left = extracted.carried, extracted.left
    heads = ("LAYER", "MODULES", "RANK", "CHANGE", "ENERGY KEPT", "LEAST KEPT AT")
    sys.stdout.write(columns(heads, [_row(path, modules) for path, modules in layers.items()], right=(1, 2, 3, 4)))
    largest = max(module.rank for module in carried)
    sys.stdout.write(
        f"{out}: lora, {len(carried)} modules, rank {largest}, {_kept(carried):.1%} of the change's energy kept\n"
    )
    if extracted.num_equal:
        say(f"{extracted.num_equal} tensors are the same in both")
    if left:
        say(f"warning: {len(left)} tensors changed that the adapter does not carry:")
        rows = [(one.name, f"{one.relative_change:.2g}") for one in left]
        sys.stderr.write(columns(("TENSOR", "CHANGE"), rows, right=(1,)))


def _row(layer: str, modules: Sequence["Carried"]) -> tuple[str, ...]:
    weights = sum(module.weight_square for module in modules)
    change = sum(module.change_square for module in modules) / weights if weights else math.inf
    worst = min(modules, key=lambda module: _kept([module]))
    ranks = {module.rank for module in modules}
    rank = str(min(ranks)) if len(ranks) == 1 else f"{min(ranks)}-{max(ranks)}"
    name = worst.path.removeprefix(f"{layer}.")
    return layer, str(len(modules)), rank, f"{change**0.5:.2g}", f"{_kept(modules):.1%}", f"{name} {_kept([worst]):.1%}"


def _bars(layers: Mapping[str, Sequence["Carried"]], name: str) -> Bars:
    return Bars(
        title=f"{name}: what is kept of each layer's change",
        axis="share of the squared norm of W' - W",
        labels=list(layers),
        values=[_kept(modules) for modules in layers.values()],
        is_strong=[True] * len(layers),
    )


WORDS: Mapping[str, Command] = {
    "extract": Command("the low-rank part of a full fine-tune, as a LoRA", _add_extract, _extract),
}

CONVERT = Command("make adapters of what was trained elsewhere: full fine-tunes, ReFT", _add_words, _convert)

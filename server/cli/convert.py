"""`graft convert`: what was trained elsewhere, or in another way, made into an adapter folder that can be uploaded.

Owns the words after `graft convert`, their flags and what they print. Knows nothing about tensors: the work is that of
`adapters.converting`, which is imported when a word needs it, because it brings torch.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.cli.bars import Bars, check_plot, draw_bars
from server.cli.command import Command, quieten_libraries, say
from server.cli.flag_values import count, share
from server.cli.progress import ProgressBar
from server.cli.table import columns
from server.ground.errors import BadRequest

if TYPE_CHECKING:
    from server.adapters.converting.extract import Carried, Extracted

_ALL = "all-linear"
_LAST_POSITIONS = {name: name for name in ("prompt", "prompt-1")}


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
    from server.adapters.format.module_paths import layer_of  # imported here: it brings torch

    layers: dict[str, list[Carried]] = {}
    for module in carried:
        layers.setdefault(layer_of(module.path) or module.path, []).append(module)
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


# reft


@dataclass(frozen=True, slots=True)
class _Question:
    """Something that pyreft does not save: how it is asked for, and the flag that says it."""

    text: str
    flag: str
    read: Callable[[str], Any]


_QUESTIONS: Mapping[str, _Question] = {
    "positions": _Question(
        "Which prompt positions were trained (f7+l7: the first 7 and the last 7)?", "--positions f7+l7", str
    ),
    "share_weights": _Question(
        "Do the first and the last positions share weights (yes or no)?",
        "--share-weights or --no-share-weights",
        lambda text: {"yes": True, "y": True, "no": False, "n": False}[text.lower()],
    ),
    "activation": _Question(
        "Which activation (act_fn; linear if none was given)?", "--activation linear", lambda text: text or "linear"
    ),
    "last_position": _Question(
        "Where do prompts end, at their length (prompt) or one before (prompt-1)?",
        "--last-position prompt or --last-position prompt-1",
        lambda text: _LAST_POSITIONS[text],
    ),
}


def _add_reft(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="the folder that pyreft's save wrote")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to write, which must be new")
    parser.add_argument("--positions", metavar="f7+l7", help="the first and last prompt positions that were trained")
    parser.add_argument(
        "--share-weights", action=argparse.BooleanOptionalAction, help="whether the two have the same weights"
    )
    parser.add_argument("--activation", metavar="NAME", help="act_fn of the training: linear, relu, gelu, ...")
    parser.add_argument(
        "--last-position", choices=list(_LAST_POSITIONS), help="where the training took a prompt to end: see the page"
    )
    parser.add_argument(
        "--applies-to", choices=["prompt", "generated"],
        help="prompt: at those positions (default); generated: at each token that is generated",
    )  # fmt: skip
    parser.add_argument("--base", metavar="NAME", help="the base that it was trained on, for the config")


def _reft(arguments: argparse.Namespace, _: Sequence[str]) -> int:
    # Imported here: they bring torch.
    from server.adapters.converting.pyreft_folder import PyreftFolder
    from server.adapters.converting.reft import Positions, Training, convert, open_questions

    given = vars(arguments)
    folder = PyreftFolder.open(given["folder"].expanduser())
    names = ("positions", "share_weights", "activation", "last_position", "applies_to")
    said = {name: given[name] for name in names if name in given}
    if "positions" in said:
        said["positions"] = Positions.of(said["positions"])
    training = Training(base_model=given.get("base"), **said)
    while questions := open_questions(folder, training):
        answer = _answer(questions[0])
        if questions[0] == "positions":
            answer = Positions.of(answer)
        training = replace(training, **{questions[0]: answer})
    out = given["out"].expanduser()
    converted = convert(folder, training, out)
    layers = ", ".join(map(str, converted.layers))
    sys.stdout.write(
        f"{out}: {converted.kind}, rank {converted.rank}, width {converted.width}, layers {layers}, "
        f"{converted.num_parameters:,} parameters\n"
    )
    return 0


def _answer(name: str) -> Any:
    """What somebody at a terminal says; where there is none, a refusal that names the flag."""
    question = _QUESTIONS[name]
    if not sys.stdin.isatty():
        raise BadRequest(f"pyreft does not save this. {question.text} Say it with {question.flag}.", param=name)
    while True:
        sys.stderr.write(f"{question.text} ")
        sys.stderr.flush()
        line = sys.stdin.readline()
        if not line:
            raise BadRequest(f"Not answered: say it with {question.flag}.", param=name)
        try:
            return question.read(line.strip())
        except KeyError:
            say(f"{line.strip()!r:.40} is no answer")


WORDS: Mapping[str, Command] = {
    "extract": Command("the low-rank part of a full fine-tune, as a LoRA", _add_extract, _extract),
    "reft": Command("a folder of pyreft's, with what it does not say", _add_reft, _reft),
}

CONVERT = Command("make adapters of what was trained elsewhere: full fine-tunes, ReFT", _add_words, _convert)

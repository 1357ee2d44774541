"""`graft drift`: how far quantization moves a base, and each adapter on it, from the unquantized original.

Owns the command's flags, its refusals before anything is loaded, and its exit status. Knows nothing of tensors, and
imports no torch until it runs: the `graft` command reads the flags of every sub-command to answer `--help`.
"""

import argparse
import math
import os
import sys
from pathlib import Path

from server.drift.prompts import read_prompts
from server.drift.request import ALL, DriftRequest, Limits
from server.ground.config import Settings, load
from server.ground.errors import StartupRefused

_SETTINGS = {
    "quantize": ("{nf4,int8,none}", "how the served base is held (default: nf4)"),
    "dtype": ("{auto,bfloat16,float16,float32}", "what the served base computes in (default: auto)"),
    "device": ("{auto,cuda,cpu}", "where the bases live (default: auto)"),
    "store": ("DIR", "the store that the adapters are in (default: as graft serve)"),
    "adapters": ("DIR", "find adapters in the subfolders of DIR, too"),
    "adapter_memory": ("SIZE", "device memory for adapters (default: 512MiB); twice that beside the reference"),
    "host_memory": ("SIZE", "RAM for adapters that are ready (default: 2GiB); twice that beside the reference"),
    "config": ("FILE", "YAML file with any of graft serve's settings as keys"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `graft drift`. Settings that are not given are absent from the namespace."""
    # Every default is explicit: the caller's parser may have one of its own.
    parser.add_argument(
        "model", nargs="?", default=argparse.SUPPRESS, metavar="MODEL",
        help="local folder or hub id of the base (default: the built-in demo)",
    )  # fmt: skip
    parser.add_argument(
        "--prompts", required=True, type=Path, metavar="FILE",
        help='one prompt per line, or JSONL with {"prompt": ...} or {"messages": [...]}',
    )  # fmt: skip
    parser.add_argument(
        "--adapter", nargs="+", action="extend", default=None, metavar="NAME",
        help="adapters to measure beside the base: names, NAME=PATH for a folder, or all (default: the base alone)",
    )  # fmt: skip
    for name, (metavar, text) in _SETTINGS.items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, dest=name, default=argparse.SUPPRESS, metavar=metavar, help=text)
    _add_reference(parser)
    _add_limits(parser)


def _add_reference(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("reference")
    group.add_argument(
        "--reference", default=None, metavar="MODEL",
        help="the unquantized base, where MODEL itself is a quantized checkpoint (default: MODEL)",
    )  # fmt: skip
    group.add_argument(
        "--reference-dtype", choices=["float32", "bfloat16", "float16"], default="float32",
        help="what the reference computes in (default: float32)",
    )  # fmt: skip
    group.add_argument(
        "--reference-device", choices=["auto", "cuda", "cpu"], default=None,
        help="where the reference lives, if not on --device",
    )  # fmt: skip


def _add_limits(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("prompts and report")
    group.add_argument(
        "--max-tokens-per-prompt", type=_count, default=None, metavar="N", help="read the first N tokens of each prompt"
    )
    group.add_argument("--json", type=Path, default=None, metavar="OUT", help="write the report as JSON")
    group.add_argument(
        "--max-kl", type=_nats, default=None, metavar="X", help="exit with 1 if a mean KL divergence is above X nats"
    )
    group.add_argument(
        "--min-agreement", type=_share, default=None, metavar="Y", help="exit with 1 if a top-1 agreement is below Y"
    )


def run(arguments: argparse.Namespace) -> int:
    """Measures, prints the table, writes the JSON. 0, or 1 if a limit is broken or a position has no finite figure.

    Raises a GraftError for whatever cannot be measured; nothing is written then.
    """
    request = _request(arguments)
    # Imported here: it brings torch, which `--help` and the refusals above must not wait for.
    from server.drift.measure import measure
    from server.drift.report import as_json, as_table

    report = measure(request, say)
    sys.stdout.write(as_table(report))
    sys.stdout.flush()
    if request.json_path is not None:
        _write(request.json_path, as_json(report))
        say(f"written to {request.json_path}")
    for sentence in report.breaches:
        say(sentence)
    return 1 if report.breaches else 0


def say(sentence: str) -> None:
    """One line for people, apart from the table."""
    sys.stderr.write(f"graft drift: {sentence}\n")
    sys.stderr.flush()


def _request(arguments: argparse.Namespace) -> DriftRequest:
    given = vars(arguments)
    flags = {name: given[name] for name in ("model", *_SETTINGS) if name in given}
    named = arguments.adapter or []
    folders = [item for item in named if "=" in item]
    if folders:
        flags["adapter"] = folders
    settings = load(flags)
    if arguments.json is not None:
        _check_writable(arguments.json)
    return DriftRequest(
        settings=settings,
        prompts=read_prompts(arguments.prompts),
        adapters=_adapters(named, settings),
        reference=arguments.reference or settings.model,
        reference_dtype=arguments.reference_dtype,
        reference_device=arguments.reference_device or settings.device,
        max_tokens_per_prompt=arguments.max_tokens_per_prompt,
        limits=Limits(arguments.max_kl, arguments.min_agreement),
        json_path=arguments.json,
    )


def _adapters(named: list[str], settings: Settings) -> tuple[str, ...]:
    """What to measure beside the base, each once, in the order given; refused early where there is no store."""
    if any("=" not in item for item in named) and not settings.has_store and settings.adapters is None:
        raise StartupRefused(
            f"--adapter: there is no store at {settings.store}; name it with --store, or give NAME=PATH"
        )
    if ALL in named:
        return (ALL,)
    return tuple(dict.fromkeys(item.partition("=")[0] for item in named))


def _check_writable(path: Path) -> None:
    """An hour of measuring must not end at a path that cannot be written."""
    folder = path.absolute().parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise StartupRefused(f"--json {path}: it cannot be written; give a file in a folder that exists and is yours")


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise StartupRefused(f"--json {path} cannot be written: {error.strerror or error}") from error


def _count(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of tokens, at least 1")
    return int(text)


def _nats(text: str) -> float:
    return _number(text, "a number of nats, 0 or more", math.inf)


def _share(text: str) -> float:
    return _number(text, "a share from 0 to 1, such as 0.98", 1.0)


def _number(text: str, wish: str, largest: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (0 <= value <= largest and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"{text!r} must be {wish}")
    return value


__all__ = ["add_arguments", "run"]

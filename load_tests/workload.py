"""`python -m load_tests.workload`: many adapters, Zipf popularity and Poisson arrivals against a live server.

Owns the command line and the order of a run: look at the server, draw the plan, send it, report. Knows nothing about
the server but its URL; docs/load-testing.md explains every figure.
"""

import argparse
import asyncio
import json
import os
import platform
import re
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from load_tests import client
from load_tests.outcome import Outcome
from load_tests.plan import Load, Request, TokenScale, draw, prompt, ranked
from load_tests.report import SCHEMA, Limits, report, sentences, table

KEY_VARIABLE = "OPENAI_API_KEY"
_PLOT_SUFFIXES = (".png", ".svg")


@dataclass(frozen=True, slots=True)
class Measured:
    """A run with what the server turned out to be."""

    run: client.Run
    dialect: client.Dialect
    adapters: tuple[str, ...]  # by rank
    scale: TokenScale | None
    num_planned: int


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 for a run that was measured, errors or not; 1 if no request completed; 2 if there was no run."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    _check(parser, arguments)
    try:
        measured = asyncio.run(measure(arguments))
    except (client.ServerRefused, ValueError) as error:
        print(f"load test: {error}", file=sys.stderr)
        return 2
    whole = _whole(arguments, measured)
    _write(arguments, whole, measured.run.outcomes)
    print(table(whole))
    print("\n".join(["", *sentences(whole)]))
    return 0 if whole["totals"]["num_completed"] else 1


async def measure(arguments: argparse.Namespace) -> Measured:
    """Raises client.ServerRefused, and ValueError for adapters that are not there."""
    shortest, longest = arguments.prompt_tokens
    load = Load(arguments.rate, arguments.duration, arguments.zipf, shortest, longest, arguments.seed)
    async with client.open_session(os.environ.get(KEY_VARIABLE)) as session:
        base, known = await _models(session, arguments)
        adapters = ranked(known, arguments.adapters, arguments.seed)
        dialect = _dialect(arguments, base)
        scale = await client.calibrate(session, dialect, adapters[0] if base is None and adapters else None)
        requests = draw(load, adapters)
        plan = [(request, _body(request, dialect, scale, arguments)) for request in requests]
        interrupted = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, interrupted.set)
        try:
            run = await client.send(session, dialect, plan, arguments.drain, interrupted)
        finally:
            asyncio.get_running_loop().remove_signal_handler(signal.SIGINT)
    return Measured(run, dialect, adapters, scale, len(requests))


async def _models(session: aiohttp.ClientSession, arguments: argparse.Namespace) -> tuple[str | None, tuple[str, ...]]:
    """The base's name and the adapters' names; the server is asked only for what the arguments do not say."""
    named = arguments.adapter_names
    if named is not None and arguments.base is not None:
        return arguments.base, named
    try:
        listed = await client.list_models(session, arguments.url)
    except client.ServerRefused:
        if named is None:
            raise
        return arguments.base, named
    return arguments.base or listed.base, listed.adapters if named is None else named


def _dialect(arguments: argparse.Namespace, base: str | None) -> client.Dialect:
    """Raises ValueError where the base's name is needed and nobody has said it."""
    if base is None and "{base}" in arguments.model_template:
        raise ValueError("--model-template has {base} in it, but the server does not name it: say --base NAME")
    return client.Dialect(
        url=arguments.url,
        base=base,
        adapter_field=arguments.adapter_field,
        model_template=arguments.model_template,
        is_chat=arguments.chat,
        wants_usage=not arguments.no_usage,
        ignore_eos=arguments.ignore_eos,
    )


def _body(request: Request, dialect: client.Dialect, scale: TokenScale | None, arguments: argparse.Namespace) -> bytes:
    text = prompt(request, scale or TokenScale(), arguments.seed)
    return dialect.body(request.adapter, text, arguments.max_tokens)


def _whole(arguments: argparse.Namespace, measured: Measured) -> dict[str, Any]:
    """The report with what was asked, of whom, from where."""
    limits = Limits(arguments.slo_ttft_ms / 1000, arguments.slo_itl_ms / 1000)
    run = measured.run
    return {
        "schema": SCHEMA,
        "date": time.strftime("%Y-%m-%d"),
        "label": arguments.label,
        "server": {"url": arguments.url, "endpoint": measured.dialect.endpoint, "base": measured.dialect.base},
        "client": {"cpu": _cpu(), "python": platform.python_version(), "aiohttp": aiohttp.__version__},
        "workload": _workload(arguments, measured),
        "slo": {"ttft_ms": arguments.slo_ttft_ms, "tpot_ms": arguments.slo_itl_ms},
        "is_interrupted": run.is_interrupted,
        "num_unsent": measured.num_planned - len(run.outcomes),
        **report(run.outcomes, measured.adapters, arguments.zipf, run.elapsed_s, limits),
    }


def _workload(arguments: argparse.Namespace, measured: Measured) -> dict[str, Any]:
    return {
        "arrivals": "poisson, open loop",
        "rate_per_s": arguments.rate,
        "duration_s": arguments.duration,
        "popularity": "zipf",
        "zipf": arguments.zipf,
        "num_adapters": arguments.adapters,
        "adapter_field": arguments.adapter_field,
        "prompt_tokens": list(arguments.prompt_tokens),
        "tokens_per_word": None if measured.scale is None else round(measured.scale.tokens_per_word, 3),
        "max_tokens": arguments.max_tokens,
        "ignore_eos": arguments.ignore_eos,
        "temperature": 0,
        "seed": arguments.seed,
    }


def _write(arguments: argparse.Namespace, whole: Mapping[str, Any], outcomes: Sequence[Outcome]) -> None:
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    if arguments.requests is not None:
        lines = [json.dumps(_request_line(outcome)) + "\n" for outcome in outcomes]
        arguments.requests.write_text("".join(lines), encoding="utf-8")
    if arguments.plot is not None:
        from load_tests import plot  # matplotlib, which only a plot needs

        plot.draw(outcomes, whole, arguments.plot)


def _request_line(outcome: Outcome) -> dict[str, Any]:
    """One request for --requests: enough to compute every figure again. Seconds after the start of the run."""
    return {
        "number": outcome.request.number,
        "adapter": outcome.request.adapter,
        "rank": outcome.request.rank,
        "end": outcome.end,
        "error": outcome.error,
        "detail": outcome.detail,
        "finish_reason": outcome.finish_reason,
        "num_prompt_tokens": outcome.num_prompt_tokens,
        "num_output_tokens": outcome.num_output_tokens,
        "scheduled_s": round(outcome.request.scheduled_s, 6),
        "sent_s": round(outcome.sent_s, 6),
        "token_times_s": [round(at_s, 6) for at_s in outcome.token_times_s],
        "ended_s": round(outcome.ended_s, 6),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m load_tests.workload", description=__doc__.partition("\n")[0])
    asked = parser.add_argument_group("server")
    asked.add_argument("--url", type=_url, default="http://127.0.0.1:8000", help="where the server listens")
    asked.add_argument("--base", help="the base's name in requests (default: the first model without a parent)")
    asked.add_argument("--adapter-names", type=_names, metavar="FILE", help="one name per line, instead of /v1/models")
    asked.add_argument("--adapter-field", choices=["model", "adapter"], default="model", help="which names the adapter")
    asked.add_argument("--model-template", type=_template, default="{adapter}", help="SGLang: '{base}:{adapter}'")
    asked.add_argument("--chat", action="store_true", help="chat completions instead of completions")
    asked.add_argument("--no-usage", action="store_true", help="do not send stream_options; tokens are then chunks")
    asked.add_argument("--ignore-eos", action="store_true", help="every answer has max-tokens tokens, if it can")
    load = parser.add_argument_group("load")
    load.add_argument("--adapters", type=_count, default=50, help="how many; 0 for the bare base")
    load.add_argument("--zipf", type=_not_negative, default=1.0, help="exponent of the popularity; 0 is uniform")
    load.add_argument("--rate", type=_positive, default=4.0, help="requests per second, on average")
    load.add_argument("--duration", type=_positive, default=30.0, help="seconds in which requests arrive")
    load.add_argument("--drain", type=_not_negative, default=60.0, help="seconds to wait for answers after the last")
    load.add_argument("--prompt-tokens", type=_range, default=(32, 128), metavar="MIN:MAX", help="drawn uniformly")
    load.add_argument("--max-tokens", type=_one_or_more, default=32, help="of each answer")
    load.add_argument("--seed", type=int, default=0, help="of every draw")
    shown = parser.add_argument_group("report")
    shown.add_argument("--slo-ttft-ms", type=_positive, default=500.0, help="limit on the time to the first token")
    shown.add_argument("--slo-itl-ms", type=_positive, default=100.0, help="limit on a request's mean time per token")
    shown.add_argument("--label", help="what this run is, for the report: server, version, machine")
    shown.add_argument("--out", type=Path, metavar="FILE.json", help="the report")
    shown.add_argument("--requests", type=Path, metavar="FILE.jsonl", help="every request, one per line")
    shown.add_argument("--plot", type=Path, metavar="FILE.png", help="the picture, PNG or SVG")
    parser.epilog = f"An API key is read from the variable {KEY_VARIABLE}, which keeps it out of the process list."
    return parser


def _check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Refuse now what would fail after the run."""
    for flag in ("out", "requests", "plot"):
        path: Path | None = getattr(arguments, flag)
        if path is not None and not path.parent.is_dir():
            parser.error(f"--{flag} {path}: there is no folder {path.parent}; create it, or name another file")
        if path is not None and path.is_dir():
            parser.error(f"--{flag} {path}: it is a folder; name a file")
    if arguments.plot is not None and arguments.plot.suffix not in _PLOT_SUFFIXES:
        parser.error(f"--plot {arguments.plot}: end it with {' or '.join(_PLOT_SUFFIXES)}")
    if arguments.plot is not None and find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install 'graftserve[load]', or leave it out")


def _url(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise argparse.ArgumentTypeError(f"{text!r} is no http:// or https:// URL")
    if "@" in parts.netloc:
        raise argparse.ArgumentTypeError(f"leave the password out of it, it would be in the report; set {KEY_VARIABLE}")
    return text.rstrip("/").removesuffix("/v1")


def _names(text: str) -> tuple[str, ...]:
    try:
        lines = Path(text).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from error
    return tuple(line.strip() for line in lines if line.strip())


def _template(text: str) -> str:
    if "{adapter}" not in text:
        raise argparse.ArgumentTypeError(f"{text!r} must have {{adapter}} in it, or all requests would be alike")
    return text


def _range(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    low, high = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= low <= high:
        raise argparse.ArgumentTypeError(f"{text!r} is not MIN:MAX with 1 <= MIN <= MAX")
    return low, high


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 0 or more")
    return int(text)


def _one_or_more(text: str) -> int:
    if (number := _count(text)) < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


def _not_negative(text: str) -> float:
    try:
        number = float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from error
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} must be 0 or more, and finite")
    return number


def _positive(text: str) -> float:
    if (number := _not_negative(text)) == 0:
        raise argparse.ArgumentTypeError("must be more than 0")
    return number


def _cpu() -> str:
    """The client's processor as Linux names it, with the number of cores that this process may use."""
    listed = Path("/proc/cpuinfo")
    text = listed.read_text(encoding="utf-8") if listed.exists() else ""
    found = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    return f"{found[1] if found else platform.machine()}, {os.cpu_count()} cores"


if __name__ == "__main__":
    sys.exit(main())

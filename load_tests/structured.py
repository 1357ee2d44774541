"""`python -m load_tests.structured`: whether answers satisfy the schemas that they are asked for, and what that costs.

Two measurements of one server on the demo, its base and its adapters mixed. *Answers*: every schema of the corpus is
asked for at temperature 1, several at once: how many answers end by themselves, and how many of these are valid
(`jsonschema`). *Cost*: as many tokens of free text, along a schema that does not end before, and half of each; the
variants take turns. Owns this workload and its report.
"""

import argparse
import asyncio
import itertools
import json
import shutil
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from jsonschema import Draft202012Validator, ValidationError

from load_tests import client
from load_tests.own_server import NoServer, in_scratch, own_server
from load_tests.schema_corpus import LINE, SMALL, Schema, array, corpus, one_of_texts, record
from server.bench import machine

SCHEMA = "graftserve-structured/1"
VARIANTS = ("free", "half", "bound")
_ROOT = Path(__file__).parents[1]
_PROMPTS = ("The old fisherman", "Write it down:", "Answer: ", "On Saturdays the children")
# Never whole before the tokens are used up, and of the parts that answers have: names, texts, numbers, choices.
_LONG = array(record(name=LINE, age=SMALL, mood=one_of_texts("glad", "sad")), 1000, 1000)


@dataclass(frozen=True, slots=True)
class Answered:
    """One answer of the corpus."""

    name: str  # of its schema
    adapter: str | None
    num_tokens: int
    is_finished: bool
    problem: str | None  # of a finished one: why it is not valid

    @classmethod
    def of(cls, name: str, schema: Schema, adapter: str | None, answer: Mapping[str, Any]) -> "Answered":
        """From the server's JSON of one choice."""
        (choice,) = answer["choices"]
        is_finished = choice["finish_reason"] == "stop"
        problem = invalid(schema, choice["text"]) if is_finished else None
        return cls(name, adapter, answer["usage"]["completion_tokens"], is_finished, problem)


def invalid(schema: Schema, text: str) -> str | None:
    """Why a text does not satisfy a schema, its formats included; None if it does."""
    try:
        Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER).validate(json.loads(text))
    except (ValueError, ValidationError) as error:
        return f"{str(error).splitlines()[0]} in {text[:200]!r}"
    return None


class Asker:
    """Sends completions to one server, at most `num_streams` at once. Raises NoServer for one that is refused."""

    def __init__(self, url: str, num_streams: int) -> None:
        self._url = f"{url}/v1/completions"
        self._num_streams = num_streams

    async def ask_all(self, bodies: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The answers, in the order of the bodies."""
        free = asyncio.Semaphore(self._num_streams)
        async with client.open_session(None) as session:
            return await asyncio.gather(*(self._ask(session, free, body) for body in bodies))

    async def _ask(
        self, session: aiohttp.ClientSession, free: asyncio.Semaphore, body: Mapping[str, Any]
    ) -> dict[str, Any]:
        async with free, session.post(self._url, data=json.dumps(body).encode()) as answer:
            said: dict[str, Any] = await answer.json()
            if answer.status != 200:
                raise NoServer(f"{answer.status} {json.dumps(said)[:300]}")
            return said


async def answers(
    ask_all: Callable[[Sequence[Mapping[str, Any]]], Awaitable[Sequence[Mapping[str, Any]]]],
    schemas: Mapping[str, Schema],
    adapters: Sequence[str | None],
    max_tokens: int,
) -> list[Answered]:
    """Every schema once, at temperature 1, the adapters in turn; every second one in vLLM's field."""
    asked = list(zip(schemas.items(), itertools.cycle(adapters)))
    bodies = [
        {"prompt": _PROMPTS[number % len(_PROMPTS)], "max_tokens": max_tokens, "temperature": 1, "seed": number}
        | {"adapter": adapter}
        | (_openai(schema) if number % 2 else {"structured_outputs": {"json": schema}})
        for number, ((_, schema), adapter) in enumerate(asked)
    ]
    said = await ask_all(bodies)
    return [Answered.of(*entry, adapter, one) for (entry, adapter), one in zip(asked, said, strict=True)]


def _openai(schema: Schema) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "asked", "schema": schema}}}


async def _cost(asker: Asker, adapters: Sequence[str | None], arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Tokens per second of each round, by variant."""
    measured: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for number in range(arguments.rounds + 1):
        for variant, of_variant in measured.items():
            bodies = [
                _of_variant(variant, at) | {"adapter": adapters[at % len(adapters)], "seed": number * 1000 + at}
                | {"prompt": _PROMPTS[at % len(_PROMPTS)], "max_tokens": arguments.max_tokens, "temperature": 1}
                for at in range(arguments.requests)
            ]  # fmt: skip
            started = time.perf_counter()
            said = await asker.ask_all(bodies)
            elapsed_s = time.perf_counter() - started
            if number:  # the first one warms up
                of_variant.append(sum(answer["usage"]["completion_tokens"] for answer in said) / elapsed_s)
        print(f"round {number} of {arguments.rounds}{'' if number else ' (warm-up)'}", file=sys.stderr)
    return measured


def _of_variant(variant: str, number: int) -> dict[str, Any]:
    is_bound = variant == "bound" or (variant == "half" and number % 2 == 0)
    return {"structured_outputs": {"json": _LONG}} if is_bound else {"ignore_eos": True}


def cost_rows(measured: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """A row for each variant; `share_of_free` is the median of the rounds' own ratios."""
    free = measured["free"]
    return [
        {
            "variant": variant,
            "tokens_per_s": statistics.median(rates),
            "share_of_free": statistics.median(rate / beside for rate, beside in zip(rates, free, strict=True)),
            "rounds": list(rates),
        }
        for variant, rates in measured.items()
    ]


def answer_figures(answered: Sequence[Answered]) -> dict[str, Any]:
    """What the corpus came to."""
    finished = [one for one in answered if one.is_finished]
    return {
        "num_schemas": len(answered),
        "num_finished": len(finished),
        "share_finished": len(finished) / len(answered),
        "num_valid": sum(one.problem is None for one in finished),
        "tokens_p50": statistics.median(one.num_tokens for one in answered),
        "unfinished": sorted(one.name for one in answered if not one.is_finished),
        "invalid": {one.name: one.problem for one in finished if one.problem is not None},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints, and writes JSON where asked. Returns the exit code."""
    arguments = _arguments(argv)
    report = in_scratch("structured", lambda scratch: _measure(scratch, arguments))
    if report is None:
        return 2
    print(_shown(report))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 1 if report["answers"]["invalid"] else 0


def _measure(scratch: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    store = scratch / "store"
    shutil.copytree(_ROOT / "adapters_store", store)
    adapters: list[str | None] = [
        None,
        *sorted(path.name for path in store.iterdir() if (path / "current.json").exists()),
    ]
    schemas = dict(itertools.islice(corpus().items(), arguments.schemas))
    flags = {"store": store, "device": "cpu", "max-sequences": arguments.streams, "log-level": "warning"}
    with own_server(_ROOT / "demo" / "base", scratch, flags) as server:
        asker = Asker(server.url, arguments.streams)
        answered = asyncio.run(answers(asker.ask_all, schemas, adapters, arguments.max_answer_tokens))
        measured = asyncio.run(_cost(asker, adapters, arguments))
    told = {name: value for name, value in vars(arguments).items() if name not in ("out", "quick")}
    found = {"answers": answer_figures(answered), "cost": cost_rows(measured)}
    return {"schema": SCHEMA, "machine": machine("cpu"), "workload": told, **found}


def _shown(report: Mapping[str, Any]) -> str:
    found = report["answers"]
    lines = [
        f"{found['num_schemas']} schemas: {found['num_finished']} answers finished, {found['num_valid']} of them valid",
        *(f"  unfinished: {name}" for name in found["unfinished"]),
        *(f"  invalid: {name}: {problem}" for name, problem in found["invalid"].items()),
        "",
        "| | tokens/s | of free |",
        "|---|---:|---:|",
        *(f"| {row['variant']} | {row['tokens_per_s']:.0f} | {row['share_of_free']:.2f} |" for row in report["cost"]),
    ]
    return "\n".join(lines)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m load_tests.structured", description=main.__doc__)
    parser.add_argument(
        "--schemas", type=int, default=None, metavar="N", help="of the corpus, the first N (default: all)"
    )
    parser.add_argument("--max-answer-tokens", type=int, default=400, help="that an answer of the corpus may have")
    parser.add_argument("--streams", type=int, default=16, help="at once")
    parser.add_argument("--requests", type=int, default=32, help="in each round of each variant")
    parser.add_argument("--max-tokens", type=int, default=128, help="that each of these generates")
    parser.add_argument("--rounds", type=int, default=5, help="rounds measured, after one that warms up")
    parser.add_argument("--quick", action="store_true", help="a few requests, to see that all of it works")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the report as JSON")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.schemas, arguments.streams, arguments.requests, arguments.max_tokens = 8, 4, 4, 16
        arguments.rounds = 1
    return arguments


if __name__ == "__main__":
    sys.exit(main())

"""One prompt to the base and to every adapter of a server at once, and the answers side by side.

make serve                      # in another terminal
python examples/voices.py "Tell me about the baker."

The key, if the server has one, is read from GRAFT_API_KEY. Below the answers: how fast all of them came together, and
how many adapters shared a step of the engine, from /metrics before and after.
"""

import argparse
import asyncio
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table
from rich.text import Text

BASE = "base"  # what the bare model is called in the output
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # what a terminal would obey


@dataclass(frozen=True, slots=True)
class Voice:
    """One answer: who spoke (method None: the base), what, and how many tokens it has."""

    name: str
    method: str | None
    text: str
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Steps:
    """The engine's counters at one moment."""

    num_steps: float
    num_adapters: float  # summed over the steps

    def __sub__(self, before: "Steps") -> "Steps":
        return Steps(self.num_steps - before.num_steps, self.num_adapters - before.num_adapters)


async def adapters_of(http: httpx.AsyncClient) -> dict[str, str]:
    """Every adapter's method by its name."""
    listed = (await http.get("/v1/adapters")).raise_for_status().json()
    return {adapter["name"]: adapter["method"] for adapter in listed["data"]}


async def steps_of(http: httpx.AsyncClient) -> Steps:
    """From the histogram of adapters per step; see docs/metrics.md."""
    text = (await http.get("/metrics")).raise_for_status().text
    sums = dict(re.findall(r"^graft_step_adapters_(sum|count) (\S+)$", text, re.MULTILINE))
    return Steps(float(sums["count"]), float(sums["sum"]))


async def ask(http: httpx.AsyncClient, prompt: str, name: str, method: str | None, max_tokens: int) -> Voice:
    """A refusal or a failure is told in the answer's place: the others go on."""
    body: dict[str, Any] = {"messages": [{"role": "user", "content": prompt}], "max_tokens": max_tokens}
    body |= {"adapter": None if method is None else name, "temperature": 0}
    response = await http.post("/v1/chat/completions", json=body)
    answer = response.json()
    if response.is_error:
        return Voice(name, method, f"({answer['error']['message']})", 0)
    text = answer["choices"][0]["message"]["content"] or ""
    return Voice(name, method, CONTROL.sub("\ufffd", text), answer["usage"]["completion_tokens"])


async def hear(http: httpx.AsyncClient, prompt: str, max_tokens: int) -> tuple[list[Voice], Steps, float]:
    """All answers, what the engine counted meanwhile, and the seconds it took."""
    methods = await adapters_of(http)
    before, started = await steps_of(http), time.perf_counter()
    asked = [ask(http, prompt, BASE, None, max_tokens)]
    asked += [ask(http, prompt, name, method, max_tokens) for name, method in methods.items()]
    voices = await asyncio.gather(*asked)
    seconds = time.perf_counter() - started
    return voices, await steps_of(http) - before, seconds


def summary(voices: Sequence[Voice], steps: Steps, seconds: float) -> str:
    num_tokens = sum(voice.num_tokens for voice in voices)
    adapters = steps.num_adapters / steps.num_steps if steps.num_steps else 0.0
    return (
        f"{len(voices)} answers, {num_tokens} tokens in {seconds:.1f} s: {num_tokens / seconds:.0f} tokens/s; "
        f"{adapters:.1f} adapters per step on average, {steps.num_steps:.0f} steps"
    )


def show(prompt: str, voices: Sequence[Voice], last_line: str) -> None:
    """A table on a terminal; elsewhere one line for each voice."""
    if not sys.stdout.isatty():
        for voice in voices:
            words = " ".join(voice.text.split())
            print(f"{voice.name:>24}  {voice.method or '-':<16}  {words}")
        print(last_line)
        return
    table = Table(title=Text(prompt), caption=last_line, show_lines=True)
    for heading in ("voice", "method", "answer"):
        table.add_column(heading)
    for voice in voices:
        table.add_row(Text(voice.name), Text(voice.method or ""), Text(voice.text))
    Console().print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description="One prompt to the base and every adapter of a server.")
    options.add_argument("prompt", nargs="?", default="Tell me about the baker.")
    options.add_argument("--url", default="http://127.0.0.1:8000")
    options.add_argument("--max-tokens", type=int, default=60)
    chosen = options.parse_args(arguments)
    key = os.environ.get("GRAFT_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}

    async def connected() -> tuple[list[Voice], Steps, float]:
        async with httpx.AsyncClient(base_url=chosen.url, headers=headers, timeout=300) as http:
            return await hear(http, chosen.prompt, chosen.max_tokens)

    try:
        voices, steps, seconds = asyncio.run(connected())
    except httpx.HTTPError as error:
        sys.exit(f"{chosen.url}: {error}")
    show(chosen.prompt, voices, summary(voices, steps, seconds))


if __name__ == "__main__":
    main()

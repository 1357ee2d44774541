"""Something of all that the dashboard draws: requests in waves, uploads, merges, and what goes wrong beside them.

Owns what is asked of the server while its picture is taken. Knows nothing about what is measured.
"""

import asyncio
import itertools
import json
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp

from load_tests.closed_loop import ClosedLoop
from load_tests.many_adapters import CONFIG_FILE, WEIGHTS_FILE, Made, make

_BETWEEN_S = 1.5  # two rounds of changes
_PER_WAVE = 24
_OVERFLOWS = 1e30  # a scaling with which no output is a number, and the largest that is taken
_MERGED = ("pirate-lora", "owl-qlora", "shout-rslora")


async def work(url: str, adapters: Sequence[str], store: Path, duration_s: float) -> None:
    """Raises aiohttp.ClientError where the server goes away; refusals are part of it."""
    until_s = time.perf_counter() + duration_s
    async with aiohttp.ClientSession(url) as session:
        changing = asyncio.create_task(_change(session, make(store, 1000, seed=1), until_s))
        await _ask(url, adapters, until_s)
        await changing


async def _ask(url: str, adapters: Sequence[str], until_s: float) -> None:
    """Requests of all adapters, popular ones more often, in waves that the queue does not always hold."""
    dice = random.Random(0)
    weights = [1 / rank for rank in range(1, len(adapters) + 1)]
    for wave in itertools.count(1):
        if time.perf_counter() >= until_s:
            return
        loop = ClosedLoop(url, num_streams=4 + 10 * (wave % 3), num_prompt_tokens=24, max_tokens=24)
        names = dice.choices(adapters, weights, k=_PER_WAVE)
        await loop.run([*names, "broken", "broken", "no-such-adapter"], f"wave {wave}")


async def _change(session: aiohttp.ClientSession, made: Iterator[Made], until_s: float) -> None:
    """Adapters that come, come again, are refused, are merged, fail and go."""
    first = next(made)
    for number in itertools.count():
        if time.perf_counter() >= until_s:
            return
        adapter = next(made)
        name = f"guest-{number % 6}"
        await _upload(session, name, adapter.config, adapter.weights)
        if number % 3 == 0:
            await _upload(session, name, adapter.config, adapter.weights)  # the same again
        if number % 4 == 1:
            await _upload(session, name, b"{}", adapter.weights)  # refused
        if number % 2 == 0:
            await _upload_broken(session, first, number)
        await _merge(session, number)
        if number % 6 == 5:
            await _drop(session, f"/v1/adapters/guest-{(number + 3) % 6}")
        await asyncio.sleep(_BETWEEN_S)


async def _upload(session: aiohttp.ClientSession, name: str, config: bytes, weights: bytes) -> None:
    form = aiohttp.FormData()
    form.add_field("name", name)
    form.add_field("config", config, filename=CONFIG_FILE)
    form.add_field("weights", weights, filename=WEIGHTS_FILE)
    async with session.post("/v1/adapters", params={"replace": "true"}, data=form) as answer:
        await answer.read()


async def _upload_broken(session: aiohttp.ClientSession, adapter: Made, number: int) -> None:
    """Another version of it each time: one that has failed too often is served to nobody."""
    config = json.loads(adapter.config) | {"lora_alpha": _OVERFLOWS / (1 + number)}
    await _upload(session, "broken", json.dumps(config).encode(), adapter.weights)


async def _merge(session: aiohttp.ClientSession, number: int) -> None:
    """Of two adapters into a new version; now and then of one that is not there."""
    one, other = random.Random(number).sample([*_MERGED, "no-such-adapter"], 2)
    parts = [{"name": one, "weight": 0.5 + number % 7 / 10}, {"name": other}]
    order: dict[str, Any] = {"name": "merged", "adapters": parts, "replace": True}
    async with session.post("/v1/adapters/merge", json=order) as answer:
        await answer.read()


async def _drop(session: aiohttp.ClientSession, path: str) -> None:
    async with session.delete(path) as answer:
        await answer.read()

"""`python -m load_tests.metrics_churn`: what thousands of adapters that come and go leave in GET /metrics.

Asks each of many small adapters of the demo's base once, on a server whose tiers hold a part of them, and scrapes it
all the while: how many series there are, and how long a scrape takes. Owns this measurement and its report.
"""

import argparse
import asyncio
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from load_tests.closed_loop import ClosedLoop, conclude
from load_tests.many_registered import fill
from load_tests.own_server import NoServer, own_server
from load_tests.report import percentile
from load_tests.soak import BASE
from server.adapters.store.folder_store import Store
from server.ground.adapter_series import SERIES_PER_ADAPTER

SCHEMA = "graftserve-metrics-churn/1"
_OF_AN_ADAPTER = re.compile(r'^[a-z_:]+\{[^}]*adapter(?:_name)?="', re.MULTILINE)
_NUM_UNNAMED = 16  # series of `other` and `unknown`


@dataclass(frozen=True, slots=True)
class Scrape:
    """What one answer had."""

    duration_ms: float
    num_series: int
    num_of_adapters: int  # those among them that carry an adapter's name
    num_infos: int  # of vllm:lora_requests_info
    num_bytes: int


async def scrape(session: aiohttp.ClientSession, url: str) -> Scrape:
    begun = time.perf_counter()
    async with session.get(f"{url}/metrics") as answer:
        answer.raise_for_status()
        text = await answer.text()
    duration_ms = 1000 * (time.perf_counter() - begun)
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    named = len(_OF_AN_ADAPTER.findall(text))
    infos = sum(line.startswith("vllm:lora_requests_info{") for line in lines)
    return Scrape(duration_ms, len(lines), named, infos, len(text))


async def watch(url: str, interval_s: float, until: asyncio.Event) -> list[Scrape]:
    """A scrape every `interval_s` until the event is set, and one after it."""
    found = []
    async with aiohttp.ClientSession() as session:
        while not until.is_set():
            found.append(await scrape(session, url))
            await asyncio.sleep(interval_s)
        found.append(await scrape(session, url))
    return found


def max_named(cap: int) -> int:
    """The most series with an adapter's name under a cap, vLLM's name for them counted."""
    return (SERIES_PER_ADAPTER + 1) * cap + _NUM_UNNAMED


async def churn(url: str, names: Sequence[str], num_streams: int, interval_s: float) -> dict[str, Any]:
    """Asks each adapter for one token, and what the scrapes meanwhile came to."""
    until = asyncio.Event()
    watching = asyncio.create_task(watch(url, interval_s, until))
    loop = ClosedLoop(url, num_streams, num_prompt_tokens=4, max_tokens=1)
    done = await loop.run(names, "churn")
    until.set()
    scrapes = await watching
    times = [one.duration_ms for one in scrapes]
    return {
        "num_requests": len(done.outcomes),
        "num_failed": len(done.outcomes) - len(done.completed),
        "elapsed_s": done.elapsed_s,
        "num_scrapes": len(scrapes),
        "scrape_p50_ms": statistics.median(times),
        "scrape_p99_ms": percentile(times, 99),
        "scrape_max_ms": max(times),
        "max_series": max(one.num_series for one in scrapes),
        "max_series_of_adapters": max(one.num_of_adapters for one in scrapes),
        "max_lora_requests_info": max(one.num_infos for one in scrapes),
        "max_bytes": max(one.num_bytes for one in scrapes),
    }


def measure(folder: Path, num_adapters: int, cap: int, num_streams: int, interval_s: float) -> dict[str, Any]:
    """Fills a store, serves it, and runs the churn. Raises NoServer."""
    fill(Store(folder / "store", create=True), num_adapters)
    flags = {
        "device": "cpu",
        "kv-memory": "16MiB",
        "adapter-memory": "8MiB",  # some hundreds of them
        "host-memory": "64MiB",
        "metrics-compat": "vllm",
        "metrics-max-adapters": cap,
        "log-level": "error",
    }
    names = [f"many-{index:05d}" for index in range(num_adapters)]
    with own_server(BASE, folder, flags) as server:
        row = asyncio.run(churn(server.url, names, num_streams, interval_s))
        tiers = ("on_host", "resident")
        return row | {f"num_{tier}": server.metric(f"graft_adapters_{tier}") for tier in tiers}


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints, and writes JSON where asked. The exit code: 1 where the cap did not hold."""
    parser = argparse.ArgumentParser(prog="python -m load_tests.metrics_churn", description=__doc__.partition("\n")[0])
    parser.add_argument("--adapters", type=int, default=5000, metavar="N", help="asked once each (default: 5,000)")
    parser.add_argument("--cap", type=int, default=500, metavar="N", help="--metrics-max-adapters of the server")
    parser.add_argument("--streams", type=int, default=4, metavar="N", help="requests at once")
    parser.add_argument("--interval", type=float, default=0.5, metavar="SECONDS", help="between two scrapes")
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="where the store is made (default: a new one)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="the report")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        try:
            row = measure(Path(folder), arguments.adapters, arguments.cap, arguments.streams, arguments.interval)
        except NoServer as error:
            print(f"metrics churn: {error}", file=sys.stderr)
            return 2
    for name, value in row.items():
        print(f"{name:24} {value}")
    workload = {"num_adapters": arguments.adapters, "cap": arguments.cap, "num_streams": arguments.streams}
    failed = conclude(SCHEMA, workload, [row], arguments.out)
    return failed or int(row["max_series_of_adapters"] > max_named(arguments.cap))


if __name__ == "__main__":
    sys.exit(main())

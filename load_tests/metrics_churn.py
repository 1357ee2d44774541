"""`python -m load_tests.metrics_churn`: GET /metrics while thousands of adapters come and go.

Asks each of many small adapters of the demo's base once, on a server whose tiers hold a part of them: each has rows of
its own, so that all but the last have been evicted at the end. Scrapes it all the while: how many series there are, how
long a scrape takes, what it costs the server, and for what. Owns this measurement and its report.
"""

import argparse
import asyncio
import itertools
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from load_tests.closed_loop import ClosedLoop, conclude
from load_tests.many_registered import fill
from load_tests.own_server import NoServer, OwnServer, own_server
from load_tests.report import percentile
from load_tests.soak import BASE
from server.adapters.store.folder_store import Store
from server.assemble import Server, assemble
from server.ground.adapter_series import SERIES_PER_ADAPTER
from server.ground.config import load
from server.ground.exposition import exposition

SCHEMA = "graftserve-metrics-churn/2"
GOAL_MS = 100.0  # of a scrape, in the median and in the 99th percentile
_OF_AN_ADAPTER = re.compile(r'^[a-z_:]+\{[^}]*adapter(?:_name)?="', re.MULTILINE)
_NUM_UNNAMED = 16  # series of `other` and `unknown`
_NUM_AT_REST = 100  # scrapes of the server that nobody else asks
_TIERS = {"kv-memory": "16MiB", "adapter-memory": "8MiB", "host-memory": "64MiB"}  # some hundreds, some thousands
_EVICTIONS = ("graft_adapter_device_evictions_total", "graft_adapter_host_evictions_total")
_NUM_ROUNDS = 25  # of each part of a scrape's CPU time
_NUM_NEW = 16  # adapters that come between two of these


@dataclass(frozen=True, slots=True)
class Scrape:
    """What one answer had."""

    duration_ms: float
    first_byte_ms: float  # of these, until the answer began
    num_series: int
    num_of_adapters: int  # those among them that carry an adapter's name
    num_infos: int  # of vllm:lora_requests_info
    num_bytes: int


async def scrape(session: aiohttp.ClientSession, url: str) -> Scrape:
    begun = time.perf_counter()
    async with session.get(f"{url}/metrics") as answer:
        answer.raise_for_status()
        first_byte_ms = 1000 * (time.perf_counter() - begun)
        content = await answer.read()
    duration_ms = 1000 * (time.perf_counter() - begun)
    text = content.decode()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    named = len(_OF_AN_ADAPTER.findall(text))
    infos = sum(line.startswith("vllm:lora_requests_info{") for line in lines)
    return Scrape(duration_ms, first_byte_ms, len(lines), named, infos, len(content))


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


def times(name: str, values: Sequence[float]) -> dict[str, float | None]:
    """The median and the tail of milliseconds."""
    tail = {f"{name}_p{percent}_ms": percentile(values, percent) for percent in (50, 95, 99)}
    return tail | {f"{name}_max_ms": max(values)}


async def churn(url: str, names: Sequence[str], num_streams: int, interval_s: float) -> dict[str, Any]:
    """Asks each adapter for one token, and what the scrapes meanwhile came to."""
    until = asyncio.Event()
    watching = asyncio.create_task(watch(url, interval_s, until))
    loop = ClosedLoop(url, num_streams, num_prompt_tokens=4, max_tokens=1)
    done = await loop.run(names, "churn")
    until.set()
    scrapes = await watching
    return {
        "num_requests": len(done.outcomes),
        "num_failed": len(done.outcomes) - len(done.completed),
        "elapsed_s": done.elapsed_s,
        "num_scrapes": len(scrapes),
        **times("scrape", [one.duration_ms for one in scrapes]),
        **times("first_byte", [one.first_byte_ms for one in scrapes]),
        "max_series": max(one.num_series for one in scrapes),
        "max_series_of_adapters": max(one.num_of_adapters for one in scrapes),
        "max_lora_requests_info": max(one.num_infos for one in scrapes),
        "max_bytes": max(one.num_bytes for one in scrapes),
    }


async def at_rest(server: OwnServer) -> dict[str, Any]:
    """One scrape after the other while nobody asks anything else: their times, and all the CPU time of the server."""
    async with aiohttp.ClientSession() as session:
        before_s = _cpu_seconds(server)
        scrapes = [await scrape(session, server.url) for _ in range(_NUM_AT_REST)]
        taken_s = _cpu_seconds(server) - before_s
    return times("rest", [one.duration_ms for one in scrapes]) | {"rest_cpu_ms": 1000 * taken_s / (_NUM_AT_REST + 1)}


def _cpu_seconds(server: OwnServer) -> float:
    """Of its process, and of its engine's where that has one."""
    return server.metric("process_cpu_seconds_total") + server.metric("graft_engine_process_cpu_seconds_total", 0.0)


def measure(
    folder: Path, num_adapters: int, cap: int, num_streams: int, interval_s: float, engine_process: str = "off"
) -> dict[str, Any]:
    """Fills folder/store if it is not there, serves it, and runs the churn. Raises NoServer."""
    store = folder / "store"
    if not store.exists():
        fill(Store(store, create=True), num_adapters, own_rows=True)
    flags: dict[str, object] = {
        **_TIERS,
        "device": "cpu",
        "metrics-compat": "vllm",
        "metrics-max-adapters": cap,
        "log-level": "error",
        "engine-process": engine_process,
    }
    names = [f"many-{index:05d}" for index in range(num_adapters)]
    with own_server(BASE, folder, flags) as server:
        row = asyncio.run(churn(server.url, names, num_streams, interval_s)) | asyncio.run(at_rest(server))
        row |= {f"num_{tier}": server.metric(f"graft_adapters_{tier}") for tier in ("on_host", "resident")}
        row |= {name.removeprefix("graft_adapter_"): server.metric(name) for name in _EVICTIONS}
    return row | parts(store, names, cap)


def parts(store: Path, names: Sequence[str], cap: int) -> dict[str, float]:
    """Where the CPU time of a scrape goes, in this process: medians, with some new adapters before each."""
    flags = {name.replace("-", "_"): value for name, value in _TIERS.items()}
    told = {"model": str(BASE), "device": "cpu", "store": str(store), "metrics_compat": "vllm"}
    server = assemble(load(told | flags | {"metrics_max_adapters": cap}))
    try:
        return _parts(server, itertools.cycle(names), min(len(names), 2 * cap))
    finally:
        server.close()


def _parts(server: Server, names: Iterator[str], num_first: int) -> dict[str, float]:
    registry, metrics = server.registry, server.metrics
    work: Mapping[str, Callable[[], object]] = {
        "registry": lambda: (registry.stats(), registry.on_tiers()),
        "adapters": lambda: metrics.adapters.shown(registry.on_tiers()),
        "families": lambda: exposition(list(metrics.registry.collect())),
        "all": metrics.exposition,
    }
    taken: dict[str, list[float]] = {name: [] for name in work}
    _bring(server, itertools.islice(names, num_first))
    for _ in range(_NUM_ROUNDS):
        for name, act in work.items():
            _bring(server, itertools.islice(names, _NUM_NEW))
            begun_s = time.thread_time()
            act()
            taken[name].append(1000 * (time.thread_time() - begun_s))
    return {f"cpu_{name}_ms": statistics.median(values) for name, values in taken.items()}


def _bring(server: Server, names: Iterator[str]) -> None:
    """To the host and to the device, as a request would."""
    for name in names:
        server.metrics.adapters.count_sequence([name])
        server.registry.load(name)


def faults(row: Mapping[str, Any], num_adapters: int, cap: int) -> list[str]:
    """What of a run shows that adapters did not come and go, or that the series are not bounded."""
    holds = {
        "some adapters are not on the device": row["num_resident"] < num_adapters,
        "adapters were dropped from the device": row["device_evictions_total"] > 0,
        "adapters were dropped from the host": row["host_evictions_total"] > 0,
        "the series of adapters are under the cap": row["max_series_of_adapters"] <= max_named(cap),
        "vllm:lora_requests_info is one series": row["max_lora_requests_info"] == 1,
    }
    return [f"not so: {claim}" for claim, is_so in holds.items() if not is_so]


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints, and writes JSON where asked.

    The exit code: 1 where a request failed, adapters did not come and go, or the cap did not hold. The goal is told and
    decides nothing: another machine is slower.
    """
    parser = argparse.ArgumentParser(prog="python -m load_tests.metrics_churn", description=__doc__.partition("\n")[0])
    parser.add_argument("--adapters", type=int, default=5000, metavar="N", help="asked once each (default: 5,000)")
    parser.add_argument("--cap", type=int, default=500, metavar="N", help="--metrics-max-adapters of the server")
    parser.add_argument("--streams", type=int, default=4, metavar="N", help="requests at once")
    parser.add_argument("--interval", type=float, default=0.5, metavar="SECONDS", help="between two scrapes")
    parser.add_argument("--engine-process", choices=["on", "off"], default="off", help="of the server")
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="where the store is made (default: a new one)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="the report")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        try:
            row = measure(
                Path(folder), arguments.adapters, arguments.cap, arguments.streams, arguments.interval,
                arguments.engine_process,
            )  # fmt: skip
        except NoServer as error:
            print(f"metrics churn: {error}", file=sys.stderr)
            return 2
    row |= {"goal_ms": GOAL_MS, "meets_goal": row["scrape_p99_ms"] < GOAL_MS}
    for name, value in row.items():
        print(f"{name:24} {value}")
    workload = {
        "num_adapters": arguments.adapters,
        "cap": arguments.cap,
        "num_streams": arguments.streams,
        "engine_process": arguments.engine_process,
    }
    failed = conclude(SCHEMA, workload, [row], arguments.out)
    found = faults(row, arguments.adapters, arguments.cap)
    print("\n".join(found), file=sys.stderr)
    return failed or int(bool(found))


if __name__ == "__main__":
    sys.exit(main())

"""`python -m load_tests.soak`: thousands of random operations against a live server, and whether anything is left over.

Several clients at once generate, hang up, upload, replace, delete, move and merge adapters on a server whose memory is
far too small for them all. After every so many operations they pause, the server rests, and everything must balance: no
lease, no sequence, no block of the KV cache in use, on disk exactly the versions that are listed. At the end every
adapter is deleted, and no byte may be left on any tier. Owns the course of a soak and what counts as a leak; what is
done to the server is `soak_operations`' business.
"""

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from load_tests.client import ServerRefused, list_models
from load_tests.many_adapters import STORE, make, write
from load_tests.own_server import NoServer, own_server
from load_tests.soak_operations import World, Wrong, drawn
from server.bench import machine

SCHEMA = "graftserve-soak/1"
BASE = Path(__file__).parents[1] / "demo" / "base"
# Room for two or three of the demo's adapters on the device and five on the host, and few blocks: nothing rests.
_TIGHT = {
    "adapter-memory": "2MiB",
    "host-memory": "4MiB",
    "kv-memory": "2MiB",
    "block-size": "16",
    "max-sequences": "8",
    "max-queued": "24",
    "keep-versions": "2",
    "max-adapter-wait": "0.5",
    "log-level": "error",
    "device": "cpu",
}
_OPERATION_TIMEOUT_S = 300.0  # then it hangs
_QUIET_TIMEOUT_S = 120.0
_REST_S = 8.0  # a server that has rested for five seconds gives back what is free
_MIN_RESTED = 4  # samples, for a slope
_NUM_CONTENTS = 20
_SAMPLE_EVERY = 25  # operations
_MAX_TOLD = 20  # failures
# Threads and descriptors come and go with the clients; a leak of either is one for each of thousands of operations.
_SLACK = 16
_GAUGES = (
    "graft_sequences_running",
    "graft_sequences_waiting",
    "graft_kv_blocks_used",
    "graft_adapters_loading",
    "graft_adapter_leases",
    "graft_adapter_fetches_running",
    "graft_adapter_fetches_waiting",
)
_BYTES = ("graft_adapter_host_bytes", "graft_adapter_device_bytes", "graft_adapters_on_host", "graft_adapters_resident")


@dataclass(frozen=True, slots=True)
class Sample:
    """The server's process after so many operations."""

    num_operations: int
    rss_mib: float
    num_threads: int
    num_descriptors: int
    is_rested: bool  # nobody had asked for anything for a while: what is resident then is in use

    @classmethod
    def of(cls, pid: int, num_operations: int, *, is_rested: bool = False) -> "Sample":
        process = Path("/proc") / str(pid)
        pages = int((process / "statm").read_text(encoding="ascii").split()[1])
        num_threads, num_descriptors = (len(os.listdir(process / what)) for what in ("task", "fd"))
        rss_mib = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
        return cls(num_operations, rss_mib, num_threads, num_descriptors, is_rested)


@dataclass(frozen=True, slots=True)
class Course:
    """How long a soak is, and what it may cost."""

    num_operations: int
    seed: int
    num_clients: int
    check_every: int
    max_slope_mib: float  # of resident memory, in 1,000 operations, after the warm-up
    warm_up: float  # share of the operations


@dataclass(slots=True)
class Soak:
    """A soak under way: what was seen so far. `pid` and `store` are None where the server is not of this machine."""

    course: Course
    world: World
    pid: int | None
    store: Path | None
    num_done: int = 0
    samples: list[Sample] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    async def run(self) -> None:
        """All operations, a check after every so many, and the end."""
        dice = [random.Random(f"{self.course.seed}/{client}") for client in range(self.course.num_clients)]
        while self.num_done < self.course.num_operations and len(self.failures) < _MAX_TOLD:
            last = min(self.num_done + self.course.check_every, self.course.num_operations)
            async with _session() as self.world.session:
                await asyncio.gather(*(self._client(each, last) for each in dice))
            await self._check()
            print(f"{self.num_done} of {self.course.num_operations}: {self._state()}", file=sys.stderr)
        await self._end()

    def _state(self) -> str:
        if not self.samples:
            return f"{len(self.failures)} failures"
        now = self.samples[-1]
        return (
            f"{len(self.failures)} failures, {now.rss_mib:.1f} MiB, {now.num_threads} threads, "
            f"{now.num_descriptors} descriptors"
        )

    async def _client(self, dice: random.Random, last: int) -> None:
        while self.num_done < last:
            self.num_done += 1
            if self.pid is not None and self.num_done % _SAMPLE_EVERY == 0:
                self.samples.append(Sample.of(self.pid, self.num_done))
            operation = drawn(dice)
            try:
                async with asyncio.timeout(_OPERATION_TIMEOUT_S):
                    await operation(self.world, dice)
            except (Wrong, aiohttp.ClientError, ValueError) as error:
                self._fail(f"{operation.__name__}: {error!r}")
            except TimeoutError:
                self._fail(f"{operation.__name__}: no end within {_OPERATION_TIMEOUT_S:.0f} s")

    def _fail(self, what: str) -> None:
        self.failures.append(f"after {self.num_done}: {what}")
        print(self.failures[-1], file=sys.stderr)

    # What must hold when nobody asks for anything

    async def _check(self) -> None:
        async with _session() as self.world.session:
            await self._become("quiet", lambda state: not any(state.metrics[name] for name in _GAUGES))
            if self.store is not None:
                store = self.store
                await self._become("as listed on disk", lambda state: _on_disk(store) == state.versions)
        if self.pid is not None:
            await asyncio.sleep(_REST_S)
            self.samples.append(Sample.of(self.pid, self.num_done, is_rested=True))

    async def _end(self) -> None:
        """Deletes every adapter, after which nothing may be anywhere."""
        async with _session() as session:
            self.world.session = session
            for name in (await State.of(self.world)).versions:
                async with session.delete(f"{self.world.url}/v1/adapters/{name}") as answer:
                    await answer.read()
            await self._become("empty", lambda state: not any(state.metrics[name] for name in (*_GAUGES, *_BYTES)))
            if self.store is not None:
                store = self.store
                await self._become("empty on disk", lambda _: _on_disk(store) == {})
        self._check_flat()

    async def _become(self, what: str, is_so: Callable[["State"], bool]) -> None:
        """Waits for what other threads of the server do; that it does not happen is a failure."""
        deadline = time.monotonic() + _QUIET_TIMEOUT_S
        while not is_so(state := await State.of(self.world)):
            if time.monotonic() > deadline:
                disk = "" if self.store is None else f", and on disk is {_on_disk(self.store)}"
                self._fail(f"the server does not become {what}: {state}{disk}")
                return
            await asyncio.sleep(0.05)

    # What must be flat

    def settled(self) -> list[Sample]:
        """The samples after the warm-up."""
        first = self.course.warm_up * self.course.num_operations
        return [sample for sample in self.samples if sample.num_operations > first]

    def slope_mib(self) -> float:
        """By which the resident memory of the rested server grows in 1,000 operations after the warm-up.

        From the least of the first half of the samples to the least of the second: how much of the heap is in pieces
        that cannot be given back differs by tens of MiB from one rest to the next, and a leak lifts the least, too. 0
        for a soak too short to tell.
        """
        rested = [sample for sample in self.settled() if sample.is_rested]
        if len(rested) < _MIN_RESTED:
            return 0.0
        middle = len(rested) // 2
        early, late = rested[:middle], rested[middle:]
        growth = min(each.rss_mib for each in late) - min(each.rss_mib for each in early)
        return 1000 * growth / (late[0].num_operations - early[0].num_operations)

    def _check_flat(self) -> None:
        settled = self.settled()
        early = [sample for sample in self.samples if sample not in settled]
        if not early or not settled:
            return
        if self.slope_mib() > self.course.max_slope_mib:
            self._fail(f"resident memory grows by {self.slope_mib():.2f} MiB in 1,000 operations")
        for what in ("num_threads", "num_descriptors"):
            before, after = (max(getattr(sample, what) for sample in part) for part in (early, settled))
            if after > before + _SLACK:
                self._fail(f"{what} were {before} at most in the warm-up, and then up to {after}")

    def report(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "machine": machine("cpu"),
            "course": {name: getattr(self.course, name) for name in Course.__slots__},
            "num_done": self.num_done,
            "answers": dict(sorted(self.world.counts.items())),
            "failures": self.failures,
            "rss_slope_mib_per_1000": round(self.slope_mib(), 4),
            "samples": [
                [each.num_operations, round(each.rss_mib, 2), each.num_threads, each.num_descriptors, each.is_rested]
                for each in self.samples
            ],
        }


@dataclass(frozen=True, slots=True)
class State:
    """What the server says of itself."""

    metrics: Counter[str]  # those without labels
    versions: dict[str, frozenset[str]]  # digests by name

    @classmethod
    async def of(cls, world: World) -> "State":
        async with world.session.get(f"{world.url}/metrics") as answer:
            lines = [line.split() for line in (await answer.text()).splitlines() if not line.startswith("#")]
        async with world.session.get(f"{world.url}/v1/adapters") as answer:
            listed = (await answer.json())["data"]
        metrics = Counter({name: float(value) for name, value in lines if "{" not in name})
        return cls(metrics, {each["name"]: frozenset(each["versions"]) for each in listed})


def _session() -> aiohttp.ClientSession:
    """Without any limit; connections that rest are closed before the server's five seconds are over."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2.0)
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None))


def _on_disk(store: Path) -> dict[str, frozenset[str]]:
    """The versions in the store by name; what is no version, work in progress included, is under the name ''."""
    found: dict[str, frozenset[str]] = {}
    odd = {entry.name for entry in (store / ".incoming").glob("*")}
    for entry in store.iterdir():
        if entry.name != ".incoming":
            inside = {path.name for path in entry.iterdir()} if entry.is_dir() else set()
            odd |= set() if "current.json" in inside else {entry.name}
            found[entry.name] = frozenset(inside - {"current.json"})
    return found | ({"": frozenset(odd)} if odd else {})


def draw(soak: Soak, path: Path) -> None:
    """Resident memory, threads and descriptors over the operations; PNG or SVG."""
    from matplotlib.figure import Figure  # only a picture needs it

    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    counts = [sample.num_operations for sample in soak.samples]
    left.plot(counts, [sample.rss_mib for sample in soak.samples], color="#4a7ba6", label="at work")
    rested = [sample for sample in soak.samples if sample.is_rested]
    left.plot([s.num_operations for s in rested], [s.rss_mib for s in rested], "o", color="#c1440e", label="rested")
    left.legend(fontsize="small")
    first = soak.course.warm_up * soak.course.num_operations
    left.axvline(first, color="grey", linestyle=":")
    left.set(xlabel="operations", ylabel="resident memory, MiB", title=f"{soak.slope_mib():+.2f} MiB in 1,000")
    right.plot(counts, [sample.num_threads for sample in soak.samples], color="#c1440e", label="threads")
    right.plot(counts, [sample.num_descriptors for sample in soak.samples], color="#7a9a3a", label="descriptors")
    right.set(xlabel="operations", ylim=(0, None))
    right.legend(fontsize="small")
    figure.savefig(path, dpi=80, metadata={"Date": None} if path.suffix == ".svg" else None)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if everything balanced, 1 if something did not, 2 if there was no server to soak."""
    arguments = _parser().parse_args(argv)
    try:
        with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
            soak = _soak(arguments, Path(scratch), stack)
            asyncio.run(_run(soak))
    except (NoServer, ServerRefused) as error:
        print(f"soak: {error}", file=sys.stderr)
        return 2
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(soak.report(), indent=2) + "\n", encoding="utf-8")
    if arguments.plot is not None:
        draw(soak, arguments.plot)
    print("\n".join(_told(soak)))
    return 1 if soak.failures else 0


def _told(soak: Soak) -> Iterator[str]:
    for what, count in sorted(soak.world.counts.items()):
        yield f"{count:>8}  {what}"
    if soak.samples:
        yield f"resident memory: {soak.slope_mib():+.3f} MiB in 1,000 operations after the warm-up"
    yield f"{soak.num_done} operations, {len(soak.failures)} failures"
    yield from soak.failures


def _soak(arguments: argparse.Namespace, scratch: Path, stack: ExitStack) -> Soak:
    """The soak of a server that is there, or of one that is started for it and ends with `stack`. Raises NoServer."""
    contents = tuple(make(STORE, _NUM_CONTENTS, arguments.seed))
    course = Course(
        arguments.operations, arguments.seed, arguments.clients, arguments.check_every, arguments.max_slope,
        arguments.warm_up,
    )  # fmt: skip
    if arguments.url is not None:
        return Soak(course, World(arguments.url, "", contents, None), None, None)
    folders = scratch / "folders"
    write(iter(contents), folders)
    flags = _TIGHT | {"adapter-paths": str(folders), "allow-source": folders.as_uri(), "dtype": arguments.dtype}
    started = own_server(BASE, scratch, flags)
    server = stack.enter_context(started)
    return Soak(course, World(server.url, "", contents, folders), server.pid, scratch / "store")


async def _run(soak: Soak) -> None:
    """Raises ServerRefused."""
    async with _session() as session:
        soak.world.base = (await list_models(session, soak.world.url)).base or ""
    await soak.run()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m load_tests.soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--operations", type=int, default=10_000, metavar="N", help="in all (default: 10,000)")
    parser.add_argument("--seed", type=int, default=0, help="of every draw; the order on the server is still its own")
    parser.add_argument("--clients", type=int, default=8, metavar="N", help="that ask at once")
    parser.add_argument("--check-every", type=int, default=500, metavar="N", help="operations between two checks")
    parser.add_argument("--warm-up", type=float, default=0.5, metavar="SHARE", help="of the operations, not judged")
    parser.add_argument("--max-slope", type=float, default=1.0, metavar="MIB", help="growth in 1,000 operations")
    # In 16-bit arithmetic the CPU's library keeps a kernel for each shape that it meets, which would hide a leak.
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="that the server computes in"
    )
    parser.add_argument("--url", help="a server that is there; only what its answers tell is checked")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="the report")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="the picture, PNG or SVG")
    return parser


if __name__ == "__main__":
    sys.exit(main())

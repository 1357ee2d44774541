"""`python -m load_tests.cold_load`: what streams feel of a large adapter that is loaded while they run.

Streams generate without a pause, each with a small adapter that is on the device. Beside them, again and again, a large
adapter is brought from the store: by hand (`load`: to host and device, and nobody uses it), or by a request that asks
for one token of it (`request`: the step that computes with it counts as well). Compared with the same run `alone`, in
every round. Between its loads a large adapter is unloaded; its files stay in the page cache of the machine. Owns this
workload and its report.
"""

import argparse
import asyncio
import random
import statistics
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from load_tests import client
from load_tests.closed_loop import ClosedLoop, Round, conclude, percentile_ms
from load_tests.many_adapters import write
from load_tests.outcome import End
from load_tests.own_server import ITEM_BYTES, NoServer, OwnServer, Shape, in_scratch, make_loras, own_server
from server.bench import save_model

SCHEMA = "graftserve-cold-load/1"
VARIANTS = ("alone", "load", "request")
_NUM_LARGE = 2


@dataclass(slots=True)
class Measured:
    """The rounds of a variant, and how long each cold adapter took in them."""

    rounds: list[Round] = field(default_factory=list)
    loads_s: list[float] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints a table, and writes JSON where asked. Returns the exit code."""
    arguments = _arguments(argv)
    measured = in_scratch("cold load", lambda scratch: _measure(scratch, arguments))
    if measured is None:
        return 2
    rows = rows_of(measured)
    print(table(rows))
    told = {name: value for name, value in vars(arguments).items() if name not in ("out", "model", "quick")}
    return conclude(SCHEMA, told, rows, arguments.out)


def _measure(scratch: Path, arguments: argparse.Namespace) -> dict[str, Measured]:
    model = arguments.model or scratch / "model"
    if arguments.model is None:
        save_model(model)
    shape = Shape.of(model)
    large_rank = shape.rank_of(int(arguments.large_mb * 1e6))
    write(make_loras(shape, "small", arguments.streams, arguments.rank), scratch / "adapters")
    write(make_loras(shape, "large", _NUM_LARGE, large_rank), scratch / "adapters")
    with own_server(model, scratch, _flags(scratch, shape, large_rank, arguments)) as server:
        for index in range(arguments.streams):
            server.call("POST", f"/v1/adapters/small-{index:04d}/load")
        return asyncio.run(_rounds(server, arguments))


def _flags(scratch: Path, shape: Shape, large_rank: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Twice the room that all adapters need: this is about loading, not about room."""
    total_rank = arguments.streams * arguments.rank + _NUM_LARGE * large_rank
    memory = max(2 * ITEM_BYTES * total_rank * shape.row_elements(), 16 << 20)
    flags: dict[str, Any] = {"adapters": scratch / "adapters", "adapter-memory": memory, "host-memory": "4GiB"}
    flags |= {"max-sequences": arguments.streams + 1, "quantize": arguments.quantize, "device": "cpu"}
    flags |= {"kv-memory": "512MiB", "dtype": "bfloat16", "log-level": "warning"}
    return flags


async def _rounds(server: OwnServer, arguments: argparse.Namespace) -> dict[str, Measured]:
    loop = ClosedLoop(server.url, arguments.streams, arguments.prompt_tokens, arguments.max_tokens)
    names = [f"small-{at % arguments.streams:04d}" for at in range(arguments.requests)]
    measured = {variant: Measured() for variant in VARIANTS}
    for number in range(arguments.rounds + 1):
        for variant, of_variant in measured.items():
            beside = asyncio.create_task(_load_again_and_again(server, variant, loop, arguments.pause))
            passed = await loop.run(names, f"{variant}/{number}")
            beside.cancel()
            loads_s = await beside
            if number:  # the first one warms up
                of_variant.rounds.append(passed)
                of_variant.loads_s += loads_s
        print(f"round {number} of {arguments.rounds}{'' if number else ' (warm-up)'}", file=sys.stderr)
    return measured


async def _load_again_and_again(server: OwnServer, variant: str, loop: ClosedLoop, pause_s: float) -> list[float]:
    """Until it is cancelled; the seconds that each load took. What is under way then is let end, and not counted."""
    loads_s: list[float] = []
    bring = _by_request if variant == "request" else _by_hand
    turn = 0
    try:
        while variant != "alone":
            name = f"large-{turn % _NUM_LARGE:04d}"
            turn += 1
            await asyncio.to_thread(server.call, "POST", f"/v1/adapters/{name}/unload")
            await asyncio.sleep(pause_s)
            started = time.perf_counter()
            await asyncio.shield(_kept(bring, server, loop, name))
            loads_s.append(time.perf_counter() - started)
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        await asyncio.gather(*_kept_tasks)
    return loads_s


_kept_tasks: set["asyncio.Task[None]"] = set()  # so that what is under way at the end of a round is not lost
Bring = Callable[[OwnServer, ClosedLoop, str], Coroutine[Any, Any, None]]


def _kept(bring: Bring, server: OwnServer, loop: ClosedLoop, name: str) -> "asyncio.Task[None]":
    task = asyncio.create_task(bring(server, loop, name))
    _kept_tasks.add(task)
    task.add_done_callback(_kept_tasks.discard)
    return task


async def _by_hand(server: OwnServer, loop: ClosedLoop, name: str) -> None:
    await asyncio.to_thread(server.call, "POST", f"/v1/adapters/{name}/load")


async def _by_request(server: OwnServer, loop: ClosedLoop, name: str) -> None:
    async with client.open_session(None) as session:
        outcome = await replace(loop, max_tokens=1).ask(session, name, random.Random(name))
    if outcome.end is not End.COMPLETED:
        raise NoServer(f"a request of {name} failed: {outcome.detail}")


def rows_of(measured: dict[str, Measured]) -> list[dict[str, Any]]:
    """A row for each variant. Milliseconds, of all rounds together; a ratio is the median of the rounds' own."""
    alone = measured["alone"].rounds
    return [_row(variant, of_variant, alone) for variant, of_variant in measured.items()]


def _row(variant: str, measured: Measured, alone: Sequence[Round]) -> dict[str, Any]:
    gaps = [gap for passed in measured.rounds for gap in passed.gaps_s]
    pairs = list(zip(measured.rounds, alone, strict=True))
    p99s = [(percentile_ms(passed.gaps_s, 99), percentile_ms(base.gaps_s, 99)) for passed, base in pairs]
    num_sent = sum(len(passed.outcomes) for passed in measured.rounds)
    return {
        "variant": variant,
        "num_requests": num_sent,
        "num_failed": num_sent - sum(len(passed.completed) for passed in measured.rounds),
        "num_loads": len(measured.loads_s),
        "load_s": statistics.median(measured.loads_s) if measured.loads_s else None,
        "itl_p50_ms": percentile_ms(gaps, 50),
        "itl_p99_ms": percentile_ms(gaps, 99),
        "itl_max_ms": percentile_ms(gaps, 100),
        "itl_p99_ratio": statistics.median(a / b for a, b in p99s if a is not None and b),
        "tokens_per_s": statistics.median(passed.tokens_per_s for passed in measured.rounds),
        "tokens_per_s_ratio": statistics.median(passed.tokens_per_s / base.tokens_per_s for passed, base in pairs),
        "rounds": [{"itl_p99_ms": a, "tokens_per_s": passed.tokens_per_s} for passed, (a, _) in zip(
            measured.rounds, p99s, strict=True
        )],
    }  # fmt: skip


_COLUMNS = (
    ("num_requests", "sent", 0), ("num_failed", "failed", 0), ("num_loads", "cold loads", 0), ("load_s", "s each", 2),
    ("itl_p50_ms", "ITL p50", 1), ("itl_p99_ms", "ITL p99", 1), ("itl_p99_ratio", "of alone", 2),
    ("itl_max_ms", "ITL max", 1), ("tokens_per_s", "tokens/s", 0), ("tokens_per_s_ratio", "of alone", 2),
)  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown; times of tokens in milliseconds."""
    lines = ["| beside | " + " | ".join(title for _, title, _ in _COLUMNS) + " |", "|---|" + "---:|" * len(_COLUMNS)]
    for row in rows:
        cells = ["-" if row[key] is None else f"{row[key]:.{digits}f}" for key, _, digits in _COLUMNS]
        lines.append(f"| {row['variant']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m load_tests.cold_load", description=main.__doc__)
    parser.add_argument("--model", type=Path, metavar="DIR", help="a Llama (default: a random one, 25M parameters)")
    parser.add_argument("--quantize", default="none", choices=["none", "nf4", "int8"])
    parser.add_argument("--large-mb", type=float, default=50.0, help="size of the adapter that is loaded, in 16 bit")
    parser.add_argument("--pause", type=float, default=1.0, help="seconds between the end of a load and the next")
    parser.add_argument("--rank", type=int, default=8, help="of the streams' own adapters")
    parser.add_argument("--streams", type=int, default=16, help="at once, each with an adapter of its own")
    parser.add_argument("--requests", type=int, default=64, help="of the streams in each round of each variant")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=64, help="that each request generates")
    parser.add_argument("--rounds", type=int, default=3, help="rounds measured, after one that warms up")
    parser.add_argument("--quick", action="store_true", help="a few requests, to see that all of it works")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the report as JSON")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.streams, arguments.requests, arguments.max_tokens, arguments.prompt_tokens = 2, 4, 8, 4
        arguments.rounds, arguments.large_mb, arguments.pause = 1, 0.5, 0.01
    return arguments


if __name__ == "__main__":
    sys.exit(main())

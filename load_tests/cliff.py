"""`python -m load_tests.cliff`: what happens when more adapters are asked for than fit on the device.

A server of this checkout has room for N adapters of one size. Streams ask in a closed loop, each for another adapter as
soon as it is answered, over working sets of 0.5, 1, 1.1, 2 and 4 times N: drawn uniformly, or one after the other in a
cycle, which is the worst order for a cache that keeps what was used last. All adapters are in host memory, so it is the
device alone that is too small. Owns this workload and its report; all working sets take turns within each round, so
that a slow minute of the machine hits all alike.
"""

import argparse
import asyncio
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from load_tests.closed_loop import ClosedLoop, Round, conclude, percentile_ms
from load_tests.many_adapters import write
from load_tests.own_server import ITEM_BYTES, NoServer, OwnServer, Shape, in_scratch, make_loras, own_server
from server.bench import save_model

SCHEMA = "graftserve-cliff/1"
PATTERNS = ("uniform", "cyclic")
FACTORS = (0.5, 1.0, 1.1, 2.0, 4.0)
_SLAB_BYTES = ITEM_BYTES << 16  # the device is cut into these; each width of rows may leave one partly used


@dataclass(frozen=True, slots=True)
class Case:
    """A working set, and the order in which it is asked for."""

    pattern: str
    factor: float
    num_adapters: int


@dataclass(slots=True)
class Measured:
    """The rounds of a case, and what the server counted in them."""

    rounds: list[Round] = field(default_factory=list)
    num_promotions: int = 0
    num_rotations: int = 0


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints a table, and writes JSON and a picture where asked. Returns the exit code."""
    arguments = _arguments(argv)
    measured = in_scratch("cliff", lambda scratch: _measure(scratch, arguments))
    if measured is None:
        return 2
    rows = rows_of(measured)
    print(table(rows))
    code = conclude(SCHEMA, _workload(arguments), rows, arguments.out)
    if arguments.plot is not None:
        draw(rows, arguments.plot)
    return code


def cases_of(fits: int, factors: Sequence[float]) -> list[Case]:
    """Every pattern over every working set; at least one adapter in each, and more than fit where more is meant."""
    sizes = {factor: max(1, round(factor * fits), (fits + 1) * (factor > 1)) for factor in factors}
    return [Case(pattern, factor, size) for pattern in PATTERNS for factor, size in sizes.items()]


def _measure(scratch: Path, arguments: argparse.Namespace) -> dict[Case, Measured]:
    model = arguments.model or scratch / "model"
    if arguments.model is None:
        save_model(model)
    shape, cases = Shape.of(model), cases_of(arguments.fits, arguments.factors)
    num_adapters = max(case.num_adapters for case in cases)
    write(make_loras(shape, "cliff", num_adapters, arguments.rank), scratch / "adapters")
    with own_server(model, scratch, _flags(scratch, shape, arguments)) as server:
        for index in range(num_adapters):
            server.call("POST", f"/v1/adapters/{_name(index)}/load")
        num_resident = server.metric("graft_adapters_resident")
        if num_resident != min(arguments.fits, num_adapters):
            raise NoServer(
                f"{num_resident:g} adapters fit on the device, and not {arguments.fits}: choose another --rank"
            )
        return asyncio.run(_rounds(server, cases, arguments))


def _flags(scratch: Path, shape: Shape, arguments: argparse.Namespace) -> dict[str, Any]:
    """Room for `fits` adapters and a slab of each width, which is less than one adapter more."""
    adapter_bytes = ITEM_BYTES * arguments.rank * shape.row_elements()
    num_widths = len({width for _, *widths in shape.widths for width in widths})
    memory = arguments.fits * adapter_bytes + min(num_widths * _SLAB_BYTES, adapter_bytes // 2)
    flags: dict[str, Any] = {
        "adapters": scratch / "adapters",
        "adapter-memory": memory,
        "host-memory": "4GiB",
        "dtype": "bfloat16",
    }
    flags |= {"max-sequences": arguments.streams, "quantize": arguments.quantize, "device": "cpu"}
    flags |= {"kv-memory": "512MiB", "max-adapter-wait": arguments.max_adapter_wait, "log-level": "warning"}
    return flags


def _name(index: int) -> str:
    return f"cliff-{index:04d}"


async def _rounds(server: OwnServer, cases: Sequence[Case], arguments: argparse.Namespace) -> dict[Case, Measured]:
    loop = ClosedLoop(server.url, arguments.streams, arguments.prompt_tokens, arguments.max_tokens)
    measured = {case: Measured() for case in cases}
    for number in range(arguments.rounds + 1):
        for case in cases:
            # Unmeasured: as many of the working set as can be resident are.
            resident = [_name(index) for index in range(min(case.num_adapters, arguments.fits))]
            await loop.run(resident, f"{case}/{number}/before")
            before = await asyncio.to_thread(_counts, server)
            passed = await loop.run(_order(case, arguments.requests, number), f"{case}/{number}")
            after = await asyncio.to_thread(_counts, server)
            if number:  # the first one warms up
                measured[case].rounds.append(passed)
                measured[case].num_promotions += after[0] - before[0]
                measured[case].num_rotations += after[1] - before[1]
        print(f"round {number} of {arguments.rounds}{'' if number else ' (warm-up)'}", file=sys.stderr)
    return measured


def _counts(server: OwnServer) -> tuple[int, int]:
    return int(server.metric("graft_adapter_promotions_total")), int(server.metric("graft_adapter_rotations_total"))


def _order(case: Case, num_requests: int, number: int) -> list[str]:
    dice = random.Random(f"{case}/{number}/order")
    is_cyclic = case.pattern == "cyclic"
    drawn = (at % case.num_adapters if is_cyclic else dice.randrange(case.num_adapters) for at in range(num_requests))
    return [_name(index) for index in drawn]


def rows_of(measured: dict[Case, Measured]) -> list[dict[str, Any]]:
    """A row for each case. Times in milliseconds, of all rounds together; a ratio is the median of the rounds' own."""
    return [_row(case, of_case, measured[_at_one(case, measured)]) for case, of_case in measured.items()]


def _at_one(case: Case, measured: dict[Case, Measured]) -> Case:
    """The case whose working set just fits: what the others are compared with."""
    return min((other for other in measured if other.pattern == case.pattern), key=lambda other: abs(other.factor - 1))


def _row(case: Case, of_case: Measured, at_one: Measured) -> dict[str, Any]:
    ttfts = [value for passed in of_case.rounds for value in passed.ttfts_s]
    gaps = [value for passed in of_case.rounds for value in passed.gaps_s]
    pairs = list(zip(of_case.rounds, at_one.rounds, strict=True))
    num_sent = sum(len(passed.outcomes) for passed in of_case.rounds)
    return {
        "pattern": case.pattern,
        "factor": case.factor,
        "num_adapters": case.num_adapters,
        "num_requests": num_sent,
        "num_failed": num_sent - sum(len(passed.completed) for passed in of_case.rounds),
        "num_promotions": of_case.num_promotions,
        "num_rotations": of_case.num_rotations,
        "ttft_p50_ms": percentile_ms(ttfts, 50),
        "ttft_p99_ms": percentile_ms(ttfts, 99),
        "itl_p50_ms": percentile_ms(gaps, 50),
        "itl_p99_ms": percentile_ms(gaps, 99),
        "tokens_per_s": statistics.median(passed.tokens_per_s for passed in of_case.rounds),
        "ttft_p99_ratio": _ratio([(percentile_ms(a.ttfts_s, 99), percentile_ms(b.ttfts_s, 99)) for a, b in pairs]),
        "itl_p99_ratio": _ratio([(percentile_ms(a.gaps_s, 99), percentile_ms(b.gaps_s, 99)) for a, b in pairs]),
        "tokens_per_s_ratio": _ratio([(a.tokens_per_s, b.tokens_per_s) for a, b in pairs]),
        "rounds": [
            {"ttft_p99_ms": percentile_ms(p.ttfts_s, 99), "tokens_per_s": p.tokens_per_s} for p in of_case.rounds
        ],
    }


def _ratio(pairs: Sequence[tuple[float | None, float | None]]) -> float | None:
    ratios = [value / base for value, base in pairs if value is not None and base]
    return statistics.median(ratios) if ratios else None


_COLUMNS = (
    ("num_adapters", "adapters", 0), ("num_requests", "sent", 0), ("num_failed", "failed", 0),
    ("num_promotions", "promotions", 0), ("num_rotations", "rotations", 0), ("ttft_p50_ms", "TTFT p50", 0),
    ("ttft_p99_ms", "TTFT p99", 0), ("ttft_p99_ratio", "of 1x", 2), ("itl_p50_ms", "ITL p50", 1),
    ("itl_p99_ms", "ITL p99", 1), ("itl_p99_ratio", "of 1x", 2), ("tokens_per_s", "tokens/s", 0),
    ("tokens_per_s_ratio", "of 1x", 2),
)  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown; times in milliseconds."""
    lines = ["| order | " + " | ".join(title for _, title, _ in _COLUMNS) + " |", "|---|" + "---:|" * len(_COLUMNS)]
    for row in rows:
        cells = ["-" if row[key] is None else f"{row[key]:.{digits}f}" for key, _, digits in _COLUMNS]
        lines.append(f"| {row['pattern']} {row['factor']:g}x | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Times to the first token and tokens per second over the working set; PNG or SVG, by the suffix of `path`."""
    from matplotlib.figure import Figure  # only a picture needs it

    figure = Figure(figsize=(10, 4), layout="constrained")
    times, rates = figure.subplots(1, 2)
    for pattern, colour in zip(PATTERNS, ("#c1440e", "#4a7ba6"), strict=True):
        mine = [row for row in rows if row["pattern"] == pattern]
        factors = [row["factor"] for row in mine]
        times.plot(factors, [row["ttft_p99_ms"] for row in mine], "o-", color=colour, label=f"{pattern}, p99")
        times.plot(factors, [row["ttft_p50_ms"] for row in mine], "o:", color=colour, label=f"{pattern}, p50")
        rates.plot(factors, [row["tokens_per_s"] for row in mine], "o-", color=colour, label=pattern)
    for axes, label in ((times, "time to first token, ms"), (rates, "tokens per second")):
        axes.axvline(1.0, color="grey", linestyle=":")
        axes.set(xscale="log", xlabel="adapters asked for, over what fits on the device", ylabel=label)
        axes.set_xticks(sorted({row["factor"] for row in rows}))
        axes.set_xticklabels([f"{factor:g}" for factor in sorted({row["factor"] for row in rows})])
        axes.set_ylim(bottom=0)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=80, metadata={"Date": None} if path.suffix == ".svg" else None)


def _workload(arguments: argparse.Namespace) -> dict[str, Any]:
    told = vars(arguments).items()
    return {name: value for name, value in told if name not in ("out", "plot", "model", "quick")} | {
        "model": "random Llama, 25M parameters" if arguments.model is None else arguments.model.name
    }


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m load_tests.cliff", description=main.__doc__)
    parser.add_argument("--model", type=Path, metavar="DIR", help="a Llama (default: a random one, 25M parameters)")
    parser.add_argument("--quantize", default="none", choices=["none", "nf4", "int8"])
    parser.add_argument("--fits", type=int, default=8, metavar="N", help="adapters that fit on the device")
    parser.add_argument("--rank", type=int, default=8, help="of the adapters, LoRA on all linears")
    parser.add_argument("--factors", type=float, nargs="+", default=list(FACTORS), metavar="X", help="working sets")
    parser.add_argument("--streams", type=int, default=16, help="at once")
    parser.add_argument("--requests", type=int, default=96, help="of each working set in each round")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=32, help="that each request generates")
    parser.add_argument("--max-adapter-wait", type=float, default=2.0, metavar="SECONDS", help="the server's setting")
    parser.add_argument("--rounds", type=int, default=3, help="rounds measured, after one that warms up")
    parser.add_argument("--quick", action="store_true", help="a few requests, to see that all of it works")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the report as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it as .png or .svg")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.fits, arguments.streams, arguments.requests, arguments.max_tokens = 2, 4, 8, 4
        arguments.prompt_tokens, arguments.rounds, arguments.factors = 4, 1, [1.0, 2.0]
    return arguments


if __name__ == "__main__":
    sys.exit(main())

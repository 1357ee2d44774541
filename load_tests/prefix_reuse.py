"""`python -m load_tests.prefix_reuse`: what prefix reuse saves, and what small blocks cost, on this machine.

Requests of one long shared beginning and a short tail of their own come one after another; the time to the first token
is compared with reuse on and off, and so is the rate at which many short streams decode, for each block size asked for.
Owns this workload and its report. It drives engines in this process through their public surface; all variants take
turns within each round, so that a slow minute of the machine hits all alike.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from server.assemble import Server, assemble
from server.bench import machine, save_model
from server.engine.flight import GenerationRequest
from server.engine.sequence import Delta, SamplingParams
from server.ground.config import load


@dataclass(frozen=True, slots=True)
class Workload:
    num_shared_tokens: int  # with which every prompt of a round begins
    num_tail_tokens: int  # of each prompt's own
    num_requests: int  # per round and adapter, one after another
    num_streams: int  # at once, for the decode rate
    num_decoded_tokens: int  # of each stream


@dataclass(frozen=True, slots=True)
class Variant:
    block_size: int
    prefix_reuse: str  # on, off


@dataclass(slots=True)
class Samples:
    """What was measured of one variant, over all rounds. Times in seconds."""

    cold_s: list[float] = field(default_factory=list)  # to the first token of a round's first request of an adapter
    warm_s: list[float] = field(default_factory=list)  # to the first token of the others
    tokens_per_s: list[float] = field(default_factory=list)  # decoded by all streams together, one item per round
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints a table, and writes JSON where asked. Returns the exit code."""
    arguments = _arguments(argv)
    workload = Workload(
        num_shared_tokens=arguments.shared_tokens,
        num_tail_tokens=arguments.tail_tokens,
        num_requests=arguments.requests,
        num_streams=arguments.streams,
        num_decoded_tokens=arguments.decode_tokens,
    )
    variants = [Variant(size, reuse) for size in arguments.block_sizes for reuse in ("on", "off")]
    with tempfile.TemporaryDirectory() as scratch:
        samples = _measure(Path(scratch), variants, workload, arguments)
    rows = [_row(variant, of_variant) for variant, of_variant in samples.items()]
    print(_table(rows))
    if arguments.out:
        report: dict[str, Any] = {"machine": machine(arguments.device), "command": _command()}
        report |= {"workload": asdict(workload), "model": arguments.model or "random Llama"}
        report |= {"quantize": arguments.quantize, "rows": rows}
        Path(arguments.out).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        print(f"written to {arguments.out}")
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m load_tests.prefix_reuse", description=main.__doc__)
    parser.add_argument("--model", metavar="MODEL", help="folder or hub id (default: a random Llama, 25M parameters)")
    parser.add_argument("--adapters", metavar="DIR", help="send every request to each adapter in DIR, not to the base")
    parser.add_argument("--quantize", default="none", choices=["none", "nf4", "int8"])
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "cpu"])
    parser.add_argument("--block-sizes", type=int, nargs="+", default=[128, 64, 32, 16], metavar="N")
    parser.add_argument("--shared-tokens", type=int, default=500, help="length of the shared beginning")
    parser.add_argument("--tail-tokens", type=int, default=20, help="length of what each prompt adds")
    parser.add_argument("--requests", type=int, default=8, help="requests per round and adapter, the first one cold")
    parser.add_argument("--streams", type=int, default=16, help="streams at once, for the decode rate")
    parser.add_argument("--decode-tokens", type=int, default=64, help="tokens that each of them generates")
    parser.add_argument("--rounds", type=int, default=5, help="rounds measured, after one that warms up")
    parser.add_argument("--out", metavar="FILE", help="write the report as JSON")
    return parser.parse_args(argv)


def _measure(
    scratch: Path, variants: Sequence[Variant], workload: Workload, arguments: argparse.Namespace
) -> dict[Variant, Samples]:
    model = arguments.model or str(_random_llama(scratch / "model"))
    with ExitStack() as stack:
        servers: dict[Variant, Server] = {}
        for variant in variants:
            store = scratch / f"store-{variant.block_size}-{variant.prefix_reuse}"
            servers[variant] = assemble(load(_flags(model, store, variant, workload, arguments)))
            stack.callback(servers[variant].close)
        vocab_size = len(AutoTokenizer.from_pretrained(model))
        samples = {variant: Samples() for variant in variants}
        for number in range(arguments.rounds + 1):
            for variant, server in servers.items():
                sink = samples[variant] if number else Samples()
                asyncio.run(_round(server, workload, random.Random(number), vocab_size, sink))
            print(f"round {number} of {arguments.rounds}{'' if number else ' (warm-up)'}", file=sys.stderr)
    return samples


def _flags(
    model: str, store: Path, variant: Variant, workload: Workload, arguments: argparse.Namespace
) -> dict[str, str]:
    flags = {
        "model": model,
        "store": str(store),
        "quantize": arguments.quantize,
        "device": arguments.device,
        "block_size": str(variant.block_size),
        "prefix_reuse": variant.prefix_reuse,
        "max_sequences": str(max(workload.num_streams, 16)),
        "kv_memory": "512MiB" if arguments.device == "cpu" or not torch.cuda.is_available() else "4GiB",
    }
    return flags | ({} if arguments.adapters is None else {"adapters": arguments.adapters})


async def _round(server: Server, workload: Workload, dice: random.Random, vocab_size: int, sink: Samples) -> None:
    names: list[str | None] = [info.name for info in server.registry.list()] or [None]
    shared = _tokens(dice, workload.num_shared_tokens, vocab_size)  # new in each round, and so cold at its beginning
    for number in range(workload.num_requests):
        for name in names:
            prompt = shared + _tokens(dice, workload.num_tail_tokens, vocab_size)
            first, wait_s = await _first_delta(server, name, prompt)
            (sink.warm_s if number else sink.cold_s).append(wait_s)
            sink.num_prompt_tokens += first.num_prompt_tokens
            sink.num_cached_tokens += first.num_cached_tokens
    started = time.perf_counter()
    prompts = [_tokens(dice, 32, vocab_size) for _ in range(workload.num_streams)]
    num_tokens = workload.num_decoded_tokens
    await asyncio.gather(*(_all_deltas(server, names[i % len(names)], p, num_tokens) for i, p in enumerate(prompts)))
    sink.tokens_per_s.append(workload.num_streams * num_tokens / (time.perf_counter() - started))


def _tokens(dice: random.Random, count: int, vocab_size: int) -> tuple[int, ...]:
    return tuple(dice.randrange(8, vocab_size) for _ in range(count))


async def _first_delta(server: Server, name: str | None, prompt: tuple[int, ...]) -> tuple[Delta, float]:
    """The first delta of a request, and the seconds from its submission to it."""
    started = time.perf_counter()
    (first,) = await _all_deltas(server, name, prompt, 1)
    return first, time.perf_counter() - started


async def _all_deltas(server: Server, name: str | None, prompt: tuple[int, ...], num_tokens: int) -> list[Delta]:
    lease = None if name is None else server.registry.lease(name)
    params = SamplingParams(num_tokens, temperature=0.0, ignore_eos=True)
    request = GenerationRequest(f"{time.monotonic_ns()}-{prompt[-1]}", prompt, params, lease)
    deltas = [delta async for delta in server.engine.submit(request)]
    if deltas[-1].error is not None:
        raise deltas[-1].error
    return deltas


def _row(variant: Variant, samples: Samples) -> dict[str, Any]:
    return {
        **asdict(variant),
        "hit_rate": samples.num_cached_tokens / samples.num_prompt_tokens,
        "cold_ttft_ms": 1000 * statistics.median(samples.cold_s),
        "warm_ttft_ms": 1000 * statistics.median(samples.warm_s) if samples.warm_s else None,
        "warm_ttft_p90_ms": 1000 * statistics.quantiles(samples.warm_s, n=10)[-1] if len(samples.warm_s) > 1 else None,
        "decode_tokens_per_s": statistics.median(samples.tokens_per_s),
        "decode_rounds": samples.tokens_per_s,
    }


def _table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        f"{'block':>6} {'reuse':>6} {'hit rate':>9} {'cold TTFT':>10} {'warm TTFT':>10} {'gain':>6} {'decode':>12}"
    ]
    off = {row["block_size"]: row["warm_ttft_ms"] for row in rows if row["prefix_reuse"] == "off"}
    for row in rows:
        warm = row["warm_ttft_ms"] or float("nan")
        gain = (off[row["block_size"]] or float("nan")) / warm
        lines.append(
            f"{row['block_size']:>6} {row['prefix_reuse']:>6} {row['hit_rate']:>9.2f} {row['cold_ttft_ms']:>7.1f} ms "
            f"{warm:>7.1f} ms {gain:>5.1f}x {row['decode_tokens_per_s']:>8.0f} t/s"
        )
    return "\n".join(lines)


def _random_llama(folder: Path) -> Path:
    save_model(folder)
    return folder


def _command() -> str:
    return " ".join(["python -m load_tests.prefix_reuse", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())

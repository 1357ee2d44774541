"""`python -m load_tests.step_parts`: where the time of a decode step goes on a CPU, part by part.

The functions of an assembled server that do a part are each replaced, while this runs, by one that also reads the CPU
time of the engine's thread; what a part spends inside another counts as the other's. So nothing of this is in a server,
and a busy machine changes little. Arithmetic is kept on that thread. Owns the parts' names and the report.
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from load_tests.engine_parts import mixes
from load_tests.engine_steps import Streams, watched
from load_tests.many_adapters import write
from load_tests.own_server import Shape, make_loras
from server.assemble import Server, assemble
from server.bench import machine, save_model
from server.engine import engine as engine_module
from server.engine import runner as runner_module
from server.engine.chosen import Chosen
from server.engine.engine import StepReport
from server.engine.flight import Flight
from server.ground.config import load
from server.model import sites as sites_module
from server.model.fused import FusedLinear, FusedNative, SharedNative
from server.model.sites import BaseSite
from server.ops import StepKernels, native

SCHEMA = "graftserve-step-parts/1"
_LOW_RANK = ("embed_low_rank", "expand", "expand_stack", "scale", "scale_shift", "shift", "shrink", "shrink_stack")
_LABELS = ("none", "1 LoRA", "distinct LoRA")


class Stopwatch:
    """CPU seconds of the thread that runs the parts, by part; of nested ones, each counts its own."""

    def __init__(self) -> None:
        self.spent_s: defaultdict[str, float] = defaultdict(float)
        self._inner_s: list[float] = []

    def timing(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            self._inner_s.append(0.0)
            begun_s = time.thread_time()
            try:
                return function(*arguments, **options)
            finally:
                took_s = time.thread_time() - begun_s
                self.spent_s[part] += took_s - self._inner_s.pop()
                if self._inner_s:
                    self._inner_s[-1] += took_s

        return timed


def parts_of(server: Server) -> Iterator[tuple[str, Any, str]]:
    """(part, who has its function, the function's name), in the order of a step."""
    engine: Any = server.engine
    yield "schedule", engine, "_schedule"
    yield "the engine's own", engine, "_turn"
    yield "launch: the rest", server.runner, "run"
    yield "launch: pack", runner_module, "PackedStep"
    yield "launch: collect the edits", server.adapters, "batch"
    yield "launch: collect the edits", server.adapters, "tables"
    yield "forward: the rest", server.base, "forward"
    yield "forward: base, its norms included", BaseSite, "_plain"
    yield "forward: base, its norms included", FusedLinear, "__call__"
    yield "forward: base, its norms included", FusedNative, "__call__"
    yield "forward: base, its norms included", SharedNative, "__call__"
    yield "forward: whole layers, adapters included", native.DecodeLayer, "__call__"
    for name in _LOW_RANK:
        yield "forward: adapters", sites_module, name
    yield "forward: adapters", StepKernels, "finish"
    yield "forward: adapters", StepKernels, "scale"
    yield "forward: attention", server.base.attention, "forward"
    yield "forward: attention", server.base.attention, "decode"
    yield "forward: attention", server.base.attention, "decode_natively"
    yield "choose", engine_module, "choose"
    yield "read", Chosen, "read"
    yield "commit", engine._scheduler, "commit"
    yield "text and deltas", Flight, "advance"
    yield "hand-over", engine, "_hand_over"


@contextmanager
def timed_parts(server: Server, watch: Stopwatch) -> Iterator[None]:
    """Has the watch time all parts of the server while the block runs."""
    with ExitStack() as stack:
        for part, owner, name in parts_of(server):
            is_own = name in vars(owner)
            given = getattr(owner, name)
            setattr(owner, name, watch.timing(part, given))
            stack.callback(*((setattr, owner, name, given) if is_own else (delattr, owner, name)))
        yield


def measure(server: Server, streams: Streams) -> dict[str, float]:
    """Milliseconds of each part in a decode step of all streams: medians over the steps."""
    watch, seen = Stopwatch(), list[tuple[bool, defaultdict[str, float]]]()
    num_streams = len(streams.adapters)

    def after_step(report: StepReport) -> None:
        seen.append((report.num_tokens == report.num_sequences == num_streams, watch.spent_s.copy()))

    with timed_parts(server, watch), watched(server.engine, after_step):
        asyncio.run(streams.read(server))
    pairs = [(before, after) for (was, before), (is_so, after) in pairwise(seen) if was and is_so]
    names = dict.fromkeys(part for part, _, _ in parts_of(server))
    return {name: 1000 * statistics.median(after[name] - before[name] for before, after in pairs) for name in names}


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints a table, and writes JSON where asked. Returns the exit code."""
    arguments = _arguments(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        columns = _columns(Path(scratch), arguments)
    print(table(columns))
    if arguments.out is not None:
        told = {name: value for name, value in vars(arguments).items() if name != "out"}
        report = {"schema": SCHEMA, "machine": machine("cpu"), "workload": told, "ms": columns}
        arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def _columns(scratch: Path, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """The parts' milliseconds by mix of adapters: medians of the rounds."""
    save_model(scratch / "model")
    write(make_loras(Shape.of(scratch / "model"), "lora", arguments.streams, arguments.rank), scratch / "adapters")
    flags = {
        "model": str(scratch / "model"), "store": str(scratch / "store"), "adapters": str(scratch / "adapters"),
        "quantize": arguments.quantize, "dtype": "bfloat16", "device": "cpu", "prefix_reuse": "off",
        "max_sequences": str(arguments.streams), "kv_memory": "256MiB",
    }  # fmt: skip
    server = assemble(load(flags))
    try:
        for streams in _mixed(arguments).values():
            streams.run(server)  # so that adapters are there, and all sequences decode together
        rounds = [_round(server, arguments) for _ in range(arguments.rounds)]
    finally:
        server.close()
    return {
        label: {part: statistics.median(one[label][part] for one in rounds) for part in parts}
        for label, parts in rounds[0].items()
    }


def _round(server: Server, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    return {label: measure(server, streams) for label, streams in _mixed(arguments).items()}


def _mixed(arguments: argparse.Namespace) -> dict[str, Streams]:
    """The streams of each mix of adapters that so many sequences can have."""
    found, mixed = {}, mixes(arguments.streams)
    for label in [label for label in _LABELS if label in mixed]:
        names = [name and f"lora-{int(name.partition('-')[2]):04d}" for name in mixed[label]]
        found[label] = Streams(names, arguments.prompt_tokens, arguments.tokens)
    return found


def table(columns: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown: a row for each part, a column for each mix, in milliseconds and of all."""
    totals = {label: sum(parts.values()) for label, parts in columns.items()}
    lines = ["| part | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for part in next(iter(columns.values())):
        cells = [f"{parts[part]:.2f} ({parts[part] / totals[label]:.0%})" for label, parts in columns.items()]
        lines.append(f"| {part} | {' | '.join(cells)} |")
    return "\n".join([*lines, f"| all | {' | '.join(f'{total:.2f}' for total in totals.values())} |"])


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m load_tests.step_parts", description=main.__doc__)
    parser.add_argument("--quantize", default="none", choices=["none", "nf4", "int8"])
    parser.add_argument("--streams", type=int, default=16, help="at once")
    parser.add_argument("--rank", type=int, default=8, help="of the adapters, on all linears")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32, help="of each answer")
    parser.add_argument("--rounds", type=int, default=3, help="rounds measured, after one that warms up")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the report as JSON")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())

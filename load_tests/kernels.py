"""Time of the adapters' kernels at the shapes of real models, beside other ways to compute the same.

    python -m load_tests.kernels --peers .peers --out load_tests/results/NAME.json     on a GPU
    python -m load_tests.kernels --peers .peers --quick                                anywhere, to see it work

Every way computes one site group: the edits of all its linears, applied to the base's outputs. On a GPU the calls are
captured in a CUDA graph and its replays timed, over several copies of the weights, so that neither Python nor the
cache is measured. Beside the time stand the bytes that must move (each distinct row, input and output once) and the
share of the bandwidth of a plain copy, measured here, that this makes. At the end stands what the rows say of the
targets (`kernel_targets`).

`--peers DIR` adds vLLM's and SGLang's kernels from their own packages (`peer_kernels`). `--way NAME=MODULE:FUNCTION`
adds another: FUNCTION(case) returns a function (x, y) that applies the edits to y (tokens, sum of d_out) in place. All
are checked before they are timed.
"""

import argparse
import importlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from load_tests.gpu_times import NUM_ROUNDS, seconds_of, speeds_of
from load_tests.kernel_cases import BATCHES, MODELS, QUICK_BATCHES, QUICK_MODEL, Batch, Case, Group, Model
from load_tests.kernel_targets import Layer, Row, Speeds, layers, targets
from load_tests.kernel_ways import WAYS, Run, TwoLaunches, Way
from load_tests.peer_kernels import Peers, found

CACHE_BYTES = 100 << 20  # more than a GPU's cache: so much do the copies of a group's weights take, read in turn
MAX_COPIES = 4  # where that is too few for it, the launches take longer than the bytes
FAILED = "failed"
# Of the sum that is added, relative to its size; float16 and bfloat16 are rounded twice by some ways.
LIMITS: Mapping[torch.dtype, float] = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 3e-2}


@dataclass(frozen=True, slots=True)
class Bench:
    """What is compared, and where."""

    models: Mapping[str, Model]
    batches: Sequence[Batch]
    ways: Sequence[Way]
    device: torch.device

    @property
    def is_timed(self) -> bool:
        """A time without a GPU would say nothing."""
        return self.device.type == "cuda"

    def dtype_of(self, way: Way) -> torch.dtype:
        """Triton's interpreter gets float32 right, and float16, but not bfloat16."""
        if self.is_timed:
            return torch.bfloat16
        return torch.float16 if way.is_half_only else torch.float32

    def places(self) -> Iterator[tuple[str, Batch, Group]]:
        """By batch first: if time runs out, what is there is whole layers of both models."""
        for batch in self.batches:
            for name, model in self.models.items():
                for group in model.groups:
                    yield name, batch, group


def error_of(run: Run, case: Case) -> float:
    """The run's error of what it changes, relative to its size, against float64."""
    y = case.y.clone()
    run(case.x, y)
    return float((y.double() - case.expected).norm() / (case.expected - case.y.double()).norm())


class Cases:
    """One group and batch: cases of equal shapes and other weights, made when they are wanted."""

    def __init__(self, bench: Bench, group: Group, batch: Batch) -> None:
        self._bench, self._group, self._batch = bench, group, batch
        self._made: dict[torch.dtype, list[Case]] = {}

    def of(self, dtype: torch.dtype) -> list[Case]:
        if dtype not in self._made:
            first = self._case(dtype, 0)
            num_copies = min(MAX_COPIES, max(2, -(-CACHE_BYTES // first.moved_bytes))) if self._bench.is_timed else 1
            self._made[dtype] = [first, *(self._case(dtype, seed) for seed in range(1, num_copies))]
        return self._made[dtype]

    def _case(self, dtype: torch.dtype, seed: int) -> Case:
        return Case(self._group, self._batch, dtype, self._bench.device, seed)


def measure(bench: Bench, model: str, batch: Batch, group: Group, speeds: Speeds | None) -> list[Row]:
    cases, rows = Cases(bench, group, batch), []
    for way in bench.ways:
        own = cases.of(bench.dtype_of(way))
        row = Row(
            model, group.name, batch.name, way.name, way.is_peer, batch.has_mixed_ranks,
            own[0].moved_bytes, own[0].num_flops, not_served=way.refusal(group, batch),
        )  # fmt: skip
        rows.append(row if row.not_served else _measured(row, way, own, speeds))
    return rows


def _measured(row: Row, way: Way, cases: Sequence[Case], speeds: Speeds | None) -> Row:
    try:
        error = error_of(way.make(cases[0]), cases[0])
        row = replace(row, relative_error=error, is_right=error < LIMITS[cases[0].dtype])
        return row if speeds is None else _timed(row, way, cases, speeds)
    except Exception as failure:
        # A kernel that this Triton does not compile must not cost the rest of the run.
        return replace(row, not_served=f"{FAILED}: {type(failure).__name__}: {failure}"[:300])


def _timed(row: Row, way: Way, cases: Sequence[Case], speeds: Speeds) -> Row:
    places = [_Place(way.make(case), case.x, case.y.clone()) for case in cases]  # y is changed; the case is not
    halves = [place for place in places if isinstance(place.run, TwoLaunches)]
    # Other ways launch hundreds of kernels, beside which a graph's own start is nothing.
    num_rounds = NUM_ROUNDS if halves else 1
    group_s = seconds_of([place.whole for place in places], num_rounds)
    row = replace(row, group_s=group_s, copy_share=row.moved_bytes / group_s / speeds.copy_bytes_per_s)
    if not halves:
        return row
    shrink_s = seconds_of([place.shrink for place in halves], num_rounds)
    for place in halves:
        place.shrink()  # into memory that is no graph's
    return replace(row, shrink_s=shrink_s, expand_s=seconds_of([place.expand for place in halves], num_rounds))


@dataclass(slots=True)
class _Place:
    """A run with its input and output."""

    run: Run
    x: torch.Tensor
    y: torch.Tensor
    h: Any = None

    def whole(self) -> None:
        self.run(self.x, self.y)

    def shrink(self) -> None:
        assert isinstance(self.run, TwoLaunches)
        self.h = self.run.shrink(self.x)

    def expand(self) -> None:
        """Of what the last `shrink` left."""
        assert isinstance(self.run, TwoLaunches)
        self.run.expand(self.h, self.y)


def line(row: Row) -> str:
    text = f"{row.model:12} {row.group:8} {row.batch:34} {row.way:20}"
    if row.not_served:
        return f"{text} not served: {row.not_served}"
    text += f" error {row.relative_error:.0e}"
    if row.group_s is None or row.copy_share is None:
        return text
    parts = [f"{part * 1e6:7.1f}" for part in (row.shrink_s, row.expand_s) if part is not None]
    halves = f" ({' + '.join(parts)})" if parts else ""
    return f"{text} {row.group_s * 1e6:8.1f} us a group{halves}  {row.copy_share:5.0%} of a copy"


def main(arguments: Sequence[str]) -> int:
    options = _options(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() and not options.quick else "cpu")
    if device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    peers = found(options.peers)
    ways = (*WAYS, *peers.ways, *map(_named_way, options.way))
    if device.type == "cpu":
        bench = Bench({"quick": QUICK_MODEL}, QUICK_BATCHES, ways, device)
    else:
        chosen = {name: MODELS[name] for name in options.model or MODELS}
        bench = Bench(chosen, BATCHES, ways, device)
    return _report(_run(bench, peers, options.seconds, options.out))


def _run(bench: Bench, peers: Peers, seconds: float, out: Path | None) -> dict[str, Any]:
    """All places that there is time for; the file is written after each, so that a run that is ended leaves them."""
    started = time.monotonic()
    speeds = speeds_of(bench.device) if bench.is_timed else None
    rows: list[Row] = []
    skipped: list[str] = []
    result: dict[str, Any] = {}
    for model, batch, group in bench.places():
        if time.monotonic() - started > seconds:
            skipped.append(f"{model}, {group.name}, {batch.name}")
        else:
            measured = measure(bench, model, batch, group, speeds)
            for row in measured:
                print(line(row), flush=True)
            rows += measured
        result = _result(bench, peers, speeds, rows, skipped) | {"seconds": time.monotonic() - started}
        if out is not None:
            out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def _result(
    bench: Bench, peers: Peers, speeds: Speeds | None, rows: Sequence[Row], skipped: Sequence[str]
) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if bench.is_timed else platform.processor() or platform.machine()
    num_groups = {name: len(model.groups) for name, model in bench.models.items()}
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "device": name, "torch": torch.__version__,
        "triton": importlib.import_module("triton").__version__, "peers": dict(peers.versions),
        "not_loaded": list(peers.failures),
        "speeds": speeds and asdict(speeds), "targets": targets(rows, num_groups, speeds),
        "layers": [asdict(layer) | {"num_layers": bench.models[layer.model].num_layers,
                                    "copy_share": _layer_share(layer, speeds)}
                   for layer in layers(rows, num_groups)],
        "rows": [asdict(row) for row in rows], "skipped": list(skipped),
    }  # fmt: skip


def _layer_share(layer: Layer, speeds: Speeds | None) -> float | None:
    if layer.layer_s is None or speeds is None:
        return None
    return layer.moved_bytes / layer.layer_s / speeds.copy_bytes_per_s


def _report(result: Mapping[str, Any]) -> int:
    for name, version in result["peers"].items():
        print(f"{name} {version}" if version else f"{name}: not found; see docs/kernels.md, --peers")
    for layer in result["layers"]:
        if layer["layer_s"] is not None:
            all_s = layer["layer_s"] * layer["num_layers"]
            print(f"{layer['model']:12} {layer['batch']:34} {layer['way']:20} {layer['layer_s'] * 1e6:8.1f} us a layer"
                  f"  {all_s * 1e3:7.2f} ms in all  {layer['copy_share']:5.0%} of a copy")  # fmt: skip
    for name, target in result["targets"].items():
        outcome = {None: "not measured", True: "met", False: "MISSED"}[target["met"]]
        least = "" if target["least"] is None else f"; least {target['least']:.2f}"
        print(f"{name}: {outcome} ({target['num_missed']} of {target['num_compared']} missed{least})")
    for place in result["skipped"]:
        print(f"no time left: {place}")
    wrong = [row for row in result["rows"] if row["is_right"] is False]
    failed = [row for row in result["rows"] if (row["not_served"] or "").startswith(FAILED)]
    for text, rows in (("wrong results", wrong), ("failed", failed)):
        if rows:
            places = (f"{row['way']} ({row['group']}, {row['batch']})" for row in rows)
            print(f"{text}: {', '.join(places)}", file=sys.stderr)
    for failure in result["not_loaded"]:
        print(f"not loaded: {failure}", file=sys.stderr)
    # What another server's kernels get wrong is said, and no failure of ours.
    return 1 if any(not row["is_peer"] for row in (*wrong, *failed)) else 0


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m load_tests.kernels", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", action="append", choices=sorted(MODELS), help="one of them only; may be repeated")
    parser.add_argument("--quick", action="store_true", help="small shapes in Triton's interpreter; no times")
    parser.add_argument("--way", action="append", default=[], metavar="NAME=MODULE:FUNCTION", help="one more way")
    parser.add_argument("--peers", action="append", default=[], type=Path, metavar="DIR",
                        help="where vLLM's or SGLang's package lies; may be repeated")  # fmt: skip
    parser.add_argument(
        "--seconds", type=float, default=360.0, help="begin nothing new after that; default %(default)s"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the results here as JSON")
    return parser.parse_args(arguments)


def _named_way(text: str) -> Way:
    name, _, place = text.partition("=")
    module, _, function = place.partition(":")
    make: Callable[[Case], Run] = getattr(importlib.import_module(module), function)
    return Way(name, make)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

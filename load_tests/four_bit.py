"""Time of the products of a 4-bit base at the shapes of real models: bitsandbytes', ours, and a 16-bit one's.

    python -m load_tests.four_bit --out load_tests/results/NAME.json     on a GPU, minutes
    python -m load_tests.four_bit --quick                                anywhere, to see it work

Every way computes the products of one site group, for 1 to 128 tokens. On a GPU the calls are captured in a CUDA graph
and its replays timed, over several copies of the weights, so that neither Python nor the cache is measured. Beside the
time stands the share of the bandwidth of a plain copy, measured here, that the bytes of the 4-bit weight and of its
inputs and outputs make. Results are compared with float64 before they are timed. At the end stands, for each model and
number of tokens, what all products of a layer take. `--tilings` also tries other ways to cut the same product.
"""

import argparse
import importlib
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from load_tests.gpu_times import seconds_of, speeds_of
from load_tests.kernel_cases import MODELS, Group, Model

TOKENS = (1, 2, 4, 8, 16, 32, 64, 96, 128)
QUICK = {"quick": Model(1, (Group("q k v", 128, (128, 128)), Group("down", 384, (128,))))}
QUICK_TOKENS = (1, 5)
CACHE_BYTES = 100 << 20  # more than a GPU's cache: so much do the copies of a weight take, read in turn
MAX_COPIES = 24
BLOCK = 64
# Of the norm of the product, against float64: what 8 or 24 bits leave.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
OURS, THEIRS = "triton", "bitsandbytes"

Product = Callable[[torch.Tensor], object]


@dataclass(frozen=True, slots=True)
class Row:
    """One way, for one group and number of tokens. Times are None where nothing was timed."""

    model: str
    group: str
    num_tokens: int
    way: str
    moved_bytes: int
    relative_error: float
    is_right: bool
    group_s: float | None = None
    copy_share: float | None = None


class Weights:
    """The 4-bit weights of one group, double quantized, and as each way wants them."""

    def __init__(self, group: Group, device: torch.device, dtype: torch.dtype, seed: int) -> None:
        # Both import Triton, which must not be before TRITON_INTERPRET is set.
        self._library: Any = importlib.import_module("bitsandbytes")
        four_bit: Any = importlib.import_module("server.ops.four_bit")
        generator = torch.Generator(device).manual_seed(seed)
        self._members = []
        for width in group.widths:
            dense = torch.randn(width, group.d_in, generator=generator, device=device).to(dtype)
            quantize = self._library.functional.quantize_4bit
            self._members.append(quantize(dense, blocksize=BLOCK, compress_statistics=True, quant_type="nf4"))
        self.packed = four_bit.FourBitWeight.joined([self._packed(four_bit, *member) for member in self._members])
        self._tiling = four_bit.Tiling

    @staticmethod
    def _packed(four_bit: Any, codes: torch.Tensor, state: Any) -> Any:
        d_out, d_in = state.shape
        first = state.state2.absmax
        seconds = torch.stack([first, state.offset.expand_as(first)], dim=1)
        rows, scales = codes.view(d_out, d_in // 2), state.absmax.view(d_out, -1)
        return four_bit.FourBitWeight.packed(rows, state.code, scales, state.state2.code, seconds)

    @property
    def num_bytes(self) -> int:
        return int(self.packed.num_bytes)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        dequantize = self._library.functional.dequantize_4bit
        return torch.cat([dequantize(codes, state) for codes, state in self._members]).to(dtype)

    def by_bitsandbytes(self) -> Product:
        return lambda x: [self._library.matmul_4bit(x, codes, quant_state=state) for codes, state in self._members]

    def by_triton(self, tiling: tuple[int, int, int, int] | None = None) -> Product:
        chosen = None if tiling is None else self._tiling(*tiling)
        return lambda x: self.packed.product(x, None, chosen)

    def in_16_bits(self) -> Product:
        dense = self.dense(torch.bfloat16)
        return lambda x: F.linear(x, dense)


def ways(tilings: Sequence[tuple[int, int, int, int]], *, is_timed: bool) -> Mapping[str, Callable[[Weights], Product]]:
    """By name. The interpreter gets 16 bits wrong, so there is no such product without a GPU."""

    def tiled(tiling: tuple[int, int, int, int]) -> Callable[[Weights], Product]:
        return lambda weights: weights.by_triton(tiling)

    found = {THEIRS: Weights.by_bitsandbytes, OURS: Weights.by_triton}
    in_16_bits = {"16 bits": Weights.in_16_bits} if is_timed else {}
    return {**found, **in_16_bits, **{f"triton {'x'.join(map(str, tiling))}": tiled(tiling) for tiling in tilings}}


def every_tiling() -> list[tuple[int, int, int, int]]:
    """Outputs and warps of a program, stages, parts of the inputs."""
    cuts = ((64, 4), (128, 4), (128, 8))
    return [(*cut, stages, parts) for cut, stages, parts in itertools.product(cuts, (3, 5), (1, 2, 4, 8))]


def measure(
    model: str, group: Group, num_tokens: Sequence[int], named: Mapping[str, Callable[[Weights], Product]],
    device: torch.device, copy_bytes_per_s: float | None,
) -> Iterator[Row]:  # fmt: skip
    dtype = torch.float32 if copy_bytes_per_s is None else torch.bfloat16
    first = Weights(group, device, dtype, 0)
    num_copies = 1 if copy_bytes_per_s is None else min(MAX_COPIES, max(2, -(-CACHE_BYTES // first.num_bytes)))
    copies = [first, *(Weights(group, device, dtype, seed) for seed in range(1, num_copies))]
    exact = first.dense(torch.float32).double()
    for name, make in named.items():
        products = [make(weights) for weights in copies]
        for num in num_tokens:
            x = torch.randn(num, group.d_in, generator=torch.Generator().manual_seed(num)).to(device, dtype)
            error = _error(products[0](x), x, exact)
            moved = first.num_bytes + x.element_size() * num * (group.d_in + sum(group.widths))
            group_s = None
            if copy_bytes_per_s is not None:
                group_s = seconds_of([lambda product=product, x=x: product(x) for product in products])  # type: ignore[misc]
            share = None if group_s is None or copy_bytes_per_s is None else moved / group_s / copy_bytes_per_s
            yield Row(model, group.name, num, name, moved, error, error < LIMITS[dtype], group_s, share)


def _error(found: object, x: torch.Tensor, weight: torch.Tensor) -> float:
    y = torch.cat(found, dim=-1) if isinstance(found, list) else found
    assert isinstance(y, torch.Tensor)
    expected = x.double() @ weight.t()
    return float((y.double() - expected).norm() / expected.norm())


def layers(rows: Sequence[Row], models: Mapping[str, Model]) -> list[dict[str, Any]]:
    """What all groups of a layer take in one way, where all have been timed; the share is that of their bytes."""
    found = []
    for model, num_tokens, way in dict.fromkeys((row.model, row.num_tokens, row.way) for row in rows):
        own = [row for row in rows if (row.model, row.num_tokens, row.way) == (model, num_tokens, way)]
        times = [row.group_s for row in own if row.group_s is not None]
        if len(times) == len(models[model].groups):
            share_s = sum(row.group_s * row.copy_share for row in own if row.group_s and row.copy_share)
            layer = {"model": model, "num_tokens": num_tokens, "way": way, "layer_s": sum(times)}
            found.append({**layer, "copy_share": share_s / sum(times)})
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints, and writes JSON where asked. Returns 1 if a product of ours is wrong."""
    options = _options(arguments)
    is_timed = torch.cuda.is_available() and not options.quick
    if not is_timed:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    device = torch.device("cuda" if is_timed else "cpu")
    models = {name: MODELS[name] for name in options.model or MODELS} if is_timed else QUICK
    speeds = speeds_of(device) if is_timed else None
    tilings = (every_tiling() if is_timed else [(128, 8, 3, 2)]) if options.tilings else []
    result: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if is_timed else "cpu", "torch": torch.__version__,
        "triton": importlib.import_module("triton").__version__,
        "bitsandbytes": importlib.import_module("bitsandbytes").__version__, "speeds": speeds and asdict(speeds),
    }  # fmt: skip
    rows: list[Row] = []
    skipped: list[str] = []
    started_s = time.monotonic()
    for model, group in [(name, group) for name in models for group in models[name].groups]:
        if time.monotonic() - started_s > options.seconds:
            skipped.append(f"{model}, {group.name}")
            continue
        num_tokens = TOKENS if is_timed else QUICK_TOKENS
        copy_bytes_per_s = None if speeds is None else speeds.copy_bytes_per_s
        for row in measure(model, group, num_tokens, ways(tilings, is_timed=is_timed), device, copy_bytes_per_s):
            rows.append(row)
            print(line(row), flush=True)
        result |= {"rows": [asdict(row) for row in rows], "layers": layers(rows, models), "skipped": skipped}
        if options.out is not None:  # after each group, so that a run that is ended leaves what it has
            options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for layer in layers(rows, models):
        print(f"{layer['model']:12} {layer['num_tokens']:4} tokens  {layer['way']:20} {layer['layer_s'] * 1e6:8.1f} us "
              f"a layer  {layer['copy_share']:5.0%} of a copy")  # fmt: skip
    for place in skipped:
        print(f"no time left: {place}")
    wrong = sorted({f"{row.way} ({row.group}, {row.num_tokens} tokens)" for row in rows if not row.is_right})
    if wrong:
        print(f"wrong results: {', '.join(wrong)}", file=sys.stderr)
    return 1 if any(not row.is_right and row.way.startswith(OURS) for row in rows) else 0


def line(row: Row) -> str:
    text = f"{row.model:12} {row.group:8} {row.num_tokens:4} tokens  {row.way:20} error {row.relative_error:.0e}"
    if row.group_s is None or row.copy_share is None:
        return text
    return f"{text} {row.group_s * 1e6:8.1f} us  {row.copy_share:5.0%} of a copy"


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m load_tests.four_bit", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", action="append", choices=sorted(MODELS), help="one of them only; may be repeated")
    parser.add_argument("--quick", action="store_true", help="small shapes in Triton's interpreter; no times")
    parser.add_argument("--tilings", action="store_true", help="other ways to cut our product, too")
    parser.add_argument("--seconds", type=float, default=120.0, help="begin no group after that; default %(default)s")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the results here as JSON")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())

"""`python -m load_tests.whole_engine`: the whole engine on a base of a real model's shape, with random weights.

    python -m load_tests.whole_engine --shape llama-3.1-8b --out load_tests/results/NAME.json   on a GPU, 10 minutes
    python -m load_tests.whole_engine --shape tiny                                              anywhere

A decode's time is compared with that of the bytes which it cannot avoid to move: the base's weights, the rank rows of
the batch's distinct adapters, and the keys and values of its tokens, at the speed of a plain copy that is measured in
the same run. Times of steps are medians of what the engine itself reports. What `--seconds` leaves no time for is
listed as skipped. Owns this workload and its report; `engine_peers` has what others take for the same.
"""

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from load_tests.engine_parts import PARTS, Setting, copy_bandwidth, names_of
from load_tests.engine_peers import peers
from load_tests.random_base import SHAPES, RandomBase
from server.assemble import Server, assemble
from server.bench import machine
from server.ground.config import load

SCHEMA = "graftserve-whole-engine/1"
_BASES = ("nf4", "int8", "none")
_SMALL = {"batches": [1, 4], "prompt_tokens": 8, "steps": 6, "prefills": [16, 32], "peer_batch": 4}
_LARGE = {"batches": [1, 8, 32, 64, 128], "prompt_tokens": 128, "steps": 32, "prefills": [512, 2048], "peer_batch": 32}
_BLOCK = 128  # tokens; a sequence's cache is at most this longer than it is
_ROOM = 1.25  # adapters in the device's slabs, to the bytes of their files
_LEAST_ROOM = 64 << 20


class Budget:
    """Seconds for all, of which each base gets a part; the first the largest."""

    def __init__(self, seconds: float, num_bases: int) -> None:
        self._end_s = time.monotonic() + seconds
        self._part_end_s = self._end_s
        self._num_left = num_bases

    def next_base(self) -> None:
        now_s = time.monotonic()
        self._part_end_s = now_s + max(self._end_s - now_s, 0.0) * min(1.0, 2 / (self._num_left + 1))
        self._num_left -= 1

    @property
    def is_spent(self) -> bool:
        return time.monotonic() > self._part_end_s


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints a table, and writes JSON where asked. Returns the exit code."""
    arguments = _arguments(argv)
    device = torch.device(arguments.device if arguments.device != "auto" else _best_device())
    report: dict[str, Any] = {"schema": SCHEMA, "machine": machine(device.type), "command": _command(argv)}
    report |= {"shape": arguments.shape, "rank": arguments.rank, "copy_bytes_per_s": copy_bandwidth(device)}
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        for found in _measured(Path(scratch), device, report["copy_bytes_per_s"], arguments):
            report |= found
            if arguments.out is not None:  # after each row, so that a run that is ended leaves what it has
                arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(table(report["rows"]))
    for text in report["skipped"]:
        print(f"skipped, as --seconds had run out: {text}", file=sys.stderr)
    return 0


def _measured(
    scratch: Path, device: torch.device, bandwidth: float, arguments: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """The report's part that grows: all rows so far."""
    budget = Budget(arguments.seconds, len(arguments.bases))
    begun_s = time.perf_counter()
    base = RandomBase(arguments.shape, device)
    base.save(scratch / "model")
    _save_adapters(base, scratch, arguments)
    made_s = time.perf_counter() - begun_s
    _say(f"{base.num_parameters / 1e6:,.0f} million parameters and their adapters, made in {made_s:.0f} s")
    rows: list[dict[str, Any]] = []
    skipped: list[str] = []
    for quantize in arguments.bases:
        budget.next_base()
        for row in _of_base(scratch, base, quantize, device, bandwidth, budget, arguments):
            rows.append({"base": quantize, **row})
            if "skipped" in row:
                skipped.append(f"{quantize}: {rows.pop()['skipped']}")
            else:
                _say(line(rows[-1]))
            yield {"made_s": made_s, "num_parameters": base.num_parameters, "rows": rows, "skipped": skipped}


def _save_adapters(base: RandomBase, scratch: Path, arguments: argparse.Namespace) -> None:
    for seed, name in enumerate(names_of(arguments.batches, arguments.peer_batch)):
        base.save_adapter(scratch / "adapters" / name, name.partition("-")[0], arguments.rank, seed)
    base.save_adapter(scratch / "cold", "lora", arguments.rank, -1)


def _of_base(
    scratch: Path,
    base: RandomBase,
    quantize: str,
    device: torch.device,
    bandwidth: float,
    budget: Budget,
    arguments: argparse.Namespace,
) -> Iterator[dict[str, Any]]:
    """The rows of one format of the base; a row of "skipped" for what there was no time for."""
    own = [part for part in arguments.parts if part in PARTS]
    if own and not budget.is_spent:
        with _serving(scratch, base, quantize, device, arguments) as (server, loaded_s):
            setting = Setting(
                server=server, cold=scratch / "cold", bandwidth=bandwidth, batches=tuple(arguments.batches),
                num_prompt_tokens=arguments.prompt_tokens, num_steps=arguments.steps,
                prefills=tuple(arguments.prefills),
            )  # fmt: skip
            yield {"part": "load", "seconds": loaded_s, "bytes": server.base.weight_bytes}
            yield from setting.load_adapters(names_of(arguments.batches, arguments.peer_batch))
            for part in own:
                for measure in PARTS[part](setting):
                    yield {"skipped": part} if budget.is_spent else {"part": part, **measure()}
    elif own:
        yield {"skipped": ", ".join(own)}
    if "peers" in arguments.parts:
        yield from peers(
            scratch, quantize, device, arguments.peer_batch, arguments.prompt_tokens, arguments.steps,
            is_spent=lambda: budget.is_spent,
        )  # fmt: skip


@contextmanager
def _serving(
    scratch: Path, base: RandomBase, quantize: str, device: torch.device, arguments: argparse.Namespace
) -> Iterator[tuple[Server, float]]:
    """A server of this process, and the seconds that it took to start."""
    begun_s = time.perf_counter()
    server = assemble(load(_flags(scratch, base, quantize, device, arguments)))
    try:
        yield server, time.perf_counter() - begun_s
    finally:
        server.close()
        del server
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _flags(
    scratch: Path, base: RandomBase, quantize: str, device: torch.device, arguments: argparse.Namespace
) -> dict[str, str]:
    """Room for all adapters and all tokens at once: this is about time."""
    adapter_bytes = sum(file.stat().st_size for file in scratch.glob("*/**/adapter_model.safetensors"))
    adapter_memory = int(_ROOM * adapter_bytes) + _LEAST_ROOM
    longest = max(arguments.prompt_tokens + 8 * arguments.steps, *arguments.prefills) + _BLOCK
    num_tokens = max(arguments.batches) * (arguments.prompt_tokens + 8 * arguments.steps + _BLOCK) + 2 * longest
    kv_memory = num_tokens * _token_bytes(base, device)
    return {
        "model": str(scratch / "model"), "store": str(scratch / f"store-{quantize}"), "quantize": quantize,
        "adapters": str(scratch / "adapters"), "device": device.type, "dtype": "bfloat16",
        "ops": "triton" if device.type == "cuda" else "reference", "prefix_reuse": "off",
        "four_bit_products": arguments.four_bit_products,
        "max_sequences": str(max(arguments.batches) + 1), "max_context": str(longest),
        "max_batch_tokens": str(max(2048, 2 * max(arguments.prefills))),
        "adapter_memory": str(adapter_memory), "host_memory": str(2 * adapter_memory), "kv_memory": str(kv_memory),
    }  # fmt: skip


def _token_bytes(base: RandomBase, device: torch.device) -> int:
    """Of the KV cache, for one token."""
    text: Any = base.config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    item_bytes = 4 if device.type == "cpu" else 2
    return int(2 * text.num_hidden_layers * text.num_key_value_heads * head_dim * item_bytes)


_COLUMNS = (
    ("base", "base"), ("part", "part"), ("batch", "batch"), ("adapters", "adapters"), ("ms_per_step", "ms a step"),
    ("tokens_per_s", "tokens/s"), ("must_move_mb", "MB to move"), ("share_of_copy", "of a copy"),
    ("of_base_only", "of base only"), ("note", ""),
)  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    titles = [title for _, title in _COLUMNS]
    return "\n".join([f"| {' | '.join(titles)} |", "|" + "---|" * len(titles), *map(line, rows)])


def line(row: dict[str, Any]) -> str:
    """One row of the table; what is in no column stands in the last one."""
    shown = {key for key, _ in _COLUMNS}
    note = ", ".join(f"{key} {_cell(value)}" for key, value in row.items() if key not in shown and value is not None)
    return f"| {' | '.join(_cell({**row, 'note': note}.get(key)) for key, _ in _COLUMNS)} |"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, dict):
        return "; ".join(f"{key} {_cell(item)}" for key, item in value.items())
    return f"{value:.3g}" if isinstance(value, float) and abs(value) < 100 else (
        f"{value:.0f}" if isinstance(value, float) else str(value)
    )  # fmt: skip


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _command(argv: Sequence[str] | None) -> str:
    return " ".join(["python -m load_tests.whole_engine", *(sys.argv[1:] if argv is None else argv)])


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    all_parts = [*PARTS, "peers"]
    parser = argparse.ArgumentParser(prog="python -m load_tests.whole_engine", description=main.__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3.1-8b")
    parser.add_argument("--bases", nargs="+", choices=_BASES, default=list(_BASES), help="formats of the base")
    parser.add_argument("--parts", nargs="+", choices=all_parts, default=all_parts)
    parser.add_argument("--batches", nargs="+", type=int, metavar="N", help="sequences that decode at once")
    parser.add_argument("--prefills", nargs="+", type=int, metavar="N", help="tokens of a prompt")
    parser.add_argument("--prompt-tokens", type=int, metavar="N", help="before what is decoded")
    parser.add_argument("--steps", type=int, metavar="N", help="that each figure of a decode is the median of")
    parser.add_argument("--peer-batch", type=int, metavar="N", help="sequences of PEFT and transformers")
    parser.add_argument("--rank", type=int, default=16, help="of LoRA and DoRA, on all linears")
    parser.add_argument("--four-bit-products", default="auto", choices=["auto", "triton"], help="as of `graft serve`")
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "cpu"])
    parser.add_argument("--seconds", type=float, default=420.0, help="begin no row after that; default %(default)s")
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="for the base and its adapters: 30 GB for the 8B")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the report as JSON")
    arguments = parser.parse_args(argv)
    for name, value in (_SMALL if arguments.shape == "tiny" else _LARGE).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    return arguments


if __name__ == "__main__":
    sys.exit(main())

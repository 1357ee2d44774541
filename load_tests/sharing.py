"""`python -m load_tests.sharing`: what a thousand adapters take that share tensors, beside a thousand that do not.

Llama-3.1-8B's shape without its weights: the sites are found on the meta device, where the adapters' buffer lies too,
so that nothing has its real size but the adapters, one at a time. Each goes the server's way: a file in PEFT's format
is lowered by its method, cast and hashed by the host tier, and given rows by the device tier, whose own counter is
read. The first is read from a file, and the others differ from it in the numbers that training changes. Plain LoRA
shares nothing, so its rows are asked of the allocator alone. Owns this measurement and its report.
"""

import argparse
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from server.adapters.device.device import DeviceTier
from server.adapters.device.rows import RowAllocator
from server.adapters.format.checkpoint import Checkpoint
from server.adapters.format.content import CONFIG_FILE, WEIGHTS_FILE
from server.adapters.host import HostTier
from server.adapters.lowering import lower
from server.adapters.method import Edit, Lowered
from server.bench import machine
from server.model.outline import Outline, outline
from server.model.pretrained import BaseOptions
from server.model.quantize import Quantization
from server.model.site import Site

SCHEMA = "graftserve-sharing/1"
LLAMA_8B: Mapping[str, int] = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip
_DTYPE = torch.bfloat16
_NUM_KEPT = 8  # adapters kept on the host at once, of which its bytes are told
_SLAB_ELEMENTS = 1 << 20
_DEVICE_BYTES = 1 << 45  # on the meta device room costs nothing
_STEPS = 32  # bfloat16 tells whole numbers below 256 apart: an adapter's number is written as two of them


@dataclass(frozen=True, slots=True)
class Taken:
    """What `num_adapters` take, in bytes."""

    num_adapters: int
    device_bytes: int  # the device tier's own counter: rank rows, and vectors as wide as a site
    rank_vector_bytes: int  # vectors of rank width on the device, which lie beside the buffer
    host_bytes: int  # the host tier's own counter, with the first `num_host_adapters` on it
    num_host_adapters: int


def shape_of(folder: Path, sizes: Mapping[str, int]) -> Outline:
    """The sites of a Llama of these sizes; its config goes into `folder`, and its weights nowhere."""
    fields: dict[str, Any] = {**sizes, "tie_word_embeddings": False}
    LlamaConfig(**fields).save_pretrained(folder)
    return outline(BaseOptions(str(folder), Quantization("none"), _DTYPE))


def linears(base: Outline, names: tuple[str, ...] = ()) -> dict[str, Site]:
    """The linears inside the layers, by path: what "all-linear" means; or those of these names alone."""
    inside = {path: site for path, site in base.table.products.items() if ".layers." in path}
    return {path: site for path, site in inside.items() if not names or path.endswith(names)}


def plain_bytes(sites: Mapping[str, Site], rank: int, count: int) -> int:
    """What the row allocator counts for `count` LoRA adapters of their own on all of `sites`."""
    widths: dict[int, int] = {}
    for site in sites.values():
        for width in (site.d_in, site.d_out):
            widths[width] = widths.get(width, 0) + rank
    allocator = RowAllocator(_DEVICE_BYTES // _DTYPE.itemsize, _SLAB_ELEMENTS)
    for _ in range(count):
        for width, num_rows in widths.items():
            allocator.allocate(width, num_rows)
    return allocator.used_elements * _DTYPE.itemsize


def lora_file(folder: Path, sites: Mapping[str, Site], rank: int) -> Path:
    """A LoRA on all of `sites`, with whatever optimizer it was trained."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for path, site in sites.items():
        tensors[f"{path}.lora_A.weight"] = torch.randn(rank, site.d_in, generator=generator).to(_DTYPE)
        tensors[f"{path}.lora_B.weight"] = torch.randn(site.d_out, rank, generator=generator).to(_DTYPE)
    return _saved(folder, {"peft_type": "LORA", "r": rank, "lora_alpha": rank}, tensors)


def vera_file(folder: Path, sites: Mapping[str, Site], rank: int) -> Path:
    """A VeRA on all of `sites`, whose projections are drawn from its key."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for path, site in sites.items():
        tensors[f"{path}.vera_lambda_b"] = torch.randn(site.d_out, generator=generator)
        tensors[f"{path}.vera_lambda_d"] = torch.randn(rank, generator=generator)
    config = {"peft_type": "VERA", "r": rank, "save_projection": False, "projection_prng_key": 0}
    return _saved(folder, config, tensors)


def _saved(folder: Path, config: Mapping[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True)
    (folder / CONFIG_FILE).write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, folder / WEIGHTS_FILE)
    return folder


def _varied(edit: Edit, trained: Sequence[str], number: int) -> Edit:
    changed: dict[str, Any] = {name: _numbered(edit.tensors()[name], number) for name in trained}
    return replace(edit, **changed)


def variants(first: Lowered, trained: Sequence[str], count: int) -> Iterator[Lowered]:
    """`count` adapters that differ at every site, in the fields of the edits that are `trained`, and in no other."""
    for number in range(count):
        yield replace(
            first,
            edits={path: _varied(edit, trained, number) for path, edit in first.edits.items()},
        )


def _numbered(tensor: torch.Tensor, number: int) -> torch.Tensor:
    copy = tensor.clone()
    copy.view(-1)[:2] = torch.tensor([float(number // _STEPS), float(number % _STEPS)])
    return copy


def taken(base: Outline, adapters: Iterator[Lowered], told: Callable[[int], None] = lambda number: None) -> Taken:
    """Brings the adapters to the host and the device, one after another, and reads the counters of both."""
    host = HostTier(_DEVICE_BYTES, _DTYPE)
    device = DeviceTier(base.table, _DEVICE_BYTES, _DTYPE, torch.device("meta"))
    rank_vector_bytes = host_bytes = number = 0
    for number, lowered in enumerate(adapters, start=1):
        adapter = host.put(str(number), lowered)
        device.admit(str(number), adapter)
        middles = (m for edit in adapter.edits.values() for m in (edit.mid_scale, edit.mid_shift) if m is not None)
        rank_vector_bytes += sum(middle.tensor.nbytes for middle in middles)
        if number <= _NUM_KEPT:
            host_bytes = host.used_bytes
        else:
            host.drop(str(number))
        told(number)
    return Taken(number, device.used_bytes, rank_vector_bytes, host_bytes, min(number, _NUM_KEPT))


def measure(sizes: Mapping[str, int], lora_rank: int, vera_rank: int, count: int) -> dict[str, Any]:
    """LoRA-FA of one A, and VeRA of one key, each beside plain LoRA of the same rank on the same modules."""
    with tempfile.TemporaryDirectory() as scratch:
        base = shape_of(Path(scratch) / "base", sizes)
        # LoRA-FA freezes A, so adapters that began from one seed have one A; of VeRA only two vectors are trained.
        kinds = (
            ("lora-fa", ("q_proj", "v_proj"), lora_rank, lora_file, ("up",)),
            ("vera", (), vera_rank, vera_file, ("mid_scale", "up_scale")),
        )
        rows = []
        for kind, names, rank, make, trained in kinds:
            sites = linears(base, names)
            first = lower(Checkpoint.open(make(Path(scratch) / kind, sites, rank)), sites)
            rows.append(_row(base, sites, kind, rank, variants(first, trained, count)))
    return {"dtype": str(_DTYPE).removeprefix("torch."), "rows": rows}


def _row(base: Outline, sites: Mapping[str, Site], kind: str, rank: int, adapters: Iterator[Lowered]) -> dict[str, Any]:
    def told(number: int) -> None:
        if number % 100 == 0:
            print(f"{kind}: {number}", file=sys.stderr)

    begun = time.perf_counter()
    shared = taken(base, adapters, told)
    plain = plain_bytes(sites, rank, shared.num_adapters)
    device_bytes = shared.device_bytes + shared.rank_vector_bytes
    return {
        "method": kind,
        "rank": rank,
        "num_sites": len(sites),
        "num_adapters": shared.num_adapters,
        "device_bytes": shared.device_bytes,
        "rank_vector_bytes": shared.rank_vector_bytes,
        "plain_lora_device_bytes": plain,
        "times_smaller": round(plain / device_bytes, 2),
        "host_bytes": shared.host_bytes,
        "num_host_adapters": shared.num_host_adapters,
        "elapsed_s": round(time.perf_counter() - begun, 1),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints, and writes JSON where asked. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m load_tests.sharing", description=__doc__.partition("\n")[0])
    parser.add_argument("--adapters", type=int, default=1000, metavar="N", help="of each kind (default: 1,000)")
    parser.add_argument("--rank", type=int, default=8, metavar="R", help="of LoRA-FA (default: 8)")
    parser.add_argument("--vera-rank", type=int, default=256, metavar="R", help="of VeRA (default: 256)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="the report")
    arguments = parser.parse_args(argv)
    command = shlex.join(["python", "-m", "load_tests.sharing", *(sys.argv[1:] if argv is None else argv)])
    report = {"schema": SCHEMA, "machine": machine("cpu"), "command": command, "model": "Llama-3.1-8B, its shape"}
    report |= measure(LLAMA_8B, arguments.rank, arguments.vera_rank, arguments.adapters)
    text = json.dumps(report, indent=2)
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

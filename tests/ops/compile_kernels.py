"""Compiles every kernel for a GPU that is not here, and writes down what came out: a program for the test beside it."""

import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from server.ops import four_bit, kernels

_LEVELS = (*(-i / 7 for i in range(7, 0, -1)), 0.0, *(i / 8 for i in range(1, 9)))


def _product(num_tokens: int) -> tuple[Any, dict[str, Any], int, int]:
    """As `four_bit` launches it for Llama-3.1-8B's o_proj."""
    tiling = four_bit.Tiling.of(num_tokens, 4096, 4096)
    constants = {
        "IS_DOUBLE": True, "HAS_BIAS": False, "LOOKUP": four_bit.lookup(_LEVELS, torch.bfloat16),
        "BLOCK_N": tiling.block_n, "TOKENS": max(16, num_tokens),
    }  # fmt: skip
    return four_bit._product, constants, tiling.num_warps, tiling.num_stages


_EXPAND = {"IS_JOINT": True, "IS_ALIGNED": True, "NUM_SPLITS": 4, "BLOCK_R": 16}
# As `kernels` launches them for Llama-3.1-8B: at decode, at prefill, and with every field of the normal form.
VARIANTS: list[tuple[Any, dict[str, Any], int, int]] = [
    (kernels._shrink, {"TILE": 16, "BLOCK_R": 16, "BLOCK_K": 128}, 4, 4),
    (kernels._shrink, {"TILE": 64, "BLOCK_R": 32, "BLOCK_K": 64}, 4, 4),
    (kernels._embed, {"TILE": 16, "BLOCK_R": 16}, 4, 3),
    (kernels._expand, {**_EXPAND, "HAS_MIDDLE": False, "HAS_VECTORS": False, "TILE": 16, "BLOCK_N": 128}, 4, 2),
    (kernels._expand, {**_EXPAND, "HAS_MIDDLE": True, "HAS_VECTORS": True, "TILE": 64, "BLOCK_N": 64}, 4, 2),
    (kernels._scale, {"BLOCK": 1024}, 4, 3),
    (kernels._store_kv, {"LARGEST": 3e38, "BLOCK": 128}, 1, 3),
    (kernels._attend, {"HAS_WINDOW": True, "HAS_SOFTCAP": True, "BLOCK_H": 16, "BLOCK_T": 64, "BLOCK_D": 128}, 4, 2),
    (kernels._join, {"HAS_SINKS": True, "NUM_PARTS": 32, "BLOCK_D": 128}, 1, 3),
    *(_product(num_tokens) for num_tokens in (1, 32, 64, 128)),
    (four_bit._sum, {"HAS_BIAS": True, "NUM_SPLITS": 4, "BLOCK": 1024}, 4, 3),
    (four_bit._whole, {"IS_DOUBLE": True, "BLOCK_N": 64}, 4, 3),
]
_INTEGERS = dict.fromkeys(("members", "slots", "order", "starts", "lengths", "firsts", "blocks", "offsets"), "*i32")
_FLOATS = dict.fromkeys(("h", "parts", "tops", "sums", "sinks"), "*fp32")
_ROWS = dict.fromkeys(("x", "y", "buffer", "query", "keys", "values", "key_cache", "value_cache", "out"), "*bf16")
_TYPES = {
    **_INTEGERS, **_FLOATS, **_ROWS, "addresses": "*i64", "ids": "*i64",
    "codes": "*i16", "scales": "*u8", "scale_levels": "*fp32", "seconds": "*fp32", "levels": "*fp32", "bias": "*fp32",
    "matrix": "*bf16", "gain": "fp32", "scaling": "fp32", "softcap": "fp32",
}  # fmt: skip
_UNALIGNED = {
    "num_tokens", "num_members", "num_rank_blocks", "first_member", "num_sequences", "window", "group",
    "num_units", "split_units", "first",
}  # fmt: skip


def compiled(target: int) -> Iterator[dict[str, Any]]:
    for kernel, constants, num_warps, num_stages in VARIANTS:
        # As at run time: innermost strides are 1, pointers and most sizes multiples of 16.
        steps = {name: 1 for name in kernel.arg_names if name.endswith("step")}
        fixed = {**constants, **steps}
        types = {name: "constexpr" if name in fixed else _TYPES.get(name, "i32") for name in kernel.arg_names}
        aligned = {
            (number,): [["tt.divisibility", 16]]
            for number, (name, type_name) in enumerate(types.items())
            if type_name.startswith("*") or (type_name == "i32" and name not in _UNALIGNED)
        }
        source = ASTSource(kernel, types, constexprs=fixed, attrs=aligned)
        options = {"num_warps": num_warps, "num_stages": num_stages}
        made = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
        ptx = made.asm["ptx"]
        yield {
            "kernel": kernel.__name__,
            "uses_tensor_cores": "mma" in ptx,
            "copies_ahead": "cp.async" in ptx,
            "shared_bytes": made.metadata.shared,
            "has_local_memory": ".local " in ptx,
        }


if __name__ == "__main__":
    json.dump(list(compiled(int(sys.argv[1]))), sys.stdout)

"""The ops as C functions on a processor: the meaning of `reference.py`, reading rank rows where they lie.

Owns what a call hands over: addresses, strides, dtypes, threads. The arithmetic is in the C files, and the signatures
that have their like in the Triton kernels (`server.ops.kernels`) are theirs. Knows nothing about adapters or models.

Activations and rows are float32 or bfloat16 (`DTYPES`), each for itself; sums are float32. Nothing is copied per step.
"""

import torch

from server.ops.native.build import CannotCompile, library
from server.ops.native.decode_layer import DecodeLayer, DecodeStep, Linear
from server.ops.native.dtypes import DTYPES
from server.ops.native.joint import Joint, joint
from server.ops.native.layout import dense_rows
from server.ops.native.long_runs import LONGEST, expand_long, shrink_long
from server.ops.native.norm import Norm
from server.ops.native.weights import (
    FourBitWeight,
    PairedWeight,
    Weight,
    can_multiply_rows,
    has_matrix_unit,
    multiplies_bfloat16,
    rows_product,
)
from server.ops.runs import DecodeLists, TokenRuns
from server.ops.sheets import GroupTable, Sheets

__all__ = [
    "DTYPES",
    "CannotCompile",
    "DecodeLayer",
    "DecodeStep",
    "FourBitWeight",
    "Joint",
    "Linear",
    "Norm",
    "PairedWeight",
    "Weight",
    "argmax",
    "can_multiply_rows",
    "decode_attention",
    "embed_low_rank",
    "expand",
    "gated",
    "has_matrix_unit",
    "joint",
    "library",
    "multiplies_bfloat16",
    "rotary_decode",
    "rows_product",
    "scale",
    "shrink",
    "store_kv",
]

_MAX_HEAD_WIDTH = 512  # MAX_WIDTH of kernels.c


def shrink(x: torch.Tensor, group: GroupTable, table: Sheets, tokens: TokenRuns) -> torch.Tensor:
    """The dot products of a site group: x (tokens, d_in) -> (tokens, members, max_rank) float32.

    Only what `expand` will read is written; `mid_scale` and `mid_shift` are left to it.

    Semantics:
        for t in tokens:
            for m in members:
                for i in range(rank of slots[t] at m):
                    h[t, m, i] = dot(down[i], x[t])
    """
    x, runs, num_members = dense_rows(x), tokens.by_down, len(group.widths)
    h = torch.empty(x.shape[0], num_members, table.max_rank)
    library().graft_shrink(
        x.data_ptr(), x.stride(0), DTYPES[x.dtype],
        table.buffer.data_ptr(), DTYPES[table.buffer.dtype], group.down_stride,
        table.addresses.data_ptr(), group.members.data_ptr(), num_members,
        tokens.slots.data_ptr(), runs.order.data_ptr(), runs.starts.data_ptr(), runs.num,
        h.data_ptr(), table.max_rank, group.d_in, LONGEST, torch.get_num_threads(),
    )  # fmt: skip
    shrink_long(x, h, group, table, tokens.slots, runs)
    return h


def embed_low_rank(ids: torch.Tensor, group: GroupTable, table: Sheets, tokens: TokenRuns) -> torch.Tensor:
    """`shrink` for an embedding, whose input is a one-hot row: ids (tokens,) -> (tokens, 1, max_rank) float32.

    Semantics: as shrink, with dot(down[i], x[t]) = down[i][ids[t]].
    """
    ids, runs = ids.contiguous(), tokens.by_down  # bound to a name: its memory must outlive the call
    h = torch.empty(ids.shape[0], 1, table.max_rank)
    library().graft_embed(
        ids.data_ptr(), table.buffer.data_ptr(), DTYPES[table.buffer.dtype], group.down_stride,
        table.addresses.data_ptr(), group.members.data_ptr(),
        tokens.slots.data_ptr(), runs.order.data_ptr(), runs.starts.data_ptr(), runs.num, h.data_ptr(), table.max_rank,
    )  # fmt: skip
    return h


def expand(
    y: torch.Tensor,
    h: torch.Tensor | None,
    group: GroupTable,
    table: Sheets,
    tokens: TokenRuns,
    *,
    member: int | None = None,
    gain: float = 1.0,
) -> None:
    """Everything behind the base product, in place and rounded once: y (tokens, d_out).

    `h` from `shrink` of the same group; it is not read for slots without rank rows, and None where there are no others.
    y is the output of one member, or, without `member`, those of all members side by side. `gain` multiplies the
    low-rank part (Gemma's embeddings).

    Semantics:
        for t in tokens with slots[t] != 0:
            for i in range(rank):
                g[i] = mid_scale[i] * h[t, m, i] + mid_shift[i]
            y[t] = out_scale * (y[t] + gain * up_scale * sum(g[i] * up[i])) + out_shift
    """
    runs, rows, num_members = tokens.by_up, dense_rows(y), len(group.widths)
    first, last = (0, num_members) if member is None else (member, member + 1)
    library().graft_expand(
        rows.data_ptr(), rows.stride(0), DTYPES[y.dtype], None if h is None else h.data_ptr(),
        table.buffer.data_ptr(), DTYPES[table.buffer.dtype],
        table.addresses.data_ptr(), group.members.data_ptr(), num_members, first, last, member is None,
        tokens.slots.data_ptr(), runs.order.data_ptr(), runs.starts.data_ptr(), runs.num,
        table.max_rank, max(group.widths[first:last]), gain, table.has_vectors, LONGEST,
        torch.get_num_threads(),
    )  # fmt: skip
    expand_long(rows, h, group, table, tokens.slots, runs, range(first, last), gain, is_joint=member is None)
    if rows is not y:
        y.copy_(rows)


def scale(x: torch.Tensor, group: GroupTable, table: Sheets, tokens: TokenRuns, *, member: int) -> torch.Tensor:
    """What the base of this member reads, a tensor of its own: x (tokens, d_in).

    Semantics: y[t] = in_scale[slots[t]] * x[t], rounded once; x[t] where the slot has no in_scale.
    """
    x = dense_rows(x)
    y = torch.empty(x.shape, dtype=x.dtype)
    library().graft_scale(
        x.data_ptr(), x.stride(0), y.data_ptr(), DTYPES[x.dtype], table.buffer.data_ptr(), group.in_stride,
        table.addresses.data_ptr(), group.members.data_ptr(), member, tokens.slots.data_ptr(), *x.shape,
    )  # fmt: skip
    return y


def store_kv(
    keys: torch.Tensor,
    values: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    blocks: torch.Tensor,
    offsets: torch.Tensor,
) -> None:
    """Writes the keys and values of a step's tokens into their blocks, in place.

    keys, values (tokens, kv_heads, head_dim) of one dtype; both caches (blocks, kv_heads, block_size, head_dim), dense;
    blocks, offsets (tokens,). Values that are not finite are stored as 0 or the largest number of the narrower dtype,
    as `reference.store_kv` does and why.

    Semantics:
        for t in tokens:
            key_cache[blocks[t], :, offsets[t], :] = keys[t]
            value_cache[blocks[t], :, offsets[t], :] = nan_to_num(values[t])
    """
    keys, values = dense_rows(keys), dense_rows(values)
    blocks, offsets = blocks.contiguous(), offsets.contiguous()
    assert key_cache.is_contiguous()
    assert value_cache.is_contiguous()
    library().graft_store_kv(
        keys.data_ptr(), keys.stride(0), keys.stride(1), values.data_ptr(), values.stride(0), values.stride(1),
        DTYPES[keys.dtype], key_cache.data_ptr(), value_cache.data_ptr(), DTYPES[key_cache.dtype],
        *key_cache.shape[1:], blocks.data_ptr(), offsets.data_ptr(), keys.shape[0],
    )  # fmt: skip


def decode_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    batch: DecodeLists,
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of one query per sequence over its cached tokens: (sequences, heads, head_dim) -> the same shape.

    Caches as in `store_kv`. `sinks` (heads,): a score without a value, which takes its share of the weight.

    Semantics:
        for s in sequences:
            seen = cached tokens of s with position > length[s] - 1 - window
            p = softmax(cap(scaling * query[s] . keys[seen]) ++ sinks);  out[s] = p[seen] @ values[seen]

    Nothing past a sequence's end is read, whatever a former user left there.
    """
    query = dense_rows(query)
    num_sequences, num_heads, width = query.shape
    assert width <= _MAX_HEAD_WIDTH
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    scores = None if sinks is None else sinks.float().contiguous()
    library().graft_decode_attention(
        query.data_ptr(), query.stride(0), query.stride(1), out.data_ptr(), DTYPES[query.dtype],
        key_cache.data_ptr(), value_cache.data_ptr(), DTYPES[key_cache.dtype],
        num_sequences, num_heads, key_cache.shape[1], key_cache.shape[2], width,
        batch.lengths.data_ptr(), batch.firsts.data_ptr(), batch.blocks.data_ptr(),
        scaling, window or 0, softcap or 0.0, None if scores is None else scores.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """Where the largest number of each row is, the first of equals: (rows, width) -> (rows,) int64.

    0 for a row without a number above minus infinity. PyTorch's takes a number at a time: 14 ms for 16 rows of 150,000.
    """
    rows = dense_rows(logits)
    found = torch.empty(rows.shape[0], dtype=torch.int64)
    library().graft_argmax(
        rows.data_ptr(), rows.stride(0), DTYPES[rows.dtype], *rows.shape, found.data_ptr(), torch.get_num_threads()
    )
    return found


def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, rounded once: both (..., width) of one dtype -> the same (Shazeer 2020, arXiv:2002.05202)."""
    width = gate.shape[-1]
    gates, ups = (dense_rows(t.reshape(-1, width)) for t in (gate, up))
    if gates.stride(0) != ups.stride(0):
        gates, ups = gates.contiguous(), ups.contiguous()
    y = torch.empty_like(gate, memory_format=torch.contiguous_format)
    library().graft_gated(
        gates.data_ptr(), ups.data_ptr(), gates.stride(0), y.data_ptr(), DTYPES[gate.dtype], gates.shape[0], width,
        torch.get_num_threads(),
    )  # fmt: skip
    return y


def rotary_decode(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    turns: tuple[torch.Tensor, torch.Tensor],
    caches: tuple[torch.Tensor, torch.Tensor],
    places: tuple[torch.Tensor, torch.Tensor],
    batch: DecodeLists,
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """`rotate`, `store_kv` and `decode_attention` of a step of decodes in one call.

    query (tokens, heads * width), keys and values (tokens, kv_heads * width), as the projections give them; `turns`:
    cos and sin, each (tokens, 1, width) float32 as `reference.rotate` has them, and dense; `caches` and `places`
    (blocks, offsets) as in `store_kv`. Returns (tokens, heads * width), dense.
    """
    query, keys, values = dense_rows(query), dense_rows(keys), dense_rows(values)
    (cos, sin), (key_cache, value_cache), (blocks, offsets) = turns, caches, places
    num_kv_heads, block_size, width = key_cache.shape[1:]
    assert width <= _MAX_HEAD_WIDTH
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    num_sequences, num_outputs = query.shape
    library().graft_rotary_decode(
        query.data_ptr(), query.stride(0), keys.data_ptr(), keys.stride(0), values.data_ptr(), values.stride(0),
        DTYPES[query.dtype], cos.data_ptr(), sin.data_ptr(), out.data_ptr(),
        key_cache.data_ptr(), value_cache.data_ptr(), DTYPES[key_cache.dtype], blocks.data_ptr(), offsets.data_ptr(),
        num_sequences, num_outputs // width, num_kv_heads, block_size, width,
        batch.lengths.data_ptr(), batch.firsts.data_ptr(), batch.blocks.data_ptr(),
        scaling, window or 0, softcap or 0.0, torch.get_num_threads(),
    )  # fmt: skip
    return out

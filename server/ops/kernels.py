"""The ops in Triton: the meaning of `reference.py`, reading rank rows where they lie.

Owns the kernels, their block sizes and grids. Knows nothing about who fills the sheets or cuts the runs.

Nothing is copied per step and nothing comes back from the device. A program finds its rows through the sheet of its
run's first token, so an adapter of rank 8 reads 8 rows whatever rank its neighbours have, and tokens whose adapters
share a projection are one product. What differs within a run (scales, shifts) is read per token. Grids follow from the
number of runs, the base's widths and the largest rank there is; programs without work end at once. So a CUDA graph may
hold them. All sums are in float32, those of a token in one order whatever shares its batch, but for the length of its
run.

Nothing that differs from step to step is compiled into a kernel: nobody waits for a compiler once a base is warm.

Block sizes were chosen from bytes and registers, not yet from measurements: see docs/decisions/0011-kernels.md.
"""

import torch
import triton
import triton.language as tl

from server.ops import sheets
from server.ops.runs import SHORT_RUN, DecodeLists, TokenRuns
from server.ops.sheets import GroupTable, Sheets

_RANK, _DOWN, _UP = (tl.constexpr(field) for field in (sheets.RANK, sheets.DOWN, sheets.UP))
_MID_SCALE, _MID_SHIFT = tl.constexpr(sheets.MID_SCALE), tl.constexpr(sheets.MID_SHIFT)
_IN_SCALE, _UP_SCALE = tl.constexpr(sheets.IN_SCALE), tl.constexpr(sheets.UP_SCALE)
_OUT_SCALE, _OUT_SHIFT = tl.constexpr(sheets.OUT_SCALE), tl.constexpr(sheets.OUT_SHIFT)
_NUM_FIELDS, _NUM_COLUMNS = tl.constexpr(sheets.NUM_FIELDS), tl.constexpr(sheets.NUM_COLUMNS)
_SITE, _WIDTH, _COLUMN = tl.constexpr(sheets.SITE), tl.constexpr(sheets.WIDTH), tl.constexpr(sheets.COLUMN)
_ROW_STRIDE, _VECTOR_STRIDE = tl.constexpr(sheets.ROW_STRIDE), tl.constexpr(sheets.VECTOR_STRIDE)

_MIN_SPLIT = 1024  # inputs summed by one program of a shrink
_MAX_SPLITS = 4  # an expand reads every split's sums again, once per block of outputs


# The normal form


def joint(group: GroupTable, table: Sheets, tokens: TokenRuns, *, has_rows: bool, scales: bool = False) -> None:
    """Nothing: a GPU takes shrink and expand as two launches."""


def shrink(x: torch.Tensor, group: GroupTable, table: Sheets, tokens: TokenRuns) -> torch.Tensor:
    """The dot products of a site group: x (tokens, d_in), strided as it likes -> (splits, tokens, members, max_rank).

    float32, partial sums over parts of d_in, which `expand` adds up; only what `expand` will read is written.
    `mid_scale` and `mid_shift` are left to `expand`, so that adapters that share `down` rows may differ in them.

    Semantics:
        for t in tokens:
            for m in members:
                for i in range(rank of slots[t] at m):
                    sum(h[:, t, m, i]) = dot(down[i], x[t])
    """
    runs, num_members = tokens.by_down, len(group.widths)
    num_splits = max(1, min(_MAX_SPLITS, group.d_in // _MIN_SPLIT))
    h = _hidden(num_splits, x.shape[0], num_members, table)
    is_short = runs.max_length == SHORT_RUN
    # A short run is bound by the bytes of its rows: 256 of them in a row at once, and 16 rows, the least that a tensor
    # core takes. A long one reads its tokens again for every block of ranks, so it takes more of those.
    block_r, block_k = (16, 128) if is_short else (32, 64)
    split_width = triton.cdiv(triton.cdiv(group.d_in, num_splits), block_k) * block_k
    num_rank_blocks = triton.cdiv(table.max_rank, block_r)
    if x.shape[0] and runs.num:
        _shrink[(runs.num, num_members * num_rank_blocks, num_splits)](
            x, x.stride(0), x.stride(1), table.buffer, group.down_stride, table.addresses, group.members,
            tokens.slots, runs.order, runs.starts, h, x.shape[0], num_members, table.max_rank, num_rank_blocks,
            group.d_in, split_width,
            TILE=runs.max_length, BLOCK_R=block_r, BLOCK_K=block_k, num_warps=4, num_stages=4,
        )  # fmt: skip
    return h


def embed_low_rank(ids: torch.Tensor, group: GroupTable, table: Sheets, tokens: TokenRuns) -> torch.Tensor:
    """`shrink` for an embedding, whose input is a one-hot row: ids (tokens,) -> (1, tokens, 1, max_rank) float32.

    Semantics: as shrink, with dot(down[i], x[t]) = down[i][ids[t]].
    """
    h, runs = _hidden(1, ids.shape[0], 1, table), tokens.by_down
    if ids.shape[0] and runs.num:
        _embed[(runs.num, triton.cdiv(table.max_rank, 16))](
            ids, table.buffer, group.down_stride, table.addresses, group.members,
            tokens.slots, runs.order, runs.starts, h, table.max_rank, TILE=runs.max_length, BLOCK_R=16,
        )  # fmt: skip
    return h


def _hidden(num_splits: int, num_tokens: int, num_members: int, table: Sheets) -> torch.Tensor:
    shape = (num_splits, num_tokens, num_members, table.max_rank)
    return torch.empty(shape, dtype=torch.float32, device=table.buffer.device)


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
    """Everything behind the base product, in place and rounded once: y (tokens, d_out), strided as it likes.

    `h` from `shrink` of the same group; it is not read for slots without rank rows, and None where there are no others.
    y is the output of one member, or,
    without `member`, those of all members side by side. `gain` multiplies the low-rank part (Gemma's embeddings).

    Semantics:
        for t in tokens with slots[t] != 0:
            for i in range(rank):
                g[i] = mid_scale[i] * sum(h[:, t, m, i]) + mid_shift[i]
            y[t] = out_scale * (y[t] + gain * up_scale * sum(g[i] * up[i])) + out_shift
    """
    runs = tokens.by_up
    if h is None:
        h = _hidden(1, 0, len(group.widths), table)
    widths = group.widths if member is None else group.widths[member : member + 1]
    # Accumulators and the three vectors of each token must fit in registers: 16 x 128 or 64 x 64 of float32 do.
    block_n = min(128 if runs.max_length == SHORT_RUN else 64, max(16, triton.next_power_of_2(max(widths))))
    if y.shape[0] and runs.num:
        _expand[(runs.num, triton.cdiv(max(widths), block_n), len(widths))](
            y, y.stride(0), y.stride(1), h, table.buffer, table.addresses, group.members,
            tokens.slots, runs.order, runs.starts, y.shape[0], h.shape[2], table.max_rank, member or 0, gain,
            IS_JOINT=member is None, IS_ALIGNED=all(width % 8 == 0 for width in group.widths),
            HAS_MIDDLE=table.has_middle, HAS_VECTORS=table.has_vectors, NUM_SPLITS=h.shape[0],
            TILE=runs.max_length, BLOCK_R=16, BLOCK_N=block_n, num_warps=4, num_stages=2,
        )  # fmt: skip


def scale(x: torch.Tensor, group: GroupTable, table: Sheets, tokens: TokenRuns, *, member: int) -> torch.Tensor:
    """What the base of this member reads, a tensor of its own: x (tokens, d_in), strided as it likes.

    Semantics: y[t] = in_scale[slots[t]] * x[t], rounded once; x[t] where the slot has no in_scale.
    """
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.shape[0]:
        block = min(1024, triton.next_power_of_2(group.d_in))
        _scale[(x.shape[0], triton.cdiv(group.d_in, block))](
            x, x.stride(0), x.stride(1), y, table.buffer, group.in_stride, table.addresses, group.members, member,
            tokens.slots, group.d_in, BLOCK=block,
        )  # fmt: skip
    return y


@triton.jit
def _fields(addresses, members, slot, member):
    """The sheets of these slots, and their fields at this member's site."""
    sheet = tl.load(addresses + slot).to(tl.pointer_type(tl.int32))
    return sheet, sheet + tl.load(members + member * _NUM_COLUMNS + _SITE) * _NUM_FIELDS


@triton.jit
def _tile(sheet, fields, order, start, stop, first, rank, TILE: tl.constexpr, BLOCK_R: tl.constexpr):
    """The tokens of a run, (TILE,), and ranks from `first` on with the `down` row of each, (BLOCK_R,); both with which
    of them there are."""
    place = start + tl.arange(0, TILE)
    is_token = place < stop
    token = tl.load(order + place, mask=is_token, other=0).to(tl.int64)
    i = first + tl.arange(0, BLOCK_R)
    is_row = i < rank
    row = tl.load(sheet + tl.load(fields + _DOWN) + i, mask=is_row, other=0).to(tl.int64)
    return token, is_token, i, is_row, row


@triton.jit(do_not_specialize=["num_tokens", "num_members", "num_rank_blocks"])
def _shrink(
    x, x_stride, x_step, buffer, down_stride, addresses, members,
    slots, order, starts, h, num_tokens, num_members, max_rank, num_rank_blocks, d_in, split_width,
    TILE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    run, split = tl.program_id(0), tl.program_id(2)
    member = tl.program_id(1) // num_rank_blocks
    first = tl.program_id(1) % num_rank_blocks * BLOCK_R
    start, stop = tl.load(starts + run).to(tl.int32), tl.load(starts + run + 1).to(tl.int32)
    if start == stop:
        return
    sheet, fields = _fields(addresses, members, tl.load(slots + tl.load(order + start)), member)
    rank = tl.load(fields + _RANK)
    if first >= rank:
        return
    token, is_token, i, is_row, row = _tile(sheet, fields, order, start, stop, first, rank, TILE, BLOCK_R)
    total = tl.zeros((TILE, BLOCK_R), tl.float32)
    for k_first in range(split * split_width, tl.minimum((split + 1) * split_width, d_in), BLOCK_K):
        k = k_first + tl.arange(0, BLOCK_K)
        inside = k < d_in
        a = tl.load(x + token[:, None] * x_stride + k[None, :] * x_step, is_token[:, None] & inside[None, :], other=0.0)
        b = tl.load(buffer + row[None, :] * down_stride + k[:, None], is_row[None, :] & inside[:, None], other=0.0)
        total = tl.dot(a.to(b.dtype), b, total, input_precision="ieee")
    at = ((split * num_tokens + token) * num_members + member) * max_rank
    tl.store(h + at[:, None] + i[None, :], total, is_token[:, None] & is_row[None, :])


@triton.jit
def _embed(
    ids, buffer, down_stride, addresses, members, slots, order, starts, h, max_rank,
    TILE: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    run, first = tl.program_id(0), tl.program_id(1) * BLOCK_R
    start, stop = tl.load(starts + run).to(tl.int32), tl.load(starts + run + 1).to(tl.int32)
    if start == stop:
        return
    sheet, fields = _fields(addresses, members, tl.load(slots + tl.load(order + start)), 0)
    rank = tl.load(fields + _RANK)
    if first >= rank:
        return
    token, is_token, i, is_row, row = _tile(sheet, fields, order, start, stop, first, rank, TILE, BLOCK_R)
    is_read = is_token[:, None] & is_row[None, :]
    column = tl.load(ids + token, mask=is_token, other=0).to(tl.int64)
    dots = tl.load(buffer + row[None, :] * down_stride + column[:, None], is_read, other=0.0)
    tl.store(h + token[:, None] * max_rank + i[None, :], dots.to(tl.float32), is_read)


@triton.jit
def _middle(sheet, field, i, is_own, identity):
    """Each token's own mid_scale or mid_shift, (TILE, BLOCK_R); `field` (TILE,) says where it begins in the sheet."""
    at = tl.load(field)
    is_there = (at >= 0)[:, None] & is_own
    bits = tl.load(sheet[:, None] + at[:, None] + i[None, :], is_there, other=0)
    return tl.where(is_there, bits.to(tl.float32, bitcast=True), identity)


@triton.jit
def _vector(buffer, field, stride, n, is_own, identity):
    """Each token's own vector, (TILE, BLOCK_N); `field` (TILE,) holds its row. Vectors are float32 in any buffer."""
    row = tl.load(field)
    floats = buffer.to(tl.pointer_type(tl.float32), bitcast=True)
    at = row.to(tl.int64)[:, None] * stride + n[None, :]
    return tl.load(floats + at, (row >= 0)[:, None] & is_own, other=identity)


@triton.jit
def _low_rank(
    h, buffer, row_stride, sheet, fields, start_sheet, start_fields, rank, token, is_token, n, width,
    num_tokens, num_members, max_rank, member,
    HAS_MIDDLE: tl.constexpr, NUM_SPLITS: tl.constexpr,
    TILE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """sum(g[i] * up[i]) of an expand, (TILE, BLOCK_N) float32."""
    rows = start_sheet + tl.load(start_fields + _UP)
    total = tl.zeros((TILE, BLOCK_N), tl.float32)
    for first in range(0, rank, BLOCK_R):
        i = first + tl.arange(0, BLOCK_R)
        is_row = i < rank
        is_own = is_token[:, None] & is_row[None, :]
        g = tl.zeros((TILE, BLOCK_R), tl.float32)
        for split in tl.static_range(NUM_SPLITS):
            at = ((split * num_tokens + token) * num_members + member) * max_rank
            g += tl.load(h + at[:, None] + i[None, :], is_own, other=0.0)
        if HAS_MIDDLE:
            g = g * _middle(sheet, fields + _MID_SCALE, i, is_own, 1.0)
            g += _middle(sheet, fields + _MID_SHIFT, i, is_own, 0.0)
        row = tl.load(rows + i, mask=is_row, other=0).to(tl.int64)
        up = tl.load(buffer + row[:, None] * row_stride + n[None, :], is_row[:, None] & (n < width)[None, :], other=0.0)
        total = tl.dot(g.to(up.dtype), up, total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=["num_tokens", "num_members", "first_member"])
def _expand(
    y, y_stride, y_step, h, buffer, addresses, members,
    slots, order, starts, num_tokens, num_members, max_rank, first_member, gain,
    IS_JOINT: tl.constexpr, IS_ALIGNED: tl.constexpr, HAS_MIDDLE: tl.constexpr, HAS_VECTORS: tl.constexpr,
    NUM_SPLITS: tl.constexpr, TILE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    run, member = tl.program_id(0), first_member + tl.program_id(2)
    start, stop = tl.load(starts + run).to(tl.int32), tl.load(starts + run + 1).to(tl.int32)
    columns = members + member * _NUM_COLUMNS
    # Hints that let a thread load 16 bytes at once: strides are rounded up to that, widths most often.
    alignment: tl.constexpr = 8 if IS_ALIGNED else 1
    width = tl.multiple_of(tl.load(columns + _WIDTH), alignment)
    first_column = tl.multiple_of(tl.load(columns + _COLUMN), alignment) if IS_JOINT else 0
    if (start == stop) | (tl.program_id(1) * BLOCK_N >= width):
        return
    place = start + tl.arange(0, TILE)
    is_token = place < stop
    token = tl.load(order + place, mask=is_token, other=0).to(tl.int64)
    sheet, fields = _fields(addresses, members, tl.load(slots + token), member)
    start_sheet, start_fields = _fields(addresses, members, tl.load(slots + tl.load(order + start)), member)
    rank = tl.load(start_fields + _RANK)
    # Most sites of an adapter of few sites: neither rows nor vectors.
    if (rank == 0) & (not HAS_VECTORS):
        return
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_own = is_token[:, None] & (n < width)[None, :]
    low = _low_rank(
        h, buffer, tl.multiple_of(tl.load(columns + _ROW_STRIDE), 8), sheet, fields, start_sheet, start_fields, rank,
        token, is_token, n, width, num_tokens, num_members, max_rank, member,
        HAS_MIDDLE, NUM_SPLITS, TILE, BLOCK_R, BLOCK_N,
    )  # fmt: skip
    at = y + token[:, None] * y_stride + (first_column + n)[None, :] * y_step
    if HAS_VECTORS:
        stride = tl.multiple_of(tl.load(columns + _VECTOR_STRIDE), 4)
        low *= gain * _vector(buffer, fields + _UP_SCALE, stride, n, is_own, 1.0)
        total = tl.load(at, is_own, other=0.0).to(tl.float32) + low
        total *= _vector(buffer, fields + _OUT_SCALE, stride, n, is_own, 1.0)
        total += _vector(buffer, fields + _OUT_SHIFT, stride, n, is_own, 0.0)
    else:
        total = tl.load(at, is_own, other=0.0).to(tl.float32) + low * gain
    tl.store(at, total.to(y.dtype.element_ty), is_own)


@triton.jit(do_not_specialize=["member"])
def _scale(
    x, x_stride, x_step, y, buffer, stride, addresses, members, member, slots, width, BLOCK: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    _, fields = _fields(addresses, members, tl.load(slots + token), member)
    row = tl.load(fields + _IN_SCALE).to(tl.int64)
    value = tl.load(x + token * x_stride + n * x_step, n < width, other=0.0)
    floats = buffer.to(tl.pointer_type(tl.float32), bitcast=True)
    factor = tl.load(floats + row * stride + n, (n < width) & (row >= 0), other=1.0)
    tl.store(y + token * width + n, (value.to(tl.float32) * factor).to(value.dtype), n < width)


# Attention


def store_kv(
    keys: torch.Tensor,
    values: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    blocks: torch.Tensor,
    offsets: torch.Tensor,
) -> None:
    """Writes the keys and values of a step's tokens into their blocks, in place.

    keys, values (tokens, kv_heads, head_dim), strided as they like; both caches (blocks, kv_heads, block_size,
    head_dim), of one layout; blocks, offsets (tokens,). Values that are not finite are stored as 0 or the largest
    number of their dtype, as `reference.store_kv` does and why.

    Semantics:
        for t in tokens:
            key_cache[blocks[t], :, offsets[t], :] = keys[t]
            value_cache[blocks[t], :, offsets[t], :] = nan_to_num(values[t])
    """
    num_tokens, num_heads, width = keys.shape
    assert key_cache.stride() == value_cache.stride()
    if num_tokens:
        _store_kv[(num_tokens, num_heads)](
            keys, *keys.stride(), values, *values.stride(), key_cache, value_cache, *key_cache.stride(),
            blocks, blocks.stride(0), offsets, offsets.stride(0), width,
            LARGEST=torch.finfo(values.dtype).max, BLOCK=triton.next_power_of_2(width), num_warps=1,
        )  # fmt: skip


@triton.jit
def _store_kv(
    keys, key_stride, key_head, key_step, values, value_stride, value_head, value_step,
    key_cache, value_cache, block_stride, head_stride, token_stride, step,
    blocks, blocks_step, offsets, offsets_step, width, LARGEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, BLOCK)
    inside = d < width
    to = tl.load(blocks + token * blocks_step).to(tl.int64) * block_stride + head * head_stride
    to += tl.load(offsets + token * offsets_step).to(tl.int64) * token_stride
    key = tl.load(keys + token * key_stride + head * key_head + d * key_step, inside)
    tl.store(key_cache + to + d * step, key.to(key_cache.dtype.element_ty), inside)
    value = tl.load(values + token * value_stride + head * value_head + d * value_step, inside).to(tl.float32)
    finite = tl.where(value == value, tl.minimum(tl.maximum(value, -LARGEST), LARGEST), 0.0)
    tl.store(value_cache + to + d * step, finite.to(value_cache.dtype.element_ty), inside)


# Programs that fill a large GPU twice. One sequence of long context is cut in up to 32 parts, 64 sequences in none.
_WANTED_PROGRAMS = 256
_MAX_PARTS = 32


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

    Each sequence is cut in parts by length, and the parts joined by their log-sum-exp. Their number follows from the
    shape of `query` alone. Nothing past a sequence's end is read, whatever a former user left there.
    """
    num_sequences, num_heads, width = query.shape
    kv_heads, group = value_cache.shape[1], num_heads // value_cache.shape[1]
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if not num_sequences:
        return out
    num_parts = min(_MAX_PARTS, triton.next_power_of_2(triton.cdiv(_WANTED_PROGRAMS, num_sequences * kv_heads)))
    parts = query.new_empty(num_parts, num_sequences, num_heads, width, dtype=torch.float32)
    tops, sums = query.new_empty(2, num_parts, num_sequences, num_heads, dtype=torch.float32)
    block_d = max(16, triton.next_power_of_2(width))
    _attend[(num_sequences, kv_heads, num_parts)](
        query, *query.stride(), key_cache, value_cache, *key_cache.stride(), key_cache.shape[2],
        batch.lengths, batch.firsts, batch.blocks, parts, tops, sums, num_sequences, num_heads, width,
        scaling, window or 0, softcap or 0.0, group,
        HAS_WINDOW=window is not None, HAS_SOFTCAP=softcap is not None,
        # All query heads of a KV head, at least a tensor core's tile; keys and values of 64 tokens are 32 KB at width
        # 128 in 16 bits, of which two stages fit beside another program's.
        BLOCK_H=max(16, triton.next_power_of_2(group)), BLOCK_T=64 if block_d <= 128 else 32, BLOCK_D=block_d,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    _join[(num_sequences, num_heads)](
        parts, tops, sums, tops if sinks is None else sinks, out, num_sequences, num_heads, width,
        HAS_SINKS=sinks is not None, NUM_PARTS=num_parts, BLOCK_D=block_d, num_warps=1,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["num_sequences"])
def _attend(
    query, sequence_stride, query_head, query_step, keys, values, block_stride, head_stride, token_stride, step,
    block_size, lengths, firsts, blocks, parts, tops, sums, num_sequences, num_heads, width,
    scaling, window, softcap, group, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    sequence, kv_head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    head = kv_head * group + tl.arange(0, BLOCK_H)
    is_head = tl.arange(0, BLOCK_H) < group
    d = tl.arange(0, BLOCK_D)
    is_out = is_head[:, None] & (d < width)[None, :]
    queries = query + sequence * sequence_stride + head[:, None] * query_head + d[None, :] * query_step
    q = tl.load(queries, is_out, other=0.0).to(keys.dtype.element_ty)
    stop = tl.load(lengths + sequence).to(tl.int32)
    start = tl.maximum(stop - window, 0) if HAS_WINDOW else 0
    num_tokens = tl.cdiv(tl.cdiv(stop - start, BLOCK_T), tl.num_programs(2)) * BLOCK_T
    start += part * num_tokens
    stop = tl.minimum(start + num_tokens, stop)
    own_blocks = blocks + tl.load(firsts + sequence)
    top = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    out = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
    for first in range(start, stop, BLOCK_T):
        position = first + tl.arange(0, BLOCK_T)
        is_seen = position < stop
        at = tl.load(own_blocks + position // block_size, is_seen, other=0).to(tl.int64) * block_stride
        at += kv_head * head_stride + position % block_size * token_stride
        is_read = is_seen[:, None] & (d < width)[None, :]
        key = tl.load(keys + at[:, None] + d[None, :] * step, is_read, other=0.0)
        scores = tl.dot(q, tl.trans(key), input_precision="ieee") * scaling
        if HAS_SOFTCAP:
            scores = softcap * (1.0 - 2.0 / (tl.exp(2.0 * scores / softcap) + 1.0))  # tanh, which ends at 1
        scores = tl.where(is_seen[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))  # at least one token is seen, so it is a number
        weights = tl.exp(scores - new_top[:, None])
        shrunk = tl.exp(top - new_top)
        value = tl.load(values + at[:, None] + d[None, :] * step, is_read, other=0.0)
        out = tl.dot(weights.to(value.dtype), value, out * shrunk[:, None], input_precision="ieee")
        total = total * shrunk + tl.sum(weights, 1)
        top = new_top
    row = (part * num_sequences + sequence) * num_heads + head
    tl.store(tops + row, top, is_head)
    tl.store(sums + row, total, is_head)
    tl.store(parts + row[:, None] * width + d[None, :], out, is_out)


@triton.jit(do_not_specialize=["num_sequences"])
def _join(
    parts, tops, sums, sinks, out, num_sequences, num_heads, width,
    HAS_SINKS: tl.constexpr, NUM_PARTS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    sequence, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = (tl.arange(0, NUM_PARTS) * num_sequences + sequence) * num_heads + head
    d = tl.arange(0, BLOCK_D)
    part_tops = tl.load(tops + row)  # -inf for a part without tokens
    top = tl.max(part_tops, 0)
    if HAS_SINKS:
        sink = tl.load(sinks + head).to(tl.float32)
        top = tl.maximum(top, sink)
    weights = tl.exp(part_tops - top)
    total = tl.sum(tl.load(sums + row) * weights, 0)
    if HAS_SINKS:
        total += tl.exp(sink - top)
    all_parts = tl.load(parts + row[:, None] * width + d[None, :], (d < width)[None, :], other=0.0)
    joined = tl.sum(all_parts * weights[:, None], 0) / total
    tl.store(out + (sequence * num_heads + head) * width + d, joined.to(out.dtype.element_ty), d < width)

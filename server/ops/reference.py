"""The meaning of every op in plain torch: the CPU path, and the oracle of the kernels' tests.

Owns the arithmetic. Knows nothing about how rows are stored, what a method is, or which sequence a token belongs to.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from server.ops.edits import GroupEdits, Lanes, Run, SiteEdits, Stack, TokenLayout

_MAX_TURNED_PLACES = 128  # of lanes, whose outputs are copied once more to make one product of all pieces


def shrink(x: torch.Tensor, group: GroupEdits, layout: TokenLayout) -> torch.Tensor:
    """The hidden activations of a site group: (tokens, d_in) -> (tokens, rows), 0 where a row is not the token's own.

    Semantics:
        for t in tokens:
            for i in rows of adapters[t]:
                h[t, i] = mid_scale[adapters[t], i] * dot(down[i], x[t]) + mid_shift[adapters[t], i]
    """
    assert group.down is not None
    num_mixed = layout.num_mixed
    if num_mixed == x.shape[0]:
        return _shrink_mixed(x, group, layout)
    h = x.new_zeros(x.shape[0], group.down.shape[0])
    if num_mixed:
        h[:num_mixed] = _shrink_mixed(x[:num_mixed], group, layout)
    for run in layout.runs:
        columns = group.columns[run.adapter]
        if columns is None:
            continue
        part = x[run.start : run.end] @ group.down[columns].t()
        if group.mid_scale is not None:
            part *= group.mid_scale[run.adapter, columns]
        if group.mid_shift is not None:
            part += group.mid_shift[run.adapter, columns]
        h[run.start : run.end, columns] = part
    return h


def _shrink_mixed(x: torch.Tensor, group: GroupEdits, layout: TokenLayout) -> torch.Tensor:
    assert group.down is not None
    assert group.foreign is not None
    h = x @ group.down.t()
    if group.mid_scale is not None:
        h *= layout.mixed_rows(group.mid_scale)
    # Filled, not multiplied by zero: what overflows in one adapter must not reach its neighbours as NaN.
    h.masked_fill_(layout.mixed_rows(group.foreign), 0)
    if group.mid_shift is not None:
        h += layout.mixed_rows(group.mid_shift)
    return h


def expand(y: torch.Tensor, h: torch.Tensor, edits: SiteEdits, layout: TokenLayout) -> None:
    """Adds the low-rank part to y in place: y (tokens, d_out), h (tokens, rows of this site).

    Semantics:
        for t in tokens:
            y[t] += up_scale[adapters[t]] * sum(h[t, i] * up[i] for i in rows of adapters[t])
    """
    assert edits.up is not None
    num_mixed = layout.num_mixed
    if num_mixed:
        if edits.up_scale is None:
            y[:num_mixed].addmm_(h[:num_mixed], edits.up)
        else:
            y[:num_mixed].addcmul_(h[:num_mixed] @ edits.up, layout.mixed_rows(edits.up_scale))
    for run in layout.runs:
        columns = edits.columns[run.adapter]
        if columns is None:
            continue
        part = y[run.start : run.end]
        if edits.up_scale is None:
            part.addmm_(h[run.start : run.end, columns], edits.up[columns])
        else:
            part.addcmul_(h[run.start : run.end, columns] @ edits.up[columns], edits.up_scale[run.adapter])


@dataclass(slots=True)
class StackHidden:
    """The hidden activations of a step's tokens at a group with a matrix per adapter, all its members side by side."""

    lanes: torch.Tensor | None  # (lanes, length, members with rows * rank)
    runs: tuple[torch.Tensor, ...]  # (tokens of the run, members with rows * rank) of each run after the lanes
    # (places, pieces * width): what the lanes give for all members at once, where one of them has been asked for.
    outputs: torch.Tensor | None = None


def shrink_stack(x: torch.Tensor, stack: Stack, layout: TokenLayout) -> StackHidden:
    """As `shrink`, with a matrix per adapter: x (tokens, d_in), in which the padding of lanes is computed as well."""
    in_lanes = None if layout.lanes is None else _shrink_lanes(x, stack, layout.lanes)
    return StackHidden(in_lanes, tuple(_shrink_run(x, stack, run) for run in layout.runs_after_lanes))


def _shrink_lanes(x: torch.Tensor, stack: Stack, lanes: Lanes) -> torch.Tensor:
    rows = _first(x, lanes.num_tokens) if lanes.is_ordered else x.index_select(0, lanes.tokens)
    inputs = rows.to(stack.down.dtype).view(lanes.num, lanes.length, -1)
    h = torch.bmm(inputs, stack.down_columns)
    if stack.mid_scale is not None:
        h *= stack.mid_scale
    if stack.mid_shift is not None:
        h += stack.mid_shift
    return h


def _first(x: torch.Tensor, num: int) -> torch.Tensor:
    """x[:num] without an operator where that is all of it."""
    return x if x.shape[0] == num else x[:num]


def _shrink_run(x: torch.Tensor, stack: Stack, run: Run) -> torch.Tensor:
    h = x[run.start : run.end].to(stack.down.dtype) @ stack.down[run.adapter - 1].t()
    if stack.mid_scale is not None:
        h *= stack.mid_scale[run.adapter - 1]
    if stack.mid_shift is not None:
        h += stack.mid_shift[run.adapter - 1]
    return h


def expand_stack(
    y: torch.Tensor,
    hidden: StackHidden,
    stack: Stack,
    pieces: tuple[int, int],
    layout: TokenLayout,
    up_scale: torch.Tensor | None = None,
) -> None:
    """As `expand`, with a matrix per adapter: adds the pieces [first, last) to y (tokens, pieces * width) in place.

    `hidden` from `shrink_stack`; up_scale (S, pieces * width).
    """
    width = stack.up.shape[3]
    in_lanes = hidden.lanes
    if in_lanes is not None and layout.lanes is not None and _is_short(in_lanes, stack):
        if hidden.outputs is None:
            hidden.outputs = _all_pieces(in_lanes, stack)
        out = hidden.outputs[:, pieces[0] * width : pieces[1] * width]
        _add_lanes(y, out, layout.lanes, None if up_scale is None else (up_scale, layout))
        in_lanes = None
    if in_lanes is not None or hidden.runs:
        _expand_members(y, in_lanes, hidden.runs, stack, pieces, layout, up_scale)


def _expand_members(
    y: torch.Tensor,
    in_lanes: torch.Tensor | None,
    in_runs: Sequence[torch.Tensor],
    stack: Stack,
    pieces: tuple[int, int],
    layout: TokenLayout,
    up_scale: torch.Tensor | None,
) -> None:
    """As `expand_stack`, a product for each member."""
    width = stack.up.shape[3]
    for first, last in stack.spans:
        if first == last or not pieces[0] <= first < pieces[1]:
            continue
        at = stack.owners[first] * stack.rank
        member = slice(at, at + stack.rank)
        columns = slice((first - pieces[0]) * width, (last - pieces[0]) * width)
        scales = None if up_scale is None else up_scale[:, columns]
        if in_lanes is not None and layout.lanes is not None:
            up = _up_of(stack.up[:, first:last])
            out = torch.bmm(in_lanes[:, :, member], up).view(-1, up.shape[2])
            _add_lanes(y[:, columns], out, layout.lanes, None if scales is None else (scales, layout))
        for run, h in zip(layout.runs_after_lanes, in_runs, strict=True):
            out = h[:, member] @ _up_of(stack.up[run.adapter - 1, first:last])
            if scales is not None:
                out *= scales[run.adapter]
            y[run.start : run.end, columns] += out.to(y.dtype)


def _up_of(pieces: torch.Tensor) -> torch.Tensor:
    """(..., pieces, rank, width) -> (..., rank, pieces * width); a copy where there is more than one piece."""
    return pieces.transpose(-3, -2).flatten(-2)


def _is_short(h: torch.Tensor, stack: Stack) -> bool:
    """Whether one product for all pieces saves more than turning its outputs round costs; lanes of one need none."""
    return stack.is_coarse and (h.shape[1] == 1 or h.shape[0] * h.shape[1] <= _MAX_TURNED_PLACES)


def _all_pieces(h: torch.Tensor, stack: Stack) -> torch.Tensor:
    """One batched product for all outputs of lanes: h (lanes, length, ...) -> (lanes * length, pieces * width)."""
    num, length = h.shape[:2]
    if length == 1:
        if stack.owner_index is not None:
            h = h.view(num, -1, stack.rank).index_select(1, stack.owner_index)
        return torch.bmm(h.view(-1, 1, stack.rank), stack.up_pieces).view(num, -1)
    h = h.view(num, length, -1, stack.rank).transpose(1, 2)
    if stack.owner_index is not None:
        h = h.index_select(1, stack.owner_index)
    out = torch.bmm(h.reshape(-1, length, stack.rank), stack.up_pieces)
    return out.view(num, -1, length, out.shape[2]).transpose(1, 2).reshape(num * length, -1)


def _add_lanes(
    y: torch.Tensor, out: torch.Tensor, lanes: Lanes, scaled: tuple[torch.Tensor, TokenLayout] | None = None
) -> None:
    """y[token] += up_scale * out[its place] for each token in lanes; tokens without an adapter are left alone."""
    if not lanes.is_ordered:
        out = out.index_select(0, lanes.places)
    if lanes.bare is not None:
        out.masked_fill_(lanes.bare, 0)
    if scaled is not None:
        up_scale, layout = scaled
        out = out * up_scale.index_select(0, layout.adapters[: lanes.num_tokens])
    _first(y, lanes.num_tokens).add_(out.to(y.dtype))  # cast first: a sum of two dtypes takes three passes


def embed_low_rank(
    ids: torch.Tensor, rows: torch.Tensor, numbers: torch.Tensor, group: GroupEdits, layout: TokenLayout
) -> torch.Tensor:
    """`shrink` for an embedding site, whose input is a one-hot row: (tokens,) ids -> (tokens, rows).

    `rows` is the row store seen as (all rows, vocabulary) and `numbers` (rows,) the row numbers of this step, so that
    no table is copied.

    Semantics: as shrink, with dot(down[i], x[t]) = down[i][ids[t]].
    """
    assert group.foreign is not None
    h = rows[numbers[None, :], ids[:, None]]
    if group.mid_scale is not None:
        h *= group.mid_scale[layout.adapters]
    h.masked_fill_(group.foreign[layout.adapters], 0)
    if group.mid_shift is not None:
        h += group.mid_shift[layout.adapters]
    return h


def scale(x: torch.Tensor, scales: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """Semantics: y[t] = scales[adapters[t]] * x[t]; scales (S, width) float32, row 0 all ones; rounded once."""
    return torch.mul(x, scales.index_select(0, layout.adapters), out=torch.empty_like(x))


def shift(x: torch.Tensor, shifts: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """Semantics: y[t] = x[t] + shifts[adapters[t]]; shifts (S, width) float32, row 0 all zeros; rounded once."""
    return torch.add(x, shifts.index_select(0, layout.adapters), out=torch.empty_like(x))


def scale_shift(x: torch.Tensor, scales: torch.Tensor, shifts: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """Semantics: y[t] = scales[adapters[t]] * x[t] + shifts[adapters[t]]; rounded once."""
    shifted = shifts.index_select(0, layout.adapters)
    return shifted.addcmul_(x.float(), scales.index_select(0, layout.adapters)).to(x.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotary embedding, in place, of heads whose halves are pairs (Su et al. 2021, arXiv:2104.09864, as in Llama).

    x (tokens, heads, width), cos and sin (tokens, 1, width); the first half of sin is negated.

    Semantics:
        for i in range(width):
            y[..., i] = cos[..., i] * x[..., i] + sin[..., i] * x[..., (i + width // 2) % width]
    """
    other = torch.roll(x, x.shape[-1] // 2, dims=-1)
    x.mul_(cos).addcmul_(other, sin)


def store_kv(
    keys: torch.Tensor,
    values: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    blocks: torch.Tensor,
    offsets: torch.Tensor,
) -> None:
    """Writes the keys and values of a step's tokens into their blocks, in place.

    keys, values (tokens, kv_heads, head_dim); both caches (blocks, kv_heads, block_size, head_dim); blocks, offsets
    (tokens,).

    Values that are not finite are stored as 0 or the largest number: decode reads blocks whole and gives weight 0 to
    what a former user left in them, and 0 times infinity would make his overflow the next user's.

    Semantics:
        for t in tokens:
            key_cache[blocks[t], :, offsets[t], :] = keys[t]
            value_cache[blocks[t], :, offsets[t], :] = nan_to_num(values[t])
    """
    key_cache[blocks, :, offsets] = keys.to(key_cache.dtype)
    value_cache[blocks, :, offsets] = torch.nan_to_num(values).to(value_cache.dtype)


@dataclass(slots=True)
class DecodeBatch:
    """The decoding sequences of a step (one query each) and the blocks that their queries read.

    A pair is one (sequence, block). `runs` are stretches of pairs whose blocks follow
    one another in the cache, (first pair, last pair + 1, first block): a run is read in place, without a gather. So
    pairs are ordered by block where each sequence has one, whatever the order of the sequences.
    """

    lengths: torch.Tensor  # (sequences,) cached tokens of each sequence, the new one included
    pair_sequence: torch.Tensor  # (pairs,)
    pair_block: torch.Tensor  # (pairs,)
    pair_start: torch.Tensor  # (pairs,) position of the block's first token in its sequence
    runs: tuple[tuple[int, int, int], ...]
    is_single: bool  # one block per sequence
    inverse: torch.Tensor | None  # (sequences,) if is_single: the pair of each; None where pair i is sequence i
    num_read: int  # tokens at the start of each block that any query sees; the rest of the blocks is not read
    _masks: dict[int | None, torch.Tensor] = field(default_factory=dict)

    def hidden(self, window: int | None) -> torch.Tensor:
        """(pairs, 1, 1, num_read) bool, False where the query sees the cached token."""
        known = self._masks.get(window)
        if known is None:
            positions = self.pair_start[:, None] + torch.arange(self.num_read, device=self.lengths.device)
            length = self.lengths[self.pair_sequence][:, None]
            hidden = positions >= length
            if window is not None:
                hidden |= positions < length - window
            known = hidden[:, None, None, :]
            self._masks[window] = known
        return known


def decode_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    batch: DecodeBatch,
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attention of one query per sequence over its cached tokens: (sequences, heads, head_dim) -> the same shape.

    Semantics:
        for s in sequences:
            seen = cached tokens of s with position > length[s] - 1 - window
            p = softmax(cap(scaling * query[s] . keys[seen]));  out[s] = p @ values[seen]

    Sequences of several blocks are computed block by block and joined by their log-sum-exp (as in flash-decoding).
    """
    num_heads, head_dim = query.shape[1:]
    kv_heads = value_cache.shape[1]
    num_pairs = batch.pair_block.shape[0]
    pairs = query.to(key_cache.dtype)
    if not batch.is_single or batch.inverse is not None:
        pairs = pairs.index_select(0, batch.pair_sequence)
    pairs = pairs.reshape(num_pairs * kv_heads, num_heads // kv_heads, head_dim)
    keys, values = _read_runs(key_cache, value_cache, batch)
    scores = _product(pairs, keys, kv_heads, scaling)
    scores = scores.view(num_pairs, kv_heads, -1, batch.num_read).float()
    if softcap is not None:
        scores = torch.tanh(scores / softcap).mul_(softcap)
    # Filled, not added: what a block's former user left may have overflowed, and NaN - inf is NaN.
    scores.masked_fill_(batch.hidden(window), -math.inf)
    if batch.is_single:
        weights = torch.softmax(scores, dim=-1)
        share = None
    else:
        weights, share = _softmax_over_pairs(scores, batch)
    weights = weights.to(value_cache.dtype).view(num_pairs * kv_heads, -1, batch.num_read)
    out = _product(weights, values, kv_heads, 1.0).view(num_pairs, num_heads, head_dim)
    if share is None:
        return (out if batch.inverse is None else out.index_select(0, batch.inverse)).to(query.dtype)
    joined = torch.zeros(batch.lengths.shape[0], num_heads, head_dim, dtype=torch.float32, device=out.device)
    joined.index_add_(0, batch.pair_sequence, out.float() * share.view(num_pairs, num_heads, 1))
    return joined.to(query.dtype)


_Reads = list[tuple[int, int, torch.Tensor]]


def _read_runs(key_cache: torch.Tensor, value_cache: torch.Tensor, batch: DecodeBatch) -> tuple[_Reads, _Reads]:
    """For each run of pairs the transposed keys and the values that it reads, as views of the cache.

    One gathered copy instead when the blocks lie too scattered for views.
    """
    num_pairs, num_read = batch.pair_block.shape[0], batch.num_read
    if len(batch.runs) > max(4, num_pairs // 4):
        keys = key_cache[:, :, :num_read].index_select(0, batch.pair_block).flatten(0, 1)
        values = value_cache[:, :, :num_read].index_select(0, batch.pair_block).flatten(0, 1)
        return [(0, num_pairs, keys.transpose(1, 2))], [(0, num_pairs, values)]
    reads = [(a, b, slice(first, first + b - a)) for a, b, first in batch.runs]
    # Heads are joined with blocks before the cut, while both are still one stretch of memory.
    return (
        [(a, b, key_cache[blocks].flatten(0, 1)[:, :num_read].transpose(1, 2)) for a, b, blocks in reads],
        [(a, b, value_cache[blocks].flatten(0, 1)[:, :num_read]) for a, b, blocks in reads],
    )


def _product(left: torch.Tensor, reads: _Reads, kv_heads: int, factor: float) -> torch.Tensor:
    """factor * left @ what each run reads: (pairs * kv_heads, group, n) -> (pairs * kv_heads, group, m)."""
    parts = []
    for a, b, right in reads:
        part = left[a * kv_heads : b * kv_heads]
        # With beta 0 the first argument is not read: this is bmm with the scaling inside.
        parts.append(torch.baddbmm(left.new_empty(1), part, right, beta=0, alpha=factor))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _softmax_over_pairs(scores: torch.Tensor, batch: DecodeBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax within each pair, and each pair's share (pairs, kv_heads, group) of its sequence's total weight."""
    pair_max = scores.amax(dim=-1)  # -inf for a block wholly outside the window
    weights = torch.exp(scores - pair_max.clamp_min(torch.finfo(scores.dtype).min)[..., None])
    pair_sum = weights.sum(dim=-1)
    lse = pair_max + torch.log(pair_sum)
    shape = (batch.lengths.shape[0], *lse.shape[1:])
    index = batch.pair_sequence[:, None, None].expand_as(lse)
    top = torch.full(shape, -math.inf, device=scores.device).scatter_reduce(0, index, lse, "amax")
    relative = torch.exp(lse - top.index_select(0, batch.pair_sequence))
    total = torch.zeros(shape, device=scores.device).scatter_add(0, index, relative)
    share = relative / total.index_select(0, batch.pair_sequence)
    return weights / pair_sum.clamp_min(torch.finfo(scores.dtype).tiny)[..., None], share


@dataclass(frozen=True, slots=True)
class PrefillSpan:
    """Tokens [start, end) of a step that continue one sequence of which `num_cached` tokens are in the cache."""

    start: int
    end: int
    num_cached: int
    blocks: torch.Tensor  # (blocks,) of the sequence, covering num_cached + end - start tokens


def prefill_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    span: PrefillSpan,
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Causal attention of one sequence's chunk: query (n, heads, head_dim), keys, values (n, kv_heads, head_dim).

    The chunk's own keys and values are used as they come; earlier ones are read from the cache (already stored).

    Semantics:
        for i in range(n):
            p = num_cached + i;  seen = positions in (p - window, p]
            out[i] = softmax(cap(scaling * query[i] . keys[seen])) @ values[seen]
    """
    num_new = query.shape[0]
    if span.num_cached:
        length = span.num_cached + num_new
        keys = key_cache.index_select(0, span.blocks).transpose(1, 2).flatten(0, 1)[:length].to(query.dtype)
        values = value_cache.index_select(0, span.blocks).transpose(1, 2).flatten(0, 1)[:length].to(query.dtype)
    q, k, v = (t.transpose(0, 1)[None] for t in (query, keys, values))
    is_plain = span.num_cached == 0 and (window is None or window >= num_new)
    if softcap is None:
        mask = None if is_plain else _causal_mask(span.num_cached, num_new, window, query.device)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=is_plain, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out[0].transpose(0, 1)
    seen = _causal_mask(span.num_cached, num_new, window, query.device)
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
    scores = torch.tanh((q @ k.transpose(2, 3)).float() * (scaling / softcap)) * softcap
    weights = torch.softmax(scores.masked_fill(~seen, -math.inf), dim=-1).to(v.dtype)
    return (weights @ v)[0].transpose(0, 1)


def _causal_mask(num_cached: int, num_new: int, window: int | None, device: torch.device) -> torch.Tensor:
    """(num_new, num_cached + num_new) bool, True where the query sees the token."""
    query = torch.arange(num_cached, num_cached + num_new, device=device)[:, None]
    key = torch.arange(num_cached + num_new, device=device)[None, :]
    seen = key <= query
    return seen if window is None else seen & (key > query - window)

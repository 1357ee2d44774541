"""Every op against its Semantics, written out as loops in float64."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.ops import (
    DecodeBatch,
    GroupEdits,
    Lanes,
    PrefillSpan,
    Run,
    SiteEdits,
    Stack,
    TokenLayout,
    decode_attention,
    embed_low_rank,
    expand,
    expand_stack,
    prefill_attention,
    scale,
    shift,
    shrink,
    shrink_stack,
    store_kv,
)

D_IN, D_OUT, BLOCK_SIZE, HEAD_DIM = 5, 4, 4, 6
examples = settings(max_examples=100, deadline=None, derandomize=True)


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# The normal form


@dataclass(frozen=True, slots=True)
class Case:
    """A step: the adapter of each token, and for each member of a group the span of rows that each adapter owns."""

    mixed: tuple[int, ...]
    chunks: tuple[tuple[int, int], ...]  # (length, adapter)
    num_rows: tuple[int, ...]  # of each member
    spans: tuple[tuple[tuple[int, int], ...], ...]  # [member][adapter]; adapter 0 owns nothing
    has_mid_scale: bool
    has_mid_shift: bool
    has_up_scale: bool
    seed: int

    @property
    def num_adapters(self) -> int:
        return len(self.spans[0])

    @property
    def adapters(self) -> list[int]:
        return [*self.mixed, *(adapter for length, adapter in self.chunks for _ in range(length))]

    @property
    def offsets(self) -> tuple[int, ...]:
        return tuple(sum(self.num_rows[:i]) for i in range(len(self.num_rows) + 1))

    def rows_of(self, adapter: int) -> list[int]:
        """The adapter's rows among those of the whole group."""
        return [o + i for o, s in zip(self.offsets, self.spans, strict=False) for i in range(*s[adapter])]

    def layout(self) -> TokenLayout:
        runs, start = [], len(self.mixed)
        for length, adapter in self.chunks:
            runs.append(Run(start, start + length, adapter))
            start += length
        return TokenLayout(torch.tensor(self.adapters, dtype=torch.long), len(self.mixed), tuple(runs))

    def group(self) -> GroupEdits:
        num = self.offsets[-1]
        foreign = torch.ones(self.num_adapters, num, dtype=torch.bool)
        columns: list[torch.Tensor | slice | None] = []
        for adapter in range(self.num_adapters):
            rows = self.rows_of(adapter)
            foreign[adapter, rows] = False
            columns.append(torch.tensor(rows) if rows else None)
        members = tuple(self.site(member) if n else None for member, n in enumerate(self.num_rows))
        mid_scale = normal(self.num_adapters, num, seed=self.seed + 1) if self.has_mid_scale else None
        mid_shift = None
        if self.has_mid_shift:
            mid_shift = normal(self.num_adapters, num, seed=self.seed + 2).masked_fill(foreign, 0)
        down = normal(num, D_IN, seed=self.seed + 3)
        return GroupEdits(members, None, down, foreign, mid_scale, mid_shift, self.offsets, tuple(columns))

    def site(self, member: int) -> SiteEdits:
        columns = tuple(slice(a, b) if b > a else None for a, b in self.spans[member])
        up_scale = normal(self.num_adapters, D_OUT, seed=self.seed + 20 + member) if self.has_up_scale else None
        up = normal(self.num_rows[member], D_OUT, seed=self.seed + 10 + member)
        return SiteEdits(True, up, columns, up_scale=up_scale)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Spans overlap as they like: adapters that share rows, nest in one another's, or have none at a member."""
    num_adapters = draw(st.integers(1, 4))
    adapter = st.integers(0, num_adapters)
    num_rows = draw(st.lists(st.integers(0, 5), min_size=1, max_size=3).map(tuple).filter(sum))
    spans = []
    for n in num_rows:
        ends = [sorted((draw(st.integers(0, n)), draw(st.integers(0, n)))) for _ in range(num_adapters)]
        spans.append(((0, 0), *((a, b) for a, b in ends)))
    return Case(
        mixed=tuple(draw(st.lists(adapter, max_size=5))),
        chunks=tuple(draw(st.lists(st.tuples(st.integers(1, 3), adapter), max_size=3))),
        num_rows=num_rows,
        spans=tuple(spans),
        has_mid_scale=draw(st.booleans()),
        has_mid_shift=draw(st.booleans()),
        has_up_scale=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
    )


def shrink_by_loops(dots: torch.Tensor, case: Case, group: GroupEdits) -> torch.Tensor:
    """dots (tokens, rows): of each token with each row of `down`."""
    h = torch.zeros_like(dots)
    for t, adapter in enumerate(case.adapters):
        for i in case.rows_of(adapter):
            factor = 1.0 if group.mid_scale is None else group.mid_scale[adapter, i]
            addend = 0.0 if group.mid_shift is None else group.mid_shift[adapter, i]
            h[t, i] = factor * dots[t, i] + addend
    return h


@examples
@given(cases())
def test_shrink_gives_each_token_the_rows_of_its_adapter(case: Case) -> None:
    group = case.group()
    assert group.down is not None
    x = normal(len(case.adapters), D_IN, seed=case.seed)
    dots = torch.tensor([[float(row.dot(token)) for row in group.down] for token in x], dtype=x.dtype)
    expected = shrink_by_loops(dots.view(len(x), case.offsets[-1]), case, group)
    torch.testing.assert_close(shrink(x, group, case.layout()), expected)


@examples
@given(cases())
def test_embed_low_rank_reads_the_rows_at_each_tokens_id(case: Case) -> None:
    vocabulary, num_stored = 7, case.offsets[-1] + 3
    store = normal(num_stored, vocabulary, seed=case.seed)
    numbers = torch.randperm(num_stored, generator=torch.Generator().manual_seed(case.seed))[: case.offsets[-1]]
    ids = torch.tensor([(3 * t + case.seed) % vocabulary for t in range(len(case.adapters))], dtype=torch.long)
    group = case.group()
    dots = torch.tensor([[float(store[n, i]) for n in numbers] for i in ids], dtype=torch.float64)
    expected = shrink_by_loops(dots.view(len(ids), case.offsets[-1]), case, group)
    torch.testing.assert_close(embed_low_rank(ids, store, numbers, group, case.layout()), expected)


@examples
@given(cases())
def test_expand_adds_each_tokens_rows_in_place(case: Case) -> None:
    layout = case.layout()
    group = case.group()
    h = shrink(normal(len(case.adapters), D_IN, seed=case.seed), group, layout)
    for member, edits in enumerate(group.members):
        if edits is None:
            continue
        assert edits.up is not None
        y = normal(len(case.adapters), D_OUT, seed=case.seed + 5)
        expected = y.clone()
        part = h[:, case.offsets[member] : case.offsets[member + 1]]
        for t, adapter in enumerate(case.adapters):
            for i in range(*case.spans[member][adapter]):
                factor = 1.0 if edits.up_scale is None else edits.up_scale[adapter]
                expected[t] += factor * part[t, i] * edits.up[i]
        expand(y, part, edits, layout)
        torch.testing.assert_close(y, expected)


def stacked(case: Case, group: GroupEdits, num_pieces: int) -> Stack:
    """The group's rows as a matrix per adapter, padded with zero rows; each output in this many pieces."""
    assert group.down is not None
    num_adapters = case.num_adapters - 1
    have_rows = [member for member, n in enumerate(case.num_rows) if n]
    rank = max(1, *(b - a for spans in case.spans for a, b in spans))
    down = torch.zeros(num_adapters, len(have_rows), rank, D_IN, dtype=torch.float64)
    up = torch.zeros(num_adapters, len(have_rows), num_pieces, rank, D_OUT // num_pieces, dtype=torch.float64)
    of_group = (group.mid_scale, group.mid_shift)
    mids = [None if m is None else torch.ones(num_adapters, len(have_rows), rank, dtype=m.dtype) for m in of_group]
    for place, member in enumerate(have_rows):
        edits, offset = group.members[member], case.offsets[member]
        assert edits is not None
        assert edits.up is not None
        for lane, (a, b) in enumerate(case.spans[member][1:]):
            down[lane, place, : b - a] = group.down[offset + a : offset + b]
            up[lane, place, :, : b - a] = edits.up[a:b].view(b - a, num_pieces, D_OUT // num_pieces).transpose(0, 1)
            for mid, values in zip(mids, of_group, strict=True):
                if mid is not None and values is not None:
                    mid[lane, place, : b - a] = values[lane + 1, offset + a : offset + b]
    owners = [place for place in range(len(have_rows)) for _ in range(num_pieces)]
    places = [have_rows.index(member) if member in have_rows else None for member in range(len(case.num_rows))]
    return Stack(
        rank=rank,
        down=down.flatten(1, 2),
        up=up.flatten(1, 2),
        spans=tuple((0, 0) if p is None else (p * num_pieces, (p + 1) * num_pieces) for p in places),
        owners=tuple(owners),
        owner_index=torch.tensor(owners),
        mid_scale=None if mids[0] is None else mids[0].view(num_adapters, 1, -1),
        mid_shift=None if mids[1] is None else mids[1].view(num_adapters, 1, -1),
    )


@examples
@given(cases(), st.sampled_from(["all", "mixed", "none"]), st.sampled_from([1, 2, D_OUT]))
def test_a_stack_adds_what_shrink_and_expand_do(case: Case, in_lanes: str, num_pieces: int) -> None:
    group, x = case.group(), normal(len(case.adapters), D_IN, seed=case.seed)
    h = shrink(x, group, case.layout())
    num_in_lanes = {"all": len(case.adapters), "mixed": len(case.mixed), "none": 0}[in_lanes]
    lanes = Lanes.of(case.adapters[:num_in_lanes], case.num_adapters - 1, torch.device("cpu"))
    start = lanes.num_tokens if lanes is not None else 0
    rest = [Run(t, t + 1, adapter) for t, adapter in enumerate(case.adapters) if t >= start and adapter]
    layout = replace(case.layout(), lanes=lanes, runs_after_lanes=tuple(rest))
    stack = stacked(case, group, num_pieces)
    hidden = shrink_stack(x, stack, layout)
    joint, all_expected = [], []
    for member, edits in enumerate(group.members):
        if edits is None:
            continue
        expected = normal(len(x), D_OUT, seed=case.seed + 5)
        y = expected.clone()
        joint.append(y.clone())
        expand(expected, h[:, case.offsets[member] : case.offsets[member + 1]], edits, layout)
        all_expected.append(expected)
        expand_stack(y, hidden, stack, stack.spans[member], layout, edits.up_scale)
        torch.testing.assert_close(y, expected)
    if not case.has_up_scale:
        y = torch.cat(joint, dim=1)
        expand_stack(y, hidden, stack, (0, len(stack.owners)), layout)
        torch.testing.assert_close(y, torch.cat(all_expected, dim=1))


def test_lanes_that_would_be_mostly_padding_are_not_made() -> None:
    device = torch.device("cpu")
    few, many = [1] * 9 + [2], [1] * 600 + [2]
    assert all(Lanes.of(few, num, device) is not None for num in (2, 16))
    assert Lanes.of(many, 2, device) is not None
    assert Lanes.of(many, 3, device) is None
    assert Lanes.of([0, 0], 2, device) is None
    assert Lanes.of([], 2, device) is None


def test_what_overflows_in_one_lane_stays_there() -> None:
    lanes = Lanes.of([1, 0, 2], 2, torch.device("cpu"))
    assert lanes is not None
    down = torch.tensor([[[math.inf] * D_IN], [[1.0] * D_IN]])
    stack = Stack(1, down, torch.ones(2, 1, 1, D_OUT), spans=((0, 1),), owners=(0,))
    layout = TokenLayout(torch.tensor([1, 0, 2]), 3, (), lanes)
    y = torch.zeros(3, D_OUT)
    expand_stack(y, shrink_stack(torch.ones(3, D_IN), stack, layout), stack, (0, 1), layout)
    assert y[0].isinf().all()
    assert torch.equal(y[1:], torch.tensor([[0.0] * D_OUT, [float(D_IN)] * D_OUT]))


@examples
@given(cases())
def test_scale_and_shift_use_each_tokens_own_vector(case: Case) -> None:
    x = normal(len(case.adapters), D_OUT, seed=case.seed)
    vectors = normal(case.num_adapters, D_OUT, seed=case.seed + 1)
    scaled = torch.stack([vectors[a] * x[t] for t, a in enumerate(case.adapters)]) if len(x) else x
    shifted = torch.stack([vectors[a] + x[t] for t, a in enumerate(case.adapters)]) if len(x) else x
    torch.testing.assert_close(scale(x, vectors, case.layout()), scaled)
    torch.testing.assert_close(shift(x, vectors, case.layout()), shifted)


@pytest.mark.parametrize("bad", [math.inf, math.nan, 1e308])
@pytest.mark.parametrize("place", ["token", "down", "mid_scale"])
def test_what_overflows_in_one_adapter_does_not_reach_its_neighbours(bad: float, place: str) -> None:
    case = Case((1, 2, 0, 2, 1), ((2, 1), (2, 2), (1, 0)), (3, 2), (((0, 0), (0, 1), (1, 3)), ((0, 0), (0, 2), (0, 1))),
                has_mid_scale=True, has_mid_shift=True, has_up_scale=True, seed=3)  # fmt: skip
    x = normal(len(case.adapters), D_IN, seed=0)
    group, layout = case.group(), case.layout()
    assert group.down is not None
    assert group.mid_scale is not None
    own = [row for row in case.rows_of(2) if row not in case.rows_of(1)]

    def outputs() -> torch.Tensor:
        h = shrink(x, group, layout)
        y = normal(len(x), D_OUT, seed=1)
        site = group.members[0]
        assert site is not None
        expand(y, h[:, : case.num_rows[0]], site, layout)
        return y

    healthy = outputs()
    tensor, at = {"token": (x, [1, 3]), "down": (group.down, own), "mid_scale": (group.mid_scale, [2])}[place]
    tensor[at] = bad
    others = [t for t, adapter in enumerate(case.adapters) if adapter != 2]
    torch.testing.assert_close(outputs()[others], healthy[others], rtol=0, atol=0)


# Attention


@dataclass(frozen=True, slots=True)
class Shape:
    """Heads, and how scores are formed."""

    kv_heads: int
    group: int
    window: int | None
    softcap: float | None

    @property
    def options(self) -> dict[str, float | int | None]:
        return {"scaling": 0.7, "window": self.window, "softcap": self.softcap}


shapes = st.builds(
    Shape,
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    window=st.none() | st.integers(1, 14),
    softcap=st.none() | st.floats(0.5, 30),
)


def attention_by_loops(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, position: int, shape: Shape
) -> torch.Tensor:
    """One query (heads, head_dim) at a position, over keys and values (tokens, kv_heads, head_dim) of its sequence."""
    first = 0 if shape.window is None else max(position - shape.window + 1, 0)
    seen = range(first, position + 1)
    out = torch.zeros_like(query)
    for head, q in enumerate(query):
        scores = torch.stack([0.7 * q.dot(keys[p, head // shape.group]) for p in seen])
        if shape.softcap is not None:
            scores = shape.softcap * torch.tanh(scores / shape.softcap)
        for weight, p in zip(torch.softmax(scores, dim=0), seen, strict=True):
            out[head] += weight * values[p, head // shape.group]
    return out


class Cached:
    """Sequences in a cache whose other places hold what a former user may have left: overflowed keys, large values."""

    def __init__(self, lengths: Sequence[int], shape: Shape, order: Sequence[int], seed: int) -> None:
        """`order`: the cache's blocks in the order in which sequences take them."""
        self.lengths = lengths
        self.shape = shape
        num_blocks = max(order) + 1
        size = (num_blocks, shape.kv_heads)
        self.key_cache = torch.full((*size, BLOCK_SIZE, HEAD_DIM), math.nan, dtype=torch.float64)
        self.value_cache = torch.full((*size, BLOCK_SIZE, HEAD_DIM), 1e30, dtype=torch.float64)
        self.keys = [normal(n, shape.kv_heads, HEAD_DIM, seed=seed + i) for i, n in enumerate(lengths)]
        self.values = [normal(n, shape.kv_heads, HEAD_DIM, seed=seed + 50 + i) for i, n in enumerate(lengths)]
        self.query = normal(len(lengths), shape.kv_heads * shape.group, HEAD_DIM, seed=seed + 99)
        self.blocks: list[list[int]] = []
        left = list(order)
        for i, n in enumerate(lengths):
            self.blocks.append([left.pop(0) for _ in range(-(-n // BLOCK_SIZE))])
            blocks = torch.tensor([self.blocks[i][p // BLOCK_SIZE] for p in range(n)])
            offsets = torch.tensor([p % BLOCK_SIZE for p in range(n)])
            store_kv(self.keys[i], self.values[i], self.key_cache, self.value_cache, blocks, offsets)

    def batch(self) -> DecodeBatch:
        pairs = [(s, block, i * BLOCK_SIZE) for s, own in enumerate(self.blocks) for i, block in enumerate(own)]
        is_single = len(pairs) == len(self.lengths)
        inverse = None
        if is_single:
            pairs.sort(key=lambda pair: pair[1])
            inverse = torch.tensor([[s for s, _, _ in pairs].index(s) for s in range(len(pairs))])
        runs: list[tuple[int, int, int]] = []
        for index, (_, block, _) in enumerate(pairs):
            if runs and block == pairs[index - 1][1] + 1:
                runs[-1] = (runs[-1][0], index + 1, runs[-1][2])
            else:
                runs.append((index, index + 1, block))
        sequence, blocks, starts = (torch.tensor(column) for column in zip(*pairs, strict=True))
        num_read = min(BLOCK_SIZE, max(self.lengths))
        lengths = torch.tensor(self.lengths)
        return DecodeBatch(lengths, sequence, blocks, starts, tuple(runs), is_single, inverse, num_read)

    def decode(self) -> torch.Tensor:
        return decode_attention(self.query, self.key_cache, self.value_cache, self.batch(), **self.shape.options)  # type: ignore[arg-type]

    def expected(self) -> torch.Tensor:
        pairs = zip(self.query, self.keys, self.values, self.lengths, strict=True)
        return torch.stack([attention_by_loops(q, k, v, n - 1, self.shape) for q, k, v, n in pairs])


def blocks_for(lengths: Sequence[int]) -> int:
    return sum(-(-n // BLOCK_SIZE) for n in lengths)


@examples
@given(st.lists(st.integers(1, 19), min_size=1, max_size=5), shapes, st.randoms(use_true_random=False), st.booleans())
def test_decode_is_softmax_attention_wherever_the_blocks_lie(
    lengths: list[int], shape: Shape, dice: Random, scattered: bool
) -> None:
    order = list(range(blocks_for(lengths) + 2))
    if scattered:
        dice.shuffle(order)
    cached = Cached(lengths, shape, order, seed=sum(lengths))
    torch.testing.assert_close(cached.decode(), cached.expected(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 1, 3, 4, 5, 64])
@pytest.mark.parametrize(
    "lengths",
    [[1], [4], [1, 4, 3], [5, 19, 1, 8]],
    ids=["one-token", "full-block", "single-blocks", "several-blocks"],
)
def test_decode_at_the_edges_of_blocks_and_windows(lengths: list[int], window: int | None) -> None:
    """Blocks that lie wholly before a window have no weight at all, which must not become NaN."""
    cached = Cached(lengths, Shape(2, 2, window, None), range(blocks_for(lengths)), seed=7)
    torch.testing.assert_close(cached.decode(), cached.expected(), rtol=1e-5, atol=1e-5)


def test_decode_gathers_blocks_too_scattered_for_views() -> None:
    lengths = [17, 18, 19]
    cached = Cached(lengths, Shape(2, 2, None, None), list(range(0, 32, 2)), seed=1)
    batch = cached.batch()
    assert len(batch.runs) == batch.pair_block.shape[0] == 15
    torch.testing.assert_close(cached.decode(), cached.expected(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_a_former_user_left_in_a_block_does_not_reach_the_next(bad: float) -> None:
    cached = Cached([3], Shape(1, 1, None, None), [0], seed=2)
    overflow = torch.full((1, 1, HEAD_DIM), bad, dtype=torch.float64)
    store_kv(overflow, overflow, cached.key_cache, cached.value_cache, torch.tensor([0]), torch.tensor([3]))
    torch.testing.assert_close(cached.decode(), cached.expected(), rtol=1e-5, atol=1e-5)


def test_large_scores_do_not_overflow_across_blocks() -> None:
    cached = Cached([10, 3], Shape(1, 1, None, None), range(4), seed=4)
    cached.query *= 1e4
    torch.testing.assert_close(cached.decode(), cached.expected(), rtol=1e-4, atol=1e-4)


@examples
@given(st.integers(0, 13), st.integers(1, 7), shapes, st.booleans())
def test_prefill_is_causal_attention_over_cache_and_chunk(
    num_cached: int, num_new: int, shape: Shape, backwards: bool
) -> None:
    total = num_cached + num_new
    order = range(blocks_for([total]) + 1)
    cached = Cached([total], shape, order[::-1] if backwards else order, seed=total)
    keys, values = cached.keys[0], cached.values[0]
    query = normal(num_new, shape.kv_heads * shape.group, HEAD_DIM, seed=1)
    span = PrefillSpan(0, num_new, num_cached, torch.tensor(cached.blocks[0]))
    out = prefill_attention(
        query, keys[num_cached:], values[num_cached:], cached.key_cache, cached.value_cache, span,
        **shape.options,  # type: ignore[arg-type]
    )  # fmt: skip
    expected = [attention_by_loops(q, keys, values, num_cached + i, shape) for i, q in enumerate(query)]
    torch.testing.assert_close(out, torch.stack(expected), rtol=1e-5, atol=1e-5)


def test_store_kv_writes_its_own_places_and_no_others() -> None:
    keys, values = normal(5, 2, 3, seed=0), normal(5, 2, 3, seed=1)
    key_cache, value_cache = torch.zeros(2, 4, 2, 2, 3, dtype=keys.dtype)
    blocks, offsets = torch.tensor([3, 3, 0, 1, 2]), torch.tensor([1, 0, 1, 1, 0])
    expected_keys, expected_values = key_cache.clone(), value_cache.clone()
    for t in range(5):
        expected_keys[blocks[t], :, offsets[t], :] = keys[t]
        expected_values[blocks[t], :, offsets[t], :] = values[t]
    store_kv(keys, values, key_cache, value_cache, blocks, offsets)
    torch.testing.assert_close(key_cache, expected_keys, rtol=0, atol=0)
    torch.testing.assert_close(value_cache, expected_values, rtol=0, atol=0)

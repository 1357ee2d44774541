"""Every kernel against its Semantics in float64: Triton's in its interpreter, or on the GPU where there is one, and the
native ones."""

import importlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.ops import native
from server.ops.runs import DecodeLists
from tests.ops.resident import EVERY_FIELD, FIELDS, Edit, Resident, Shape, drawn, normal

# The interpreter takes a millisecond for what a GPU does in a nanosecond, so there are few examples, each of much.
examples = settings(max_examples=12, deadline=None, derandomize=True)


@dataclass(frozen=True, slots=True)
class Device:
    """Kernels, and where they run."""

    kernels: Any
    device: torch.device

    def resident(self, d_in: int, *widths: int) -> Resident:
        return Resident(d_in, widths, torch.float32, self.device)


@pytest.fixture(scope="module", params=["native", "triton"])
def on(request: pytest.FixtureRequest) -> Iterator[Device]:
    if request.param == "native":
        yield Device(native, torch.device("cpu"))
        return
    pytest.importorskip("triton")
    triton = importlib.import_module("server.ops.kernels")
    with pytest.MonkeyPatch.context() as patch:
        # The interpreter computes the parts of a sequence one after the other, also those that are empty.
        patch.setattr(triton, "_WANTED_PROGRAMS", 8)
        yield Device(triton, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def check(
    on: Device, case: Resident, slots: Sequence[int], *, seed: int = 0, is_joint: bool = True, is_static: bool = False,
    rtol: float = 1e-4,
) -> None:  # fmt: skip
    """Shrink and expand give what `Resident.expected` computes, and touch nothing else."""
    tokens, group, table = case.runs(slots, is_static=is_static), case.group, case.sheets
    x = normal(len(slots), case.d_in, seed=seed).to(case.dtype).to(on.device)
    base = normal(len(slots), sum(case.widths), seed=seed + 1).to(case.dtype).to(on.device)
    y = base.clone()
    h = on.kernels.shrink(x, group, table, tokens)
    parts = list(zip(y.split(case.widths, dim=1), base.split(case.widths, dim=1), strict=True))
    if is_joint:
        on.kernels.expand(y, h, group, table, tokens)
    for member, (part, before) in enumerate(parts):
        if not is_joint:
            on.kernels.expand(part, h, group, table, tokens, member=member)
        expected = case.expected(x, before, slots, member)
        torch.testing.assert_close(part.double().cpu(), expected.cpu(), rtol=rtol, atol=rtol)
        bare = [t for t, slot in enumerate(slots) if not slot]
        assert torch.equal(part[bare], before[bare])


@st.composite
def residents(draw: st.DrawFn, on: Device) -> Resident:
    """Up to four adapters, some with matrices of the first one's; each at some of the group's sites only."""
    widths = draw(st.lists(st.sampled_from([1, 5, 16, 33]), min_size=1, max_size=3))
    case = on.resident(draw(st.sampled_from([1, 7, 24, 130])), *widths)
    ranks = draw(st.lists(st.sampled_from([0, 1, 8, 17]), min_size=len(widths), max_size=len(widths)))
    first: dict[int, Edit] = {}
    for number in range(draw(st.integers(1, 4))):
        share = draw(st.sampled_from(["", "down", "up", "down up"])) if number else ""
        edits = {}
        for member, rank in enumerate(ranks):
            fields = draw(st.sets(st.sampled_from(FIELDS)))
            own_rank = rank if share else draw(st.sampled_from([rank, 0, 3]))
            if share or draw(st.integers(0, 3)):
                like = first.get(member)
                is_alike = like is not None and like.down is not None and len(like.down) == own_rank
                shape = Shape(own_rank, tuple(sorted(fields)))
                edits[member] = drawn(case, member, shape, 100 * number + member, like if is_alike else None, share)
        first = first or edits
        case.admit(edits)
    return case


@examples
@given(st.data(), st.booleans(), st.booleans())
def test_each_token_gets_its_own_edit(on: Device, data: st.DataObject, is_joint: bool, is_static: bool) -> None:
    case = data.draw(residents(on))
    slot = st.integers(0, len(case.slots) - 1)
    stretches = data.draw(st.lists(st.tuples(slot, st.sampled_from([1, 1, 2, 18])), max_size=5))
    slots = [slot for slot, length in stretches for _ in range(length)]
    check(on, case, slots, is_joint=is_joint, is_static=is_static)


@pytest.mark.parametrize("rank", [1, 15, 16, 17, 64, 256])
def test_any_rank_beside_rank_eight(on: Device, rank: int) -> None:
    case = on.resident(40, 24)
    slots = [case.admit({0: drawn(case, 0, Shape(r), r)}) for r in (rank, 8)]
    check(on, case, [slots[1], slots[0], 0])


@pytest.mark.parametrize("field", FIELDS)
def test_an_adapter_with_a_vector_beside_one_without(on: Device, field: str) -> None:
    case = on.resident(12, 20)
    slots = [case.admit({0: drawn(case, 0, Shape(3, fields), seed)}) for seed, fields in enumerate([(field,), ()])]
    check(on, case, [slots[0], slots[1], slots[0]])


def test_vectors_alone_are_edits(on: Device) -> None:
    case = on.resident(12, 20, 5)
    slot = case.admit({1: drawn(case, 1, Shape(0, ("out_scale", "out_shift")), 3)})
    check(on, case, [0, slot])


def test_sums_are_split_over_a_wide_input(on: Device) -> None:
    """More than one split, and a last one that is shorter."""
    case = on.resident(2200, 6)
    slot = case.admit({0: drawn(case, 0, Shape(2), 1)})
    check(on, case, [slot, slot])


def test_a_prefill_chunk_is_cut_in_long_runs(on: Device) -> None:
    case = on.resident(70, 40)
    one, two = (case.admit({0: drawn(case, 0, shape, seed)}) for seed, shape in enumerate([EVERY_FIELD, Shape(33)]))
    check(on, case, [two, 0, *[one] * 70, two])


def test_a_batch_of_the_base_alone_is_left_as_it_is(on: Device) -> None:
    case = on.resident(6, 4)
    case.admit({0: drawn(case, 0, EVERY_FIELD, 1)})
    check(on, case, [0, 0])
    check(on, case, [0, 0], is_static=True)
    check(on, case, [])


def test_inputs_and_outputs_may_be_strided(on: Device) -> None:
    case = on.resident(10, 9)
    slot = case.admit({0: drawn(case, 0, EVERY_FIELD, 1)})
    tokens, group, table = case.runs([slot, 0, slot]), case.group, case.sheets
    wide = normal(10, 7, seed=1).to(on.device)
    x = wide.t()[::3]
    assert x.stride(0) != 1
    y = normal(9, 6, seed=2).to(on.device).t()[::2]
    before = y.clone()
    on.kernels.expand(y, on.kernels.shrink(x, group, table, tokens), group, table, tokens, member=0)
    torch.testing.assert_close(y.double(), case.expected(x, before, [slot, 0, slot], 0), rtol=1e-5, atol=1e-5)
    scaled = on.kernels.scale(x, group, table, tokens, member=0)
    factor = case.slots[slot][0].vectors["in_scale"].to(on.device)
    torch.testing.assert_close(scaled, torch.stack([x[0] * factor, x[1], x[2] * factor]))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's, which computes with numpy
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_overflows_in_one_token_does_not_reach_its_run(on: Device, bad: float) -> None:
    """Three adapters in one run (shared rows): the token of one, and the vectors of another, are beyond numbers."""
    case = on.resident(10, 9)
    healthy = drawn(case, 0, EVERY_FIELD, 1)
    worse = drawn(case, 0, EVERY_FIELD, 2, healthy, "down up")
    worse.vectors["mid_scale"][0] = worse.vectors["up_scale"][1] = bad
    slots = [case.admit({0: edit}) for edit in (healthy, worse, drawn(case, 0, EVERY_FIELD, 3, healthy, "down up"))]
    tokens, group, table = case.runs([slots[0], slots[1], slots[2], 0]), case.group, case.sheets
    assert tokens.by_down.num == tokens.by_up.num == 1
    x = normal(4, 10, seed=4).to(on.device)
    x[2] = bad
    y = normal(4, 9, seed=5).to(on.device)
    before = y.clone()
    on.kernels.expand(y, on.kernels.shrink(x, group, table, tokens), group, table, tokens)
    torch.testing.assert_close(y[:1].double(), case.expected(x[:1], before[:1], slots[:1], 0), rtol=1e-5, atol=1e-5)
    assert torch.equal(y[3], before[3])


def test_an_embedding_reads_the_rows_at_each_tokens_id(on: Device) -> None:
    case = on.resident(11, 8)
    slots = [case.admit({0: drawn(case, 0, shape, seed)}) for seed, shape in enumerate([EVERY_FIELD, Shape(17)])]
    batch = [slots[0], 0, slots[1], slots[1]]
    tokens, group, table = case.runs(batch), case.group, case.sheets
    ids = torch.tensor([3, 10, 0, 10], device=on.device)
    y = normal(4, 8, seed=5).to(on.device)
    before = y.clone()
    on.kernels.expand(y, on.kernels.embed_low_rank(ids, group, table, tokens), group, table, tokens, gain=2.5)
    one_hot = torch.nn.functional.one_hot(ids, 11).float()
    expected = case.expected(one_hot, before, batch, 0, gain=2.5)
    torch.testing.assert_close(y.double(), expected.to(on.device), rtol=1e-5, atol=1e-5)


# Attention


@dataclass(frozen=True, slots=True)
class Heads:
    """Heads, and how scores are formed."""

    kv_heads: int
    group: int
    width: int
    block_size: int
    window: int | None
    softcap: float | None
    has_sinks: bool


heads = st.builds(
    Heads,
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    width=st.sampled_from([4, 6, 16]),
    block_size=st.sampled_from([8, 24]),
    window=st.none() | st.integers(1, 90),
    softcap=st.none() | st.floats(0.5, 30),
    has_sinks=st.booleans(),
)


class Cached:
    """Sequences in a cache whose other places hold what a former user may have left."""

    def __init__(self, on: Device, lengths: Sequence[int], like: Heads, dtype: torch.dtype, seed: int) -> None:
        self.on, self.lengths, self.like = on, lengths, like
        num_blocks = [-(-n // like.block_size) for n in lengths]
        left = Random(seed).sample(range(sum(num_blocks) + 2), sum(num_blocks))
        self.blocks = [[left.pop() for _ in range(n)] for n in num_blocks]
        cache = torch.full((2, sum(num_blocks) + 2, like.kv_heads, like.block_size, like.width), math.nan)
        self.key_cache, self.value_cache = cache.to(dtype).to(on.device)
        self.query = normal(len(lengths), like.kv_heads * like.group, like.width, seed=seed).to(dtype).to(on.device)
        self.sinks = normal(like.kv_heads * like.group, seed=seed + 1).to(on.device) if like.has_sinks else None
        shape = (sum(lengths), like.kv_heads, like.width)
        self.keys, self.values = (normal(*shape, seed=seed + 2 + i).to(dtype).to(on.device) for i in range(2))
        places = [(own[p // like.block_size], p % like.block_size)
                  for own, n in zip(self.blocks, lengths, strict=True) for p in range(n)]  # fmt: skip
        blocks, offsets = torch.tensor(places, device=on.device).view(-1, 2).unbind(1)
        on.kernels.store_kv(self.keys, self.values, self.key_cache, self.value_cache, blocks, offsets)

    def decode(self) -> torch.Tensor:
        firsts = [sum(map(len, self.blocks[:i])) for i in range(len(self.blocks))]
        numbers = [block for own in self.blocks for block in own]
        lists = [torch.tensor(n, dtype=torch.int64, device=self.on.device) for n in (self.lengths, firsts, numbers)]
        options = {"window": self.like.window, "softcap": self.like.softcap}
        return self.on.kernels.decode_attention(
            self.query, self.key_cache, self.value_cache, DecodeLists(*lists), scaling=0.7, sinks=self.sinks, **options
        )

    def expected(self) -> torch.Tensor:
        """In float64, (sequences, heads, width)."""
        rows, start = [], 0
        for query, length in zip(self.query, self.lengths, strict=True):
            first = 0 if self.like.window is None else max(length - self.like.window, 0)
            own = slice(start + first, start + length)
            k, v = (t[own].double().repeat_interleave(self.like.group, dim=1) for t in (self.keys, self.values))
            scores = 0.7 * torch.einsum("hd,thd->ht", query.double(), k)
            if self.like.softcap is not None:
                scores = self.like.softcap * torch.tanh(scores / self.like.softcap)
            sinks = scores.new_full((len(scores), 1), -math.inf) if self.sinks is None else self.sinks.double()[:, None]
            weights = torch.softmax(torch.cat([scores, sinks], dim=1), dim=1)[:, :-1]
            rows.append(torch.einsum("ht,thd->hd", weights, v))
            start += length
        return torch.stack(rows)


@settings(examples, max_examples=8)
@given(st.lists(st.sampled_from([1, 2, 8, 23, 64, 65, 140]), min_size=1, max_size=3), heads)
def test_decode_is_softmax_attention_wherever_the_blocks_lie(on: Device, lengths: list[int], like: Heads) -> None:
    cached = Cached(on, lengths, like, torch.float32, seed=sum(lengths))
    torch.testing.assert_close(cached.decode().double(), cached.expected(), rtol=1e-4, atol=1e-5)


def test_no_sequences_have_no_attention(on: Device) -> None:
    cached = Cached(on, [], Heads(2, 2, 16, 8, None, None, False), torch.float32, seed=0)
    assert cached.decode().shape == (0, 4, 16)


def test_large_scores_do_not_overflow(on: Device) -> None:
    cached = Cached(on, [70, 3], Heads(1, 1, 16, 8, None, None, False), torch.float32, seed=4)
    cached.query *= 1e4
    torch.testing.assert_close(cached.decode().double(), cached.expected(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_store_kv_writes_its_own_places_and_numbers_only(on: Device, bad: float) -> None:
    """Keys and values as attention has them: heads before tokens, transposed."""
    keys, values = (normal(2, 5, 3, seed=seed).to(on.device).transpose(0, 1) for seed in range(2))
    values[4, 1, 2] = bad
    key_cache, value_cache = torch.zeros(2, 4, 2, 2, 3, device=on.device)
    blocks, offsets = torch.tensor([[3, 3, 0, 1, 2], [1, 0, 1, 1, 0]], device=on.device)
    expected_keys, expected_values = key_cache.clone(), value_cache.clone()
    expected_keys[blocks, :, offsets] = keys
    expected_values[blocks, :, offsets] = torch.nan_to_num(values)
    on.kernels.store_kv(keys, values, key_cache, value_cache, blocks, offsets)
    assert torch.equal(key_cache, expected_keys)
    assert torch.equal(value_cache, expected_values)

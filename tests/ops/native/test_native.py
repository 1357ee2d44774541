"""Native kernels where they differ from their Triton twins (`tests/ops/test_kernels.py` has both): what stands between
products, 16 bits, and that an answer does not depend on its neighbours or on how many threads there are."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from server.ops import native, reference
from server.ops.runs import DecodeLists
from tests.ops.resident import EVERY_FIELD, Resident, Shape, drawn, normal

CPU = torch.device("cpu")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
examples = settings(max_examples=30, deadline=None, derandomize=True)


@pytest.fixture(params=[1, 2], ids="{} threads".format)
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def limits(dtype: torch.dtype) -> dict[str, float]:
    """One rounding to the dtype, and float32 sums."""
    return {"rtol": torch.finfo(dtype).eps + 1e-5, "atol": 1e-5}


@DTYPES
@pytest.mark.parametrize("width", [1, 7, 16, 100, 512])
def test_an_rms_norm(dtype: torch.dtype, width: int) -> None:
    x, weight = (normal(3, 2, width, seed=1) * 9).to(dtype), normal(width, seed=2)
    expected = F.rms_norm(x.double(), (width,), weight.double(), 1e-5)
    found = native.Norm(weight, 1e-5)(x)
    assert found.dtype is dtype
    torch.testing.assert_close(found.double(), expected, **limits(dtype))
    strided = x.transpose(0, 1)
    torch.testing.assert_close(native.Norm(weight, 1e-5)(strided), found.transpose(0, 1), rtol=0, atol=0)


@DTYPES
@pytest.mark.parametrize("width", [1, 33, 1408])
def test_a_gated_product_of_two_halves(dtype: torch.dtype, width: int) -> None:
    both = (normal(1, 9, 2 * width, seed=3) * 20).to(dtype)
    gate, up = both.split(width, dim=-1)
    found = native.gated(gate, up)
    expected = F.silu(gate.double()) * up.double()
    torch.testing.assert_close(found.double(), expected, **limits(dtype))
    torch.testing.assert_close(native.gated(gate, up.contiguous()), found, rtol=0, atol=0)


@examples
@given(st.floats(width=32, allow_nan=False, allow_infinity=True))
def test_silu_at_any_number(value: float) -> None:
    gate = torch.tensor([[value, -value]])
    expected = F.silu(gate)
    torch.testing.assert_close(native.gated(gate, torch.ones(1, 2)), expected, rtol=2e-6, atol=1e-37, equal_nan=True)


def test_what_is_no_number_stays_none() -> None:
    nan = torch.full((1, 20), torch.nan)
    for dtype in native.DTYPES:
        assert native.gated(nan.to(dtype), torch.ones(1, 20).to(dtype)).isnan().all()
        assert native.Norm(torch.ones(20), 1e-5)(nan.to(dtype)).isnan().all()


@examples
@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40))
def test_numbers_are_rounded_as_pytorch_rounds_them(bits: list[int]) -> None:
    """Any float32, subnormal or infinite, on its way to a cache in bfloat16."""
    words = torch.tensor(bits, dtype=torch.int64).to(torch.int32)
    numbers = words.view(torch.float32)[None, None]
    keys, values = torch.zeros(2, 1, 1, 1, len(bits), dtype=torch.bfloat16)
    first = torch.zeros(1, dtype=torch.int64)
    native.store_kv(numbers, torch.zeros_like(numbers), keys, values, first, first)
    expected = numbers[0, 0].to(torch.bfloat16)
    assert torch.equal(keys.flatten().isnan(), expected.isnan())
    assert torch.equal(keys.flatten().nan_to_num(), expected.nan_to_num())


@pytest.mark.usefixtures("_threads")
@DTYPES
@pytest.mark.parametrize("width", [2, 16, 40, 64])
@pytest.mark.parametrize("options", [{}, {"window": 9, "softcap": 3.0}], ids=["plain", "window and cap"])
def test_a_rotary_decode_is_a_rotation_a_store_and_attention(
    dtype: torch.dtype, width: int, options: dict[str, Any]
) -> None:
    lengths, heads, kv_heads = [1, 30, 70], 6, 2
    projected = normal(3, (heads + 2 * kv_heads) * width, seed=1).to(dtype)
    query, keys, values = projected.split([n * width for n in (heads, kv_heads, kv_heads)], dim=1)
    values[1, 3] = torch.inf
    angles = torch.rand(3, 1, width // 2, generator=torch.Generator().manual_seed(2)).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    sin[..., : width // 2] *= -1
    at_once, expected = (normal(2, 5, kv_heads, 32, width, seed=3).to(dtype) for _ in range(2))
    places = torch.tensor([2, 0, 1]), torch.tensor([0, 29, 5])
    lists = DecodeLists(torch.tensor(lengths), torch.tensor([0, 1, 2]), torch.tensor([2, 0, 4, 3, 1]))

    found = native.rotary_decode(query, keys, values, (cos, sin), tuple(at_once), places, lists, scaling=0.3, **options)

    turned = [t.float().reshape(3, -1, width) for t in (query, keys)]
    for t in turned:
        reference.rotate(t, cos, sin)
    native.store_kv(turned[1], values.float().reshape(3, -1, width), *expected, *places)
    # A processor may round the two products of a rotation once or twice; values are only copied.
    torch.testing.assert_close(at_once, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    assert torch.equal(at_once[1], expected[1])
    answer = native.decode_attention(turned[0], *expected, lists, scaling=0.3, **options).flatten(1)
    torch.testing.assert_close(found, answer.to(dtype), **limits(dtype))


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_adapters_answer_is_the_same_to_the_bit_beside_any_others(dtype: torch.dtype) -> None:
    case = Resident(320, (1100, 64, 33), dtype, CPU)
    shapes = [Shape(8), EVERY_FIELD, Shape(17, ("out_scale",)), Shape(0, ("out_shift",))]
    slots = [
        case.admit({member: drawn(case, member, shape, 10 * number + member) for member in range(3)})
        for number, shape in enumerate(shapes)
    ]
    x, y = normal(1, 320, seed=1).to(dtype), normal(1, 1197, seed=2).to(dtype)

    def answers(batch: list[int]) -> torch.Tensor:
        out, tokens = y.repeat(len(batch), 1), case.runs(batch)
        h = native.shrink(x.repeat(len(batch), 1), case.group, case.sheets, tokens)
        native.expand(out, h, case.group, case.sheets, tokens)
        return out

    alone = {slot: answers([slot])[0] for slot in [0, *slots]}
    batch = [*slots, *[slots[1]] * 30, 0, *slots]  # no run is long enough for a library's product
    together = answers(batch)
    for slot, found in zip(batch, together, strict=True):
        assert torch.equal(found, alone[slot])
    # Inputs and rows are exact and the sums float32, so what is left is one rounding of the result.
    parts = zip(together.split(case.widths, dim=1), y.split(case.widths, dim=1), strict=True)
    for member, (found, base) in enumerate(parts):
        expected = case.expected(x.repeat(len(batch), 1), base.repeat(len(batch), 1), batch, member)
        torch.testing.assert_close(found.double(), expected, **limits(dtype))


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("cache_dtype", list(native.DTYPES), ids=str)
@pytest.mark.parametrize("dtype", list(native.DTYPES), ids=str)
def test_attention_in_any_pair_of_dtypes(dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    lengths, heads, width = [1, 63, 64, 200], 6, 48
    caches = normal(2, 8, 2, 64, width, seed=1).to(cache_dtype)
    query = normal(len(lengths), heads, width, seed=2).to(dtype)
    blocks = [[3], [0], [7], [5, 1, 6, 2]]
    firsts = torch.tensor([0, 1, 2, 3])
    lists = DecodeLists(torch.tensor(lengths), firsts, torch.tensor([b for own in blocks for b in own]))
    found = native.decode_attention(query, *caches, lists, scaling=0.3)
    for number, (own, length) in enumerate(zip(blocks, lengths, strict=True)):
        keys, values = (cache[own].transpose(1, 2).flatten(0, 1)[:length].double() for cache in caches)
        scores = torch.einsum("hd,thd->ht", query[number].double(), keys.repeat_interleave(3, dim=1)) * 0.3
        expected = torch.einsum("ht,thd->hd", scores.softmax(1), values.repeat_interleave(3, dim=1))
        torch.testing.assert_close(found[number].double(), expected, **limits(dtype))


@DTYPES
@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("width", [1, 15, 16, 17, 4096, 32001])
def test_the_largest_of_each_row(dtype: torch.dtype, width: int) -> None:
    logits = normal(5, width, seed=7).to(dtype)  # in 16 bits many are equal: the first of them
    expected = torch.tensor([int((row == row.max()).nonzero()[0]) for row in logits])
    assert torch.equal(native.argmax(logits), expected)
    wide = torch.full((5, width + 40), torch.inf, dtype=dtype)
    wide[:, 3 : 3 + width] = logits
    assert torch.equal(native.argmax(wide[:, 3 : 3 + width]), expected)


@DTYPES
def test_the_largest_of_a_row_that_tells_nothing_is_a_place_in_it(dtype: torch.dtype) -> None:
    rows = torch.stack([torch.full((40,), value, dtype=dtype) for value in (-torch.inf, torch.nan, torch.inf)])
    assert native.argmax(rows).tolist() == [0, 0, 0]
    rows[0, 33], rows[1, 39] = -3.0, 1.0
    assert native.argmax(rows).tolist() == [33, 39, 0]

"""Products of 4-bit weights in Triton are those of the dequantized weights: in its interpreter, or on a GPU."""

import re
from collections.abc import Sequence

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
from server.ops.four_bit import FourBitWeight, Tiling, lookup

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
examples = settings(max_examples=12, deadline=None, derandomize=True)
dtypes_on_a_gpu = [torch.float32] + [
    pytest.param(dtype, marks=[pytest.mark.gpu, pytest.mark.skipif(DEVICE.type != "cuda", reason="no GPU here")])
    for dtype in (torch.bfloat16, torch.float16)
]
# Of the norm of the product. Levels and products are rounded once each: half a unit in the last of 8 or 11 bits.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}


def quantized(
    d_out: int, d_in: int, *, kind: str = "nf4", is_double: bool = True, seed: int = 0
) -> tuple[FourBitWeight, torch.Tensor]:
    """A random weight as bitsandbytes quantizes it, and what it stands for, float32."""
    dense = torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    codes, state = quantize_4bit(dense, blocksize=64, compress_statistics=is_double, quant_type=kind)
    scale_levels = seconds = None
    if is_double:
        first = state.state2.absmax
        scale_levels, seconds = state.state2.code, torch.stack([first, state.offset.expand_as(first)], dim=1)
    rows, scales = codes.view(d_out, d_in // 2), state.absmax.view(d_out, -1)
    packed = FourBitWeight.packed(rows, state.code, scales, scale_levels, seconds)
    return packed, dequantize_4bit(codes, state)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def relative_error(found: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> float:
    expected = x.double() @ weight.double().t()
    expected = expected if bias is None else expected + bias.double()
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("is_double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_packed_weight_stands_for_the_same_numbers(kind: str, is_double: bool) -> None:
    packed, dense = quantized(192, 384, kind=kind, is_double=is_double)
    assert torch.equal(packed.whole(), dense)
    assert torch.equal(packed.rows(48, 128).whole(), dense[48:128])


def test_a_packed_weight_takes_the_bytes_that_bitsandbytes_takes() -> None:
    packed, _ = quantized(256, 512)
    num_blocks = 256 * 512 // 64
    tables = 4 * (16 + 256)
    assert packed.num_bytes == 256 * 512 // 2 + num_blocks + 2 * 4 * num_blocks // 256 + tables


@pytest.mark.parametrize("dtype", dtypes_on_a_gpu, ids=str)
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("num_tokens", [1, 3, 16, 17, 64, 128, 129])
def test_the_product_is_that_of_the_dequantized_weight(num_tokens: int, has_bias: bool, dtype: torch.dtype) -> None:
    packed, dense = quantized(192, 640)
    x, bias = normal(num_tokens, 640, dtype=dtype), normal(192, seed=2) if has_bias else None
    found = packed.product(x, bias)
    assert found.dtype is dtype
    assert relative_error(found, x, dense, bias) < LIMITS[dtype]


@examples
@given(
    num_tokens=st.integers(1, 40),
    d_out=st.sampled_from([128, 144, 272]),
    num_units=st.integers(1, 5),
    block_n=st.sampled_from([64, 128]),
    num_splits=st.integers(1, 5),
    is_double=st.booleans(),
)
def test_any_tiling_gives_the_same_product(
    num_tokens: int, d_out: int, num_units: int, block_n: int, num_splits: int, is_double: bool
) -> None:
    """Parts without inputs and outputs beyond the last included."""
    d_in = 128 * num_units
    packed, dense = quantized(d_out, d_in, is_double=is_double and d_out * d_in % 16384 == 0)
    x, bias = normal(num_tokens, d_in), normal(d_out, seed=2)
    found = packed.product(x, bias, Tiling(block_n, 4, 2, num_splits))
    assert relative_error(found, x, dense, bias) < LIMITS[torch.float32]


def test_joined_weights_are_multiplied_at_once_and_apart() -> None:
    made = [quantized(d_out, 256, seed=d_out) for d_out in (128, 64, 192)]
    joined = FourBitWeight.joined([packed for packed, _ in made])
    x = normal(2, 5, 256)
    together = torch.cat([x @ dense.t() for _, dense in made], dim=-1)
    torch.testing.assert_close(joined.product(x), together, rtol=1e-4, atol=1e-4)
    first = 0
    for packed, dense in made:
        part = joined.rows(first, first + len(dense))
        torch.testing.assert_close(part.product(x), packed.product(x), rtol=1e-5, atol=1e-5)
        assert torch.equal(part.whole(), dense)
        first += len(dense)


def test_a_token_is_multiplied_the_same_whatever_is_beside_it() -> None:
    packed, _ = quantized(128, 512)
    x = normal(64, 512)
    alone = torch.cat([packed.product(row[None]) for row in x[:4]])
    assert torch.equal(alone, packed.product(x)[:4])


def test_rows_may_lie_apart() -> None:
    packed, _ = quantized(128, 256)
    wide = normal(6, 3 * 256)
    for x in (wide[:, 256:512], wide[:, ::3], wide.t()[:256, :4].t()):
        torch.testing.assert_close(packed.product(x), packed.product(x.contiguous()), rtol=1e-6, atol=1e-6)


def test_no_token_is_no_product() -> None:
    packed, _ = quantized(128, 256)
    assert packed.product(normal(0, 256)).shape == (0, 128)


@pytest.mark.parametrize(
    ("d_out", "d_in", "block", "can_pack"),
    [(4096, 4096, 64, True), (128, 896, 64, True), (4096, 4096, 128, False), (4096, 4160, 64, False),
     (4100, 4096, 64, False), (64, 128, 64, False)],
)  # fmt: skip
def test_which_weights_can_be_packed(d_out: int, d_in: int, block: int, can_pack: bool) -> None:
    assert FourBitWeight.can_pack(d_out, d_in, block) is can_pack


def test_the_parts_of_a_sum_do_not_depend_on_the_number_of_tokens() -> None:
    for d_out, d_in in ((6144, 4096), (4096, 14336), (28672, 4096), (128, 896)):
        assert len({Tiling.of(num, d_out, d_in).num_splits for num in range(1, 129)}) == 1


# What the compiler makes of `lookup` runs on a GPU alone. Its instructions are few, and are executed here one by one.


def executed(assembly: str, operand: int) -> list[int]:
    """$0 to $3 for a $4."""
    registers = {"$4": operand}

    def value(name: str) -> int:
        return registers[name] if name in registers else int(name, 0)

    for line in assembly.strip("{} ").split(";"):
        if not line.strip() or line.strip().startswith(".reg"):
            continue
        matched = re.fullmatch(r"\s*(\w+)\.b32 (\S+), (.+)", line)
        assert matched is not None, line
        name, target, sources = matched.groups()
        registers[target] = instruction(name, [value(source) for source in sources.split(", ")])
    return [registers[f"${i}"] for i in range(4)]


def instruction(name: str, sources: Sequence[int]) -> int:
    """As the PTX manual defines it."""
    a, b = sources[:2]
    if name == "prmt":
        pool = (a | b << 32).to_bytes(8, "little")
        chosen = [sources[2] >> 4 * i & 15 for i in range(4)]
        assert all(number < 8 for number in chosen)  # the fourth bit would repeat a sign
        return int.from_bytes(bytes(pool[number] for number in chosen), "little")
    return {"and": a & b, "or": a | b, "shr": a >> b}[name]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_levels_are_found_within_registers(dtype: torch.dtype) -> None:
    levels = torch.linspace(-1, 1, 16).square().tolist()
    assembly = lookup(tuple(levels), dtype)
    rounded = torch.tensor(levels).to(dtype)
    words = torch.randint(0, 1 << 16, (64, 2), generator=torch.Generator().manual_seed(0)).tolist()
    every_code = [[0x3210, 0x7654], [0xBA98, 0xFEDC]]
    for first, second in words + every_code:
        outputs = executed(assembly, first | second << 16)
        for number, output in enumerate(outputs):
            pair = torch.tensor([output & 0xFFFF, output >> 16], dtype=torch.int32).to(torch.int16).view(dtype)
            codes = [word >> 4 * number & 15 for word in (first, second)]
            assert torch.equal(pair, rounded[codes])

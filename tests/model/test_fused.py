"""One product for the linears of a group, plain or packed: the same outputs, and weights that can still be read."""

import importlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn

from server.model.base import Base
from server.model.fused import FusedLinear, can_pack, can_read_codes, fused_four_bit, fused_natively
from server.model.pretrained import BaseOptions
from server.model.quantize import Quantization, dequantized_weight
from server.model.site import PRODUCTS
from server.ops import native
from server.ops.packed import FourBitProducts

packed_only = pytest.mark.skipif(not can_pack(), reason="this processor computes plain 16-bit weights only")


def linears(*, bias: bool, dtype: torch.dtype) -> list[nn.Linear]:
    torch.manual_seed(0)
    return [nn.Linear(64, width, bias, dtype=dtype).requires_grad_(False) for width in (32, 96, 16)]


def four_bit_linears(kind: str, *, bias: bool, is_nested: bool) -> list[Linear4bit]:
    made = []
    for plain in linears(bias=bias, dtype=torch.float32):
        module = Linear4bit(64, plain.out_features, bias, torch.float32)
        weight = Params4bit(plain.weight.data, False, quant_type=kind, compress_statistics=is_nested, module=module)
        module.weight = weight.to("cpu")  # which quantizes it
        if bias:
            module.bias.data = plain.bias.data
        made.append(module.requires_grad_(False).eval())
    return made


def options(folder: Path, dtype: torch.dtype) -> BaseOptions:
    return BaseOptions(str(folder), Quantization.NONE, dtype)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("is_packed", [False, pytest.param(True, marks=packed_only)], ids=["plain", "packed"])
@pytest.mark.parametrize("num_tokens", [1, 16, 70])
def test_the_product_holds_the_members_outputs_side_by_side(bias: bool, is_packed: bool, num_tokens: int) -> None:
    members = linears(bias=bias, dtype=torch.bfloat16)
    x = torch.randn(1, num_tokens, 64, dtype=torch.bfloat16)
    expected = torch.cat([member(x) for member in members], dim=-1)
    fused = FusedLinear(members, is_packed=is_packed)
    torch.testing.assert_close(fused(x), expected, rtol=2e-2, atol=2e-2)  # two units of bfloat16 in the last place


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("is_packed", [False, pytest.param(True, marks=packed_only)], ids=["plain", "packed"])
def test_a_member_is_computed_by_itself_for_an_input_of_its_own(bias: bool, is_packed: bool) -> None:
    members = linears(bias=bias, dtype=torch.bfloat16)
    x = torch.randn(2, 3, 64, dtype=torch.bfloat16)
    expected = [member(x) for member in members]
    fused = FusedLinear(members, is_packed=is_packed)
    for number, wanted in enumerate(expected):
        torch.testing.assert_close(fused.product_of(number, x), wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("is_packed", [False, pytest.param(True, marks=packed_only)], ids=["plain", "packed"])
def test_a_members_weight_can_be_read_exactly(is_packed: bool) -> None:
    members = linears(bias=False, dtype=torch.bfloat16)
    weights = [member.weight.clone() for member in members]
    fused = FusedLinear(members, is_packed=is_packed)
    for number, weight in enumerate(weights):
        assert torch.equal(fused.weight_of(number), weight)


@packed_only
def test_a_packed_members_own_weight_is_nan_and_takes_no_memory() -> None:
    members = linears(bias=False, dtype=torch.bfloat16)
    FusedLinear(members, is_packed=True)
    for member in members:
        assert member.weight.shape == (member.out_features, 64)
        assert member.weight.isnan().all()
        assert member.weight.untyped_storage().nbytes() == 2


@packed_only
def test_a_packed_base_counts_its_bytes_once(tiny_llama: Path) -> None:
    plain = Base.load(options(tiny_llama, torch.float32))
    packed = Base.load(options(tiny_llama, torch.bfloat16))
    assert packed.sites.packed_bytes > 0
    assert plain.sites.packed_bytes == 0
    assert packed.weight_bytes == pytest.approx(plain.weight_bytes / 2, rel=0.1)  # buffers stay float32


@packed_only
def test_a_packed_base_answers_what_methods_ask_of_the_weight(tiny_llama: Path) -> None:
    packed, plain = (Base.load(options(tiny_llama, dtype)) for dtype in (torch.bfloat16, torch.float32))
    for path, site in packed.sites.by_path.items():
        if site.kind not in PRODUCTS:
            continue
        twin = plain.sites.by_path[path]
        torch.testing.assert_close(site.row_norms_squared, twin.row_norms_squared, rtol=1e-2, atol=1e-4)
        rows = torch.randn(2, site.d_in)
        expected = twin.project(rows)
        assert (site.project(rows) - expected).norm() <= 1e-2 * expected.norm()
        if site.fused is not None:
            x = torch.randn(3, site.d_in)
            outside_of_a_step = site.module(x.bfloat16()).float()
            assert (outside_of_a_step - F.linear(x, twin.module.weight, twin.module.bias)).norm() <= 0.05 * x.norm()  # type: ignore[arg-type]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("is_nested", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_native_product_of_4_bits_is_that_of_the_dequantized_weights(kind: str, is_nested: bool, bias: bool) -> None:
    members = four_bit_linears(kind, bias=bias, is_nested=is_nested)
    weights = [dequantized_weight(member) for member in members]
    x = torch.randn(2, 3, 64)
    expected = [F.linear(x, weight, member.bias) for weight, member in zip(weights, members, strict=True)]
    fused = fused_natively(members)
    assert fused is not None
    torch.testing.assert_close(fused(x), torch.cat(expected, dim=-1), rtol=1e-5, atol=1e-5)
    for number, weight in enumerate(weights):
        torch.testing.assert_close(fused.product_of(number, x), expected[number], rtol=1e-5, atol=1e-5)
        assert torch.equal(fused.output_of(number, fused(x)), fused.product_of(number, x))
        assert torch.equal(fused.weight_of(number), weight)


def test_weights_of_4_bits_lie_in_one_place_and_nobody_reads_the_other_unnoticed() -> None:
    members = four_bit_linears("nf4", bias=False, is_nested=True)
    num_weights = sum(member.out_features * 64 for member in members)
    fused = fused_natively(members)
    assert fused is not None
    assert fused.packed_bytes == num_weights // 2 + num_weights // 64 * 4 + 16 * 4
    for member in members:
        assert member.weight.numel() == 0
        assert member.quant_state is None  # where bitsandbytes keeps the scales a second time
        with pytest.raises(ValueError, match="quant_state"):
            dequantized_weight(member)
        with pytest.raises(IndexError):
            member(torch.ones(1, 64))


def test_what_bitsandbytes_has_repacked_is_left_to_it() -> None:
    member = four_bit_linears("nf4", bias=False, is_nested=True)[1]
    assert can_read_codes(member)
    member.weight.quant_state.packing_format_for_cpu = True
    assert not can_read_codes(member)
    assert fused_natively([member]) is None


def test_weights_of_several_formats_are_no_one_product() -> None:
    mixed = [*four_bit_linears("nf4", bias=False, is_nested=True), *four_bit_linears("fp4", bias=False, is_nested=True)]
    assert fused_natively(mixed) is None
    assert all(can_read_codes(member) for member in mixed)


@pytest.mark.skipif(not native.multiplies_bfloat16(), reason="this processor does not multiply bfloat16")
def test_a_native_product_of_plain_weights_is_theirs() -> None:
    members = linears(bias=True, dtype=torch.bfloat16)
    weights = [member.weight.clone() for member in members]
    x = torch.randn(2, 3, 64, dtype=torch.bfloat16)
    expected = torch.cat([member(x) for member in members], dim=-1)
    fused = fused_natively(members)
    assert fused is not None
    torch.testing.assert_close(fused(x), expected, rtol=2e-2, atol=2e-2)
    for number, (weight, member) in enumerate(zip(weights, members, strict=True)):
        assert torch.equal(fused.weight_of(number), weight)
        assert member.weight.isnan().all()
        assert member.weight.untyped_storage().nbytes() == 2


@pytest.mark.parametrize("quantize", [Quantization.NF4, Quantization.NONE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_base_with_native_products_is_the_base_without(
    tiny_llama: Path, quantize: Quantization, dtype: torch.dtype
) -> None:
    own, stock = (Base.load(BaseOptions(str(tiny_llama), quantize, dtype, ops=ops)) for ops in ("native", "reference"))
    assert own.sites.packed_bytes > 0 or dtype is torch.float32
    for path, site in stock.sites.by_path.items():
        if site.kind not in PRODUCTS:
            continue
        twin = own.sites.by_path[path]
        rows, limit = torch.randn(2, site.d_in), 1e-5 if dtype is torch.float32 else 1e-2
        assert torch.equal(twin.row_norms_squared, site.row_norms_squared)
        expected = site.project(rows)
        assert (twin.project(rows) - expected).norm() <= limit * expected.norm()


def wide_four_bit_linears(*, bias: bool, is_nested: bool) -> list[Linear4bit]:
    """Wide enough for Triton's products."""
    torch.manual_seed(0)
    made = []
    for width in (128, 384):
        module = Linear4bit(128, width, bias, torch.float32, compress_statistics=is_nested, quant_type="nf4")
        made.append(module.to("cpu").requires_grad_(False).eval())
    return made


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("is_nested", [True, False], ids=["double", "single"])
def test_a_product_of_4_bits_in_triton_is_that_of_the_dequantized_weights(is_nested: bool, bias: bool) -> None:
    members = wide_four_bit_linears(bias=bias, is_nested=is_nested)
    weights = [dequantized_weight(member) for member in members]
    x = torch.randn(2, 3, 128)
    expected = [F.linear(x, weight, member.bias) for weight, member in zip(weights, members, strict=True)]
    fused = fused_four_bit(members, four_bit_in_triton())
    assert fused is not None
    torch.testing.assert_close(fused(x), torch.cat(expected, dim=-1), rtol=1e-5, atol=1e-5)
    for number, (weight, member) in enumerate(zip(weights, members, strict=True)):
        torch.testing.assert_close(fused.product_of(number, x), expected[number], rtol=1e-5, atol=1e-5)
        assert torch.equal(fused.output_of(number, fused(x)), fused.product_of(number, x))
        assert torch.equal(fused.weight_of(number), weight)
        assert member.weight.numel() == 0


def test_what_triton_cannot_multiply_is_left_as_it_is() -> None:
    narrow = four_bit_linears("nf4", bias=False, is_nested=True)
    mixed = [wide_four_bit_linears(bias=False, is_nested=is_nested)[0] for is_nested in (True, False)]
    for members in (narrow, mixed):
        assert fused_four_bit(members, four_bit_in_triton()) is None
        assert all(member.weight.numel() > 0 for member in members)


def four_bit_in_triton() -> FourBitProducts:
    pytest.importorskip("triton")
    products: FourBitProducts = importlib.import_module("server.ops.four_bit").FourBitWeight
    return products

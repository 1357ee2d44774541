"""One product for the linears of a group, plain or packed: the same outputs, and weights that can still be read."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from server.model.base import Base
from server.model.fused import FusedLinear, can_pack
from server.model.pretrained import BaseOptions
from server.model.quantize import Quantization
from server.model.site import PRODUCTS

packed_only = pytest.mark.skipif(not can_pack(), reason="this processor computes plain 16-bit weights only")


def linears(*, bias: bool, dtype: torch.dtype) -> list[nn.Linear]:
    torch.manual_seed(0)
    return [nn.Linear(64, width, bias, dtype=dtype).requires_grad_(False) for width in (32, 96, 16)]


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

"""Native products of the base's weights: right for any shape and processor, and the same to the bit in any batch."""

import platform
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from server.ops.native import (
    FourBitWeight,
    PairedWeight,
    Weight,
    build,
    can_multiply_rows,
    multiplies_bfloat16,
    rows_product,
)
from server.ops.native import weights as module
from tests.ops.resident import normal

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
SHAPES = pytest.mark.parametrize(("d_out", "d_in", "block"), [(16, 8, 8), (48, 192, 64), (208, 96, 32), (80, 512, 128)])
_WAYS = ("has_matrix_unit", "has_pair_vectors")  # to multiply bfloat16, the first that there is
in_bfloat16 = pytest.mark.skipif(not multiplies_bfloat16(), reason="this processor does not multiply bfloat16")


def four_bit(d_out: int, d_in: int, block: int) -> FourBitWeight:
    generator = torch.Generator().manual_seed(d_out + d_in)
    codes = torch.randint(0, 256, (d_out, d_in // 2), dtype=torch.uint8, generator=generator)
    scales = torch.rand(d_out, d_in // block, generator=generator) + 0.1
    return FourBitWeight.packed(codes, scales, torch.linspace(-1, 1, 16) ** 3)


def plain(d_out: int, d_in: int) -> PairedWeight:
    return PairedWeight.packed(normal(d_out, d_in, seed=d_in).bfloat16())


@pytest.fixture(params=["as it is", "no matrix unit", "no bfloat16"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = {"as it is": (), "no matrix unit": _WAYS[:1], "no bfloat16": _WAYS}[request.param]
    for way in missing:
        monkeypatch.setattr(module, way, lambda: False)


@pytest.fixture(params=["x86-64-v3", "x86-64"])
def _other_processor(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The same source for a processor with less than this one."""
    flags = [flag.replace("native", request.param) for flag in build._FLAGS if flag != "-O3"]
    monkeypatch.setattr(build, "_FLAGS", (*flags, "-O1"))  # seconds sooner
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cached = [build.library, *(getattr(module, way) for way in _WAYS)]
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


def check(weight: Weight, x: torch.Tensor, bias: torch.Tensor | None) -> None:
    expected = x.double() @ weight.whole().double().t()
    if bias is not None:
        expected = expected + bias.double()
    found = weight.product(x, bias)
    assert found.dtype is x.dtype
    # Of bfloat16: the output's rounding, and that of weights or levels where bfloat16 is multiplied.
    size = (x.double().abs() @ weight.whole().double().abs().t()).max()
    eps = torch.finfo(x.dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=eps, atol=float(size) * (eps / 8 + 1e-6))


@DTYPES
@SHAPES
@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 7, 16, 23, 48, 49, 64, 65, 150])
def test_a_product_with_codes(dtype: torch.dtype, d_out: int, d_in: int, block: int, num_tokens: int) -> None:
    weight = four_bit(d_out, d_in, block)
    x = normal(1, num_tokens, d_in, seed=num_tokens).to(dtype)
    check(weight, x, None)
    check(weight, x, normal(d_out, seed=3))


@in_bfloat16
@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize(("d_out", "d_in"), [(16, 32), (208, 96), (64, 1408)])
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 5, 15, 16, 17, 63, 64, 65, 79, 150, 700])
def test_a_product_with_a_plain_weight(d_out: int, d_in: int, num_tokens: int) -> None:
    if not module.multiplies_bfloat16():
        pytest.skip("nothing is left that multiplies it")
    weight = plain(d_out, d_in)
    x = normal(num_tokens, d_in, seed=num_tokens).bfloat16()
    check(weight, x, None)
    check(weight, x, normal(d_out, seed=3))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the names of x86's generations")
@pytest.mark.usefixtures("_other_processor")
def test_processors_with_less_compute_the_same() -> None:
    assert not multiplies_bfloat16()
    weight = four_bit(208, 192, 64)
    for num_tokens in (1, 2, 3, 4, 5, 11, 48):
        for dtype in (torch.float32, torch.bfloat16):
            check(weight, normal(num_tokens, 192, seed=1).to(dtype), normal(208, seed=2))


def weights() -> Iterator[tuple[Weight, torch.dtype]]:
    yield four_bit(96, 1024, 64), torch.float32
    yield four_bit(96, 1024, 64), torch.bfloat16
    if module.multiplies_bfloat16():
        yield plain(96, 1024), torch.bfloat16


@pytest.mark.usefixtures("_way")
def test_an_answer_does_not_depend_on_its_neighbours_or_on_the_threads() -> None:
    before = torch.get_num_threads()
    for weight, dtype in weights():
        x = normal(45, 1024, seed=1).to(dtype)
        together = weight.product(x)
        try:
            for num_threads in (1, 2):
                torch.set_num_threads(num_threads)
                for size in (1, 2, 5, 12, 33):
                    for part, found in zip(x.split(size), together.split(size), strict=True):
                        assert torch.equal(weight.product(part), found)
        finally:
            torch.set_num_threads(before)


def test_strides_of_any_kind_are_read() -> None:
    for weight, dtype in weights():
        x = normal(7, 1024, seed=1).to(dtype)
        expected = weight.product(x)
        wide = torch.full((7, 3000), torch.nan, dtype=dtype)
        wide[:, 5:1029] = x
        assert torch.equal(weight.product(wide[:, 5:1029]), expected)
        assert torch.equal(weight.product(x.t().contiguous().t()), expected)
        assert weight.product(x[:0]).shape == (0, 96)


def test_rows_are_those_of_their_outputs() -> None:
    for weight, dtype in weights():
        x = normal(3, 1024, seed=1).to(dtype)
        assert torch.equal(weight.rows(32, 80).product(x), weight.product(x)[:, 32:80])
        assert torch.equal(weight.rows(32, 80).whole(), weight.whole()[32:80])


@pytest.mark.skipif(not module.has_pair_vectors(), reason="this processor has no vectors of bfloat16")
@pytest.mark.parametrize(("d_out", "d_in"), [(16, 32), (7, 96), (75, 512)])
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 3, 7, 16, 29, 32])
def test_a_product_with_rows_as_they_lie(d_out: int, d_in: int, num_tokens: int) -> None:
    weight, bias = normal(d_out, d_in, seed=1).bfloat16(), normal(d_out, seed=2)
    x = normal(num_tokens, 2 * d_in, seed=3).bfloat16()[:, :d_in]
    assert can_multiply_rows(d_in)
    for added in (None, bias):
        found = rows_product(x, weight, added)
        expected = x.double() @ weight.double().t() + (0 if added is None else added.double())
        torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-3)
        for token in range(num_tokens):
            assert torch.equal(rows_product(x[token], weight, added), found[token])


@in_bfloat16
def test_a_plain_weight_is_kept_exactly() -> None:
    rows = normal(48, 96, seed=1).bfloat16()
    weight = PairedWeight.packed(rows)
    assert torch.equal(weight.whole(), rows)
    assert weight.num_bytes == rows.numel() * 2


def test_what_has_no_layout_is_not_taken() -> None:
    assert FourBitWeight.can_pack(32, 128, 64)
    assert not FourBitWeight.can_pack(24, 128, 64)  # a tile is 16 outputs
    assert not FourBitWeight.can_pack(32, 96, 64)  # a block would cross rows
    assert not FourBitWeight.can_pack(32, 128, 4)
    assert not PairedWeight.can_pack(24, 128)
    assert not PairedWeight.can_pack(32, 48)

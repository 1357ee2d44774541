"""4-bit weights of the base in Triton: how they lie on a GPU, and products of few tokens that read each code once.

Owns the layout, the kernels, their block sizes and grids. Knows nothing about bitsandbytes, whose codes it is given,
nor about what reads the products. docs/decisions/0025-products-of-4-bits-on-a-gpu.md says why it is so.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Self

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

_BLOCK = 64  # weights of a row that share a scale
_UNIT = tl.constexpr(128)  # inputs that lie together: two blocks
_STEP = tl.constexpr(32)  # inputs between those whose codes are in one word of 16 bits
_SECOND_BLOCK = tl.constexpr(256)  # scales that share a second scale

_LONGEST = 128  # tokens that are multiplied here; for more, weights are made whole for a library's product
_WANTED_PROGRAMS = 256  # of one product: two for each of the 132 multiprocessors of an H200
_MAX_SPLITS = 4  # each writes its sums: for 64 tokens as many bytes as the codes of 512 inputs
_BLOCK_N = 64  # outputs of a program that makes weights whole
_BLOCK_SUM = 1024


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a product is cut: outputs and warps of a program, stages of its pipeline, and parts of the inputs."""

    block_n: int
    num_warps: int
    num_stages: int
    num_splits: int

    @classmethod
    def of(cls, num_tokens: int, d_out: int, d_in: int) -> Self:
        """Chosen from registers and bytes, not yet from measurements. The parts do not depend on the tokens."""
        num_splits = min(_MAX_SPLITS, d_in // 128, triton.cdiv(_WANTED_PROGRAMS, triton.cdiv(d_out, 64)))
        return cls(64, 4, 4, num_splits) if num_tokens <= 64 else cls(128, 8, 2, num_splits)


@dataclass(frozen=True, slots=True)
class FourBitWeight:
    """W (d_out, d_in) as levels[code] * scale: a `Packed`, and as a class `FourBitProducts`.

    codes (d_in / 128, d_out, 32) int16: the codes of an input and of those 32, 64 and 96 after it, the first in the
    lowest bits; scale_codes (d_in / 64, d_out); levels (16,) float32, and `numbers` the same on the CPU. `first` is the
    row of a larger weight at which this one, a view, begins.
    """

    codes: torch.Tensor
    levels: torch.Tensor
    numbers: tuple[float, ...]
    scale_codes: torch.Tensor
    scale_levels: torch.Tensor | None
    seconds: torch.Tensor | None
    first: int = 0

    @staticmethod
    def can_pack(d_out: int, d_in: int, block: int) -> bool:
        """The last, that weights can be joined: each begins with a second scale of its own."""
        return block == _BLOCK and d_out % 16 == 0 and d_in % 128 == 0 and d_out * d_in % (256 * _BLOCK) == 0

    @classmethod
    def packed(
        cls,
        codes: torch.Tensor,
        levels: torch.Tensor,
        scale_codes: torch.Tensor,
        scale_levels: torch.Tensor | None,
        seconds: torch.Tensor | None,
    ) -> Self:
        each = torch.stack([codes >> 4, codes & 15], dim=-1).view(len(codes), -1, 4, 32)
        low, high = (each[:, :, i] | each[:, :, i + 1] << 4 for i in (0, 2))
        units = torch.stack([low, high], dim=-1).view(torch.int16).squeeze(-1).transpose(0, 1).contiguous()
        numbers = tuple(levels.tolist())
        return cls(units, levels.contiguous(), numbers, scale_codes.t().contiguous(), scale_levels, seconds)

    @classmethod
    def joined(cls, weights: Sequence[Self]) -> Self:
        seconds = [w.seconds for w in weights if w.seconds is not None]
        return replace(
            weights[0],
            codes=torch.cat([w.codes for w in weights], dim=1),
            scale_codes=torch.cat([w.scale_codes for w in weights], dim=1),
            seconds=torch.cat(seconds) if seconds else None,
        )

    @property
    def num_bytes(self) -> int:
        held = (self.codes, self.levels, self.scale_codes, self.scale_levels, self.seconds)
        return sum(t.numel() * t.element_size() for t in held if t is not None)

    def rows(self, first: int, last: int) -> Self:
        codes, scale_codes = self.codes[:, first:last], self.scale_codes[:, first:last]
        return replace(self, codes=codes, scale_codes=scale_codes, first=self.first + first)

    def product(self, x: torch.Tensor, bias: torch.Tensor | None = None, tiling: Tiling | None = None) -> torch.Tensor:
        """As `Packed` says.

        Semantics: y[t] = sum(rounded(levels[code[k]]) * x[t, k] * scale[k]) + bias, sums in float32, levels rounded to
        the dtype of x. For more than 128 tokens weights are rounded, and a library multiplies.
        """
        rows = x.reshape(-1, self._d_in)
        num_tokens = len(rows)
        if num_tokens > _LONGEST:
            return F.linear(x, self.whole(x.dtype), None if bias is None else bias.to(x.dtype))
        y = torch.empty(num_tokens, self._d_out, dtype=x.dtype, device=x.device)
        if num_tokens:
            rows = rows if rows.stride(1) == 1 else rows.contiguous()
            self._multiply(rows, y, bias, tiling or Tiling.of(num_tokens, self._d_out, self._d_in))
        return y.view(*x.shape[:-1], self._d_out)

    def _multiply(self, x: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None, tiling: Tiling) -> None:
        num_tokens, num_units, num_splits = len(x), len(self.codes), tiling.num_splits
        is_whole = num_splits == 1
        parts = y if is_whole else torch.empty(num_splits, *y.shape, dtype=torch.float32, device=y.device)
        has_registers = x.is_cuda and x.dtype is not torch.float32
        _product[(triton.cdiv(self._d_out, tiling.block_n), num_splits)](
            x, x.stride(0), *self._place, x if bias is None else bias, parts,
            num_tokens, self._d_out, num_units, triton.cdiv(num_units, num_splits), self.first,
            IS_DOUBLE=self.scale_levels is not None, HAS_BIAS=bias is not None and is_whole,
            LOOKUP=lookup(self.numbers, x.dtype) if has_registers else "",
            BLOCK_N=tiling.block_n, TOKENS=max(16, triton.next_power_of_2(num_tokens)),
            num_warps=tiling.num_warps, num_stages=tiling.num_stages,
        )  # fmt: skip
        if not is_whole:
            _sum[(num_tokens, triton.cdiv(self._d_out, _BLOCK_SUM))](
                parts, y, y if bias is None else bias, num_tokens, self._d_out,
                HAS_BIAS=bias is not None, NUM_SPLITS=num_splits, BLOCK=_BLOCK_SUM,
            )  # fmt: skip

    def whole(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """(d_out, d_in), a copy; each weight rounded once, to the bit what bitsandbytes makes of it in `dtype`."""
        matrix = torch.empty(self._d_out, self._d_in, dtype=dtype, device=self.codes.device)
        _whole[(triton.cdiv(self._d_out, _BLOCK_N), len(self.codes))](
            *self._place, matrix, self._d_out, self._d_in, self.first,
            IS_DOUBLE=self.scale_levels is not None, BLOCK_N=_BLOCK_N,
            enable_fp_fusion=False,  # bitsandbytes rounds a scale before it adds the second one
        )  # fmt: skip
        return matrix

    @property
    def _place(self) -> tuple[torch.Tensor | int | None, ...]:
        """Codes, scales and levels, as the kernels take them; what is not there is not read."""
        scale_codes = self.scale_codes
        doubled = (scale_codes, scale_codes) if self.scale_levels is None else (self.scale_levels, self.seconds)
        return self.codes, self.codes.stride(0), scale_codes, scale_codes.stride(0), *doubled, self.levels

    @property
    def _d_out(self) -> int:
        return self.codes.shape[1]

    @property
    def _d_in(self) -> int:
        return len(self.codes) * 2 * _BLOCK


@cache
def lookup(levels: tuple[float, ...], dtype: torch.dtype) -> str:
    """PTX that finds levels within registers: $4 is two words of four codes, $0 to $3 are the levels of both words'
    first codes, of their second ones, and so on, in 16 bits.

    `prmt` chooses four bytes of eight by four numbers of three bits each. So a table of sixteen bytes is two of them
    and a third that chooses by the fourth bit; and a level is two bytes, of two tables.
    """
    bits = torch.tensor(levels).to(dtype).view(torch.int16).tolist()
    low, high = (
        [_word([number >> shift & 255 for number in bits[i : i + 4]]) for i in (0, 4, 8, 12)] for shift in (0, 8)
    )
    bytes_of_four = [
        line
        for name, table in (("h", high), ("l", low))
        for line in (
            f"prmt.b32 a, {table[0]}, {table[1]}, m;",
            f"prmt.b32 b, {table[2]}, {table[3]}, m;",
            f"prmt.b32 {name}, a, b, s;",
        )
    ]
    lines = [
        ".reg .b32 w, m, s, a, b, h, l;",
        "prmt.b32 w, $4, 0, 0x3120;",  # the first two codes of both words, then the others
        "and.b32 m, w, 0x77777777;",  # the lower three bits of each code
        "and.b32 s, w, 0x88888888;",
        "shr.b32 s, s, 1;",
        "or.b32 s, s, 0x32103210;",  # byte i of the first table or of the second, by the fourth bit of code i
        *bytes_of_four,
        "prmt.b32 $0, l, h, 0x6240;",
        "prmt.b32 $1, l, h, 0x7351;",
        "shr.b32 m, m, 16;",
        "shr.b32 s, s, 16;",
        *bytes_of_four,
        "prmt.b32 $2, l, h, 0x6240;",
        "prmt.b32 $3, l, h, 0x7351;",
    ]
    return "{ " + " ".join(lines) + " }"


def _word(numbers: Sequence[int]) -> str:
    """Four bytes as PTX writes them, the first lowest."""
    return f"0x{int.from_bytes(bytes(numbers), 'little'):08x}"


@triton.jit
def _levels_of(code, levels, x, LOOKUP: tl.constexpr):
    """The levels of the first codes, of the second ones, and so on, in the dtype that x points to."""
    if LOOKUP == "":
        code = code.to(tl.int32)
        w_a = tl.load(levels + (code & 15)).to(x.dtype.element_ty)
        w_b = tl.load(levels + (code >> 4 & 15)).to(x.dtype.element_ty)
        w_c = tl.load(levels + (code >> 8 & 15)).to(x.dtype.element_ty)
        w_d = tl.load(levels + (code >> 12 & 15)).to(x.dtype.element_ty)
    else:
        w_a, w_b, w_c, w_d = tl.inline_asm_elementwise(
            LOOKUP, "=r,=r,=r,=r,r", [code],
            dtype=(x.dtype.element_ty, x.dtype.element_ty, x.dtype.element_ty, x.dtype.element_ty),
            is_pure=True, pack=2,
        )  # fmt: skip
    return w_a, w_b, w_c, w_d


@triton.jit
def _scale_codes(scales, stride, unit, n, is_read):
    """What is held of the scales of the rows n: of both blocks of a unit."""
    own = scales + 2 * unit * stride + n
    return tl.load(own, is_read, other=0), tl.load(own + stride, is_read, other=0)


@triton.jit
def _scale_of(code, scale_levels, seconds, number, is_read, IS_DOUBLE: tl.constexpr):
    """Scales, float32; `number` counts them along the rows of the weight."""
    scale = code
    if IS_DOUBLE:
        second = seconds + number // _SECOND_BLOCK * 2
        scale = tl.load(scale_levels + code.to(tl.int32)) * tl.load(second, is_read, other=0.0)
        scale += tl.load(second + 1, is_read, other=0.0)
    return scale


# What they differ in is no reason to compile them again while others wait.
@triton.jit(do_not_specialize=["num_tokens", "num_units", "split_units", "first"])
def _product(
    x, x_stride, codes, code_stride, scales, scale_stride, scale_levels, seconds, levels, bias, y,
    num_tokens, d_out, num_units, split_units, first,
    IS_DOUBLE: tl.constexpr, HAS_BIAS: tl.constexpr, LOOKUP: tl.constexpr, BLOCK_N: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_own = n < d_out
    j = tl.arange(0, _STEP)
    token = tl.arange(0, TOKENS)
    is_token = token < num_tokens
    own_x = x + token[None, :].to(tl.int64) * x_stride + j[:, None]
    own_codes = codes + n[:, None] * _STEP + j[None, :]
    number = (first + n) * (2 * num_units)
    total = tl.zeros((BLOCK_N, TOKENS), tl.float32)
    start, stop = split * split_units, tl.minimum((split + 1) * split_units, num_units)
    # A scale is found by three loads, of which one waits for another. So it is looked up while the unit before its own
    # is multiplied, by a code that was loaded one unit earlier still.
    is_first = is_own & (start < stop)  # the last parts of a few inputs may be empty
    code_ab, code_cd = _scale_codes(scales, scale_stride, start, n, is_first)
    scale_ab = _scale_of(code_ab, scale_levels, seconds, number + 2 * start, is_first, IS_DOUBLE)
    scale_cd = _scale_of(code_cd, scale_levels, seconds, number + 2 * start + 1, is_first, IS_DOUBLE)
    code_ab, code_cd = _scale_codes(scales, scale_stride, start + 1, n, is_own & (start + 1 < stop))
    for unit in range(start, stop):
        code = tl.load(own_codes + unit * code_stride, is_own[:, None], other=0)
        unit_x = own_x + unit * _UNIT
        x_a = tl.load(unit_x, is_token[None, :], other=0.0)
        x_b = tl.load(unit_x + _STEP, is_token[None, :], other=0.0)
        x_c = tl.load(unit_x + 2 * _STEP, is_token[None, :], other=0.0)
        x_d = tl.load(unit_x + 3 * _STEP, is_token[None, :], other=0.0)
        w_a, w_b, w_c, w_d = _levels_of(code, levels, x, LOOKUP)
        # A block's sum is multiplied by its scale, so no weight is rounded twice.
        sum_ab = tl.dot(w_b, x_b, tl.dot(w_a, x_a, input_precision="ieee"), input_precision="ieee")
        sum_cd = tl.dot(w_d, x_d, tl.dot(w_c, x_c, input_precision="ieee"), input_precision="ieee")
        total += sum_ab * scale_ab[:, None]
        total += sum_cd * scale_cd[:, None]
        is_next = is_own & (unit + 1 < stop)
        scale_ab = _scale_of(code_ab, scale_levels, seconds, number + 2 * unit + 2, is_next, IS_DOUBLE)
        scale_cd = _scale_of(code_cd, scale_levels, seconds, number + 2 * unit + 3, is_next, IS_DOUBLE)
        code_ab, code_cd = _scale_codes(scales, scale_stride, unit + 2, n, is_own & (unit + 2 < stop))
    if HAS_BIAS:
        total += tl.load(bias + n, is_own, other=0.0)[:, None]
    at = (split.to(tl.int64) * num_tokens + token[None, :]) * d_out + n[:, None]
    tl.store(y + at, total.to(y.dtype.element_ty), is_token[None, :] & is_own[:, None])


@triton.jit(do_not_specialize=["num_tokens"])
def _sum(parts, y, bias, num_tokens, d_out, HAS_BIAS: tl.constexpr, NUM_SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """The parts of a product, in their order."""
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_own = n < d_out
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(NUM_SPLITS):
        total += tl.load(parts + (split * num_tokens + token) * d_out + n, is_own, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + n, is_own, other=0.0)
    tl.store(y + token * d_out + n, total.to(y.dtype.element_ty), is_own)


@triton.jit(do_not_specialize=["first"])
def _whole(
    codes, code_stride, scales, scale_stride, scale_levels, seconds, levels, matrix, d_out, d_in, first,
    IS_DOUBLE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    unit = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_own = n < d_out
    j = tl.arange(0, _STEP)
    own_codes = codes + n[:, None] * _STEP + j[None, :]
    code = tl.load(own_codes + unit * code_stride, is_own[:, None], other=0)
    w_a, w_b, w_c, w_d = _levels_of(code, levels, levels, "")
    number = (first + n) * (d_in // (2 * _STEP)) + 2 * unit
    code_ab, code_cd = _scale_codes(scales, scale_stride, unit, n, is_own)
    scale_ab = _scale_of(code_ab, scale_levels, seconds, number, is_own, IS_DOUBLE)
    scale_cd = _scale_of(code_cd, scale_levels, seconds, number + 1, is_own, IS_DOUBLE)
    at = matrix + n[:, None].to(tl.int64) * d_in + unit * _UNIT + j[None, :]
    tl.store(at, (w_a * scale_ab[:, None]).to(matrix.dtype.element_ty), is_own[:, None])
    tl.store(at + _STEP, (w_b * scale_ab[:, None]).to(matrix.dtype.element_ty), is_own[:, None])
    tl.store(at + 2 * _STEP, (w_c * scale_cd[:, None]).to(matrix.dtype.element_ty), is_own[:, None])
    tl.store(at + 3 * _STEP, (w_d * scale_cd[:, None]).to(matrix.dtype.element_ty), is_own[:, None])

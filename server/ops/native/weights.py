"""Weights of the base laid out for native products: of 4 bits for any processor, of bfloat16 where it multiplies them.

Owns their layouts, and which product is made how. Knows nothing about bitsandbytes, whose codes it is given, nor about
what reads the products.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from typing import Protocol, Self

import torch
import torch.nn.functional as F

from server.ops.native.build import library
from server.ops.native.dtypes import DTYPES
from server.ops.native.layout import dense_rows
from server.ops.native.shelves import SHELVES
from server.ops.packed import Packed

_TILE = 16  # LANES of vectors.h: outputs side by side
_CODES = 8  # of four_bit.h: in a word of 32 bits
_LONGEST = 48  # tokens that vectors are as good for as weights made whole and a library's product
ROOM_FOR_TOKENS = 16  # MOST_TOKENS of four_bit.c and pair_vectors.c, or a multiple of it
_UNIT_INPUTS = 32  # of matrix_unit.c
_NEAR_INPUTS = 1 << 14  # numbers in bfloat16 that stay in the first level's cache while they are read for every output


class Way(IntEnum):
    """How a product in bfloat16 is made, as decode_layer.c numbers them."""

    BY_VECTORS = 0
    BY_PAIRS = 1
    ON_UNIT = 2


@dataclass(frozen=True, slots=True)
class Layout:
    """A weight as the C functions want it."""

    way: Way
    place: tuple[int | None, int | None, int | None, int | None]  # addresses: plain; codes, scales and levels
    num_tiles: int
    width: int
    block: int

    @property
    def d_out(self) -> int:
        return self.num_tiles * _TILE

    @property
    def max_tokens(self) -> int:
        """Beyond which a library's product is the better one."""
        return _LONGEST if self.way is Way.BY_VECTORS else sys.maxsize


class Weight(Packed, Protocol):
    """One that C functions multiply."""

    @property
    def layout(self) -> Layout:
        """For products of bfloat16."""


@cache
def has_matrix_unit() -> bool:
    """Whether products in bfloat16 can be made on Intel's AMX."""
    return bool(library().graft_has_matrix_unit())


@cache
def has_pair_vectors() -> bool:
    """Whether products in bfloat16 can be made by vectors (AVX512-BF16)."""
    return bool(library().graft_has_pair_vectors())


def multiplies_bfloat16() -> bool:
    """Whether this processor makes products in bfloat16 in one way or another."""
    return _way() is not Way.BY_VECTORS


def _way() -> Way:
    if has_matrix_unit():  # which asks Linux for it
        return Way.ON_UNIT
    return Way.BY_PAIRS if has_pair_vectors() else Way.BY_VECTORS


@dataclass(frozen=True, slots=True)
class FourBitWeight:
    """W as levels[code] * scale: one of 16 levels for each weight, one scale for each block of a row.

    codes (d_out / 16, d_in / 8, 16) int32, eight codes in each, the first lowest; scales (d_out / 16, d_in / block, 16)
    float32; levels (16,) float32.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    levels: torch.Tensor

    @staticmethod
    def can_pack(d_out: int, d_in: int, block: int) -> bool:
        return d_out % _TILE == 0 and d_in % block == 0 and block % _CODES == 0

    @classmethod
    def packed(cls, codes: torch.Tensor, scales: torch.Tensor, levels: torch.Tensor) -> Self:
        """From rows: codes (d_out, d_in / 2) uint8, of two the higher bits first; scales (d_out, d_in / block)."""
        num_tiles, num_words = codes.shape[0] // _TILE, codes.shape[1] * 2 // _CODES
        words = ((codes >> 4) | (codes << 4)).view(torch.int32).view(num_tiles, _TILE, num_words)
        tiled = scales.float().view(num_tiles, _TILE, -1)
        return cls(words.mT.contiguous(), tiled.mT.contiguous(), levels.float().contiguous())

    @classmethod
    def joined(cls, weights: Sequence[Self]) -> Self:
        """One above the other; they must be alike in d_in, block and levels."""
        codes, scales = torch.cat([w.codes for w in weights]), torch.cat([w.scales for w in weights])
        return cls(codes, scales, weights[0].levels)

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.codes, self.scales, self.levels))

    def rows(self, first: int, last: int) -> Self:
        tiles = slice(first // _TILE, last // _TILE)
        return type(self)(self.codes[tiles], self.scales[tiles], self.levels)

    def product(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x float32 or bfloat16.

        Where the processor multiplies bfloat16, and elsewhere up to 48 tokens, a token's sums have one order whatever
        else is in x: they are the same to the bit.
        """
        if x.dtype is torch.bfloat16 and (layout := self.layout).way is not Way.BY_VECTORS:
            return _bfloat16_product(x, layout, bias)
        rows = dense_rows(x.reshape(-1, self._d_in))
        num = rows.shape[0]
        if num > _LONGEST:
            return F.linear(x, self._matrix(x.dtype).t(), None if bias is None else bias.to(x.dtype))
        y = torch.empty(num, self._d_out, dtype=x.dtype)
        turned = torch.empty(-(-num // ROOM_FOR_TOKENS) * ROOM_FOR_TOKENS * self._d_in)
        library().graft_four_bit(
            *self._place, None if bias is None else bias.data_ptr(), len(self.codes), self._d_in, self._block,
            rows.data_ptr(), rows.stride(0), DTYPES[x.dtype], num, turned.data_ptr(), y.data_ptr(), self._d_out,
            torch.get_num_threads(),
        )  # fmt: skip
        return y.view(*x.shape[:-1], self._d_out)

    @property
    def layout(self) -> Layout:
        way = _way() if self._block % _UNIT_INPUTS == 0 else Way.BY_VECTORS
        return Layout(way, (None, *self._place), len(self.codes), self._d_in, self._block)

    def whole(self) -> torch.Tensor:
        """Float32, to the bit what bitsandbytes makes of it in that dtype."""
        return self._matrix(torch.float32).t()

    def _matrix(self, dtype: torch.dtype) -> torch.Tensor:
        """W^T (d_in, d_out), each weight rounded once."""
        matrix = torch.empty(self._d_in, self._d_out, dtype=dtype)
        library().graft_four_bit_weight(
            *self._place, len(self.codes), self._d_in, self._block, matrix.data_ptr(), DTYPES[dtype],
            torch.get_num_threads(),
        )  # fmt: skip
        return matrix

    @property
    def _d_out(self) -> int:
        return len(self.codes) * _TILE

    @property
    def _d_in(self) -> int:
        return self.codes.shape[1] * _CODES

    @property
    def _block(self) -> int:
        return self._d_in // self.scales.shape[1]

    @property
    def _place(self) -> tuple[int, int, int]:
        return self.codes.data_ptr(), self.scales.data_ptr(), self.levels.data_ptr()


@dataclass(frozen=True, slots=True)
class PairedWeight:
    """W in bfloat16, two inputs side by side, as processors multiply them.

    pairs (d_out / 16, d_in / 2, 16, 2): in a row two inputs of 16 outputs.
    """

    pairs: torch.Tensor

    @staticmethod
    def can_pack(d_out: int, d_in: int) -> bool:
        return d_out % _TILE == 0 and d_in % _UNIT_INPUTS == 0 and multiplies_bfloat16()

    @classmethod
    def packed(cls, weight: torch.Tensor) -> Self:
        """From (d_out, d_in) bfloat16."""
        return cls(SHELVES.kept(weight.view(weight.shape[0] // _TILE, _TILE, -1, 2).transpose(1, 2)))

    @property
    def num_bytes(self) -> int:
        return self.pairs.numel() * self.pairs.element_size()

    def rows(self, first: int, last: int) -> Self:
        return type(self)(self.pairs[first // _TILE : last // _TILE])

    def product(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x bfloat16. A token's sums are the same to the bit whatever else is in x."""
        return _bfloat16_product(x, self.layout, bias)

    @property
    def layout(self) -> Layout:
        place = (self.pairs.data_ptr(), None, None, None)
        return Layout(_way(), place, len(self.pairs), self.pairs.shape[1] * 2, _UNIT_INPUTS)

    def whole(self) -> torch.Tensor:
        return self.pairs.transpose(1, 2).reshape(len(self.pairs) * _TILE, -1)


def _bfloat16_product(x: torch.Tensor, layout: Layout, bias: torch.Tensor | None) -> torch.Tensor:
    assert x.dtype is torch.bfloat16
    width, d_out = layout.width, layout.d_out
    rows = dense_rows(x.reshape(-1, width))
    num, num_threads = rows.shape[0], torch.get_num_threads()
    y = torch.empty(num, d_out, dtype=x.dtype)
    weight = (*layout.place, None if bias is None else bias.data_ptr(), layout.num_tiles, width, layout.block)
    if layout.way is Way.ON_UNIT:
        library().graft_unit_product(*weight, rows.data_ptr(), rows.stride(0), num, y.data_ptr(), d_out, num_threads)
    else:
        turned = torch.empty(-(-num // ROOM_FOR_TOKENS) * ROOM_FOR_TOKENS * width, dtype=x.dtype)
        library().graft_pair_product(
            *weight, rows.data_ptr(), rows.stride(0), num, turned.data_ptr(), y.data_ptr(), d_out, num_threads
        )
    return y.view(*x.shape[:-1], d_out)


def can_multiply_rows(d_in: int) -> bool:
    """Whether `rows_product` is there for such a weight."""
    return d_in % _UNIT_INPUTS == 0 and has_pair_vectors()


def rows_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x (..., d_in) -> x W^T + bias, for a weight (d_out, d_in) in bfloat16 that has to stay as it is; bias (d_out,)
    float32.

    Of few tokens, for which a library would lay the weight out anew: then a token's sums are the same to the bit
    whatever else is in x. Of more, a library's.
    """
    assert x.dtype is weight.dtype is torch.bfloat16
    assert weight.is_contiguous()
    d_out, d_in = weight.shape
    rows = dense_rows(x.reshape(-1, d_in))
    if rows.numel() > _NEAR_INPUTS:
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    y = torch.empty(rows.shape[0], d_out, dtype=x.dtype)
    library().graft_rows_product(
        weight.data_ptr(), None if bias is None else bias.data_ptr(), d_out, d_in, rows.data_ptr(), rows.stride(0),
        rows.shape[0], y.data_ptr(), d_out, torch.get_num_threads(),
    )  # fmt: skip
    return y.view(*x.shape[:-1], d_out)

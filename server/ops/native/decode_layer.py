"""A decoder layer of Llama's kind in one call, for steps that only decode: what it is given, laid out once.

Owns the structs of decode_layer.c. Knows nothing about modules, nor about which layers are of that kind.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from server.ops.native.build import library
from server.ops.native.dtypes import DTYPES
from server.ops.native.joint import Joint
from server.ops.native.norm import Norm
from server.ops.native.weights import ROOM_FOR_TOKENS, Weight
from server.ops.runs import DecodeLists

_PRODUCTS = ("projections", "out", "gate_up", "down")
_Edits = ctypes.c_void_p * len(_PRODUCTS)


def _fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class _Product(ctypes.Structure):
    """`struct product` of decode_layer.c."""

    _fields_ = [
        ("way", ctypes.c_int64), *_fields(ctypes.c_void_p, "plain codes scales levels bias"),
        *_fields(ctypes.c_int64, "num_tiles width block"),
    ]  # fmt: skip


class _Norm(ctypes.Structure):
    _fields_ = [("weight", ctypes.c_void_p), ("eps", ctypes.c_double)]


class _Layer(ctypes.Structure):
    _fields_ = [
        *[(name, _Product) for name in _PRODUCTS], ("before_attention", _Norm), ("before_mlp", _Norm),
        *_fields(ctypes.c_int64, "num_heads num_kv_heads head_width window"),
        *_fields(ctypes.c_double, "scaling softcap"),
    ]  # fmt: skip


class _Step(ctypes.Structure):
    _fields_ = [
        *_fields(ctypes.c_int64, "num_tokens num_threads cache_dtype block_size"),
        *_fields(ctypes.c_void_p, "cos sin own_blocks offsets lengths firsts blocks read wide inner other turned"),
    ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Linear:
    """The linears of a group side by side: x W^T + bias."""

    weight: Weight
    bias: torch.Tensor | None  # (d_out,) float32


class DecodeStep:
    """A step's part of the call: where its tokens are and what they attend to, and room for what is in between."""

    def __init__(
        self,
        num_tokens: int,
        turns: tuple[torch.Tensor, torch.Tensor],
        places: tuple[torch.Tensor, torch.Tensor],
        lists: DecodeLists,
        cache: torch.Tensor,
        widest: int,
    ) -> None:
        """`turns` and `places` as `native.rotary_decode` has them; a `cache` of keys; `widest` of all linears."""
        room = torch.empty(4 * num_tokens + 2 * -(-num_tokens // ROOM_FOR_TOKENS) * ROOM_FOR_TOKENS, widest,
                           dtype=torch.bfloat16)  # fmt: skip
        read, wide, inner, other, turned = (room[n * num_tokens :].data_ptr() for n in range(5))
        self._kept = turns, places, lists, room
        self._struct = _Step(
            num_tokens, torch.get_num_threads(), DTYPES[cache.dtype], cache.shape[2],
            *(t.data_ptr() for t in (*turns, *places, lists.lengths, lists.firsts, lists.blocks)),
            read, wide, inner, other, turned,
        )  # fmt: skip
        self.place = ctypes.addressof(self._struct)


class DecodeLayer:
    """One layer's part of the call."""

    def __init__(
        self, linears: Sequence[Linear], norms: Sequence[Norm], heads: tuple[int, int, int], *,
        scaling: float, window: int | None, softcap: float | None,
    ) -> None:  # fmt: skip
        """`linears`: queries, keys and values; out; gate and up; down. `norms`: before the attention, before the MLP.
        `heads`: of queries, of keys, and their width."""
        layouts = [linear.weight.layout for linear in linears]
        self.widest = max(max(layout.width, layout.d_out) for layout in layouts)
        self.max_tokens = min(layout.max_tokens for layout in layouts)
        self._kept = linears, norms
        self._struct = _Layer(
            *(_product(linear) for linear in linears), *(_Norm(norm.weight.data_ptr(), norm.eps) for norm in norms),
            *heads, window or 0, scaling, softcap or 0.0,
        )  # fmt: skip
        self._place = ctypes.addressof(self._struct)
        self._call = library().graft_decode_layer

    def __call__(
        self, x: torch.Tensor, step: DecodeStep, joints: Sequence[object], keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """x (tokens, hidden) bfloat16, dense -> the same, a tensor of its own. `joints`: the edits of each of the
        linears, made by `joint`, or None; `keys` and `values` of this layer's cache."""
        y = torch.empty_like(x)
        edits = _Edits(*(joint.place if isinstance(joint, Joint) else None for joint in joints))
        self._call(step.place, self._place, edits, keys.data_ptr(), values.data_ptr(), x.data_ptr(), y.data_ptr())
        return y


def _product(linear: Linear) -> _Product:
    layout = linear.weight.layout
    bias = None if linear.bias is None else linear.bias.data_ptr()
    return _Product(layout.way, *layout.place, bias, layout.num_tiles, layout.width, layout.block)

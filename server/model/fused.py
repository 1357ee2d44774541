"""One product for all linears of a site group, with its weight laid out as the processor wants it.

Owns the weights of the linears that it takes over, and their layout. Knows nothing about adapters or sites.
"""

from collections.abc import Callable, Collection, Sequence
from functools import cache
from typing import Generic, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from server.model.quantize import empty, four_bit_format, four_bit_rows, four_bit_scales
from server.ops.native import FourBitWeight, Linear, PairedWeight, Weight, can_multiply_rows, rows_product
from server.ops.packed import FourBitProducts, Packed

PackedWeight = TypeVar("PackedWeight", bound=Packed)
_PACKED_FOR_TOKENS = 16  # the batch that oneDNN is told to expect; any other works


@cache
def can_pack() -> bool:
    """Whether this processor and this PyTorch can keep 16-bit weights in oneDNN's own layout.

    Every product of a plain weight lays it out anew, which takes as long as the product itself for a few tokens.
    """
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    weight = torch.arange(64 * 32, dtype=torch.float32).view(64, 32).remainder(7).to(torch.bfloat16)
    x = torch.ones(3, 32, dtype=torch.bfloat16)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_FOR_TOKENS)
        is_right = torch.equal(_packed_product(x, packed, None), F.linear(x, weight))
        return is_right and torch.equal(packed.to_dense(), weight)
    except (AttributeError, RuntimeError):  # the operators are PyTorch's own business and may change
        return False


def _packed_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


class Fused(Protocol):
    """One product for linears that share their input, the members; it has taken their weights over."""

    packed_bytes: int  # of weights that the members' own parameters no longer hold

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(..., d_in) -> (..., sum of all d_out), the members' outputs beside one another."""

    def product_of(self, member: int, x: torch.Tensor) -> torch.Tensor:
        """What a call gives for one member, (..., d_out)."""

    def output_of(self, member: int, outputs: torch.Tensor) -> torch.Tensor:
        """The part (..., d_out) of one member, a view of what a call returned."""

    def weight_of(self, member: int) -> torch.Tensor:
        """(d_out, d_in) of one member."""


class _Members:
    """Where the members' outputs lie."""

    def __init__(self, modules: Sequence[nn.Linear]) -> None:
        self.widths = [m.out_features for m in modules]
        self.offsets = [sum(self.widths[:i]) for i in range(len(modules))]

    def output_of(self, member: int, outputs: torch.Tensor) -> torch.Tensor:
        return outputs.narrow(-1, self.offsets[member], self.widths[member])

    def _span(self, member: int) -> slice:
        return slice(self.offsets[member], self.offsets[member] + self.widths[member])


class FusedLinear(_Members):
    """Of plain linears.

    Unpacked, the linears' own weights become views of the fused one. Packed (bfloat16 on a CPU that can), they become a
    NaN that takes no memory: nobody reads it unnoticed, and `weight_of` unpacks.
    """

    def __init__(self, modules: Sequence[nn.Linear], *, is_packed: bool = False) -> None:
        super().__init__(modules)
        biases = [m.bias.data for m in modules if m.bias is not None]
        self.bias = torch.cat(biases) if biases else None
        weight = torch.cat([m.weight.data for m in modules])
        self._packed: torch.Tensor | None = None
        self._weight: torch.Tensor | None = None
        if is_packed:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_FOR_TOKENS)
        else:
            self._weight = weight
        self.packed_bytes = weight.numel() * weight.element_size() if is_packed else 0
        for module, start, width in zip(modules, self.offsets, self.widths, strict=True):
            if is_packed:
                _withdraw(module)
            else:
                module.weight.data = weight[start : start + width]
            if self.bias is not None:
                module.bias.data = self.bias[start : start + width]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._packed is not None:
            return _packed_product(x, self._packed, self.bias)
        assert self._weight is not None
        return F.linear(x, self._weight, self.bias)

    def product_of(self, member: int, x: torch.Tensor) -> torch.Tensor:
        """Only the member's rows are computed, unless they are packed, for a packed weight cannot be cut."""
        if self._weight is None:
            return self.output_of(member, self(x))
        rows = self._span(member)
        return F.linear(x, self._weight[rows], None if self.bias is None else self.bias[rows])

    def weight_of(self, member: int) -> torch.Tensor:
        """A view, or a copy where the weight is packed."""
        weight = self._weight if self._packed is None else self._packed.to_dense()
        assert weight is not None
        return weight[self._span(member)]


class FusedPacked(_Members, Generic[PackedWeight]):
    """Of linears whose weights are laid out for products of ours; their own are taken away."""

    def __init__(self, modules: Sequence[nn.Linear], weight: PackedWeight) -> None:
        super().__init__(modules)
        biases = [m.bias.data.float() for m in modules if m.bias is not None]
        self._bias = torch.cat(biases) if biases else None
        self._weight = weight
        self.packed_bytes = weight.num_bytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._weight.product(x, self._bias)

    def product_of(self, member: int, x: torch.Tensor) -> torch.Tensor:
        """Only the member's rows are computed."""
        rows = self._span(member)
        bias = None if self._bias is None else self._bias[rows]
        return self._weight.rows(rows.start, rows.stop).product(x, bias)

    def weight_of(self, member: int) -> torch.Tensor:
        """A copy; of 4 bits dequantized, float32."""
        rows = self._span(member)
        return self._weight.rows(rows.start, rows.stop).whole()


class FusedNative(FusedPacked[Weight]):
    """For native products on a processor."""

    @property
    def linear(self) -> Linear:
        return Linear(self._weight, self._bias)


class SharedNative(_Members):
    """Of one linear whose weight others hold as well, as a head's often is the embedding: it stays as it is."""

    packed_bytes = 0

    def __init__(self, module: nn.Linear) -> None:
        super().__init__([module])
        self._weight = module.weight.data
        self._bias = None if module.bias is None else module.bias.data.float()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return rows_product(x, self._weight, self._bias)

    def product_of(self, member: int, x: torch.Tensor) -> torch.Tensor:
        return self(x)

    def weight_of(self, member: int) -> torch.Tensor:
        return self._weight


def can_read_codes(module: nn.Module, can_pack: Callable[[int, int, int], bool] = FourBitWeight.can_pack) -> bool:
    """Whether a module has a 4-bit weight as it is stored, and of a shape that native products, or others, can pack."""
    found = four_bit_format(module)
    if found is None:
        return False
    assert isinstance(module, nn.Linear)
    return can_pack(module.out_features, module.in_features, found[1])


def fused(
    modules: Sequence[nn.Module],
    shared: Collection[int],
    *,
    is_native: bool,
    four_bit: FourBitProducts | None = None,
) -> Fused | None:
    """One product of modules that read the same, all linears alike in dtype and in having a bias; None for others.

    With `is_native` weights are laid out for native products where there are such, that of a single linear, too, and
    4-bit ones for those of `four_bit`; other plain ones are packed in bfloat16 on a CPU. A weight at one of the
    `shared` addresses, as a head's often is with the embedding, stays as it is; natively it is multiplied so.
    """
    linears = [module for module in modules if isinstance(module, nn.Linear)]
    if len(linears) < len(modules) or len({(m.weight.dtype, m.bias is None) for m in linears}) != 1:
        return None
    weight = linears[0].weight
    is_shared = any(m.weight.data_ptr() in shared for m in linears)
    if four_bit is not None and (product := fused_four_bit(linears, four_bit)) is not None:
        return product
    if is_native and not is_shared and (native := fused_natively(linears)) is not None:
        return native
    if any(type(module) is not nn.Linear for module in linears):
        return None
    if is_native and is_shared and weight.dtype is torch.bfloat16 and can_multiply_rows(linears[0].in_features):
        return SharedNative(linears[0]) if len(linears) == 1 else None
    is_packed = weight.device.type == "cpu" and weight.dtype is torch.bfloat16 and not is_shared and can_pack()
    return FusedLinear(linears, is_packed=is_packed) if len(linears) > 1 or is_packed else None


def fused_four_bit(modules: Sequence[nn.Linear], products: FourBitProducts) -> Fused | None:
    """One such product of 4-bit linears; None where there is none."""
    if not _are_one_format(modules) or not all(can_read_codes(module, products.can_pack) for module in modules):
        return None
    weights = []
    for module in modules:
        rows = four_bit_rows(module)
        weights.append(products.packed(rows.codes, rows.levels, rows.scale_codes, rows.scale_levels, rows.seconds))
        empty(module)
    return FusedPacked(modules, products.joined(weights))


def _are_one_format(modules: Sequence[nn.Linear]) -> bool:
    return len({four_bit_format(module) for module in modules}) == 1


def fused_natively(modules: Sequence[nn.Linear]) -> FusedNative | None:
    """One native product of 4-bit linears, or of plain ones in bfloat16 on a matrix unit; None where there is none."""
    if _are_one_format(modules) and all(can_read_codes(module) for module in modules):
        return FusedNative(modules, FourBitWeight.joined([_four_bit_weight(module) for module in modules]))
    if all(type(m) is nn.Linear and m.weight.dtype is torch.bfloat16 for m in modules) and all(
        PairedWeight.can_pack(m.out_features, m.in_features) for m in modules
    ):
        weight = PairedWeight.packed(torch.cat([m.weight.data for m in modules]))
        for module in modules:
            _withdraw(module)
        return FusedNative(modules, weight)
    return None


def _four_bit_weight(module: nn.Linear) -> FourBitWeight:
    rows = four_bit_rows(module)
    weight = FourBitWeight.packed(rows.codes, four_bit_scales(module), rows.levels)
    empty(module)
    return weight


def _withdraw(module: nn.Linear) -> None:
    """A NaN that takes no memory in the place of a plain weight: nobody reads it unnoticed."""
    module.weight.data = module.weight.data.new_full((1, 1), torch.nan).expand(module.weight.shape)

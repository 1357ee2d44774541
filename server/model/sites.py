"""A site of a base, and how a step's edits are applied at it.

Owns the wrapping of the base's modules (done once, at load) and the order of operations of the normal form, and of the
ops beside it. Knows nothing about adapters or methods: it sees the batch-local edits of the scope's context, whatever
they came from.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from server.model.context import FusedOutput, Scope, SiteKernels, StepContext
from server.model.fused import Fused
from server.model.quantize import can_read_weight, dequantized_weight, is_quantized
from server.model.site import SiteKind
from server.ops import (
    GroupEdits,
    SiteEdits,
    Stack,
    StackHidden,
    TokenLayout,
    embed_low_rank,
    expand,
    expand_stack,
    scale,
    scale_shift,
    shift,
    shrink,
    shrink_stack,
)
from server.ops.site_ops import PlacedOp, around


class BaseSite:
    """A module of the base (satisfies the `Site` protocol), and its forward with edits: a linear or an embedding."""

    def __init__(self, index: int, path: str, module: nn.Module, scope: Scope, *, is_head: bool = False) -> None:
        self.index = index
        self.path = path
        self.module = module
        self.is_head = is_head
        self.kind = self._kind()
        self.d_in, self.d_out = self._widths()
        bias = getattr(module, "bias", None)
        self.bias = None if bias is None else bias.detach().float().cpu()
        # A quantized weight can be read only before the first forward pass (see `dequantized_weight`).
        self._row_norms_squared: torch.Tensor | None = None
        if is_quantized(module):
            self._row_norms_squared = _row_norms_squared(module, dequantized_weight(module))
        embed_scale = getattr(module, "embed_scale", None)  # Gemma multiplies its embeddings by sqrt(hidden)
        # Read once: reading waits for a GPU. A base of shapes alone (`outline`) has no number here, and no forward.
        has_number = not getattr(embed_scale, "is_meta", False)
        self.gain = float(embed_scale) if embed_scale is not None and has_number else 1.0
        self.table_of: str | None = None  # set by SiteTable
        # Set by SiteTable once groups are known.
        self.group = -1
        self.member = 0
        self.observer: Callable[[BaseSite, torch.Tensor], None] | None = None
        self.fused: Fused | None = None
        self._scope = scope
        self._base: Callable[[torch.Tensor], torch.Tensor] = module.forward
        module.forward = self.forward

    def _kind(self) -> SiteKind:
        return SiteKind.EMBEDDING if isinstance(self.module, nn.Embedding) else SiteKind.LINEAR

    def _widths(self) -> tuple[int, int]:
        return _widths(self.module)

    def num_rows(self, x: torch.Tensor) -> int:
        """Rows of an input: tokens, at a site that is called once for each."""
        return x.numel() if self.kind is SiteKind.EMBEDDING else x.numel() // x.shape[-1]

    @property
    def weight_offset(self) -> float:
        """What a norm adds to its weight; 0 elsewhere."""
        return 0.0

    def normalized(self, x: torch.Tensor) -> torch.Tensor:
        raise TypeError(f"{self.path} is no norm")

    @property
    def row_norms_squared(self) -> torch.Tensor:
        """||W_j||^2 of each output row of the dequantized weight, float32 on the CPU, (d_out,)."""
        if self._row_norms_squared is None:
            self._row_norms_squared = _row_norms_squared(self.module, self._weight())
        return self._row_norms_squared

    def project(self, rows: torch.Tensor) -> torch.Tensor:
        """rows @ W^T without the bias: (r, d_in) -> (r, d_out) float32 on the CPU.

        4-bit weights that bitsandbytes multiplies cannot be read once they have been used, so theirs goes through the
        base's own product.
        """
        weight = getattr(self.module, "weight", None)
        assert isinstance(weight, torch.Tensor)
        with torch.inference_mode():
            if self.kind is SiteKind.EMBEDDING:
                return (rows.to(weight.device, torch.float32) @ weight.float()).cpu()
            if self.fused is None and not can_read_weight(self.module):
                dtype = getattr(self.module, "compute_dtype", None) or torch.float32
                product = self._base(rows.to(weight.device, dtype)).float().cpu()
                return product if self.bias is None else product - self.bias
            weight = self._weight()
            w = weight.t() if isinstance(self.module, Conv1D) else weight
            return F.linear(rows.to(w.device, torch.float32), w.float()).cpu()

    def _weight(self) -> torch.Tensor:
        return dequantized_weight(self.module) if self.fused is None else self.fused.weight_of(self.member)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The module's forward, with the edits of the step in progress; the bare base outside of a step."""
        context = self._scope.current
        if self.observer is not None:
            self.observer(self, x)
        if context is None:
            return self._plain(x)
        ops = () if context.ops is None else context.ops.at(self.index, is_head=self.is_head)
        return self._with_ops(x, ops, context) if ops else self._normal(x, context)

    def _with_ops(self, x: torch.Tensor, ops: Sequence[PlacedOp], context: StepContext) -> torch.Tensor:
        is_embedding = self.kind is SiteKind.EMBEDDING
        flat = x.view(-1) if is_embedding else x.view(-1, self.d_in)

        def normal(read: torch.Tensor) -> torch.Tensor:
            is_own = read is not flat
            return self._normal(read.view(x.shape) if is_own else x, context, is_own=is_own).view(-1, self.d_out)

        return around(ops, flat, normal, self).view(*(x.shape if is_embedding else x.shape[:-1]), self.d_out)

    def _normal(self, x: torch.Tensor, context: StepContext, *, is_own: bool = False) -> torch.Tensor:
        """The normal form of x, (..., d_in) or ids; `is_own` where the other members of the group read another one."""
        if context.kernels is not None:
            return self._by_kernels(x, context, context.kernels, is_own=is_own)
        # A site outside of the groups has the number -1.
        group = None if context.edits is None or self.group < 0 else context.edits.group(self.group)
        layout = context.logits_layout if self.is_head else context.layout
        if group is None:
            return self._product(x, context, None, layout, is_own=is_own)[0]
        if self.kind is SiteKind.EMBEDDING:
            return self._embed(x, group, layout, context)
        return self._edited(x, group, layout, context, is_own=is_own)

    def _edited(
        self, x: torch.Tensor, group: GroupEdits, layout: TokenLayout, context: StepContext, *, is_own: bool
    ) -> torch.Tensor:
        edits = group.members[self.member]
        if edits is None:
            return self._product(x, context, None, layout, is_own=is_own)[0]
        flat = x.view(-1, self.d_in)
        if edits.in_scale is not None:
            product, is_done = self._plain(scale(flat, edits.in_scale, layout)), False
        else:
            product, is_done = self._product(x, context, group, layout, is_own=is_own)
            if is_done and edits.out_scale is None and edits.out_shift is None:
                return product
        y = product.view(-1, self.d_out)
        if edits.has_rows and not is_done:
            self._add_low_rank(y, x, group, layout, context)
        return _finish(y, edits, layout).view(*x.shape[:-1], self.d_out)

    def _add_low_rank(
        self, y: torch.Tensor, x: torch.Tensor, group: GroupEdits, layout: TokenLayout, context: StepContext
    ) -> None:
        """Adds this member's low-rank part to y; what depends on the input alone is computed once for the group."""
        edits = group.members[self.member]
        assert edits is not None
        if group.stack is not None:
            hidden = self._stack_hidden(x, group.stack, layout, context)
            expand_stack(y, hidden, group.stack, group.stack.spans[self.member], layout, edits.up_scale)
            return
        known = context.shrunk.get(self.group)
        if known is None or known[0] is not x:
            known = (x, shrink(x.view(-1, self.d_in), group, layout))
            context.shrunk[self.group] = known
        start, end = group.offsets[self.member], group.offsets[self.member + 1]
        expand(y, known[1][:, start:end], edits, layout)

    def _stack_hidden(self, x: torch.Tensor, stack: Stack, layout: TokenLayout, context: StepContext) -> StackHidden:
        known = context.stack_shrunk.get(self.group)
        if known is None or known[0] is not x:
            known = (x, shrink_stack(x.view(-1, self.d_in), stack, layout))
            context.stack_shrunk[self.group] = known
        return known[1]

    def _product(
        self, x: torch.Tensor, context: StepContext, group: GroupEdits | None, layout: TokenLayout, *, is_own: bool
    ) -> tuple[torch.Tensor, bool]:
        """The base's own product, and whether the low-rank part is in it already.

        Where the group's weights are fused, the first member that is called computes for all who read the same, and
        adds the low-rank parts of all at once where that can be.
        """
        if self.fused is None or is_own:
            return self._plain(x), False
        known = context.fused.get(self.group)
        if known is None or known.input is not x:
            output = self.fused(x)
            is_joint = group is not None and group.is_joint
            if group is not None and group.stack is not None and is_joint:
                hidden = self._stack_hidden(x, group.stack, layout, context)
                pieces = (0, len(group.stack.owners))
                expand_stack(output.view(-1, output.shape[-1]), hidden, group.stack, pieces, layout)
            known = FusedOutput(x, output, is_joint)
            context.fused[self.group] = known
        return self.fused.output_of(self.member, known.output), known.has_low_rank

    def _by_kernels(self, x: torch.Tensor, context: StepContext, kernels: SiteKernels, *, is_own: bool) -> torch.Tensor:
        """The same where kernels read rank rows in their places: all that follows the base's product is one launch."""
        is_edited = self.group >= 0 and kernels.edits(self.index)
        if is_edited and kernels.scales_input(self.index):
            scaled = kernels.scale(x.view(-1, self.d_in), self.group, self.member, is_head=self.is_head)
            y, is_done = self._plain(scaled.view(x.shape)), False
        else:
            y, is_done = self._product_by_kernels(x, context, kernels, is_own=is_own)
        if is_edited and not is_done:
            flat = y.view(-1, self.d_out)
            kernels.finish(flat, x, self.group, self.member, is_head=self.is_head, gain=self.gain)
        return y

    def _product_by_kernels(
        self, x: torch.Tensor, context: StepContext, kernels: SiteKernels, *, is_own: bool
    ) -> tuple[torch.Tensor, bool]:
        """As `_product`, the edits of all members included where they can be made at once."""
        if self.fused is None or is_own:
            return self._plain(x), False
        known = context.fused.get(self.group)
        if known is None or known.input is not x:
            output = self.fused(x)
            is_joint = kernels.is_joint(self.group)
            if is_joint:
                kernels.finish(output.view(-1, output.shape[-1]), x, self.group, None, is_head=self.is_head)
            known = context.fused[self.group] = FusedOutput(x, output, is_joint)
        return self.fused.output_of(self.member, known.output), known.has_low_rank

    def _plain(self, x: torch.Tensor) -> torch.Tensor:
        """The bare base's output for any input."""
        if self.fused is None:
            return self._base(x)
        return self.fused.product_of(self.member, x)

    def _embed(self, ids: torch.Tensor, group: GroupEdits, layout: TokenLayout, context: StepContext) -> torch.Tensor:
        edits = group.members[0]
        y = self._base(ids)
        if edits is None:
            return y
        flat = y.view(-1, self.d_out)
        if edits.has_rows:
            assert context.edits is not None
            rows, numbers = context.edits.embedding_rows(self.group)
            h = embed_low_rank(ids.view(-1), rows, numbers, group, layout)
            factor = getattr(self.module, "embed_scale", None)  # Gemma multiplies its embeddings by sqrt(hidden)
            expand(flat, h if factor is None else h * factor, edits, layout)
        return _finish(flat, edits, layout).view_as(y)


def _finish(y: torch.Tensor, edits: SiteEdits, layout: TokenLayout) -> torch.Tensor:
    if edits.out_scale is not None and edits.out_shift is not None:
        return scale_shift(y, edits.out_scale, edits.out_shift, layout)
    if edits.out_scale is not None:
        return scale(y, edits.out_scale, layout)
    return y if edits.out_shift is None else shift(y, edits.out_shift, layout)


def _widths(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    if isinstance(module, Conv1D):
        return int(module.weight.shape[0]), int(module.weight.shape[1])
    assert isinstance(module, nn.Linear)
    return module.in_features, module.out_features


def _row_norms_squared(module: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        out_dim = 1 if isinstance(module, nn.Embedding | Conv1D) else 0  # those are stored (d_in, d_out)
        # In pieces: a head of 128k rows in float64 would take gigabytes.
        norms = [(p.double() ** 2).sum(dim=1 - out_dim) for p in torch.split(weight, 1024, dim=out_dim)]
        return torch.cat(norms).float().cpu()

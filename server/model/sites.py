"""The sites of a base: finding them, grouping those that share an input, and applying a step's edits at them.

Owns the wrapping of the base's modules (done once, at load) and the order of operations of the normal form. Knows
nothing about adapters or methods: it sees the batch-local edits of the scope's context, whatever they came from.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from server.model.context import Scope, StepContext
from server.model.quantize import can_read_weight, dequantized_weight, is_quantized
from server.model.site import SiteKind
from server.ops import (
    GroupEdits,
    SiteEdits,
    TokenLayout,
    add_lanes,
    embed_low_rank,
    expand,
    scale,
    scale_shift,
    shift,
    shrink,
    to_lanes,
)

_NO_EDIT = SiteEdits()


class BaseSite:
    """A linear or an embedding of the base (satisfies the `Site` protocol), and its module's forward with edits."""

    def __init__(self, index: int, path: str, module: nn.Module, scope: Scope, *, is_head: bool) -> None:
        self.index = index
        self.path = path
        self.module = module
        self.is_head = is_head
        self.kind = SiteKind.EMBEDDING if isinstance(module, nn.Embedding) else SiteKind.LINEAR
        self.d_in, self.d_out = _widths(module)
        bias = getattr(module, "bias", None)
        self.bias = None if bias is None else bias.detach().float().cpu()
        # A quantized weight can be read only before the first forward pass (see `dequantized_weight`).
        self._row_norms_squared = _row_norms_squared(module) if is_quantized(module) else None
        # Set by SiteTable once groups are known.
        self.group = -1
        self.member = 0
        self.observer: Callable[[BaseSite, torch.Tensor], None] | None = None
        self.fused: FusedLinear | None = None
        self._scope = scope
        self._base: Callable[[torch.Tensor], torch.Tensor] = module.forward
        module.forward = self.forward

    @property
    def row_norms_squared(self) -> torch.Tensor:
        """||W_j||^2 of each output row of the dequantized weight, float32 on the CPU, (d_out,)."""
        if self._row_norms_squared is None:
            self._row_norms_squared = _row_norms_squared(self.module)
        return self._row_norms_squared

    def project(self, rows: torch.Tensor) -> torch.Tensor:
        """rows @ W^T without the bias: (r, d_in) -> (r, d_out) float32 on the CPU.

        4-bit weights cannot be read once they have been used, so theirs goes through the base's own product.
        """
        weight = getattr(self.module, "weight", None)
        assert isinstance(weight, torch.Tensor)
        with torch.inference_mode():
            if self.kind is SiteKind.EMBEDDING:
                return (rows.to(weight.device, torch.float32) @ weight.float()).cpu()
            if not can_read_weight(self.module):
                dtype = getattr(self.module, "compute_dtype", None) or torch.float32
                product = self._base(rows.to(weight.device, dtype)).float().cpu()
                return product if self.bias is None else product - self.bias
            weight = dequantized_weight(self.module)
            w = weight.t() if isinstance(self.module, Conv1D) else weight
            return F.linear(rows.to(w.device, torch.float32), w.float()).cpu()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The module's forward, with the edits of the step in progress; the bare base outside of a step."""
        context = self._scope.current
        if self.observer is not None:
            self.observer(self, x)
        if context is None:
            return self._base(x)
        # A site outside of the groups has the number -1.
        group = None if context.edits is None or self.group < 0 else context.edits.group(self.group)
        if group is None:
            return self._product(x, context, _NO_EDIT)
        layout = context.logits_layout if self.is_head else context.layout
        if self.kind is SiteKind.EMBEDDING:
            return self._embed(x, group, layout, context)
        return self._edited(x, group, layout, context)

    def _edited(self, x: torch.Tensor, group: GroupEdits, layout: TokenLayout, context: StepContext) -> torch.Tensor:
        edits = group.members[self.member]
        if edits is None:
            return self._product(x, context, _NO_EDIT)
        flat = x.view(-1, self.d_in)
        into = x if edits.in_scale is None else scale(flat, edits.in_scale, layout)
        y = self._product(into, context, edits).view(-1, self.d_out)
        if edits.up is not None:
            self._add_low_rank(y, x, group, layout, context)
        return _finish(y, edits, layout).view(*x.shape[:-1], self.d_out)

    def _add_low_rank(
        self, y: torch.Tensor, x: torch.Tensor, group: GroupEdits, layout: TokenLayout, context: StepContext
    ) -> None:
        """Adds this member's low-rank part to y; what depends on the input alone is computed once for the group."""
        edits = group.members[self.member]
        assert edits is not None
        has_lanes = group.is_stacked and layout.lanes is not None
        if has_lanes:
            assert edits.stack is not None
            assert layout.lanes is not None
            known = context.lanes.get(self.group)
            if known is None or known[0] is not x:
                known = (x, to_lanes(x.view(-1, self.d_in), layout.lanes, edits.stack.down.dtype))
                context.lanes[self.group] = known
            add_lanes(y, known[1], edits, layout)
            if layout.lanes.num_tokens == y.shape[0]:
                return
        known = context.shrunk.get(self.group)
        if known is None or known[0] is not x:
            known = (x, shrink(x.view(-1, self.d_in), group, layout, has_mixed=not has_lanes))
            context.shrunk[self.group] = known
        start, end = group.offsets[self.member], group.offsets[self.member + 1]
        expand(y, known[1][:, start:end], edits, layout, has_mixed=not has_lanes)

    def _product(self, x: torch.Tensor, context: StepContext, edits: SiteEdits) -> torch.Tensor:
        """The base's own product; of the whole group at once where its weights are fused and the input is shared."""
        if self.fused is None or edits.in_scale is not None:
            return self._base(x)
        known = context.fused.get(self.group)
        if known is None or known[0] is not x:
            known = (x, self.fused(x))
            context.fused[self.group] = known
        start = self.fused.offsets[self.member]
        return known[1][..., start : start + self.d_out]

    def _embed(self, ids: torch.Tensor, group: GroupEdits, layout: TokenLayout, context: StepContext) -> torch.Tensor:
        edits = group.members[0]
        y = self._base(ids)
        if edits is None:
            return y
        flat = y.view(-1, self.d_out)
        if edits.up is not None:
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


class FusedLinear:
    """One product for all members of a group; the members' own weights become views of the fused one."""

    def __init__(self, modules: Sequence[nn.Linear]) -> None:
        weight = torch.cat([m.weight.data for m in modules])
        biases = [m.bias.data for m in modules if m.bias is not None]
        self.weight = weight
        self.bias = torch.cat(biases) if biases else None
        self.offsets: list[int] = []
        start = 0
        for module in modules:
            self.offsets.append(start)
            end = start + module.out_features
            module.weight.data = weight[start:end]
            if self.bias is not None:
                module.bias.data = self.bias[start:end]
            start = end

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class SiteGroup:
    """Sites fed by the same input, in the order in which the model calls them."""

    index: int
    sites: tuple[BaseSite, ...]


class SiteTable:
    """All sites of a base by path, and their groups."""

    def __init__(self, model: nn.Module, scope: Scope) -> None:
        head = model.get_output_embeddings()  # type: ignore[operator]
        found = [(path, m) for path, m in model.named_modules() if _is_site(m)]
        self.sites = tuple(BaseSite(i, path, m, scope, is_head=m is head) for i, (path, m) in enumerate(found))
        self.by_path = {site.path: site for site in self.sites}
        self.groups: tuple[SiteGroup, ...] = ()

    def group_by_input(self, calls: Sequence[tuple[BaseSite, torch.Tensor]], num_tokens: int) -> None:
        """Forms the groups from one observed forward pass over `num_tokens` tokens: (site, its input) in call order.

        Sites that the pass never called, called more than once or with other rows than the batch's tokens (experts)
        cannot be edited token by token and leave the table.
        """
        by_input: dict[tuple[int, int], list[BaseSite]] = {}
        counts = Counter(site.index for site, _ in calls)
        for site, x in calls:
            rows = x.numel() if site.kind is SiteKind.EMBEDDING else x.numel() // x.shape[-1]
            if counts[site.index] == 1 and (site.is_head or rows == num_tokens):
                # Embeddings stay alone: their tables are as wide as their vocabularies, whatever the ids.
                own = site.index if site.kind is SiteKind.EMBEDDING else -1
                by_input.setdefault((id(x), own), []).append(site)
        self.groups = tuple(SiteGroup(i, tuple(sites)) for i, sites in enumerate(by_input.values()))
        for group in self.groups:
            for member, site in enumerate(group.sites):
                site.group, site.member = group.index, member
        self.by_path = {site.path: site for group in self.groups for site in group.sites}

    def fuse(self) -> None:
        """One base product per group where all members are plain linears alike in dtype, input and having a bias."""
        for group in self.groups:
            modules = [site.module for site in group.sites]
            if len(modules) < 2 or not all(type(m) is nn.Linear for m in modules):
                continue
            linears = [m for m in modules if isinstance(m, nn.Linear)]
            if len({(m.weight.dtype, m.bias is None) for m in linears}) == 1:
                fused = FusedLinear(linears)
                for site in group.sites:
                    site.fused = fused


def _is_site(module: nn.Module) -> bool:
    """A linear or an embedding that is called with its input alone (OPT's position embedding is not)."""
    is_kind = isinstance(module, nn.Linear | Conv1D | nn.Embedding)
    return is_kind and len(inspect.signature(type(module).forward).parameters) == 2


def _widths(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    if isinstance(module, Conv1D):
        return int(module.weight.shape[0]), int(module.weight.shape[1])
    assert isinstance(module, nn.Linear)
    return module.in_features, module.out_features


def _row_norms_squared(module: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        weight = dequantized_weight(module)
        out_dim = 1 if isinstance(module, nn.Embedding | Conv1D) else 0  # those are stored (d_in, d_out)
        # In pieces: a head of 128k rows in float64 would take gigabytes.
        norms = [(p.double() ** 2).sum(dim=1 - out_dim) for p in torch.split(weight, 1024, dim=out_dim)]
        return torch.cat(norms).float().cpu()

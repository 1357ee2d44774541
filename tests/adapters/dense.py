"""Sites over a dense model, and the normal form applied to it in plain torch: what an edit means, with nothing between.

For tests only: the server's own sites work on quantized bases and on batches.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from server.adapters.method import Edit
from server.model.site import SiteKind
from server.ops.site_ops.alone import run_alone


@dataclass(frozen=True, slots=True)
class DenseSite:
    """The Site protocol over an nn.Linear, a Conv1D or an nn.Embedding."""

    index: int
    path: str
    module: nn.Module

    @property
    def kind(self) -> SiteKind:
        return SiteKind.EMBEDDING if isinstance(self.module, nn.Embedding) else SiteKind.LINEAR

    @property
    def weight(self) -> torch.Tensor:
        """(d_out, d_in), as in y = x W^T."""
        weight = self.module.get_parameter("weight").detach()
        return weight if isinstance(self.module, nn.Linear) else weight.T

    @property
    def d_in(self) -> int:
        return self.weight.shape[1]

    @property
    def d_out(self) -> int:
        return self.weight.shape[0]

    @property
    def table_of(self) -> str | None:
        return None

    @property
    def bias(self) -> torch.Tensor | None:
        bias = getattr(self.module, "bias", None)
        return None if bias is None else bias.detach()

    @property
    def row_norms_squared(self) -> torch.Tensor:
        return self.weight.square().sum(1)

    @property
    def gain(self) -> float:
        return float(getattr(self.module, "embed_scale", 1.0))

    def project(self, rows: torch.Tensor) -> torch.Tensor:
        return rows @ self.weight.T

    def normalized(self, x: torch.Tensor) -> torch.Tensor:
        raise TypeError(f"{self.path} is no norm")


def sites_of(model: nn.Module) -> dict[str, DenseSite]:
    """Every linear and token embedding of a model, by path."""
    kinds = (nn.Linear, Conv1D, nn.Embedding)
    found = [(path, module) for path, module in model.named_modules() if isinstance(module, kinds)]
    return {path: DenseSite(index, path, module) for index, (path, module) in enumerate(found)}


def apply(
    edit: Edit,
    base: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    *,
    ids: bool,
    embed_scale: torch.Tensor | float = 1.0,
) -> torch.Tensor:
    """An edit's output (tokens, d_out), straight from the definition. With `ids`, x holds token ids: one-hot rows.

    Gemma's embedding multiplies what it reads by `embed_scale`, and PEFT the low-rank part, too.
    """
    y = base(x if edit.in_scale is None else x * edit.in_scale)
    if edit.down is not None and edit.up is not None:
        h = edit.down.T[x] if ids else x @ edit.down.T
        h = h if edit.mid_scale is None else edit.mid_scale * h
        h = h if edit.mid_shift is None else h + edit.mid_shift
        delta = h @ edit.up * embed_scale
        y = y + (delta if edit.up_scale is None else edit.up_scale * delta)
    y = y if edit.out_scale is None else edit.out_scale * y
    return y if edit.out_shift is None else y + edit.out_shift


@contextmanager
def edited(model: nn.Module, edits: Mapping[str, Edit]) -> Iterator[None]:
    """The model with the edits in place, until the block ends."""
    modules = {path: model.get_submodule(path) for path in edits}
    for path, module in modules.items():
        module.forward = _with_edit(edits[path], module.forward, DenseSite(0, path, module))
    try:
        yield
    finally:
        for module in modules.values():
            del module.forward


def _with_edit(
    edit: Edit, base: Callable[[torch.Tensor], torch.Tensor], site: DenseSite
) -> Callable[[torch.Tensor], torch.Tensor]:
    def normal(x: torch.Tensor) -> torch.Tensor:
        return apply(edit, base, x, ids=site.kind is SiteKind.EMBEDDING, embed_scale=site.gain)

    return lambda x: run_alone(edit.ops, normal, x, site)


def edited_logits(model: nn.Module, edits: Mapping[str, Edit], input_ids: torch.Tensor) -> torch.Tensor:
    with edited(model, edits), torch.no_grad():
        logits: torch.Tensor = model(input_ids=input_ids).logits
    return logits

"""All sites of a base: finding them, and grouping those that share an input.

Owns which modules of a model are sites, and of what kind. Knows nothing about adapters, and applies no edits.
"""

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from server.model.attention import is_attention
from server.model.context import Scope
from server.model.fused import fused
from server.model.site import PRODUCTS, Site, SiteKind
from server.model.sites import BaseSite
from server.model.sublayers import AttentionSite, BlockSite, NormSite
from server.ops.packed import FourBitProducts
from server.ops.site_ops import OpSite


@dataclass(frozen=True, slots=True)
class SiteGroup:
    """Sites fed by the same input, in the order in which the model calls them."""

    index: int
    sites: tuple[BaseSite, ...]


class SiteTable:
    """All sites of a base by path, and their groups."""

    def __init__(self, model: nn.Module, scope: Scope) -> None:
        head = model.get_output_embeddings()  # type: ignore[operator]
        self.sites = tuple(_sites(model, scope, head))
        _note_tied(self.sites)
        self.attention = _attention_sites(model, len(self.sites))
        found: list[BaseSite | AttentionSite] = [*self.sites, *self.attention.values()]
        self.by_path: Mapping[str, Site] = {site.path: site for site in found}
        self.by_index: Mapping[int, OpSite] = {site.index: site for site in found}
        self.groups: tuple[SiteGroup, ...] = ()

    @property
    def products(self) -> Mapping[str, BaseSite]:
        """The linears and embeddings among the sites, by path."""
        return {site.path: site for site in self.sites if site.kind in PRODUCTS and site.path in self.by_path}

    @property
    def num_sites(self) -> int:
        """One more than the largest index of a site."""
        return len(self.sites) + len(self.attention)

    def note_kv_shape(self, layer: int, kv_heads: int, head_dim: int) -> None:
        """What a layer caches for each token."""
        self.attention[layer].d_in = 2 * kv_heads * head_dim

    def group_by_input(self, calls: Sequence[tuple[BaseSite, torch.Tensor]], num_tokens: int) -> None:
        """Forms the groups from one observed forward pass over `num_tokens` tokens: (site, its input) in call order.

        Sites that the pass never called, called more than once or with other rows than the batch's tokens (experts)
        cannot be edited token by token and leave the table.
        """
        by_input: dict[tuple[int, int], list[BaseSite]] = {}
        counts = Counter(site.index for site, _ in calls)
        for site, x in calls:
            if counts[site.index] == 1 and (site.is_head or site.num_rows(x) == num_tokens):
                # Embeddings stay alone: their tables are as wide as their vocabularies, whatever the ids. And so does
                # what is no product, and changes what it reads in its place.
                own = -1 if site.kind is SiteKind.LINEAR else site.index
                by_input.setdefault((id(x), own), []).append(site)
        self.groups = tuple(SiteGroup(i, tuple(sites)) for i, sites in enumerate(by_input.values()))
        for group in self.groups:
            for member, site in enumerate(group.sites):
                site.group, site.member = group.index, member
        grouped = {site.path: site for group in self.groups for site in group.sites}
        self.by_path = grouped | {site.path: site for site in self.attention.values() if site.d_in}

    def fuse(self, *, is_native: bool, four_bit: FourBitProducts | None) -> None:
        """One base product per group where there can be one, see `fused`."""
        products = [site.module for site in self.sites if site.kind in PRODUCTS]
        places = Counter(module.get_parameter("weight").data_ptr() for module in products)
        shared = {place for place, num in places.items() if num > 1}
        for group in self.groups:
            modules = [site.module for site in group.sites]
            product = fused(modules, shared, is_native=is_native, four_bit=four_bit)
            for site in group.sites:
                site.fused = product

    def compact_norms(self, *, is_native: bool) -> list[nn.Module]:
        """Computes norms with fewer operators where that gives the same, or natively; returns those norms."""
        norms = [site for site in self.sites if isinstance(site, NormSite)]
        return [site.module for site in norms if site.compact(is_native=is_native)]

    @property
    def packed_bytes(self) -> int:
        """Bytes of the weights that the model's own parameters no longer hold."""
        return sum(fused.packed_bytes for fused in {id(s.fused): s.fused for s in self.sites if s.fused}.values())


def _note_tied(sites: Sequence[BaseSite]) -> None:
    tables = {id(site.module.weight): site.path for site in sites if site.kind is SiteKind.EMBEDDING}
    for site in sites:
        if site.kind is SiteKind.LINEAR:
            site.table_of = tables.get(id(site.module.weight))


def _sites(model: nn.Module, scope: Scope, head: nn.Module | None) -> Iterator[BaseSite]:
    """Products, norms and blocks, each in the order of the modules."""
    modules = list(model.named_modules())
    products = [(path, m) for path, m in modules if _is_site(m)]
    norms = [(path, m) for path, m in modules if _is_norm(m)]
    number = count()
    yield from (BaseSite(next(number), path, m, scope, is_head=m is head) for path, m in products)
    yield from (NormSite(next(number), path, m, scope) for path, m in norms)
    config: Any = getattr(model, "config", None)
    for path, block in _blocks(model, config):
        yield BlockSite(next(number), path, block, scope, int(config.get_text_config().hidden_size))


def _is_site(module: nn.Module) -> bool:
    """A linear or an embedding that is called with its input alone (OPT's position embedding is not)."""
    is_kind = isinstance(module, nn.Linear | Conv1D | nn.Embedding)
    return is_kind and len(inspect.signature(type(module).forward).parameters) == 2


def _is_norm(module: nn.Module) -> bool:
    """A norm over the last dimension, called with its input alone."""
    weight = getattr(module, "weight", None)
    is_named = type(module).__name__.endswith(("Norm", "LayerNorm"))
    is_vector = isinstance(weight, nn.Parameter) and weight.dim() == 1
    return is_named and is_vector and len(inspect.signature(type(module).forward).parameters) == 2


def _blocks(model: nn.Module, config: Any) -> list[tuple[str, nn.Module]]:
    """The decoder layers: the model's list of as many modules as it says that it has layers."""
    num_layers = None if config is None else getattr(config.get_text_config(), "num_hidden_layers", None)
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return [(f"{path}.{number}", block) for number, block in enumerate(module)]
    return []


def _attention_sites(model: nn.Module, first_index: int) -> dict[int, AttentionSite]:
    """By layer. Their widths are noted once attention has been seen at work."""
    found = [(path, m) for path, m in model.named_modules() if is_attention(m)]
    return {
        int(module.layer_idx): AttentionSite(first_index + number, path) for number, (path, module) in enumerate(found)
    }

"""The outline of a base: its sites with their shapes, found without its weights.

Owns how an architecture is built and traced on the meta device, where tensors have shapes and no bytes: the model's
config is read, and what its fingerprint samples. Knows nothing about adapters. What an adapter's tensors must fit is
the same as on the loaded base; numbers that would need the weights are stand-ins, and account is kept of who asked.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedConfig

from server.ground.errors import StartupRefused
from server.model.context import Scope
from server.model.fingerprint import fingerprint
from server.model.pretrained import BaseOptions, default_dtype, model_name, read_config
from server.model.site import Site, SiteKind
from server.model.site_table import SiteTable
from server.model.sites import BaseSite

_IMPLEMENTATION = "graft-outline"
_KV_SHAPE = "graft_kv_shape"  # of an attention, while it is traced
_NUM_TOKENS = 13  # of the traced pass; any number that is no width of a model will do


@dataclass(frozen=True, slots=True)
class OutlinedSite:
    """A site without its weight (satisfies the `Site` protocol)."""

    site: Site
    asked: set[str]  # shared by the sites of an outline: the paths of those whose weight was asked for

    @property
    def index(self) -> int:
        return self.site.index

    @property
    def path(self) -> str:
        return self.site.path

    @property
    def kind(self) -> SiteKind:
        return self.site.kind

    @property
    def d_in(self) -> int:
        return self.site.d_in

    @property
    def d_out(self) -> int:
        return self.site.d_out

    @property
    def table_of(self) -> str | None:
        return self.site.table_of

    @property
    def bias(self) -> torch.Tensor | None:
        """A stand-in where the base has a bias, float32 (d_out,), or None; another one at each site."""
        return self.site.bias

    @property
    def row_norms_squared(self) -> torch.Tensor:
        """Ones, (d_out,): rows of some length."""
        self.asked.add(self.path)
        return torch.ones(self.d_out)

    def project(self, rows: torch.Tensor) -> torch.Tensor:
        """Zeros, (r, d_out)."""
        self.asked.add(self.path)
        return torch.zeros(rows.shape[0], self.d_out)


@dataclass(frozen=True, slots=True)
class Outline:
    """What is known of a base without loading it."""

    name: str
    fingerprint: str | None  # of the checkpoint's files; None where they are not on this machine
    dtype: torch.dtype  # that the loaded base would compute in
    table: SiteTable  # its modules are on the meta device
    sites: Mapping[str, OutlinedSite]  # by path: those that the loaded base has, too
    asked: set[str]

    @property
    def num_asked(self) -> int:
        """Sites whose weight somebody asked for, and got stand-ins."""
        return len(self.asked)


def outline(options: BaseOptions) -> Outline:
    """Builds the architecture without weights and traces one pass through it, as loading the base does.

    The device of `options` is only named: it need not be there. Raises StartupRefused when there is no such model, or
    when its architecture cannot be built or traced so.
    """
    config = read_config(options.model)
    dtype = options.dtype or default_dtype(config, options.device)
    mark = fingerprint(options.model, config)
    table = _traced(options.model, config)  # last: building a model writes into its config
    asked: set[str] = set()
    return Outline(
        name=model_name(options.model),
        fingerprint=mark,
        dtype=dtype,
        table=table,
        sites={path: OutlinedSite(site, asked) for path, site in table.by_path.items()},
        asked=asked,
    )


def _traced(name: str, config: PreTrainedConfig) -> SiteTable:
    try:
        build: Any = AutoModelForCausalLM.from_config
        with torch.device("meta"):
            # bfloat16 whatever the base's own: torch's product of grouped experts takes nothing else there.
            model: nn.Module = build(config, attn_implementation=_IMPLEMENTATION, dtype=torch.bfloat16)
        table = _sites(model)
        _trace(model, table)
    except (KeyError, ValueError, RuntimeError) as error:  # what needs values has none on the meta device
        reason = str(error).partition("\n")[0]
        raise StartupRefused(
            f"the sites of {name!r} cannot be found without its weights ({type(error).__name__}: {reason}): add "
            "--load-base"
        ) from error
    return table


def _sites(model: nn.Module) -> SiteTable:
    """The table of a model on the meta device, which it leaves there.

    Sites read their biases when they are made, so these have values meanwhile: differing ones, because adapters whose
    tensors are equal share memory, and such chance equality must not count.
    """
    for number, module in enumerate(model.modules(), start=1):
        bias = getattr(module, "bias", None)
        if isinstance(bias, nn.Parameter):
            module.bias = nn.Parameter(torch.full(bias.shape, number / 1024, device="cpu"))
    table = SiteTable(model, Scope())
    model.to("meta")
    return table


def _trace(model: nn.Module, table: SiteTable) -> None:
    """Forms the groups, and so finds the sites that are called once for each token."""
    calls: list[tuple[BaseSite, torch.Tensor]] = []
    for site in table.sites:
        site.observer = lambda site, x: calls.append((site, x))
    ids = torch.zeros(1, _NUM_TOKENS, dtype=torch.long, device="meta")
    with torch.inference_mode():
        model(input_ids=ids, use_cache=False)
    for site in table.sites:
        site.observer = None
    for module in model.modules():
        shape = vars(module).get(_KV_SHAPE)
        if shape is not None:
            table.note_kv_shape(int(module.layer_idx), *shape)  # type: ignore[arg-type]
    table.group_by_input(calls, _NUM_TOKENS)


def _attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, None]:
    """An attention of shapes: query (1, heads, tokens, width) -> (1, tokens, heads, width of values)."""
    batch, num_heads, num_tokens, _width = query.shape
    vars(module)[_KV_SHAPE] = (key.shape[1], key.shape[3])
    return query.new_empty(batch, num_tokens, num_heads, value.shape[3]), None


AttentionInterface.register(_IMPLEMENTATION, _attention)

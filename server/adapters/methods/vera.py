"""VeRA: one frozen random pair for the whole model, and two trained vectors per site.

Owns y = base(x) + lambda_b * (B (lambda_d * (A x))) and the rule by which A and B are drawn again when the file leaves
them out. Kopiczko et al. 2023, arXiv:2310.11454.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from server.adapters.format import fields
from server.adapters.format.checkpoint import Checkpoint
from server.adapters.format.contradictions import contradictions
from server.adapters.format.module_paths import SiteFinder
from server.adapters.method import Edit, Lowered
from server.ground.errors import AdapterRejected
from server.model.site import Site, SiteKind

_KNOWN = {"r", "projection_prng_key", "save_projection", "vera_dropout", "d_initial", "init_weights", "bias"}
_LAMBDA_B, _LAMBDA_D = "vera_lambda_b", "vera_lambda_d"
_SHARED_A, _SHARED_B = "vera_A", "vera_B"


class Vera:
    name = "vera"

    def claims(self, config: Mapping[str, Any]) -> bool:
        return config.get("peft_type") == "VERA"

    def lower(self, checkpoint: Checkpoint, sites: Mapping[str, Site]) -> Lowered:
        rank = _rank(checkpoint)
        targets = _targets(checkpoint, sites)
        if not targets:
            return Lowered(self.name, 0, 0, {})
        shared = _shared(checkpoint, rank, [site for site, _ in targets])
        edits: dict[str, Edit] = {}
        for site, module in targets:
            edits[site.path] = Edit(
                down=shared.down(site.d_in),
                up=shared.up(site.d_out),
                mid_scale=checkpoint.take(f"{module}.{_LAMBDA_D}", (rank,)),
                up_scale=checkpoint.take(f"{module}.{_LAMBDA_B}", (site.d_out,)),
            )
        warnings = contradictions(checkpoint.config, [module for _, module in targets])
        return Lowered(self.name, rank, checkpoint.num_parameters, edits, warnings)


@dataclass(frozen=True, slots=True)
class Shared:
    """The frozen pair, and its slices: sites of equal width get the very same tensor."""

    a: torch.Tensor  # (r, the largest d_in)
    b: torch.Tensor  # (the largest d_out, r)
    _downs: dict[int, torch.Tensor] = field(default_factory=dict)
    _ups: dict[int, torch.Tensor] = field(default_factory=dict)

    def down(self, d_in: int) -> torch.Tensor:
        if d_in not in self._downs:
            self._downs[d_in] = self.a[:, :d_in].contiguous()
        return self._downs[d_in]

    def up(self, d_out: int) -> torch.Tensor:
        if d_out not in self._ups:
            self._ups[d_out] = self.b[:d_out].T.contiguous()
        return self._ups[d_out]


def _rank(checkpoint: Checkpoint) -> int:
    config = checkpoint.config
    fields.check_known(config, _KNOWN)
    fields.check_no_bias(config, "VeRA")
    rank, limit = fields.count(config.get("r", 256), "r"), checkpoint.limits.max_rank
    if rank > limit:
        raise AdapterRejected(f"r = {rank} in adapter_config.json; the limit is {limit}. Use a smaller r.")
    return rank


def _targets(checkpoint: Checkpoint, sites: Mapping[str, Site]) -> list[tuple[Site, str]]:
    """The linears that the file edits, with their module paths in the file."""
    finder = SiteFinder(sites)
    modules: dict[str, str] = {}
    for key in checkpoint:
        module, _, parameter = key.rpartition(".")
        if parameter not in (_LAMBDA_B, _LAMBDA_D):
            continue
        name = checkpoint.name(key)
        site = finder.find(module, name)
        if site.kind is not SiteKind.LINEAR:
            raise AdapterRejected(f"{name}: VeRA edits linear modules only.")
        if modules.setdefault(site.path, module) != module:
            raise AdapterRejected(f"{name}: {site.path} is edited twice in this file. Save one adapter per file.")
        for partner in (_LAMBDA_B, _LAMBDA_D):
            if f"{module}.{partner}" not in checkpoint:
                raise AdapterRejected(f"{name} has no partner: vera_lambda_b and vera_lambda_d come together.")
    return [(sites[path], module) for path, module in modules.items()]


def _shared(checkpoint: Checkpoint, rank: int, targets: list[Site]) -> Shared:
    widest_in = max(site.d_in for site in targets)
    widest_out = max(site.d_out for site in targets)
    if not fields.flag(checkpoint.config, "save_projection", default=True):
        return _drawn(checkpoint, rank, widest_in, widest_out)
    for key in (_SHARED_A, _SHARED_B):
        if key not in checkpoint:
            raise AdapterRejected(f"save_projection is true in adapter_config.json, but the file has no {key}.")
    return Shared(checkpoint.take(_SHARED_A, (rank, widest_in)), checkpoint.take(_SHARED_B, (widest_out, rank)))


def _drawn(checkpoint: Checkpoint, rank: int, widest_in: int, widest_out: int) -> Shared:
    """A, then B, uniform within sqrt(3) sqrt(2) / sqrt(columns), from one CPU generator with the config's key.

    The draw depends on the largest widths among the modules that were trained, which are those in the file.
    """
    key = checkpoint.config.get("projection_prng_key", 0)
    if type(key) is not int or not -(1 << 63) <= key < 1 << 63:
        raise AdapterRejected(
            f"projection_prng_key = {key!r:.40} in adapter_config.json must be a 64-bit whole number."
        )
    generator = torch.Generator("cpu").manual_seed(key)

    def draw(num_rows: int, num_columns: int) -> torch.Tensor:
        bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(num_columns))
        return torch.empty(num_rows, num_columns).uniform_(-bound, bound, generator=generator)

    a = draw(rank, widest_in)
    return Shared(a, draw(widest_out, rank))


METHOD = Vera()

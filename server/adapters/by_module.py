"""Lowering for methods whose tensors lie at the linears that they edit: one module of the file, one edit.

Owns the grouping of a checkpoint's keys by module, and what is refused for every such method: half a set of tensors, a
module twice, a module that is no linear, a rank above the limit. Knows nothing about what the tensors mean.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from server.adapters.format.checkpoint import Checkpoint
from server.adapters.format.contradictions import contradictions
from server.adapters.format.lora_file import ignore_base_table
from server.adapters.format.module_paths import SiteFinder
from server.adapters.method import Edit, Lowered
from server.ground.errors import AdapterRejected
from server.model.site import Site, SiteKind

_BASE_TABLE = "base_layer.weight"  # PEFT's copy of a whole embedding or head that is edited


@dataclass(frozen=True, slots=True)
class ModuleTensors:
    """What a file holds for one linear, by the names of its parameters ("lora_A", "delora_lambda", ...)."""

    path: str  # of the module, as in the file
    site: Site
    checkpoint: Checkpoint
    keys: dict[str, str] = field(default_factory=dict)  # parameter -> canonical key

    def __contains__(self, parameter: str) -> bool:
        return parameter in self.keys

    def name(self, parameter: str) -> str:
        """The key as the file spells it, for messages."""
        return self.checkpoint.name(self.keys[parameter])

    def shape(self, parameter: str) -> tuple[int, ...]:
        return self.checkpoint.shape(self.keys[parameter])

    def take(self, parameter: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor, float32 on the CPU; a refusal that names it if it has another shape than the given one."""
        return self.checkpoint.take(self.keys[parameter], shape)

    def check_saved_rank(self, parameter: str, place: int, rank: int, fields: str = "r") -> None:
        """Refuses a tensor whose shape has another rank at `place` than the config's `fields` say."""
        saved = next(iter(self.shape(parameter)[place:]), 0)
        if saved != rank:
            raise AdapterRejected(
                f"{self.name(parameter)} has rank {saved}, and {fields} in adapter_config.json says {rank}, so its "
                "scaling is not known. Save the config that belongs to the weights."
            )

    def check_rank(self, rank: int, remedy: str = "Use a smaller r.") -> None:
        """Refuses a rank above the limit before anything of that size is made."""
        if rank > self.checkpoint.limits.max_rank:
            raise AdapterRejected(
                f"{self.path} has rank {rank}; the limit is {self.checkpoint.limits.max_rank}. {remedy}"
            )


def modules_of(
    checkpoint: Checkpoint,
    sites: Mapping[str, Site],
    required: Sequence[str],
    optional: Sequence[str] = (),
    kinds: Collection[SiteKind] = (SiteKind.LINEAR,),
) -> tuple[ModuleTensors, ...]:
    """The linears, or sites of `kinds`, for which the file has tensors, in its order.

    A parameter is how a key ends after the path of its module; keys that end otherwise stay unused in the checkpoint.
    Raises AdapterRejected, naming the key, for a module that is no such site of the base, comes twice, or lacks one of
    the `required` parameters.
    """
    finder = SiteFinder(sites)
    parameters = (*required, *optional, _BASE_TABLE)
    found: dict[str, ModuleTensors] = {}
    for key in checkpoint:
        parameter = next((one for one in parameters if key.endswith("." + one)), None)
        if parameter is None:
            continue
        path, name = key[: -len(parameter) - 1], checkpoint.name(key)
        site = finder.find(path, name)
        if site.kind not in kinds:
            raise AdapterRejected(
                f"{name}: {site.path} is no {' or '.join(kinds)} module, and this method edits no other."
            )
        module = found.setdefault(site.path, ModuleTensors(path, site, checkpoint))
        if module.path != path:
            raise AdapterRejected(f"{name}: {site.path} is edited twice in this file. Save one adapter per file.")
        module.keys[parameter] = key
        if parameter == _BASE_TABLE:
            ignore_base_table(checkpoint, key, site, sites)
    for module in found.values():
        if missing := next((one for one in required if one not in module), None):
            raise AdapterRejected(
                f"{module.name(next(iter(module.keys)))} has no partner: the file has no {module.path}.{missing}."
            )
    return tuple(found.values())


def lower_by_module(
    method: str, checkpoint: Checkpoint, modules: Sequence[ModuleTensors], edit: Callable[[ModuleTensors], Edit | None]
) -> Lowered:
    """The adapter whose edit at each module's site is `edit` of that module; None where it changes nothing."""
    edits = {module.site.path: made for module in modules if (made := edit(module)) is not None}
    rank = max((made.rank for made in edits.values()), default=0)
    copies = tuple(
        f"{module.name(_BASE_TABLE)} is a copy of the base's own table; it is not used."
        for module in modules
        if _BASE_TABLE in module
    )
    warnings = copies + contradictions(checkpoint.config, [module.path for module in modules])
    return Lowered(method, rank, checkpoint.num_parameters, edits, warnings)

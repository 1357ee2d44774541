"""From a checkpoint to the normal form: chooses the method, lets it lower, and checks what it says.

Owns what holds for every method: no key left over, at least one edit, and tensors that fit their sites. Knows nothing
about any particular method.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch

from server.adapters.format.checkpoint import Checkpoint
from server.adapters.method import Edit, Lowered, WeighedMethod
from server.adapters.methods import method_for
from server.ground.errors import AdapterRejected
from server.model.site import Site
from server.ops.site_ops import SITE_OPS

_MAX_NAMED = 3


def lower(checkpoint: Checkpoint, sites: Mapping[str, Site], weight: float = 1.0) -> Lowered:
    """The checkpoint as edits on `sites` (site path -> site), fit to be applied as they are.

    With a weight they are fit to be mixed (see `mixing.py`): the result says what of the weight the mix has to add.

    Pure, and may run in any thread. Raises AdapterRejected, naming the key, the field or the shape, for whatever
    cannot be applied exactly.
    """
    lowered = _lowered(checkpoint, sites, weight)
    if leftover := checkpoint.leftover():
        more = f" and {len(leftover) - _MAX_NAMED} more" if len(leftover) > _MAX_NAMED else ""
        raise AdapterRejected(
            f"The method {lowered.method} has no use for {', '.join(leftover[:_MAX_NAMED])}{more}. "
            "Nothing is passed over: save the adapter without these keys, or with the config that they belong to."
        )
    if not lowered.edits:
        raise AdapterRejected(f"The adapter edits no site of the base: it holds no {lowered.method} tensor.")
    for edits in lowered.parts:
        for path, edit in edits.items():
            _check(edit, sites[path], checkpoint.limits.max_rank)
            _check_ops(edit, sites[path])
    return lowered


def _lowered(checkpoint: Checkpoint, sites: Mapping[str, Site], weight: float) -> Lowered:
    method = method_for(checkpoint.config)
    if weight != 1 and isinstance(method, WeighedMethod):
        return method.lower_weighed(checkpoint, sites, weight)
    return replace(method.lower(checkpoint, sites), weight=weight)


def _check(edit: Edit, site: Site, max_rank: int) -> None:
    if edit.rank > max_rank:
        raise AdapterRejected(f"{site.path} has rank {edit.rank}; the limit is {max_rank}. Use a smaller r.")
    wanted = _shapes(edit.rank, site)
    for name, tensor in edit.tensors().items():
        where = f"{name} at {site.path}"
        if tuple(tensor.shape) != wanted[name]:
            raise AdapterRejected(
                f"{where} has the shape {list(tensor.shape)}, and this base needs {list(wanted[name])}."
            )
        _check_numbers(tensor, where)


def _check_ops(edit: Edit, site: Site) -> None:
    for name, tensors in edit.ops.items():
        for field, tensor in tensors.items():
            _check_numbers(tensor, f"{field} of {name} at {site.path}")
        try:
            SITE_OPS[name].check(tensors, site)
        except ValueError as error:
            raise AdapterRejected(f"{name} at {site.path}: {error}.") from error


def _check_numbers(tensor: torch.Tensor, where: str) -> None:
    if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
        raise AdapterRejected(f"{where} is {tensor.dtype} on {tensor.device}; the method must give float32 on CPU.")
    if not bool(torch.isfinite(tensor).all()):
        raise AdapterRejected(f"{where} is not finite once computed: the adapter's numbers are out of range.")


def _shapes(rank: int, site: Site) -> dict[str, tuple[int, ...]]:
    return {
        "down": (rank, site.d_in),
        "up": (rank, site.d_out),
        "mid_scale": (rank,),
        "mid_shift": (rank,),
        "in_scale": (site.d_in,),
        "up_scale": (site.d_out,),
        "out_scale": (site.d_out,),
        "out_shift": (site.d_out,),
    }

"""LoReFT and its relatives: edits of the residual stream after a layer, at the ends of the prompt or after it.

Owns the format of docs/convert.md, and what each kind of intervention computes there:

    loreft      h + R (W h + b - R^T h)           noreft      h + P^T (W h + b - (P h + p))
    direft      h + R (W h + b)                   nodireft    h + P^T (W h + b)
    consreft    h + R (b - R^T h)                 lobireft    h + R b

with R (h, r), W and P (r, h). With an activation, W h + b stands inside it, and the edit is the op `bottleneck`.
Wu et al. 2024, arXiv:2404.03592; the relatives are those of its library.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from server.adapters.format import fields
from server.adapters.format.checkpoint import Checkpoint
from server.adapters.method import Edit, Lowered
from server.adapters.positions import Generated, Positions, PromptEnds, prompt_ends
from server.ground.errors import AdapterRejected
from server.model.site import Site, SiteKind
from server.ops.site_ops.bottleneck import ACTIVATIONS, NAMES

_KNOWN = {"intervention", "r", "layers", "positions", "share_weights", "activation", "last_position", "applies_to"}
_KEY = re.compile(r"layers\.(\d{1,5})\.(all|prefix|suffix)\.(.+)")
_NUM_LEFT_OUT = {"prompt": 0, "prompt-1": 1}
_Tensors = Mapping[str, torch.Tensor]


def _loreft(t: _Tensors) -> Edit:
    r = t["rotate_layer"].T
    return Edit(down=t["weight"] - r, up=r.contiguous(), mid_shift=t["bias"])


def _direft(t: _Tensors) -> Edit:
    return Edit(down=t["weight"], up=t["rotate_layer"].T.contiguous(), mid_shift=t["bias"])


def _consreft(t: _Tensors) -> Edit:
    r = t["rotate_layer"].T
    return Edit(down=-r, up=r.contiguous(), mid_shift=t["bias"])


def _lobireft(t: _Tensors) -> Edit:
    return Edit(out_shift=t["rotate_layer"] @ t["bias"])


def _noreft(t: _Tensors) -> Edit:
    p = t["proj_layer.weight"]
    shift = t["bias"] - t["proj_layer.bias"] if "proj_layer.bias" in t else t["bias"]
    return Edit(down=t["weight"] - p, up=p, mid_shift=shift)


def _nodireft(t: _Tensors) -> Edit:
    return Edit(down=t["weight"], up=t["proj_layer.weight"], mid_shift=t["bias"])


# Of each kind its edit, and the tensors that it is made of.
_KINDS: Mapping[str, tuple[Callable[[_Tensors], Edit], frozenset[str]]] = {
    "loreft": (_loreft, frozenset({"weight", "bias", "rotate_layer"})),
    "direft": (_direft, frozenset({"weight", "bias", "rotate_layer"})),
    "consreft": (_consreft, frozenset({"bias", "rotate_layer"})),
    "lobireft": (_lobireft, frozenset({"bias", "rotate_layer"})),
    "noreft": (_noreft, frozenset({"weight", "bias", "proj_layer.weight"})),
    "nodireft": (_nodireft, frozenset({"weight", "bias", "proj_layer.weight"})),
}
_OPTIONAL = {"noreft": frozenset({"proj_layer.bias"})}


_READING = ("loreft", "direft", "noreft", "nodireft")  # the kinds with a W, which an activation may follow
_TAKEN = {"loreft": "rotate_layer", "noreft": "proj_layer.weight"}  # what is taken off, past the activation
_READS = torch.tensor([1.0, 0.0])  # the op's input is the site's output


class Loreft:
    name = "loreft"

    def claims(self, config: Mapping[str, Any]) -> bool:
        return config.get("peft_type") == "LOREFT"

    def lower(self, checkpoint: Checkpoint, sites: Mapping[str, Site]) -> Lowered:
        config = checkpoint.config
        fields.check_known(config, _KNOWN)
        kind = _one_of(config, "intervention", _KINDS, "loreft")
        act = _activation(config, kind)
        parts = {part: _edits(checkpoint, kind, act, part, sites) for part in ("all", "prefix", "suffix")}
        positions = _positions(config, has_suffix=bool(parts["suffix"]))
        first = parts["all"] or parts["prefix"]
        if (parts["all"] and (parts["prefix"] or parts["suffix"])) or bool(parts["prefix"]) != bool(parts["suffix"]):
            raise AdapterRejected("The file must have the part 'all' of its layers, or both 'prefix' and 'suffix'.")
        _check_described(checkpoint, positions, has_two=bool(parts["suffix"]))
        rank = max((_rank(edit) for edits in parts.values() for edit in edits.values()), default=0)
        return Lowered(kind, rank, checkpoint.num_parameters, first, positions=positions, last_edits=parts["suffix"])


def _check_described(checkpoint: Checkpoint, positions: Positions, *, has_two: bool) -> None:
    """What the config says of the file must be so, and each part must have a place where it acts."""
    config = checkpoint.config
    if has_two and not (isinstance(positions, PromptEnds) and positions.first and positions.last):
        raise AdapterRejected(
            "The file has the parts 'prefix' and 'suffix', so positions in adapter_config.json must name both ends of "
            "the prompt, as f7+l7."
        )
    found = [match for key in checkpoint if (match := _KEY.fullmatch(key))]
    ranks = [checkpoint.shape(match[0])[0] for match in found if match[3] == "bias"]
    layers = sorted({int(match[1]) for match in found})
    said = {"layers": layers, "share_weights": not has_two, "r": max(ranks, default=0)}
    for name, value in said.items():
        if config.get(name) not in (None, value):
            raise AdapterRejected(
                f"{name} = {config[name]!r:.60} in adapter_config.json, and the file's is {value}. Save the config "
                "that belongs to the weights."
            )


def _activation(config: Mapping[str, Any], kind: str) -> int | None:
    """The number of the op's activation; None for none. The config has transformers' name of it."""
    name = config.get("activation")
    if name in (None, "linear"):
        return None
    act = ACTIVATIONS.index(NAMES[name]) if isinstance(name, str) and name in NAMES else None
    if act is None or kind not in _READING:
        known = ", ".join(NAMES) if kind in _READING else "none"
        raise AdapterRejected(
            f"activation = {name!r:.40} in adapter_config.json is not served; of {kind} {known} are, and null."
        )
    return act


def _activated(edit: Edit, kind: str, act: int, tensors: _Tensors) -> Edit:
    """up^T (act(W h + b) - what is taken off), each with rows of its own."""
    assert edit.up is not None
    weight, bias, up = tensors["weight"], tensors["bias"], edit.up
    rank, width = weight.shape
    acts = torch.full((rank,), float(act))
    taken = _TAKEN.get(kind)
    if taken is not None:
        off = tensors[taken].T if taken == "rotate_layer" else tensors[taken]
        weight, up = torch.cat([weight, off]), torch.cat([up, -up])
        bias = torch.cat([bias, tensors.get("proj_layer.bias", torch.zeros(rank))])
        acts = torch.cat([acts, torch.full((rank,), float(ACTIVATIONS.index("linear")))])
    op = {"down": weight, "down_bias": bias, "up": up, "up_bias": torch.zeros(width), "act": acts, "reads": _READS}
    return Edit(ops={"bottleneck": op})


def _edits(checkpoint: Checkpoint, kind: str, act: int | None, part: str, sites: Mapping[str, Site]) -> dict[str, Edit]:
    """The edits of one part by site path."""
    blocks = {int(s.path.rpartition(".")[2]): s for s in sites.values() if s.kind is SiteKind.BLOCK}
    make, needed = _KINDS[kind]
    wanted = needed | _OPTIONAL.get(kind, frozenset())
    of_layer: dict[int, dict[str, str]] = {}
    for key in checkpoint:
        found = _KEY.fullmatch(key)
        if found and found[2] == part and found[3] in wanted:
            of_layer.setdefault(int(found[1]), {})[found[3]] = key
    edits = {}
    for layer, keys in of_layer.items():
        if layer not in blocks:
            raise AdapterRejected(f"layers.{layer}: the base has {len(blocks)} layers that an adapter can edit.")
        if missing := needed - keys.keys():
            raise AdapterRejected(f"layers.{layer}.{part} has no {min(missing)}, which {kind} needs.")
        tensors = _tensors(checkpoint, keys, blocks[layer])
        edit = make(tensors)
        edits[blocks[layer].path] = edit if act is None else _activated(edit, kind, act, tensors)
    return edits


def _tensors(checkpoint: Checkpoint, keys: Mapping[str, str], site: Site) -> dict[str, torch.Tensor]:
    """The tensors of one intervention; the first dimension of a bias is its rank."""
    rank = next(iter(checkpoint.shape(keys["bias"])), 0)
    if rank > checkpoint.limits.max_rank:
        limit = checkpoint.limits.max_rank
        raise AdapterRejected(f"{checkpoint.name(keys['bias'])} has rank {rank}; the limit is {limit}.")
    shapes = {"rotate_layer": (site.d_out, rank), "bias": (rank,), "proj_layer.bias": (rank,)}
    return {name: checkpoint.take(key, shapes.get(name, (rank, site.d_in))) for name, key in keys.items()}


def _rank(edit: Edit) -> int:
    return len(edit.ops["bottleneck"]["down"]) if edit.ops else edit.rank


def _positions(config: Mapping[str, Any], *, has_suffix: bool) -> Positions:
    if _one_of(config, "applies_to", ("prompt", "generated"), "prompt") == "generated":
        if config.get("positions") is not None:
            raise AdapterRejected("positions in adapter_config.json must be null where applies_to is 'generated'.")
        return Generated()
    num_left_out = _NUM_LEFT_OUT[_one_of(config, "last_position", _NUM_LEFT_OUT, "prompt")]
    text = fields.text(config, "positions")
    ends = prompt_ends(text)
    if ends is None:
        raise AdapterRejected(f"positions = {text!r:.40} in adapter_config.json must be as f7+l7, f7 or l7.")
    return PromptEnds(*ends, 2 if has_suffix else 1, num_left_out)


def _one_of(config: Mapping[str, Any], name: str, known: Any, default: str) -> str:
    value = config.get(name, default)
    if not isinstance(value, str) or value not in known:
        raise AdapterRejected(f"{name} = {value!r:.40} in adapter_config.json must be one of {', '.join(known)}.")
    return value


METHOD = Loreft()

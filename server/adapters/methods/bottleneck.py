"""Bottleneck adapters: two small layers with a nonlinearity, after or beside the attention and the MLP of each layer.

Owns the reading of what AdapterHub's `adapters` library saves: its config, its keys, and where in a decoder its forward
puts them. Houlsby et al. 2019, arXiv:1902.00751 (after both); Pfeiffer et al. 2020, arXiv:2005.00247 (after the MLP,
reading the residual stream); He et al. 2021, arXiv:2110.04366 (parallel). With o what a sub-block gives, r the residual
stream before its norm, and bn the bottleneck, the library computes

    sequential                       r + o + bn(o)
    sequential, original_ln_before   r + o + bn(o + r)
    parallel                         r + o + bn(r)

in models that norm before a sub-block; other settings lose r or add it twice, and are refused.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from server.adapters.format import fields
from server.adapters.format.checkpoint import Checkpoint
from server.adapters.format.module_paths import SiteFinder
from server.adapters.method import Edit, Lowered
from server.ground.errors import AdapterRejected
from server.model.site import Site
from server.ops.site_ops.bottleneck import ACTIVATIONS, NAMES


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where in a layer of some type of model the adapters sit: the linear that ends a sub-block, the norm before it."""

    attention: tuple[str, str]
    output: tuple[str, str]
    is_hooked: bool = False  # by hooks on the model, and not by a forward of the library's own: it does less there
    has_norm_after: bool = False  # a sub-block ends in a norm, which original_ln_before would want


@dataclass(frozen=True, slots=True)
class _Form:
    """What the config says of every module."""

    reads: tuple[float, float]  # how much of the sub-block's output, and of the residual stream
    act: int
    scaling: float | None  # None: trained, in the file
    has_norm_before: bool
    has_norm_after: bool
    is_norm_last: bool


@dataclass(frozen=True, slots=True)
class _Module:
    """One adapter module of a checkpoint: the keys of its parameters."""

    number: int  # of the layer
    place: str  # attention or output
    layer: str  # its path
    keys: dict[str, str]  # by parameter

    @property
    def path(self) -> str:
        return f"{self.layer}.{self.place}_adapters"

    def key(self, parameter: str) -> str:
        """Raises AdapterRejected where the file has none."""
        if parameter not in self.keys:
            raise AdapterRejected(f"{self.path} has no {parameter} in the file, which adapter_config.json asks for.")
        return self.keys[parameter]


_LLAMA = _Layout(("self_attn.o_proj", "input_layernorm"), ("mlp.down_proj", "post_attention_layernorm"))
_QWEN = _Layout(_LLAMA.attention, _LLAMA.output, is_hooked=True)
_GEMMA = _Layout(_LLAMA.attention, ("mlp.down_proj", "pre_feedforward_layernorm"), is_hooked=True, has_norm_after=True)
_LAYOUTS: Mapping[str, _Layout] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "gpt2": _Layout(("attn.c_proj", "ln_1"), ("mlp.c_proj", "ln_2")),
    "qwen2": _QWEN,
    "qwen3": _QWEN,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
}

_KNOWN = {"config", "config_id", "hidden_size", "model_class", "model_name", "model_type", "name", "version"}
# What is read, and what only training or the shapes of the file needed; phm_... mean nothing without phm_layer.
_KNOWN_OF_CONFIG = {
    "adapter_residual_before_ln", "dropout", "factorized_phm_W", "factorized_phm_rule", "hypercomplex_nonlinearity",
    "init_weights", "init_weights_seed", "is_parallel", "learn_phm", "leave_out", "ln_after", "ln_before", "mh_adapter",
    "non_linearity", "original_ln_after", "original_ln_before", "output_adapter", "phm_bias", "phm_c_init", "phm_dim",
    "phm_init_range", "phm_rank", "reduction_factor", "residual_before_ln", "scaling", "shared_W_phm",
    "shared_phm_rule", "stochastic_depth",
}  # fmt: skip
_REFUSED = {
    "architecture": "of AdapterHub's methods the bottleneck adapters are served; train this one with PEFT",
    "cross_adapter": "the base has no cross-attention; train with cross_adapter=False",
    "inv_adapter": "invertible adapters are not served; train with inv_adapter=None",
    "inv_adapter_reduction_factor": "invertible adapters are not served; train with inv_adapter=None",
    "phm_layer": "layers of Kronecker products (Compacter) are not served; train with phm_layer=False",
    "use_gating": "its gate is a mean over all tokens of a prompt, which changes with every token that is generated; "
    "train with use_gating=False",
}

_NON_LINEARITIES: Mapping[str, str] = {**NAMES, "leakyrelu": "leaky_relu"}
_OLD_NAMES = {"gelu": "gelu_new", "gelu_orig": "gelu"}  # in files that name no version
_KEY = re.compile(  # canonical_key takes the name "default" away where it is the last but one
    r"(?P<layer>(?:.+\.)?(?P<number>\d+))\.(?P<place>attention|output)_adapters\.adapters\."
    r"(?:(?P<name>[^.]+)\.)?(?P<parameter>adapter_.+|scaling)"
)


class Bottleneck:
    name = "bottleneck"

    def claims(self, config: Mapping[str, Any]) -> bool:
        """AdapterHub's configs name no peft_type, and hold the method's own fields in an object."""
        return config.get("peft_type") is None and isinstance(config.get("config"), dict)

    def lower(self, checkpoint: Checkpoint, sites: Mapping[str, Site]) -> Lowered:
        fields.check_known(checkpoint.config, _KNOWN)
        layout, form = _layout(checkpoint.config), _form(checkpoint.config)
        modules = _modules(checkpoint)
        _check_complete(checkpoint.config["config"], modules, layout, sites)
        finder = SiteFinder(sites)
        edits: dict[str, Edit] = {}
        rank = 0
        for module in modules:
            linear, norm = layout.attention if module.place == "attention" else layout.output
            site = finder.find(f"{module.layer}.{linear}", module.path)
            tensors = _tensors(checkpoint, module, form, site)
            rank = max(rank, tensors["down"].shape[0])
            edits[site.path] = Edit(ops={"bottleneck": tensors})
            if form.reads[1]:
                kept_at = finder.find(f"{module.layer}.{norm}", module.path)
                edits[kept_at.path] = Edit(ops={"keep_stream": {}})
        return Lowered(self.name, rank, checkpoint.num_parameters, edits)


def _layout(config: Mapping[str, Any]) -> _Layout:
    """That of the config's model, after a look at what the library does there. Raises AdapterRejected."""
    kind = fields.text(config, "model_type")
    if kind not in _LAYOUTS:
        raise AdapterRejected(
            f"model_type = {kind!r:.60} in adapter_config.json: bottleneck adapters are served for "
            f"{', '.join(_LAYOUTS)}."
        )
    layout, own = _LAYOUTS[kind], config["config"]
    is_parallel = fields.flag(own, "is_parallel")
    if layout.has_norm_after and not is_parallel and fields.flag(own, "original_ln_before"):
        raise AdapterRejected(
            f"original_ln_before = true for {kind}: there the library applies the last layer's norm in every layer, "
            "which is not served; train with original_ln_before=False."
        )
    if layout.is_hooked and not fields.flag(own, "original_ln_after", True):
        raise AdapterRejected(f"original_ln_after = false for {kind}: the library itself has no such adapters there.")
    return layout


def _form(config: Mapping[str, Any]) -> _Form:
    """Raises AdapterRejected, naming the field, for what is not served or of no form."""
    own = config["config"]
    fields.check_known(own, _KNOWN_OF_CONFIG, _REFUSED)
    has_norm_after, is_parallel = fields.flag(own, "ln_after"), fields.flag(own, "is_parallel")
    return _Form(
        reads=_reads(own),
        act=_act(config),
        scaling=_scaling(own.get("scaling", 1.0)),
        has_norm_before=fields.flag(own, "ln_before"),
        has_norm_after=has_norm_after,
        is_norm_last=has_norm_after and not is_parallel and fields.flag(own, "adapter_residual_before_ln"),
    )


def _reads(own: Mapping[str, Any]) -> tuple[float, float]:
    """How much of the sub-block's output and of the residual stream the bottleneck reads."""
    has_stream_after = fields.flag(own, "original_ln_after", True)
    has_stream_before = fields.flag(own, "original_ln_before")
    keeps_output = fields.flag(own, "residual_before_ln", True)
    if fields.flag(own, "is_parallel"):
        is_sound, reads = has_stream_after, (0.0, 1.0)
    elif not has_stream_before:
        is_sound, reads = has_stream_after, (1.0, 0.0)
    else:  # what the bottleneck read is added to has the stream in it already, or gets it afterwards
        is_sound, reads = keeps_output == has_stream_after, (1.0, 1.0)
    norm_takes_stream = has_stream_before and not has_stream_after and fields.flag(own, "adapter_residual_before_ln")
    if is_sound and not (norm_takes_stream and fields.flag(own, "ln_after")):
        return reads
    raise AdapterRejected(
        f"original_ln_before = {has_stream_before}, original_ln_after = {has_stream_after}, residual_before_ln = "
        f"{keeps_output} in adapter_config.json: together they lose the residual stream, add it twice or normalize it, "
        "which is not served. Train with one of the library's own configs."
    )


def _act(config: Mapping[str, Any]) -> int:
    named = fields.text(config["config"], "non_linearity").lower()
    if "version" not in config:
        named = _OLD_NAMES.get(named, named)
    if named not in _NON_LINEARITIES:
        raise AdapterRejected(
            f"non_linearity = {named!r:.40} in adapter_config.json is not served; known are "
            f"{', '.join(sorted(_NON_LINEARITIES))}."
        )
    return ACTIVATIONS.index(_NON_LINEARITIES[named])


def _scaling(value: Any) -> float | None:
    """The factor; None where it was trained."""
    return None if value in ("learned", "channel") else fields.number(value, "scaling")


def _modules(checkpoint: Checkpoint) -> list[_Module]:
    """The file's keys by the module that they belong to. Raises AdapterRejected for those of several adapters."""
    modules: dict[tuple[int, str], _Module] = {}
    names: set[str] = set()
    for key in checkpoint:
        match = _KEY.fullmatch(key)
        if match is None:
            continue  # the caller refuses what nobody takes
        names.add(match["name"] or "default")
        if len(names) > 1:
            raise AdapterRejected(f"The file holds the adapters {' and '.join(sorted(names))}: save one per file.")
        place = int(match["number"]), match["place"]
        module = modules.setdefault(place, _Module(*place, match["layer"], {}))
        if module.keys.setdefault(match["parameter"], key) != key:
            raise AdapterRejected(f"{checkpoint.name(key)}: {module.path} is in the file twice.")
    return list(modules.values())


def _check_complete(
    own: Mapping[str, Any], modules: Sequence[_Module], layout: _Layout, sites: Mapping[str, Site]
) -> None:
    """The library would start a module that is missing with random numbers, and pass over one too many."""
    places = {"attention": fields.flag(own, "mh_adapter"), "output": fields.flag(own, "output_adapter")}
    layers = _layers(layout, sites) - _left_out(own)
    wanted = {(number, place) for place, is_on in places.items() if is_on for number in layers}
    found = {(module.number, module.place) for module in modules}
    for number, place in sorted(found ^ wanted):
        states = "has" if (number, place) in found else "lacks"
        raise AdapterRejected(
            f"The file {states} {place}_adapters of layer {number}, other than mh_adapter, output_adapter and "
            "leave_out in adapter_config.json and the layers of this base ask for. Was it trained on another model?"
        )


def _layers(layout: _Layout, sites: Mapping[str, Site]) -> set[int]:
    """The numbers of the base's layers."""
    ending = f".{layout.attention[0]}"
    numbers = [path.removesuffix(ending).rpartition(".")[2] for path in sites if path.endswith(ending)]
    return {int(number) for number in numbers if number.isdecimal()}


def _left_out(own: Mapping[str, Any]) -> set[int]:
    layers = own.get("leave_out") or []
    if not isinstance(layers, list) or not all(type(number) is int for number in layers):
        raise AdapterRejected("leave_out in adapter_config.json must be a list of layer numbers.")
    return set(layers)


def _tensors(checkpoint: Checkpoint, module: _Module, form: _Form, site: Site) -> dict[str, torch.Tensor]:
    """Those of the op, with the scaling in `up` and `up_bias`."""
    width = site.d_out
    down = f"adapter_down.{int(form.has_norm_before)}"
    rank = next(iter(checkpoint.shape(module.key(f"{down}.weight"))), 0)
    scaling = _factor(checkpoint, module, form, width)
    tensors = {
        "down": checkpoint.take(module.key(f"{down}.weight"), (rank, width)),
        "down_bias": checkpoint.take(module.key(f"{down}.bias"), (rank,)),
        "up": checkpoint.take(module.key("adapter_up.weight"), (width, rank)).T.mul(scaling).contiguous(),
        "up_bias": checkpoint.take(module.key("adapter_up.bias"), (width,)) * scaling,
        "act": torch.tensor([float(form.act)]),
        "reads": torch.tensor(form.reads),
    }
    if form.has_norm_before:
        tensors["before"] = _norm_before(checkpoint, module, width)
    if form.has_norm_after:
        tensors["after"] = _norm(checkpoint, module, "adapter_norm_after", width)
        tensors["is_last"] = torch.tensor([float(form.is_norm_last)])
    return tensors


def _factor(checkpoint: Checkpoint, module: _Module, form: _Form, width: int) -> torch.Tensor:
    """The scaling, (), (1,) or (width,)."""
    if form.scaling is not None:
        return torch.tensor(form.scaling)
    key = module.key("scaling")
    return checkpoint.take(key, (1,) if checkpoint.shape(key) == (1,) else (width,))


def _norm(checkpoint: Checkpoint, module: _Module, name: str, width: int) -> torch.Tensor:
    """Weight and bias, (2, width)."""
    return torch.stack([checkpoint.take(module.key(f"{name}.{part}"), (width,)) for part in ("weight", "bias")])


def _norm_before(checkpoint: Checkpoint, module: _Module, width: int) -> torch.Tensor:
    """Of the two names that the library has for it, a file may hold one or both."""
    names = [name for name in ("adapter_down.0", "adapter_norm_before") if f"{name}.weight" in module.keys]
    norms = [_norm(checkpoint, module, name, width) for name in names or ["adapter_norm_before"]]
    if not norms[0].equal(norms[-1]):
        raise AdapterRejected(f"{module.path}: adapter_down.0 and adapter_norm_before are one norm, and differ.")
    return norms[0]


METHOD = Bottleneck()

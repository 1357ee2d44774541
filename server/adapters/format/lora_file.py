"""A checkpoint written by PEFT's LoRA: its config, its tensors by module, its scaling.

Owns PEFT's LoraConfig and the names and shapes of its tensors, for all methods that are saved in this form. Knows
nothing about edits: what is computed from A and B is each method's own.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from server.adapters.format import fields
from server.adapters.format.checkpoint import Checkpoint
from server.adapters.format.contradictions import contradictions
from server.adapters.format.module_paths import SiteFinder
from server.adapters.format.own_rows import own_rows
from server.adapters.positions import FromInvocation, Positions
from server.ground.errors import AdapterRejected
from server.model.site import PRODUCTS, Site, SiteKind
from server.ops.site_ops import Tensors

# Fields that are read below, and fields that only say how the adapter was trained.
_KNOWN = {
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias", "bias", "use_bdlora",
    "init_lora_weights", "lora_dropout", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "velora_config", "monteclora_config", "megatron_config", "megatron_core", "qalora_group_size", "runtime_config",
    "alora_invocation_tokens", "trainable_token_indices", "modules_to_save",
    "lora_dtype", "lorap_lr_ratio", "lorap_emb_lr",  # ms-swift's, for training with LoRA+
}  # fmt: skip
_REFUSED = {name: why for name, why in fields.REFUSED.items() if name not in _KNOWN} | {
    "arrow_config": "routing between adapters per token is not served",
    "kasa_config": "it changes the base's weights, so the adapter does not fit the unchanged base",
    "use_qalora": "QA-LoRA pools its inputs by quantization group and is not served",
    "ensure_weight_tying": "adapters tied between the embedding and the head are not served yet",
}
_NEUTRAL_INITS = (None, True, False, "gaussian", "orthogonal", "eva", "mica")
# W became W - s B0 A0 before training, so the pair that it began with is needed, too (docs/initial-pair.md).
_BASE_CHANGING_INITS = re.compile(r"pissa(_niter_\d{1,4})?|olora|corda|lora_ga|loftq")
_BIASES = (None, "none", "all", "lora_only")

# How a key ends -> the role of its tensor at a module. A longer ending stands before the one that it ends in.
_ROLES = {
    "lora_A.weight": "down",
    "lora_initial_A.weight": "initial_down",
    "lora_initial_B.weight": "initial_up",
    "lora_B.weight": "up",
    "lora_embedding_A": "embedding_down",
    "lora_embedding_B": "embedding_up",
    "lora_B.bias": "up_bias",
    "lora_magnitude_vector.weight": "magnitude",
    "lora_magnitude_vector": "magnitude",
    "base_layer.bias": "bias",
    "bias": "bias",
    "base_layer.weight": "base_table",
    "token_adapter.trainable_tokens_delta": "token_rows",
    "weight": "saved_weight",
}
_CONVERT = "convert it with PEFT: save_pretrained(folder, path_initial_model_for_weight_conversion=...)"
_SERVE_ROUNDED = "serve the base that LoftQ rounded, and set init_lora_weights to true"
_LOFTQ_WARNING = (
    "LoftQ trained on a base that it had rounded. With the initial pair the adapter stands on this base's weights "
    "instead, so the answers differ from the training's by that rounding."
)
_MAX_INVOCATION = 256  # tokens; they are looked for in every prompt
_TRAINING_ONLY = (".lora_velora_embed", ".lora_monteclora_sampler")


@dataclass(slots=True)
class Part:
    """What the file holds for one module: role -> canonical key."""

    module: str  # as in the file
    site: Site
    keys: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Pair:
    """A and s B of one site, paired by row; A0 and -s B0 below them where the base's weight was changed by its init."""

    down: torch.Tensor  # (r or 2r, d_in)
    up: torch.Tensor  # (r or 2r, d_out), the scaling s folded in
    scaling: float


class LoraFile:
    """The parts of a checkpoint, by module, in the order of the file; `warnings` is what its owner should be told.

    Raises AdapterRejected, naming the field or the key, for a config or a file that cannot be applied exactly. Keys of
    unknown meaning stay unused in the checkpoint.
    """

    def __init__(self, checkpoint: Checkpoint, sites: Mapping[str, Site]) -> None:
        config = checkpoint.config
        _check_config(config)
        self._checkpoint = checkpoint
        self._rank = fields.by_pattern(config, "r", "rank_pattern", fields.count, default=8)
        self._alpha = fields.by_pattern(config, "lora_alpha", "alpha_pattern", fields.number, default=8)
        init = config.get("init_lora_weights")
        self._base_changing_init = None if init in _NEUTRAL_INITS else str(init)
        self._use_rslora = fields.flag(config, "use_rslora")
        self._num_blocks = fields.count(fields.table(config, "use_bdlora").get("nblocks", 1), "use_bdlora.nblocks")
        self.parts, warnings = _parts(checkpoint, sites)
        modules = [part.module for part in self.parts if part.keys.keys() & {"down", "embedding_down"}]
        has_up_bias = any("up_bias" in part.keys for part in self.parts)
        _check_saved(config, self.parts)
        self.positions = _positions(config)
        if self.positions is not None:
            _check_activated(self.parts)
        self._sites = sites
        self.warnings = warnings + contradictions(config, modules, has_up_bias=has_up_bias)
        if self._base_changing_init == "loftq":
            self.warnings += (_LOFTQ_WARNING,)

    def pair(self, part: Part) -> Pair | None:
        """A and s B; None for a module without them. With half a pair, or a rank other than the config's: rejected."""
        prefix = "embedding_" if part.site.kind is SiteKind.EMBEDDING else ""
        down_key, up_key = part.keys.get(prefix + "down"), part.keys.get(prefix + "up")
        if down_key is None or up_key is None:
            if key := down_key or up_key:
                name = self._checkpoint.name(key)
                raise AdapterRejected(f"{name} has no partner: A and B of a module come together.")
            return None
        rank = int(self._rank(part.module))
        self._check_rank(down_key, rank, part.site)
        scaling = self._alpha(part.module) / (math.sqrt(rank) if self._use_rslora else rank)
        down = self._matrix(down_key, rank, part.site.d_in)
        up = self._matrix(up_key, part.site.d_out, rank)
        if self._base_changing_init is not None:
            initial_down, initial_up = self._initial(part, rank)
            down, up = torch.cat([down, initial_down]), torch.cat([up, -initial_up], dim=1)
        return Pair(down, (up * scaling).T.contiguous(), scaling)

    def vector(self, part: Part, role: str) -> torch.Tensor | None:
        """A vector of the output width (d_out,): "up_bias" or "magnitude"; None if the file has none."""
        key = part.keys.get(role)
        return None if key is None else self._checkpoint.take(key, (part.site.d_out,))

    def bias_change(self, part: Part) -> torch.Tensor | None:
        """The file's bias, which is the whole new one, less the base's (d_out,); None if the file has none.

        That of a module saved as a whole is in its op.
        """
        if "saved_weight" in part.keys:
            return None
        trained = self.vector(part, "bias")
        if trained is None:
            return None
        if part.site.bias is None:
            name = self._checkpoint.name(part.keys["bias"])
            raise AdapterRejected(f"{name}: {part.site.path} has no bias in this base. Train with bias='none'.")
        return trained - part.site.bias

    def ops(self, part: Part) -> dict[str, dict[str, Tensors]]:
        """What of a part is the adapter's own, whatever the base has: ops by site path.

        Rows of an embedding's table are those of a head, too, that shares it.
        """
        if "token_rows" in part.keys:
            named = self._checkpoint.config.get("trainable_token_indices")
            ids = _of_module(named, part.module) if isinstance(named, dict) else named
            rows = own_rows(
                self._checkpoint, part.keys["token_rows"], ids, "trainable_token_indices", part.site, self._sites
            )
            return {path: {"token_rows": tensors} for path, tensors in rows.items()}
        if "saved_weight" in part.keys:
            op = "norm_weight" if part.site.kind is SiteKind.NORM else "own_weight"
            return {part.site.path: {op: self._saved(part)}}
        return {}

    def _saved(self, part: Part) -> Tensors:
        """The weight, and the bias where the site has one, of a module that was saved as a whole."""
        site, weight = part.site, self._checkpoint.take(part.keys["saved_weight"])
        weight = weight.T.contiguous() if site.kind is SiteKind.EMBEDDING else weight
        saved = self.vector(part, "bias")
        bias = site.bias if saved is None else saved
        if bias is None and site.kind is SiteKind.NORM:
            bias = torch.zeros(site.d_out)
        return {"weight": weight} | ({} if bias is None else {"bias": bias})

    def _initial(self, part: Part, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A0 (r, d_in) and B0 (d_out, r), without which W - s B0 A0 cannot be told from W."""
        down_key, up_key = part.keys.get("initial_down"), part.keys.get("initial_up")
        if down_key is None or up_key is None:
            init = self._base_changing_init
            raise AdapterRejected(
                f"init_lora_weights = {init!r:.40} in adapter_config.json: this init changed the base's weights, and "
                f"the file has no lora_initial_A and lora_initial_B for {part.module}. Save them along, or "
                f"{_SERVE_ROUNDED if init == 'loftq' else _CONVERT}."
            )
        return self._matrix(down_key, rank, part.site.d_in), self._matrix(up_key, part.site.d_out, rank)

    def _check_rank(self, key: str, rank: int, site: Site) -> None:
        name, limit = self._checkpoint.name(key), self._checkpoint.limits.max_rank
        shape = self._checkpoint.shape(key)
        saved = next(iter(shape), 0)
        if saved != rank and shape == (site.d_in, rank):
            raise AdapterRejected(
                f"{name} is transposed: its shape is {list(shape)}, and PEFT saves {[rank, site.d_in]}. "
                "Turn the A and B of every module, and save them again."
            )
        if saved > limit:
            raise AdapterRejected(f"{name} has rank {saved}; the limit is {limit}. Use a smaller r.")
        if saved != rank:
            raise AdapterRejected(
                f"{name} has rank {saved}, and r or rank_pattern in adapter_config.json says {rank}, so its scaling is "
                "not known. Save the config that belongs to the weights."
            )

    def _matrix(self, key: str, num_rows: int, num_columns: int) -> torch.Tensor:
        """(num_rows, num_columns); the stacked diagonal blocks of block-diagonal LoRA are put in their places."""
        blocks = self._num_blocks
        is_stacked = blocks > 1 and self._checkpoint.shape(key) == (num_rows, num_columns // blocks)
        if not is_stacked:
            return self._checkpoint.take(key, (num_rows, num_columns))
        if num_rows % blocks or num_columns % blocks:
            raise AdapterRejected(f"{self._checkpoint.name(key)} cannot be cut into {blocks} equal blocks.")
        height, width = num_rows // blocks, num_columns // blocks
        full = torch.zeros(num_rows, num_columns)
        for place, block in enumerate(self._checkpoint.take(key).reshape(blocks, height, width)):
            full[place * height : (place + 1) * height, place * width : (place + 1) * width] = block
        return full


def _check_config(config: Mapping[str, Any]) -> None:
    fields.check_known(config, _KNOWN, _REFUSED)
    fields.flag(config, "use_dora")
    init, bias = config.get("init_lora_weights"), config.get("bias")
    if init not in _NEUTRAL_INITS and not (isinstance(init, str) and _BASE_CHANGING_INITS.fullmatch(init)):
        raise AdapterRejected(
            f"init_lora_weights = {init!r:.40} in adapter_config.json is none of PEFT's inits, and it might have "
            "changed the base's weights. Where it did not, set it to true."
        )
    if bias not in _BIASES:
        raise AdapterRejected(f"bias = {bias!r:.40} in adapter_config.json must be none, all or lora_only.")


def _check_whole(part: Part, names: list[str]) -> None:
    """A module that was saved as a whole is one that the config names, and nothing else beside."""
    key, kind = part.keys["saved_weight"], part.site.kind
    if kind not in (*PRODUCTS, SiteKind.NORM) or not part.module.endswith(tuple(names)):
        raise AdapterRejected(f"{key}: modules_to_save in adapter_config.json does not name {part.module}.")
    others = part.keys.keys() - {"saved_weight"} - ({"bias"} if kind is not SiteKind.EMBEDDING else set())
    if others:
        raise AdapterRejected(
            f"{key} is a whole weight, and {part.keys[min(others)]} is for the same module, which it would replace. "
            "Leave the module out of modules_to_save, or out of target_modules."
        )


def _check_saved(config: Mapping[str, Any], parts: Sequence[Part]) -> None:
    """What the config says that the adapter has of its own must be in the file."""
    saved = [part.module for part in parts if "saved_weight" in part.keys]
    names = config.get("modules_to_save") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise AdapterRejected("modules_to_save in adapter_config.json must be a list of names.")
    missing = [name for name in names if not any(module.endswith(name) for module in saved)]
    for part in parts:
        if "saved_weight" in part.keys:
            _check_whole(part, names)
    if missing:
        raise AdapterRejected(
            f"modules_to_save in adapter_config.json names {missing[0]:.60}, and the file has no weight of it. Save "
            "the config that belongs to the weights."
        )
    has_rows = any("token_rows" in part.keys for part in parts)
    if config.get("trainable_token_indices") and not has_rows:
        raise AdapterRejected(
            "trainable_token_indices is set in adapter_config.json, and the file has no trainable_tokens_delta. Save "
            "the config that belongs to the weights."
        )


_NOT_ACTIVATED = ("bias", "saved_weight", "token_rows", "embedding_down")


def _check_activated(parts: Iterable[Part]) -> None:
    """PEFT applies these to every token of an activated LoRA, also before its invocation."""
    for part in parts:
        role = next((role for role in _NOT_ACTIVATED if role in part.keys), None)
        if role is not None:
            raise AdapterRejected(
                f"alora_invocation_tokens in adapter_config.json, and {part.keys[role]} in the file: PEFT applies that "
                "before the invocation, too, which is not served. Train with bias='none', on linears, and without "
                "modules_to_save and trainable_token_indices."
            )


def _of_module(named: Mapping[str, Any], module: str) -> Any:
    """The value of the name that a module's path is, or ends in after a dot."""
    return next((value for name, value in named.items() if f".{module}".endswith(f".{name}")), None)


def _positions(config: Mapping[str, Any]) -> Positions | None:
    """Activated LoRA (Greenewald et al. 2025, arXiv:2504.12397) begins at its invocation."""
    tokens = config.get("alora_invocation_tokens")
    if not tokens:
        return None
    if not isinstance(tokens, list) or not all(type(token) is int and token >= 0 for token in tokens):
        raise AdapterRejected("alora_invocation_tokens in adapter_config.json must be a list of token ids.")
    if len(tokens) > _MAX_INVOCATION:
        raise AdapterRejected(
            f"alora_invocation_tokens in adapter_config.json has {len(tokens)} tokens; the limit is {_MAX_INVOCATION}."
        )
    return FromInvocation(tuple(tokens))


def _parts(checkpoint: Checkpoint, sites: Mapping[str, Site]) -> tuple[tuple[Part, ...], tuple[str, ...]]:
    finder = SiteFinder(sites)
    parts: dict[str, Part] = {}
    warnings: list[str] = []
    for key in checkpoint:
        if any(word in key for word in _TRAINING_ONLY):
            checkpoint.ignore(key)
            continue
        ending = next((ending for ending in _ROLES if key.endswith("." + ending)), None)
        if ending is None:
            continue
        module, role, name = key[: -len(ending) - 1], _ROLES[ending], checkpoint.name(key)
        if role == "saved_weight" and not checkpoint.config.get("modules_to_save"):
            continue
        part = parts.setdefault((site := finder.find(module, name)).path, Part(module, site))
        if role not in ("bias", "saved_weight") and site.kind not in PRODUCTS:
            raise AdapterRejected(f"{name}: {site.path} is no linear or embedding, which this is for.")
        if role in part.keys or part.module != module:
            twin = checkpoint.name(next(iter(part.keys.values())))
            raise AdapterRejected(f"{name} and {twin} are for one module, {site.path}. Save one adapter per file.")
        part.keys[role] = key
        if role == "base_table":
            ignore_base_table(checkpoint, key, site, sites)
            warnings.append(f"{name} is a copy of the base's own table; it is not used.")
    return tuple(parts.values()), tuple(warnings)


def ignore_base_table(checkpoint: Checkpoint, key: str, site: Site, sites: Mapping[str, Site]) -> None:
    """PEFT saves the whole frozen table beside an adapter on the embedding or on the head."""
    vocabularies = {other.d_in for other in sites.values() if other.kind is SiteKind.EMBEDDING}
    is_embedding = site.kind is SiteKind.EMBEDDING
    if not is_embedding and site.d_out not in vocabularies:
        return  # neither embedding nor head: the key stays unused, and is refused
    table = (site.d_in, site.d_out) if is_embedding else (site.d_out, site.d_in)
    if checkpoint.shape(key) != table:
        raise AdapterRejected(
            f"{checkpoint.name(key)} has the shape {list(checkpoint.shape(key))}, and the base's table has "
            f"{list(table)}: the vocabulary was resized, which makes another model than the base."
        )
    checkpoint.ignore(key)

"""An adapter fused into its base: a checkpoint of its own, to be served without adapters.

Owns the order of the work: lower, change the weights, save, load again and compare. Knows nothing about methods (the
normal form is all it sees), stores or commands.

    W' = out_scale (W in_scale + up_scale up^T mid_scale down)        b' likewise, in float32, then rounded to the dtype

What an adapter does beside the normal form comes after that (`folding.py`).
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from server.adapters.format.checkpoint import Checkpoint
from server.adapters.lowering import lower
from server.adapters.merging.change import Change, change_of, what_is_no_change
from server.adapters.merging.folding import FOLDED, PlainSite, folded_bias, folded_weight
from server.adapters.merging.lora_folder import new_folder
from server.adapters.merging.merge import foreign_base
from server.adapters.method import Edit, Lowered
from server.ground.errors import AdapterRejected, GraftError, StartupRefused
from server.model.dense import DenseBase, DenseSite, make_plain
from server.model.pretrained import BaseOptions
from server.model.rounding import Passage, nf4_rounded, passage, total
from server.model.site import SiteKind
from server.ops.site_ops import Tensors
from server.ops.site_ops.alone import run_alone

RECIPE_FILE = "graft_recipe.json"
_NUM_TOKENS = 64  # of the comparison
_MAX_SAMPLED = 1 << 20  # numbers of one weight that are rounded to NF4: whole rows, evenly spread
# Of the logits, relative; beyond it the checkpoint is another model.
_MAX_ERROR = {torch.float32: 1e-3}
_MAX_ROUNDED_ERROR = 0.25  # as at the loading of a base
Progress = Callable[[int, int], None]  # sites done, sites in all
Ops = Mapping[str, Tensors]  # of one edit


@dataclass(frozen=True, slots=True)
class Rounding:
    """How an adapter's change comes through a way of storing weights: all sites as one, and the site it suits least."""

    whole: Passage
    worst_site: str
    worst: Passage


@dataclass(frozen=True, slots=True)
class Fused:
    """What fusing made, and how far it is from the base with the adapter beside it."""

    method: str
    dtype: torch.dtype
    num_sites: int
    is_untied: bool  # whether a table that embedding and head shared is two tables now
    saved: Rounding  # in the checkpoint's dtype
    nf4: Rounding | None  # if it is served as NF4; None where the adapter edits no weight that NF4 would hold
    relative_error: float  # norm of the difference of the logits over their norm, on random tokens
    divergence: float  # mean KL divergence of the fused model's distribution from the other, nats
    warnings: tuple[str, ...]


def fuse(
    options: BaseOptions,
    adapter: Path,
    target: Path,
    *,
    recipe: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Fused:
    """Writes the base of `options` with the adapter of a folder fused in, as the new folder `target`.

    A quantized base is dequantized first. The model is in memory once, at `options.dtype`, and it is loaded again from
    `target` for the comparison. `recipe` is written beside it as JSON. Raises StartupRefused for the base,
    AdapterRejected for an adapter that has no place in its weights, GraftError for a result that answers differently;
    then nothing is left behind.
    """
    with new_folder(target) as folder:
        tokenizer = _tokenizer(options.model)
        base = make_plain(DenseBase.load(options))
        lowered = lower(Checkpoint.open(adapter), base.sites)
        if reason := what_is_no_change(lowered, FOLDED):
            raise AdapterRejected(f"The adapter cannot be fused: {reason}. Serve it beside its base.")
        changes = {path: change_of(edit) for path, edit in lowered.edits.items()}
        ops = {path: edit.ops for path, edit in lowered.edits.items()}
        _refuse_new_biases(lowered, changes, base)
        ids = torch.randint(0, len(tokenizer), (1, _NUM_TOKENS), generator=torch.Generator().manual_seed(0))
        with _beside(base, lowered.edits):
            expected = _logits(base.model, ids)
        is_untied = _untie(base, changes)
        saved, nf4 = _change_all(base, changes, ops, progress)
        _save(base.model, tokenizer, folder, recipe)
        warnings = (*lowered.warnings, *_warnings(adapter, base, options.model))
        dtype = base.dtype
        del base
        error, divergence = _compare(expected, _logits(_loaded(folder, dtype), ids), dtype)
    return Fused(
        method=lowered.method,
        dtype=dtype,
        num_sites=len(changes),
        is_untied=is_untied,
        saved=_rounding(saved),
        nf4=_rounding(nf4) if nf4 else None,
        relative_error=error,
        divergence=divergence,
        warnings=warnings,
    )


def _tokenizer(model: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise StartupRefused(f"cannot load a tokenizer from {model!r}: {error}") from error


def _refuse_new_biases(lowered: Lowered, changes: Mapping[str, Change], base: DenseBase) -> None:
    for path, change in changes.items():
        bias = base.sites[path].bias
        if bias is None and change.of_bias(bias) is not None:
            raise AdapterRejected(
                f"The adapter ({lowered.method}) adds a bias at {path}, where this architecture has none, so no "
                "checkpoint of it can hold the two. Serve the adapter beside its base."
            )


def _warnings(adapter: Path, base: DenseBase, model: str) -> tuple[str, ...]:
    other = foreign_base(adapter, base.name, base.fingerprint) and foreign_base(adapter, model, base.fingerprint)
    if other is None:
        return ()
    return (f"the adapter says that it was made for {other}, and the base is {base.name}: are the two one base?",)


# The weights


def _untie(base: DenseBase, changes: Mapping[str, Change]) -> bool:
    """Gives embedding and head a table each, where they share one and the adapter changes it."""
    model: Any = base.model
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    is_shared = head is not None and head.weight is embedding.weight
    if not is_shared or not any(base.sites[path].module in (embedding, head) for path in changes):
        return False
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False
    model.config.get_text_config().tie_word_embeddings = False
    return True


def _change_all(
    base: DenseBase, changes: Mapping[str, Change], ops: Mapping[str, Ops], progress: Progress | None
) -> tuple[dict[str, Passage], dict[str, Passage]]:
    """Changes the model in place; how the changes came through the dtype and would through NF4, by site."""
    saved: dict[str, Passage] = {}
    nf4: dict[str, Passage] = {}
    head: Any = base.model.get_output_embeddings()  # type: ignore[no-untyped-call]
    for number, (path, change) in enumerate(changes.items(), start=1):
        site = base.sites[path]
        old = site.weight()
        _change_bias(site, change, ops[path])
        delta = _delta(site, old, change, ops[path])
        if delta is not None:
            new = _change_weight(site, old + delta)
            saved[path] = passage(delta, new - old)
            if site.kind is SiteKind.LINEAR and site.module is not head:
                nf4[path] = _through_nf4(old, new, delta)
        if progress is not None:
            progress(number, len(changes))
    return saved, nf4


def _delta(site: DenseSite, weight: torch.Tensor, change: Change, ops: Ops) -> torch.Tensor | None:
    """W' - W (d_out, d_in) float32; None where the weight stays."""
    delta = change.of_weight(weight, torch.device("cpu"))
    if not ops:
        return delta
    return folded_weight(ops, weight if delta is None else weight + delta, _place(site)) - weight


def _place(site: DenseSite) -> PlainSite:
    return PlainSite(site.kind, site.d_in, site.d_out)


def _change_weight(site: DenseSite, weight: torch.Tensor) -> torch.Tensor:
    """Puts (d_out, d_in) in; what the module's dtype makes of it, float32."""
    held = site.module.get_parameter("weight")
    rounded = (weight.T if site.is_transposed else weight).to(held.dtype).contiguous()
    if not bool(torch.isfinite(rounded).all()):
        raise AdapterRejected(
            f"The fused weight of {site.path} is out of the range of {held.dtype}. Use --dtype bfloat16 or float32."
        )
    site.module.weight = nn.Parameter(rounded.to(held.device), requires_grad=False)
    return (rounded.T if site.is_transposed else rounded).float()


def _change_bias(site: DenseSite, change: Change, ops: Ops) -> None:
    bias = site.bias
    shift = change.of_bias(bias)
    if bias is not None and (ops or shift is not None):
        new = bias if shift is None else bias + shift
        new = folded_bias(ops, new, _place(site)) if ops else new
        held = site.module.get_parameter("bias")
        site.module.bias = nn.Parameter(new.to(held), requires_grad=False)


def _through_nf4(old: torch.Tensor, new: torch.Tensor, delta: torch.Tensor) -> Passage:
    """On whole rows: a block of NF4 lies within a row."""
    num_rows = max(1, min(old.shape[0], _MAX_SAMPLED // old.shape[1]))
    rows = torch.linspace(0, old.shape[0] - 1, num_rows).long()
    return passage(delta[rows], nf4_rounded(new[rows]) - nf4_rounded(old[rows]))


def _rounding(passages: Mapping[str, Passage]) -> Rounding:
    if not passages:  # biases alone were changed
        return Rounding(Passage(), "", Passage())
    worst = min(passages, key=lambda path: passages[path].kept)
    return Rounding(total(passages.values()), worst, passages[worst])


# The files


def _save(model: PreTrainedModel, tokenizer: Any, folder: Path, recipe: Mapping[str, Any] | None) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if recipe is not None:
        (folder / RECIPE_FILE).write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")


def _loaded(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    load: Any = AutoModelForCausalLM.from_pretrained
    model, info = load(folder, dtype=dtype, attn_implementation="eager", output_loading_info=True)
    if info["missing_keys"]:
        raise GraftError(f"The fused checkpoint lacks {', '.join(sorted(info['missing_keys'])[:3])} when it is loaded.")
    frozen: PreTrainedModel = model.eval()
    return frozen


# The comparison


@contextmanager
def _beside(base: DenseBase, edits: Mapping[str, Edit]) -> Iterator[None]:
    """The model with the edits applied to activations, as they are when they are served, until the block ends."""
    modules = {path: base.model.get_submodule(path) for path in edits}
    for path, module in modules.items():
        module.forward = _with_edit(module, edits[path], _place(base.sites[path]))
    try:
        yield
    finally:
        for module in modules.values():
            del module.forward


def _with_edit(module: nn.Module, edit: Edit, place: PlainSite) -> Callable[[torch.Tensor], torch.Tensor]:
    base, embed_scale = module.forward, getattr(module, "embed_scale", 1.0)

    def normal(x: torch.Tensor) -> torch.Tensor:
        y = base(x if edit.in_scale is None else (x.float() * edit.in_scale).to(x.dtype))
        out = y.float()
        if edit.down is not None and edit.up is not None:
            h = edit.down.T[x] if isinstance(module, nn.Embedding) else x.float() @ edit.down.T
            h = h if edit.mid_scale is None else h * edit.mid_scale
            h = h if edit.mid_shift is None else h + edit.mid_shift
            added = h @ edit.up * embed_scale
            out = out + (added if edit.up_scale is None else added * edit.up_scale)
        out = out if edit.out_scale is None else out * edit.out_scale
        out = out if edit.out_shift is None else out + edit.out_shift
        rounded: torch.Tensor = out.to(y.dtype)
        return rounded

    return (lambda x: run_alone(edit.ops, normal, x, place)) if edit.ops else normal


def _logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """(tokens, vocabulary) float32."""
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits[0]
    return logits.float()


def _compare(expected: torch.Tensor, found: torch.Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """(relative error, KL divergence in nats). Raises GraftError for what is no rounding."""
    error = ((found - expected).norm() / expected.norm().clamp_min(1e-6)).item()
    divergence = nn.functional.kl_div(
        found.double().log_softmax(-1), expected.double().log_softmax(-1), reduction="batchmean", log_target=True
    ).item()
    limit = _MAX_ERROR.get(dtype, _MAX_ROUNDED_ERROR)
    if not error <= limit:
        raise GraftError(
            f"The fused checkpoint does not answer as base and adapter do (relative difference {error:.1e}, limit "
            f"{limit:.0e} in {dtype}), so it is not kept. Use --dtype float32, or serve the adapter beside its base.",
            code="fused_differs",
        )
    return error, max(0.0, divergence)

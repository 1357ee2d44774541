"""Several adapters made into one: from folders and a recipe to a new folder.

Owns the order of the work: each input is lowered, each site merged on its own, the result written and read back. Knows
nothing about methods (the normal form is all it sees), stores, commands or HTTP.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from server.adapters.format.checkpoint import Checkpoint, CheckpointLimits
from server.adapters.lowering import lower
from server.adapters.merging.change import Change, change_of, what_is_no_change
from server.adapters.merging.combine import combine
from server.adapters.merging.lora_folder import Part, new_folder, write_lora
from server.adapters.merging.recipe import Ingredient, Recipe, Strategy, check_ingredients
from server.adapters.merging.rescale import can_divide, magnitudes, merged_scale
from server.adapters.merging.truncate import Factors, exact, truncate_dense, truncate_product
from server.adapters.served_base import is_same_name
from server.adapters.store.folder_store import base_fingerprint_of, base_model_of
from server.ground.errors import AdapterRejected, BadRequest, GraftError
from server.model.fingerprint import can_compare
from server.model.site import Site, SiteKind

MAX_RANK = CheckpointLimits().max_rank
_CPU = torch.device("cpu")
_ROWS_AT_ONCE = 1024
Progress = Callable[[int, int], None]  # sites done, sites in all


@dataclass(frozen=True, slots=True)
class MergeBase:
    """The base as merging needs it. Without `weight_of` its sites have shapes alone, and stand-ins for numbers."""

    name: str
    fingerprint: str | None
    sites: Mapping[str, Site]
    weight_of: Callable[[Site], torch.Tensor] | None = None  # (d_out, d_in), as the site multiplies with it


@dataclass(frozen=True, slots=True)
class Merged:
    """What a merge made, and what it lost."""

    num_sites: int
    rank: int  # the largest at any site
    relative_error: float  # Frobenius norm of what truncation lost over that of the whole change; 0 if exact
    worst_site: str | None  # where the truncation lost the largest share; None if nothing was lost
    worst_error: float
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Input:
    """An ingredient whose folder has been read: nobody reads it again."""

    ingredient: Ingredient
    method: str
    rank: int
    changes: Mapping[str, Change]  # by site path
    config: Mapping[str, Any]
    base_model: str | None  # that its config says it was trained on
    foreign_base: str | None  # the base that it says it was made for, if that is another


@dataclass(frozen=True, slots=True)
class _Share:
    """What one input brings to one site."""

    name: str
    method: str
    weight: float
    change: Change


def merge(
    ingredients: Sequence[Ingredient],
    recipe: Recipe,
    base: MergeBase,
    target: Path,
    *,
    device: torch.device = _CPU,
    progress: Progress | None = None,
) -> Merged:
    """Writes the merged adapter as a new PEFT folder `target`, with the recipe in its manifest.

    The result is a LoRA, or a DoRA where inputs scale rows of the base's weights and no rank is given.

    Merged are changes of weights, never factors, so inputs may differ in rank, scaling, modules and method. A dense
    change is formed only where the strategy or an input needs it, one site at a time, on `device`; in memory are
    otherwise the inputs and the result. Equal arguments give equal files.

    Raises BadRequest for what is wrong with the recipe, and AdapterRejected for an input that has no meaning in it,
    each with the remedy; then nothing is left behind.
    """
    check_ingredients(ingredients)
    inputs = [read_input(item, base) for item in ingredients]
    return merge_inputs(inputs, recipe, base, target, device=device, progress=progress)


def merge_inputs(
    inputs: Sequence[Input],
    recipe: Recipe,
    base: MergeBase,
    target: Path,
    *,
    device: torch.device = _CPU,
    progress: Progress | None = None,
) -> Merged:
    """As `merge`, from ingredients that were checked (`check_ingredients`) and read. What `progress` raises ends it."""
    with new_folder(target) as folder:
        rank = _rank(recipe, inputs)
        scales = rank is None and not all(c.is_low_rank for item in inputs for c in item.changes.values())
        parts: list[Part] = []
        factors: dict[str, Factors] = {}
        paths = sorted({path for item in inputs for path in item.changes}, key=lambda path: base.sites[path].index)
        for number, path in enumerate(paths, start=1):
            shares = _shares(inputs, path)
            made = (
                _rescaled_site(base, path, shares, recipe)
                if scales
                else _merged_site(base, path, shares, recipe, rank, device)
            )
            if made is not None:
                part, factors[path] = made
                parts.append(part)
            if progress is not None:
                progress(number, len(paths))
        if not parts:
            raise BadRequest("adapters: the merged change is zero at every site. Change the weights.", param="adapters")
        merged = _merged(parts, factors, _warnings(inputs, base))
        _write(folder, parts, inputs, recipe, base, merged)
        lower(Checkpoint.open(folder), base.sites)  # what cannot be served is not handed out
    return merged


def projected_weight(site: Site) -> torch.Tensor:
    """The weight of a linear of the base that is being served, (d_out, d_in), through the site's own product."""
    if site.kind is SiteKind.EMBEDDING:
        raise AdapterRejected(f"{site.path}: the table of an embedding cannot be read while it is served.")
    pieces = []
    for start in range(0, site.d_in, _ROWS_AT_ONCE):
        rows = torch.zeros(min(_ROWS_AT_ONCE, site.d_in - start), site.d_in)
        rows[:, start:].fill_diagonal_(1)
        pieces.append(site.project(rows))
    return torch.cat(pieces).T


# The inputs


class _WatchedSite:
    """A site without numbers, which remembers that somebody asked for one (satisfies the `Site` protocol)."""

    def __init__(self, site: Site, asked: list[str]) -> None:
        self._site = site
        self._asked = asked
        self.index, self.path, self.kind = site.index, site.path, site.kind
        self.table_of = site.table_of
        self.d_in, self.d_out = site.d_in, site.d_out

    @property
    def bias(self) -> torch.Tensor | None:
        if self._site.bias is not None:
            self._asked.append(self.path)
        return self._site.bias

    @property
    def row_norms_squared(self) -> torch.Tensor:
        self._asked.append(self.path)
        return self._site.row_norms_squared

    def project(self, rows: torch.Tensor) -> torch.Tensor:
        self._asked.append(self.path)
        return self._site.project(rows)


def read_input(ingredient: Ingredient, base: MergeBase) -> Input:
    """Reads and lowers one adapter folder. Raises AdapterRejected, naming the adapter, for what cannot be."""
    asked: list[str] = []
    sites: Mapping[str, Site] = base.sites
    if base.weight_of is None:
        sites = {path: _WatchedSite(site, asked) for path, site in base.sites.items()}
    try:
        checkpoint = Checkpoint.open(ingredient.folder)
        lowered = lower(checkpoint, sites)
    except AdapterRejected as error:
        raise AdapterRejected(f"{ingredient.name}: {error.message}", param="adapters") from error
    except OSError as error:
        raise AdapterRejected(
            f"{ingredient.name}: its files cannot be read ({error.strerror or error}).", param="adapters"
        ) from error
    if reason := what_is_no_change(lowered):
        raise AdapterRejected(f"{ingredient.name} cannot be merged: {reason}. Leave it out.", param="adapters")
    changes = {path: change_of(edit) for path, edit in lowered.edits.items()}
    needing = asked[:1] or [path for path, change in changes.items() if not change.is_low_rank]
    if base.weight_of is None and needing:
        raise BadRequest(
            f"adapters: what {ingredient.name} ({lowered.method}) changes at {needing[0]} depends on the base's own "
            "numbers, which were not read. Load the base's weights (--load-base), or leave this adapter out.",
            param="adapters",
        )
    return Input(
        ingredient,
        lowered.method,
        lowered.rank,
        changes,
        checkpoint.config,
        base_model=base_model_of(ingredient.folder),
        foreign_base=foreign_base(ingredient.folder, base.name, base.fingerprint),
    )


def _rank(recipe: Recipe, inputs: Sequence[Input]) -> int | None:
    """The rank to truncate to; None for what is exact."""
    if recipe.rank is not None:
        return recipe.rank
    is_kept_whole = recipe.strategy in (Strategy.LINEAR, Strategy.CAT)
    hard = next((item for item in inputs if not all(_is_easy(c, is_kept_whole) for c in item.changes.values())), None)
    if hard is not None:
        what = "columns" if is_kept_whole else "rows or columns"
        how = f" ({recipe.strategy} takes none, so use linear)" if recipe.strategy is Strategy.CAT else ""
        raise BadRequest(
            f"rank: {hard.ingredient.name} ({hard.method}) scales {what} of the base's weights, which is a change of "
            f"full rank. Give the rank to approximate it with{how}; the error is reported.",
            param="rank",
        )
    return None if is_kept_whole else max(1, *(item.rank for item in inputs))


def _is_easy(change: Change, is_kept_whole: bool) -> bool:
    """Whether the strategy needs no rank for it: a sum can be kept whole where rows are scaled, but not columns."""
    return change.is_low_rank or (is_kept_whole and change.in_scale is None)


# One site


def _merged_site(
    base: MergeBase,
    path: str,
    shares: Sequence[_Share],
    recipe: Recipe,
    rank: int | None,
    device: torch.device,
) -> tuple[Part, Factors] | None:
    """The site's part of a LoRA; None where the changes cancel out."""
    site = base.sites[path]
    generator = torch.Generator().manual_seed(site_seed(recipe.seed or 0, path))
    factors = _factors(site, shares, recipe, rank, base, device, generator)
    shift = _shift(site, shares, recipe, generator)
    if factors is None and shift is None:
        return None
    if factors is None:  # a module without a pair has no place in PEFT's files
        factors = Factors(torch.zeros(1, site.d_in), torch.zeros(1, site.d_out), 0.0)
    return _finite(Part(site, factors.down, factors.up, shift=shift)), factors


def _rescaled_site(base: MergeBase, path: str, shares: Sequence[_Share], recipe: Recipe) -> tuple[Part, Factors] | None:
    """The site's part of a DoRA; None where nothing is changed. See `rescale.py`."""
    site = base.sites[path]
    assert base.weight_of is not None
    scale = merged_scale([share.change.out_scale for share in shares], [share.weight for share in shares])
    if scale is not None and not can_divide(scale):
        raise BadRequest(
            f"adapters: together they scale a row of {path} to nothing, which DoRA cannot. Use other weights, or "
            "give the rank to approximate the change with.",
            param="adapters",
        )
    factors = _sum_of_pairs(site, shares, recipe)
    shift = _shift(site, shares, recipe, torch.Generator())
    if factors is None and shift is None and scale is None:
        return None
    if shift is not None and site.bias is None:
        raise BadRequest(
            f"rank: the merge is a DoRA, which adds no bias at {path}, where the base has none. Give a rank, "
            "which makes it a LoRA.",
            param="rank",
        )
    factors = factors or Factors(torch.zeros(1, site.d_in), torch.zeros(1, site.d_out), 0.0)
    up = factors.up if scale is None else factors.up / scale
    weight = base.weight_of(site).to(torch.float32).cpu()
    magnitude = magnitudes(weight, factors.down, up, scale)
    bias = None if shift is None or site.bias is None else site.bias + shift
    return _finite(Part(site, factors.down, up, magnitude=magnitude, bias=bias)), factors


def _finite(part: Part) -> Part:
    tensors = (part.down, part.up, part.shift, part.magnitude, part.bias)
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors if tensor is not None):
        raise BadRequest(
            f"adapters: the merged change at {part.site.path} is not finite. Use smaller weights.", param="adapters"
        )
    return part


def _shares(inputs: Sequence[Input], path: str) -> list[_Share]:
    return [
        _Share(item.ingredient.name, item.method, item.ingredient.weight, item.changes[path])
        for item in inputs
        if path in item.changes
    ]


def site_seed(seed: int, path: str) -> int:
    """The seed of the draws at one site: they depend on nothing else, neither on the order nor on other sites."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{path}".encode()).digest()[:7])


def _factors(
    site: Site,
    shares: Sequence[_Share],
    recipe: Recipe,
    rank: int | None,
    base: MergeBase,
    device: torch.device,
    generator: torch.Generator,
) -> Factors | None:
    """The merged change of the weight; None where there is none."""
    present = [share for share in shares if share.change.rank or not share.change.is_low_rank]
    if not present:
        return None
    if recipe.strategy.is_sum and all(share.change.is_low_rank for share in present):
        whole = _sum_of_pairs(site, present, recipe, max_rank=MAX_RANK if rank is None else None)
        is_short = whole is None or rank is None or (recipe.strategy is Strategy.LINEAR and whole.down.shape[0] <= rank)
        if is_short or whole is None or rank is None:
            return whole
        return _any(truncate_product(whole.down, whole.up, rank))
    assert rank is not None
    return _any(_dense(site, present, recipe, rank, base, device, generator))


def _sum_of_pairs(
    site: Site, shares: Sequence[_Share], recipe: Recipe, max_rank: int | None = MAX_RANK
) -> Factors | None:
    """The weighted sum of the low-rank parts, exact; None where there is none. Raises BadRequest above `max_rank`."""
    present = [share for share in shares if share.change.rank]
    if not present:
        return None
    down, up = _side_by_side(present, sums_equal=recipe.strategy is not Strategy.CAT)
    if max_rank is not None and down.shape[0] > max_rank:
        raise BadRequest(
            f"rank: the ranks at {site.path} add up to {down.shape[0]}; the limit is {max_rank}. Use linear or svd "
            "with a rank.",
            param="rank",
        )
    return exact(down, up) if bool(up.any()) else None


def _any(factors: Factors) -> Factors | None:
    return factors if factors.down.shape[0] else None


def _side_by_side(shares: Sequence[_Share], *, sums_equal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """All `down` over one another, and so the weighted `up`.

    With `sums_equal`, inputs of one and the same `down` (VeRA of one seed, LoRA-FA) share its rows, without loss.
    """
    downs: list[torch.Tensor] = []
    ups: list[torch.Tensor] = []
    for share in shares:
        down, up = share.change.down, share.change.up
        assert down is not None
        assert up is not None
        same = next((place for place, known in enumerate(downs) if sums_equal and torch.equal(known, down)), None)
        if same is None:
            downs.append(down)
            ups.append(up * share.weight)
        else:
            ups[same] = ups[same] + up * share.weight
    return torch.cat(downs), torch.cat(ups)


def _dense(
    site: Site,
    shares: Sequence[_Share],
    recipe: Recipe,
    rank: int,
    base: MergeBase,
    device: torch.device,
    generator: torch.Generator,
) -> Factors:
    """The merged change formed as a matrix on `device`, and cut to the rank."""
    weight = None
    if any(not share.change.is_low_rank for share in shares):
        assert base.weight_of is not None
        weight = base.weight_of(site)
    try:
        weight = None if weight is None else weight.to(device, torch.float32)
        deltas = (share.change.of_weight(weight, device) for share in shares)
        present = (delta for delta in deltas if delta is not None)  # all are: each has a rank or a scale
        return truncate_dense(combine(present, [share.weight for share in shares], recipe, generator), rank)
    except torch.OutOfMemoryError as error:
        raise GraftError(
            f"{site.path} ({site.d_out} x {site.d_in} in float32) does not fit the memory of {device} "
            f"{len(shares) + 4} times, which {recipe.strategy} needs. Use linear, cat or svd, or --device cpu.",
            code="out_of_memory",
        ) from error


def _shift(site: Site, shares: Sequence[_Share], recipe: Recipe, generator: torch.Generator) -> torch.Tensor | None:
    """The merged change of the bias (d_out,), merged as the weights are; None where there is none."""
    shifts = [(share.change.of_bias(site.bias), share) for share in shares]
    present = [(shift, share) for shift, share in shifts if shift is not None]
    if not present:
        return None
    if site.kind is SiteKind.EMBEDDING:
        share = present[0][1]
        raise AdapterRejected(
            f"{share.name} ({share.method}) shifts the embedding {site.path}, which no LoRA file can."
        )
    merged = combine([shift for shift, _ in present], [share.weight for _, share in present], recipe, generator)
    return merged if bool(merged.any()) else None


# The result


def _merged(parts: Sequence[Part], factors: Mapping[str, Factors], warnings: tuple[str, ...]) -> Merged:
    norm = sum(item.squared_norm for item in factors.values())
    error = sum(item.squared_error for item in factors.values())
    by_site = {path: _ratio(item.squared_error, item.squared_norm) for path, item in factors.items()}
    worst = max(by_site, key=by_site.__getitem__)
    return Merged(
        num_sites=len(parts),
        rank=max(part.down.shape[0] for part in parts),
        relative_error=_ratio(error, norm),
        worst_site=worst if by_site[worst] > 0 else None,
        worst_error=by_site[worst],
        warnings=warnings,
    )


def _ratio(squared_error: float, squared_norm: float) -> float:
    """0 below 1e-6: float32 rounds more coarsely."""
    ratio = (squared_error / squared_norm) ** 0.5 if squared_norm else 0.0
    return ratio if ratio > 1e-6 else 0.0


def _warnings(inputs: Sequence[Input], base: MergeBase) -> tuple[str, ...]:
    return tuple(
        f"{item.ingredient.name} was made for another base ({item.foreign_base}) than {base.name}: a merge of adapters "
        "of different bases means nothing."
        for item in inputs
        if item.foreign_base is not None
    )


def foreign_base(folder: Path, name: str, fingerprint: str | None) -> str | None:
    """The base that an adapter says it was made for, if that is another than this one; None if not, or if unsaid."""
    made_for, named = base_fingerprint_of(folder), base_model_of(folder)
    if can_compare(made_for, fingerprint):
        return None if made_for == fingerprint else named or made_for
    return named if named is not None and not is_same_name(named, name) else None


def _write(
    folder: Path,
    parts: Sequence[Part],
    inputs: Sequence[Input],
    recipe: Recipe,
    base: MergeBase,
    merged: Merged,
) -> None:
    told = recipe.as_json([item.ingredient for item in inputs])
    for entry, item in zip(told["inputs"], inputs, strict=True):
        entry["method"] = item.method
    told["relative_error"] = float(f"{merged.relative_error:.3g}")
    manifest: dict[str, Any] = {"recipe": told}
    if base.fingerprint is not None and not merged.warnings:
        manifest["base_fingerprint"] = base.fingerprint
    names = (item.base_model for item in inputs)
    write_lora(
        folder,
        parts,
        base.sites,
        manifest,
        base_model=next((name for name in names if name is not None), base.name),
        fan_in_fan_out=any(item.config.get("fan_in_fan_out") is True for item in inputs),
    )

"""The low-rank part of a full fine-tune: two checkpoints in, a LoRA folder out.

Owns the order of the work, what a LoRA can carry and what it cannot. Knows nothing about commands. Both checkpoints are
read a tensor at a time: in memory are one pair of them, what its decomposition takes, and the result.

    W' - W = U S V^T;  the r largest: B = U S, A = V^T, with lora_alpha = r, so that PEFT's scaling is 1
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from server.adapters.converting.weight_files import WeightFiles, check_same
from server.adapters.format.checkpoint import Checkpoint, CheckpointLimits
from server.adapters.lowering import lower
from server.adapters.merging.lora_folder import Part, new_folder, write_lora
from server.adapters.merging.truncate import Factors, truncate_dense, truncate_drawn
from server.ground.errors import BadRequest, StartupRefused
from server.model.fingerprint import differing_fields
from server.model.outline import Outline, outline
from server.model.pretrained import BaseOptions, read_config
from server.model.quantize import Quantization
from server.model.site import SiteKind
from server.model.sites import BaseSite

MAX_RANK = CheckpointLimits().max_rank
_MAX_EXACT = 1024  # the smaller side of a matrix that is decomposed exactly: an eigh of 1024 takes a second
Progress = Callable[[int, int], None]  # tensors done, tensors in all


@dataclass(frozen=True, slots=True)
class Extraction:
    """What to keep of each change: at most `rank`, and with `energy` no more than holds this share of its square.

    Without a `rank` it is the largest that is served. `targets` are names of linears, or ends of paths; None means all
    but the head. `is_strict` refuses a change that would be left out.
    """

    rank: int | None = None
    energy: float = 1.0
    targets: tuple[str, ...] | None = None
    is_strict: bool = False

    def __post_init__(self) -> None:
        """Raises BadRequest for what is out of range."""
        if self.rank is not None and not 1 <= self.rank <= MAX_RANK:
            raise BadRequest(f"--rank {self.rank}: it must be from 1 to {MAX_RANK}.", param="rank")
        if not 0 < self.energy <= 1:
            raise BadRequest(f"--energy {self.energy}: it must be above 0 and at most 1, such as 0.9.", param="energy")


@dataclass(frozen=True, slots=True)
class Carried:
    """A linear whose change is in the adapter. Squares are of Frobenius norms."""

    path: str
    rank: int
    weight_square: float  # of the base's weight
    change_square: float  # of W' - W
    kept_square: float  # of what the adapter has of it


@dataclass(frozen=True, slots=True)
class Left:
    """A tensor that changed and that the adapter does not carry."""

    name: str  # as in the base's files
    relative_change: float  # norm of the change over that of the base's tensor; infinite where that is zero


@dataclass(frozen=True, slots=True)
class Extracted:
    """What became of every tensor."""

    carried: tuple[Carried, ...]  # in the order of the model
    left: tuple[Left, ...]
    num_equal: int  # tensors that are the same in both


def extract(base: str, tuned: str, target: Path, how: Extraction, progress: Progress | None = None) -> Extracted:
    """Writes the LoRA as the new folder `target`; equal arguments give equal files.

    `base` and `tuned` are local folders of one architecture, unquantized, with safetensors files. Raises StartupRefused
    for a folder, BadRequest for `how`; then nothing is left behind.
    """
    with new_folder(target) as folder:
        config = _one_config(base, tuned)
        known = outline(BaseOptions(base, Quantization.NONE))
        built: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        prefix: str = built.base_model_prefix
        files = WeightFiles.open(base, prefix), WeightFiles.open(tuned, prefix)
        check_same(*files)
        linears = {f"{path.removeprefix(f'{prefix}.')}.weight": site for path, site in known.table.products.items()}
        chosen = {name: linears[name] for name in _chosen(linears, how.targets) if name in files[0].names}
        _check_rank(how, chosen)
        left, num_equal = _left(*files, [name for name in files[0].names if name not in chosen])
        if how.is_strict and left:
            raise BadRequest(
                f"--strict: {len(left)} tensors changed that a LoRA on these modules cannot carry, {left[0].name} for "
                "one. Leave --strict out to go without them, or serve the tuned model as a base.",
                param="strict",
            )
        parts, carried = _carried(*files, chosen, how, progress)
        if not parts:
            raise BadRequest(_nothing(left), param="tuned")
        _write(folder, parts, known, base)
    return Extracted(tuple(carried), tuple(left), num_equal + len(chosen) - len(parts))


def _one_config(base: str, tuned: str) -> PreTrainedConfig:
    for model in (base, tuned):
        if not Path(model).expanduser().is_dir():
            raise StartupRefused(f"{model!r} is no folder: give the local folder of a checkpoint, downloaded first")
    one, other = read_config(base), read_config(tuned)
    if one.model_type != other.model_type:
        raise StartupRefused(
            f"{base!r} is a {one.model_type} and {tuned!r} a {other.model_type}: they are not of one architecture; "
            "give the base that the tuned model was trained from"
        )
    if differing := differing_fields(one, other):
        raise StartupRefused(
            f"the config.json of {base!r} and of {tuned!r} differ in {', '.join(differing)}: the same weights compute "
            "something else there, which no LoRA carries; give the base that the tuned model was trained from, or "
            "serve the tuned model as a base"
        )
    return one


def _chosen(linears: Mapping[str, BaseSite], targets: Collection[str] | None) -> Iterator[str]:
    """The tensors of the linears that shall be carried. Raises BadRequest for a name that is none."""
    can = {name: site for name, site in linears.items() if site.kind is SiteKind.LINEAR}
    if targets is None:
        yield from (name for name, site in can.items() if not site.is_head)
        return
    for target in targets:
        found = [name for name, site in can.items() if f".{site.path}".endswith(f".{target}")]
        if not found:
            known = ", ".join(sorted({site.path.rpartition(".")[2] for site in can.values()}))
            raise BadRequest(f"--targets {target}: the base has no such linear; it has {known}.", param="targets")
        yield from found


def _check_rank(how: Extraction, chosen: Mapping[str, BaseSite]) -> None:
    if not chosen:
        raise BadRequest("--targets: the checkpoint has no weights of its own for these (a tied head has none).")
    largest = max(min(site.d_in, site.d_out) for site in chosen.values())
    if how.energy == 1 and how.rank is not None and how.rank > largest:
        raise BadRequest(
            f"--rank {how.rank}: the largest rank that these modules can have is {largest}. Give a smaller one.",
            param="rank",
        )


def _left(base: WeightFiles, tuned: WeightFiles, names: Collection[str]) -> tuple[list[Left], int]:
    """The tensors among `names` that changed, and how many did not."""
    left = []
    for name in names:
        old, change = _read_change(base, tuned, name)
        if change is not None:
            norm = float(old.double().norm())
            left.append(Left(base.key(name), float(change.double().norm()) / norm if norm else float("inf")))
    return left, len(names) - len(left)


def _read_change(base: WeightFiles, tuned: WeightFiles, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The base's tensor, and the tuned one less it; None where they are the same."""
    old, new = base.read(name), tuned.read(name)
    return old, None if torch.equal(old, new) else new.sub_(old)


def _carried(
    base: WeightFiles,
    tuned: WeightFiles,
    chosen: Mapping[str, BaseSite],
    how: Extraction,
    progress: Progress | None,
) -> tuple[list[Part], list[Carried]]:
    parts, carried = [], []
    for number, (name, site) in enumerate(sorted(chosen.items(), key=lambda item: item[1].index), start=1):
        old, change = _read_change(base, tuned, name)
        if change is not None:
            factors = _factors(change.T if isinstance(site.module, Conv1D) else change, how)
            parts.append(Part(site, factors.down, factors.up))
            carried.append(
                Carried(
                    path=site.path,
                    rank=factors.down.shape[0],
                    weight_square=float(old.double().square().sum()),
                    change_square=factors.squared_norm,
                    kept_square=factors.squared_norm - factors.squared_error,
                )
            )
        if progress is not None:
            progress(number, len(chosen))
    return parts, carried


def _factors(change: torch.Tensor, how: Extraction) -> Factors:
    """Of a change (d_out, d_in) that is not zero."""
    rank = min(MAX_RANK if how.rank is None else how.rank, *change.shape)
    if min(change.shape) <= _MAX_EXACT or 4 * rank > min(change.shape):  # a wide basis costs more than it saves
        return truncate_dense(change, rank, how.energy)
    return truncate_drawn(change, rank, how.energy)


def _nothing(left: Collection[Left]) -> str:
    if not left:
        return "The two checkpoints have the same weights: there is nothing to extract. Are the folders exchanged?"
    return (
        f"None of the modules that shall be carried changed; what did, {next(iter(left)).name} for one, no LoRA on "
        "them can carry. Name others with --targets, or serve the tuned model as a base."
    )


def _write(folder: Path, parts: list[Part], known: Outline, base: str) -> None:
    manifest = {} if known.fingerprint is None else {"base_fingerprint": known.fingerprint}
    is_transposed = any(isinstance(known.table.products[part.site.path].module, Conv1D) for part in parts)
    write_lora(folder, parts, known.sites, manifest, base_model=base, fan_in_fan_out=is_transposed)
    lower(Checkpoint.open(folder), known.sites)  # what cannot be served is not handed out

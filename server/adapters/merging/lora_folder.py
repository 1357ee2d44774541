"""A LoRA or DoRA adapter written as PEFT writes one: from thin matrices by site to a folder.

Owns the config and the keys of the file, as the reading of it is `lora_file.py`'s. Knows nothing about where the
matrices come from.
"""

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from server.adapters.format.content import CONFIG_FILE, MANIFEST_FILE, WEIGHTS_FILE
from server.adapters.store.folder_store import FULL_DISK
from server.ground.errors import BadRequest, GraftError, StorageFull
from server.model.site import Site, SiteKind

_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class Part:
    """What the adapter has at one site, the scaling being 1. A magnitude at one site needs one at every site."""

    site: Site
    down: torch.Tensor  # (r, d_in) float32, r at least 1
    up: torch.Tensor  # (r, d_out)
    shift: torch.Tensor | None = None  # (d_out,) added to the output; LoRA's, at linears
    magnitude: torch.Tensor | None = None  # (d_out,) DoRA's
    bias: torch.Tensor | None = None  # (d_out,) the whole new bias, where the base has one


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder that becomes `target` when the block ends, and vanishes when it is left by an exception.

    Raises BadRequest if there is something at `target`, GraftError if its parent cannot be written.
    """
    if target.exists() or target.is_symlink():
        raise BadRequest(f"{target} exists already: give another folder, or remove it first.", param="out")
    partial = target.with_name(f".{target.name}.{token_hex(4)}")
    try:
        partial.mkdir()
    except OSError as error:
        raise _unwritable(target, error) from error
    try:
        yield partial
        partial.rename(target)
    except OSError as error:
        raise _unwritable(target, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _unwritable(target: Path, error: OSError) -> GraftError:
    kind, code = (StorageFull, "disk_full") if error.errno in FULL_DISK else (GraftError, "out_unwritable")
    return kind(
        f"{target} cannot be written ({error.strerror or error}): free some space, mend its permissions, or give "
        "another folder.",
        code=code,
    )


def write_lora(
    folder: Path,
    parts: Sequence[Part],
    sites: Mapping[str, Site],
    manifest: Mapping[str, Any],
    *,
    base_model: str | None,
    fan_in_fan_out: bool,
) -> None:
    """Writes config, weights and manifest; equal input gives equal bytes. `sites` are all of the base.

    Raises OSError.
    """
    has_shift = any(part.shift is not None for part in parts)
    tensors: dict[str, torch.Tensor] = {}
    for part in parts:
        tensors.update(_tensors(part, has_shift=has_shift))
    config = _config(parts, sites, has_shift=has_shift) | {
        "base_model_name_or_path": base_model,
        "fan_in_fan_out": fan_in_fan_out,
    }
    _write_json(folder / CONFIG_FILE, config)
    _write_json(folder / MANIFEST_FILE, manifest)
    _write_tensors(folder / WEIGHTS_FILE, tensors)


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    try:
        save_file(tensors, str(path), metadata={"format": "pt"})
    except SafetensorError as error:
        said = re.search(r"\(os error (\d+)\)", str(error))  # what the system says is in its words alone
        if said is None:
            raise
        raise OSError(int(said[1]), os.strerror(int(said[1]))) from error


def _tensors(part: Part, *, has_shift: bool) -> Iterator[tuple[str, torch.Tensor]]:
    module, up = _PREFIX + part.site.path, part.up.T.contiguous()
    if part.magnitude is not None:
        yield f"{module}.lora_magnitude_vector", part.magnitude
    if part.bias is not None:
        yield f"{module}.base_layer.bias", part.bias
    if part.site.kind is SiteKind.EMBEDDING:
        yield f"{module}.lora_embedding_A", part.down.contiguous()
        yield f"{module}.lora_embedding_B", up
        return
    yield f"{module}.lora_A.weight", part.down.contiguous()
    yield f"{module}.lora_B.weight", up
    if has_shift:  # PEFT wants them at all modules, or at none
        yield f"{module}.lora_B.bias", torch.zeros(part.site.d_out) if part.shift is None else part.shift


def _config(parts: Sequence[Part], sites: Mapping[str, Site], *, has_shift: bool) -> dict[str, Any]:
    """The fields of PEFT's LoraConfig that mean something here; alpha equals the rank at every module."""
    ranks = {part.site.path: part.down.shape[0] for part in parts}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    special = {path.replace(".", r"\."): own for path, own in ranks.items() if own != rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": special,
        "alpha_pattern": special,
        "target_modules": _targets(list(ranks), sites),
        "lora_bias": has_shift,
        "lora_dropout": 0.0,
        "bias": "none" if all(part.bias is None for part in parts) else "lora_only",
        "use_rslora": False,
        "use_dora": any(part.magnitude is not None for part in parts),
        "init_lora_weights": True,
    }


def _targets(paths: Sequence[str], sites: Mapping[str, Site]) -> list[str]:
    """Last names, where they mean these modules and no others of the base; else the paths."""
    names = {path.rpartition(".")[2] for path in paths}
    meant = {path for path in sites if path.rpartition(".")[2] in names}
    return sorted(names) if meant == set(paths) else sorted(paths)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")

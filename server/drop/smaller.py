"""A PEFT folder of the LoRA family without the tensors of some of its sites.

Owns what has to change in the config so that PEFT puts its modules where the tensors are and nowhere else. Knows
nothing about how the sites were chosen.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from server.adapters.format.checkpoint import Checkpoint
from server.adapters.format.content import CONFIG_FILE, MANIFEST_FILE, WEIGHTS_FILE
from server.adapters.format.lora_file import LoraFile
from server.drop.importance import Layer
from server.model.site import Site


def write_smaller(
    source: Path,
    target: Path,
    layers: Sequence[Layer],
    sites: Mapping[str, Site],
    modules: Collection[str],
    told: Mapping[str, Any],
) -> None:
    """Writes the adapter of the folder `source` into the empty folder `target` without the layers that are not kept.

    Tensors are copied as they are. `modules` are the paths of all of the base's modules; `told` goes into the
    manifest, under "drop". Equal arguments give equal bytes.
    """
    checkpoint = Checkpoint.open(source)
    parts = LoraFile(checkpoint, sites).parts
    dropped = {path for layer in layers if not layer.is_kept for path in layer.sites}
    gone = tuple(f"{part.module}." for part in parts if part.site.path in dropped)
    names = [checkpoint.name(key) for key in checkpoint if not key.startswith(gone)]
    paired = [part.site.path for part in parts if part.keys.keys() & {"down", "embedding_down"}]
    kept = [path for path in paired if path not in dropped]
    config = dict(checkpoint.config) | _targets(kept, layers, modules)
    _write_json(target / CONFIG_FILE, config)
    _write_json(target / MANIFEST_FILE, _manifest(source) | {"drop": told})
    with safe_open(str(source / WEIGHTS_FILE), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in names}
    save_file(tensors, str(target / WEIGHTS_FILE), metadata={"format": "pt"})


def _targets(kept: Sequence[str], layers: Sequence[Layer], modules: Collection[str]) -> dict[str, Any]:
    """The fields that choose modules: last names and layer numbers where these mean `kept` exactly, else the paths."""
    names = {path.rpartition(".")[2] for path in kept}
    numbers = sorted(layer.number for layer in layers if layer.is_kept)
    containers = {layer.container for layer in layers}
    chosen = {f"{container}.{number}." for container in containers for number in numbers}
    meant = {module for module in modules if module.rpartition(".")[2] in names and module.startswith(tuple(chosen))}
    is_exact = len(containers) == 1 and meant == set(kept)
    return {
        "target_modules": sorted(names) if is_exact else sorted(kept),
        "layers_to_transform": numbers if is_exact else None,
        "layers_pattern": [next(iter(containers)).rpartition(".")[2]] if is_exact else None,
        "exclude_modules": None,
    }


def _manifest(source: Path) -> dict[str, Any]:
    path = source / MANIFEST_FILE
    manifest: dict[str, Any] = json.loads(path.read_bytes()) if path.is_file() else {}
    return manifest


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")

"""A folder as pyreft's `save` writes it: its config.json, and which of its files is which intervention.

Owns pyreft's names for files, components and classes, and the sentences that refuse what is no ReFT on the output of
decoder layers. Reads no tensor, and knows nothing about positions, which the folder does not tell.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.ground.errors import AdapterRejected

_MAX_CONFIG_BYTES = 1 << 20
_MAX_INTERVENTIONS = 4096
_MAX_LAYER = 100_000
_CLASSES = {
    "LoreftIntervention": "loreft",
    "NoreftIntervention": "noreft",
    "DireftIntervention": "direft",
    "NodireftIntervention": "nodireft",
    "ConsreftIntervention": "consreft",
    "LobireftIntervention": "lobireft",
}
_CLASS = re.compile(r"<class 'pyreft\.(?:\w+\.)*(\w+)'>")
_BLOCK = "block_output"
_DOTTED_BLOCK = re.compile(r"(?:[A-Za-z_]\w*\.)*(?:layers|h|block)\[([0-9]{1,6})\]\.output", re.ASCII)
_FIELDS = (
    "layer", "component", "unit", "max_number_of_units", "low_rank_dimension", "intervention_type", "intervention",
    "subspace_partition", "group_key", "intervention_link_key", "moe_key", "source_representation",
    "hidden_source_representation", "latent_dim",
)  # fmt: skip
# Of these, all but the first must be null: they make another computation of it.
_OTHER_WORK = ("subspace_partition", "moe_key", "source_representation", "hidden_source_representation", "latent_dim")


@dataclass(frozen=True, slots=True)
class Intervention:
    """One intervention of the folder: a layer's output, and the file with its tensors."""

    layer: int
    file: Path


@dataclass(frozen=True, slots=True)
class PyreftFolder:
    """What the config says. The interventions stand in pyreft's order: prefixes first, where there are two kinds."""

    kind: str  # "loreft", "noreft", ...
    interventions: tuple[Intervention, ...]

    @classmethod
    def open(cls, folder: Path) -> "PyreftFolder":
        """Reads config.json. Raises AdapterRejected, naming the file or the field, for what cannot be converted."""
        config = _read_config(folder)
        entries = config.get("representations")
        if not isinstance(entries, list) or not 1 <= len(entries) <= _MAX_INTERVENTIONS:
            raise AdapterRejected(
                f"representations in config.json must be a list of 1 to {_MAX_INTERVENTIONS} entries: is this a folder "
                "that pyreft's save wrote?"
            )
        if config.get("mode", "parallel") != "parallel":
            raise AdapterRejected(
                f"mode = {config['mode']!r:.40} in config.json: only parallel interventions are ReFT."
            )
        kind = _kind(config.get("intervention_types"), len(entries))
        interventions = _interventions(folder, [_representation(entry) for entry in entries])
        _refuse_others(folder, interventions)
        return cls(kind, interventions)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        inner = next((child.parent.name for child in sorted(folder.glob("*/config.json"))), None)
        hint = f" (perhaps {inner})" if inner else ""
        raise AdapterRejected(f"{folder} has no config.json: give the folder that pyreft's save wrote{hint}.")
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise AdapterRejected(f"config.json has more than {_MAX_CONFIG_BYTES} bytes: it is not pyreft's.")
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise AdapterRejected(f"config.json is not valid JSON ({str(error)[:100]}).") from error
    if not isinstance(config, dict):
        raise AdapterRejected("config.json must be a JSON object.")
    return config


def _kind(types: Any, num: int) -> str:
    """The one class of all interventions."""
    if not isinstance(types, list) or len(types) != num or not all(isinstance(text, str) for text in types):
        raise AdapterRejected("intervention_types in config.json must name a class for each representation.")
    found = {_CLASSES.get(match[1]) if (match := _CLASS.fullmatch(text)) else None for text in types}
    if None in found:
        strange = next(text for text in types if not (match := _CLASS.fullmatch(text)) or match[1] not in _CLASSES)
        raise AdapterRejected(
            f"intervention_types has {strange!r:.100}, whose formula is not known; pyreft's own are "
            f"{', '.join(_CLASSES)}."
        )
    if len(found) > 1:
        raise AdapterRejected("intervention_types in config.json names several classes: train with one of them.")
    (kind,) = found
    assert kind is not None
    return kind


def _representation(entry: Any) -> dict[str, Any]:
    """One entry, which pyreft writes as a list, by field."""
    fields = dict(zip(_FIELDS, entry, strict=False)) if isinstance(entry, list) else entry
    if not isinstance(fields, dict) or (isinstance(entry, list) and len(entry) > len(_FIELDS)):
        raise AdapterRejected("representations in config.json must hold pyreft's entries: layer, component, unit, ...")
    for name in _OTHER_WORK:
        if fields.get(name) is not None:
            raise AdapterRejected(f"representations in config.json sets {name}, which ReFT does not have.")
    if (fields.get("unit"), fields.get("max_number_of_units")) != ("pos", 1):
        raise AdapterRejected("representations in config.json must be of the unit pos, one at a time.")
    return fields


def _interventions(folder: Path, representations: Sequence[dict[str, Any]]) -> tuple[Intervention, ...]:
    """As pyvene names files: the place, and after # how many of the same place came before."""
    counts: Counter[str] = Counter()
    found = []
    for fields in representations:
        layer, place = _place(fields)
        path = folder / f"intkey_{place}_unit_pos_nunit_1#{counts[place]}.bin"
        counts[place] += 1
        if not path.is_file():
            raise AdapterRejected(f"{path.name} is missing, and config.json needs it: save the adapter again.")
        found.append(Intervention(layer, path))
    return tuple(found)


def _place(fields: dict[str, Any]) -> tuple[int, str]:
    """(layer, the place in a file's name)."""
    layer, component = fields.get("layer"), fields.get("component")
    if component == _BLOCK and type(layer) is int and 0 <= layer <= _MAX_LAYER:
        return layer, f"layer_{layer}_comp_{_BLOCK}"
    match = _DOTTED_BLOCK.fullmatch(component) if isinstance(component, str) else None
    if match is None:
        raise AdapterRejected(
            f"component = {component!r:.60} of layer {layer!r:.20} in config.json: only interventions on the output of "
            "decoder layers (block_output) can be converted."
        )
    return int(match[1]), f"comp_{match.string.replace('.', '_')}"


def _refuse_others(folder: Path, interventions: Sequence[Intervention]) -> None:
    known = {intervention.file for intervention in interventions}
    if strange := sorted(path.name for path in folder.glob("intkey_*") if path not in known):
        raise AdapterRejected(f"{strange[0]} is not in config.json: the folder is of two trainings; save it again.")
    if (folder / "pytorch_model.bin").exists():
        raise AdapterRejected(
            "The folder has a pytorch_model.bin: weights of the base were trained beside the interventions, and no "
            "adapter can hold these. Train with disable_model_grads=True."
        )

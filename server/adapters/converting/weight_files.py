"""A base's checkpoint as files: its tensors by name, read one at a time, without the model around them.

Owns how names of two checkpoints of one architecture are brought together, and the sentences that refuse a folder as
such. Knows nothing about sites or what is done with the numbers.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from server.ground.errors import StartupRefused
from server.model.pretrained import read_config, stored_quantization

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
# Masks and angles that old versions of transformers saved; they are computed.
_BUFFERS = (
    ".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias",
)  # fmt: skip
_HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True)
class _Place:
    file: Path
    key: str  # as in the file
    shape: tuple[int, ...]


class WeightFiles:
    """The tensors of a local folder, one file or shards, by name without the prefix of the base model."""

    def __init__(self, folder: Path, places: Mapping[str, _Place]) -> None:
        self.folder = folder
        self._places = places

    @classmethod
    def open(cls, model: str, prefix: str) -> "WeightFiles":
        """Reads the headers. `prefix` is what transformers calls the model inside the model ("model", "transformer").

        Raises StartupRefused for what is no folder, is quantized, lacks safetensors files, or has a file missing or
        damaged.
        """
        folder = Path(model).expanduser()
        if not folder.is_dir():
            raise StartupRefused(f"{model!r} is no folder: give the local folder of a checkpoint, downloaded first")
        config = read_config(str(folder))
        if stored_quantization(config) is not None:
            raise StartupRefused(
                f"{model!r} is a quantized checkpoint: what it was before cannot be read from it; give the original"
            )
        is_tied = bool(getattr(config.get_text_config(), "tie_word_embeddings", False))
        places: dict[str, _Place] = {}
        for file in _files(folder):
            for place in _read_header(file):
                name = place.key.removeprefix(f"{prefix}.")
                if not name.endswith(_BUFFERS) and not (is_tied and name == _HEAD):
                    places[name] = place
        return cls(folder, places)

    @property
    def names(self) -> tuple[str, ...]:
        """In the order of the files."""
        return tuple(self._places)

    def key(self, name: str) -> str:
        """The name as the file spells it."""
        return self._places[name].key

    def shape(self, name: str) -> tuple[int, ...]:
        return self._places[name].shape

    def read(self, name: str) -> torch.Tensor:
        """One tensor, float32 on the CPU. Raises StartupRefused where it is not finite or cannot be read."""
        place = self._places[name]
        try:
            with safe_open(str(place.file), framework="pt") as file:
                tensor: torch.Tensor = file.get_tensor(place.key).float()
        except (OSError, SafetensorError, RuntimeError) as error:
            raise StartupRefused(f"{place.file}: {place.key} cannot be read ({error}); download it again") from error
        if not bool(torch.isfinite(tensor).all()):
            raise StartupRefused(f"{place.file}: {place.key} contains NaN or infinity: the training run diverged")
        return tensor


def check_same(base: WeightFiles, tuned: WeightFiles) -> None:
    """Raises StartupRefused, with names, where the two do not have the same tensors of the same shapes."""
    remedy = "give the base that the tuned model was trained from"
    for one, other in ((base, tuned), (tuned, base)):
        if lacking := sorted(one.key(name) for name in set(one.names) - set(other.names)):
            more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
            raise StartupRefused(
                f"{other.folder} lacks {', '.join(lacking[:3])}{more}, which {one.folder} has: they are not of one "
                f"architecture; {remedy}"
            )
    for name in base.names:
        if base.shape(name) != tuned.shape(name):
            raise StartupRefused(
                f"{base.key(name)} has the shape {list(tuned.shape(name))} in {tuned.folder} and "
                f"{list(base.shape(name))} in {base.folder}: another model, or a resized vocabulary; {remedy}"
            )


def _files(folder: Path) -> list[Path]:
    """Those that transformers reads: the one file, or all that the index names."""
    if (folder / _WHOLE).is_file():
        return [folder / _WHOLE]
    index = folder / _INDEX
    if not index.is_file():
        raise StartupRefused(
            f"{folder} has no {_WHOLE}: save the model with save_pretrained, which writes safetensors files; pickles "
            "(.bin) are not read"
        )
    try:
        named = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        files = [folder / name for name in named]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StartupRefused(f"{index} is no index of shards ({error!r:.80}); download it again") from error
    if missing := next((file for file in files if file.parent != folder or not file.is_file()), None):
        raise StartupRefused(f"{index} names {missing.name}, which is not there; download it again")
    return files


def _read_header(path: Path) -> list[_Place]:
    try:
        with safe_open(str(path), framework="pt") as file:
            return [_Place(path, key, tuple(file.get_slice(key).get_shape())) for key in file.keys()]  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise StartupRefused(f"{path} is not whole ({error}); download it again") from error

"""The safetensors files of a checkpoint, and what their headers list. https://github.com/huggingface/safetensors#format

Owns where they are, without the network, and how a header is read. Knows nothing about what the tensors mean.
"""

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

ITEM_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a checkpoint: where its bytes begin."""

    name: str
    dtype: str  # safetensors' word
    shape: tuple[int, ...]
    path: Path
    begin: int  # absolute, in bytes

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES.get(self.dtype, 1)


def weight_files(model: str) -> tuple[Path, ...]:
    """The safetensors files that transformers reads for this model: the one file, or those that the index names."""
    whole = _file(model, "model.safetensors")
    if whole is not None:
        return (whole,)
    index = _file(model, "model.safetensors.index.json")
    if index is None:
        return ()
    named = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    found = [_file(model, name) for name in named]
    return tuple(path for path in found if path is not None)


def stored_tensors(path: Path) -> Iterator[StoredTensor]:
    """What the header of a file lists. Raises OSError and ValueError for files that are not what they should be."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    for name, entry in header.items():
        if name != "__metadata__":
            begin = 8 + length + entry["data_offsets"][0]
            yield StoredTensor(name, entry["dtype"], tuple(entry["shape"]), path, begin)


def _file(model: str, name: str) -> Path | None:
    if Path(model).is_dir():
        path = Path(model) / name
        return path if path.is_file() else None
    cached = try_to_load_from_cache(model, name)
    return Path(cached) if isinstance(cached, str) else None  # else not there, or known not to be on the hub

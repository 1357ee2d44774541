"""An adapter's folder as it lies on disk: its config, its keys, its tensors one at a time.

Owns the checks that a stranger's file must pass before a byte of it is interpreted, and the spelling of keys. Knows
nothing about methods, sites or devices.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import torch

from server.adapters.format.content import CONFIG_FILE, WEIGHTS_FILE
from server.adapters.format.foreign import HEAD_BYTES, PICKLE, foreign_kind
from server.adapters.format.module_paths import canonical_key
from server.ground.errors import AdapterRejected

_FLOATING = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4}
_MAX_DIMENSIONS = 8
_HUBS_WEIGHTS_FILE = "adapter.safetensors"  # as AdapterHub's library calls it
_MAX_NAME_LENGTH = 512
# JSON takes up to fifty times its own size once it is parsed, so what a header could hold is counted before. A matrix
# takes 12 of these signs, and what the metadata has of them stands in texts.
_SIGNS = b"{[,:"
_MAX_SIGNS_PER_TENSOR = 14
_MAX_METADATA_SIGNS = 10_000


@dataclass(frozen=True, slots=True)
class CheckpointLimits:
    """What a checkpoint may ask for at most.

    The defaults hold a rank 512 LoRA on every linear of a 70B model (1120 tensors) and one on every expert of a
    mixture of experts (48 layers of 128 experts: 37 thousand tensors, a header of 5.5 MB).
    """

    max_config_bytes: int = 1 << 20
    max_config_depth: int = 16
    max_header_bytes: int = 8 << 20
    max_tensors: int = 1 << 16
    max_weights_bytes: int = 16 << 30
    max_rank: int = 512


@dataclass(frozen=True, slots=True)
class _Entry:
    name: str  # as written in the file
    dtype: str
    shape: tuple[int, ...]
    begin: int  # absolute, in bytes
    end: int


class Checkpoint:
    """One adapter folder: `config`, and tensors by canonical key.

    A canonical key is `<module path>.<parameter>` without wrapper prefixes and adapter name (see `canonical_key`).
    Keeps account of which keys were used, so that what no method understood can be refused. Holds no open file; not
    for use by two threads at once.
    """

    def __init__(
        self, weights: Path, config: Mapping[str, Any], entries: Mapping[str, _Entry], limits: CheckpointLimits
    ) -> None:
        self.config = config
        self.limits = limits
        self._weights = weights
        self._entries = entries
        self._used: set[str] = set()
        self._ignored: set[str] = set()

    @classmethod
    def open(cls, folder: Path, *, limits: CheckpointLimits | None = None) -> Self:
        """Reads the config and the header of the weights, and no tensor.

        Raises AdapterRejected, naming the file, the limit and the remedy, for whatever does not hold together.
        """
        limits = limits or CheckpointLimits()
        config = _read_config(folder / CONFIG_FILE, limits)
        weights = _weights_file(folder)
        return cls(weights, MappingProxyType(config), _by_canonical_key(_read_header(weights, limits)), limits)

    def keys(self) -> tuple[str, ...]:
        """The canonical keys, in the order of the file."""
        return tuple(self._entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def name(self, key: str) -> str:
        """The key as the file spells it, for messages."""
        return self._entries[key].name

    def is_empty(self, key: str) -> bool:
        """Whether the tensor holds no number: all that is left of a module that was pruned away."""
        return 0 in self._entries[key].shape

    def shape(self, key: str) -> tuple[int, ...]:
        """Raises AdapterRejected for a tensor that is empty, as `take` does."""
        return _filled(self._entries[key]).shape

    def take(self, key: str, shape: tuple[int, ...] | None = None) -> torch.Tensor:
        """The tensor, float32 on the CPU, and marks its key as used. Reads this one tensor from disk.

        Raises AdapterRejected if the tensor has another shape than the given one, is empty, is not floating, or is not
        finite.
        """
        entry = _filled(self._entries[key])
        if shape is not None and entry.shape != shape:
            raise AdapterRejected(
                f"{entry.name} has the shape {list(entry.shape)}, and this base needs {list(shape)}. "
                "Was the adapter trained on another model?"
            )
        if entry.dtype not in _FLOATING:
            raise AdapterRejected(f"{entry.name} is of type {entry.dtype}; save it as F32, F16 or BF16.")
        tensor = _read_tensor(self._weights, entry)
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterRejected(f"{entry.name} contains NaN or infinity: the training run diverged.")
        self._used.add(key)
        return tensor

    def ignore(self, key: str) -> None:
        """Marks a key as understood and of no effect; its numbers do not count."""
        self._ignored.add(self._entries[key].name)
        self._used.add(key)

    def leftover(self) -> tuple[str, ...]:
        """The keys neither taken nor ignored so far, as the file spells them.

        Raises AdapterRejected if one of their tensors is empty.
        """
        return tuple(_filled(entry).name for key, entry in self._entries.items() if key not in self._used)

    @property
    def num_parameters(self) -> int:
        """Numbers in the file, without the ignored ones."""
        return sum(math.prod(e.shape) for e in self._entries.values() if e.name not in self._ignored)


def _read_config(path: Path, limits: CheckpointLimits) -> dict[str, Any]:
    if not path.is_file():
        raise AdapterRejected(f"There is no {CONFIG_FILE}: the folder must be one that PEFT's save_pretrained wrote.")
    size = path.stat().st_size
    if size > limits.max_config_bytes:
        raise AdapterRejected(f"{CONFIG_FILE} has {size} bytes; the limit is {limits.max_config_bytes}.")
    with path.open("rb") as file:
        text = file.read(size)
    try:
        config = _parse_json(text, CONFIG_FILE)
    except AdapterRejected:
        _refuse_foreign(CONFIG_FILE, text, wants_json=True)
        raise
    if not isinstance(config, dict):
        raise AdapterRejected(f"{CONFIG_FILE} must be a JSON object.")
    if _depth(config, limits.max_config_depth) > limits.max_config_depth:
        raise AdapterRejected(f"{CONFIG_FILE} is nested deeper than {limits.max_config_depth} levels.")
    return config


def _parse_json(text: bytes, where: str) -> Any:
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_object, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise AdapterRejected(f"{where} is not valid JSON: it is not in UTF-8. Save it in UTF-8.") from error
    except RecursionError as error:
        raise AdapterRejected(f"{where} is not valid JSON: it is nested too deep.") from error
    except ValueError as error:
        reason = str(error).partition(";")[0]  # of a number of too many digits Python tells how to raise its limit
        raise AdapterRejected(f"{where} is not valid JSON: {reason}.") from error


def _refuse_foreign(filename: str, head: bytes, *, wants_json: bool) -> None:
    """Says what the file is instead, if that shows."""
    kind = foreign_kind(head[:HEAD_BYTES], wants_json=wants_json)
    if kind is not None:
        raise AdapterRejected(f"{filename} is {kind}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    parsed = dict(pairs)
    if len(parsed) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the name {twice!r:.60} occurs twice")
    return parsed


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is not a JSON number")


def _depth(value: Any, most: int) -> int:
    """How deep lists and objects are nested; never looks further than one level below `most`."""
    if not isinstance(value, dict | list) or most < 0:
        return 0
    children = value.values() if isinstance(value, dict) else value
    return 1 + max((_depth(child, most - 1) for child in children), default=0)


def _weights_file(folder: Path) -> Path:
    path = folder / WEIGHTS_FILE
    if path.is_file():
        return path
    pickled = sorted(file.name for suffix in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in folder.glob(suffix))
    if pickled:
        raise AdapterRejected(f"{pickled[0]} is {PICKLE}")
    hint = f": rename {_HUBS_WEIGHTS_FILE} to it" if (folder / _HUBS_WEIGHTS_FILE).is_file() else ""
    raise AdapterRejected(f"There is no {WEIGHTS_FILE} in the folder{hint}.")


def _read_header(path: Path, limits: CheckpointLimits) -> list[_Entry]:
    """The entries of a safetensors header, checked against one another and the size of the file.

    Format: 8 bytes little-endian length, that many bytes of JSON, then the tensors without gaps.
    https://github.com/huggingface/safetensors#format
    """
    size = path.stat().st_size
    if size > limits.max_weights_bytes:
        raise AdapterRejected(f"{WEIGHTS_FILE} has {size} bytes; the limit is {limits.max_weights_bytes}.")
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
        length = int.from_bytes(head[:8], "little")
        _check_length(head, length, size, limits)
        file.seek(8)
        header = _parse_header(file.read(length), limits)
    _check_metadata(header.pop("__metadata__", {}))
    if len(header) > limits.max_tensors:
        raise AdapterRejected(f"{WEIGHTS_FILE} has {len(header)} tensors; the limit is {limits.max_tensors}.")
    entries = [_entry(name, described, 8 + length) for name, described in header.items()]
    _check_contiguous(entries, 8 + length, size)
    return entries


def _check_length(head: bytes, length: int, size: int, limits: CheckpointLimits) -> None:
    """Of the header, by the first bytes of the file: where they are no length, they often say what the file is."""
    if size < 8:
        raise AdapterRejected(f"{WEIGHTS_FILE} is truncated: it has {size} bytes. Upload it again.")
    if 0 < length <= min(size - 8, limits.max_header_bytes):
        return
    _refuse_foreign(WEIGHTS_FILE, head, wants_json=False)
    if length == 0:
        raise AdapterRejected(f"{WEIGHTS_FILE} has an empty header. Upload it again.")
    if length > size - 8:
        raise AdapterRejected(
            f"{WEIGHTS_FILE} is truncated: it has {size} bytes, and its header alone would have {length}. "
            "Upload it again."
        )
    raise AdapterRejected(f"{WEIGHTS_FILE} has a header of {length} bytes; the limit is {limits.max_header_bytes}.")


def _parse_header(text: bytes, limits: CheckpointLimits) -> dict[str, Any]:
    num_signs = sum(text.count(sign) for sign in _SIGNS)
    max_signs = _MAX_SIGNS_PER_TENSOR * limits.max_tensors + _MAX_METADATA_SIGNS
    if num_signs > max_signs:
        raise AdapterRejected(
            f"The header of {WEIGHTS_FILE} describes more than the {limits.max_tensors} tensors that are allowed: it "
            f"has {num_signs} of the signs that divide JSON, and they need {max_signs} at most."
        )
    header = _parse_json(text, f"The header of {WEIGHTS_FILE}")
    if not isinstance(header, dict):
        raise AdapterRejected(f"The header of {WEIGHTS_FILE} must be a JSON object.")
    return header


def _check_metadata(metadata: Any) -> None:
    """Free text by the format: nothing of it is used."""
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise AdapterRejected(f"__metadata__ in the header of {WEIGHTS_FILE} must be an object of texts.")


def _entry(name: str, described: Any, data_begin: int) -> _Entry:
    if len(name) > _MAX_NAME_LENGTH or not name.isprintable():
        raise AdapterRejected(f"{name!r:.60}: a key must be printable and of at most {_MAX_NAME_LENGTH} characters.")
    if not isinstance(described, dict) or described.keys() != {"dtype", "shape", "data_offsets"}:
        raise AdapterRejected(f"{name}: the header must give exactly dtype, shape and data_offsets.")
    dtype, shape, offsets = described["dtype"], described["shape"], described["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise AdapterRejected(
            f"{name} is of type {dtype!r:.40}; the known types are {', '.join(_ITEM_BYTES)}. "
            f"Save it as {', '.join(_FLOATING)}."
        )
    if not _are_counts(shape) or len(shape) > _MAX_DIMENSIONS:
        raise AdapterRejected(f"{name}: shape must be at most {_MAX_DIMENSIONS} whole numbers.")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise AdapterRejected(f"{name}: data_offsets must be two whole numbers.")
    begin, end = offsets
    num_bytes = math.prod(shape) * _ITEM_BYTES[dtype]
    if end - begin != num_bytes:
        raise AdapterRejected(f"{name}: data_offsets span {end - begin} bytes, its shape and type need {num_bytes}.")
    return _Entry(name, dtype, tuple(shape), data_begin + begin, data_begin + end)


def _filled(entry: _Entry) -> _Entry:
    """The entry, unless its tensor is empty."""
    if 0 in entry.shape:
        raise AdapterRejected(
            f"{entry.name} is empty, shape {list(entry.shape)}: it was saved without gathering the shards of the "
            "training run. Save it again with the full parameters (DeepSpeed: zero.GatheredParameters; FSDP: "
            "summon_full_params)."
        )
    return entry


def _are_counts(values: Any) -> bool:
    """Whether `values` is a list of whole numbers in 0 .. 2^53 - 1, so that no product of them grows without bound."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 53 for value in values)


def _check_contiguous(entries: list[_Entry], data_begin: int, size: int) -> None:
    position = data_begin
    for entry in sorted(entries, key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != position:
            fault = "overlaps another tensor's" if entry.begin < position else "leaves a gap before it"
            raise AdapterRejected(f"{entry.name}: its data {fault}. Upload the file as it was saved.")
        position = entry.end
    if position != size:
        raise AdapterRejected(f"{WEIGHTS_FILE} has {size} bytes, its header describes {position}. Upload it again.")


def _by_canonical_key(entries: list[_Entry]) -> dict[str, _Entry]:
    keyed: dict[str, _Entry] = {}
    for entry in entries:
        key = canonical_key(entry.name)
        if key in keyed:
            raise AdapterRejected(
                f"{keyed[key].name} and {entry.name} are the same parameter ({key}). Save one adapter per file."
            )
        keyed[key] = entry
    return keyed


def _read_tensor(path: Path, entry: _Entry) -> torch.Tensor:
    """One tensor as float32.

    A plain read rather than a memory map: a mapped file that is cut short under the process kills it with SIGBUS.
    """
    data = bytearray(entry.end - entry.begin)
    with path.open("rb") as file:
        file.seek(entry.begin)
        if file.readinto(data) != len(data):
            raise AdapterRejected(f"{entry.name}: the file ended early. Upload it again.")
    return torch.frombuffer(data, dtype=_FLOATING[entry.dtype]).reshape(entry.shape).to(torch.float32)

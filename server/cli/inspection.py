"""What `graft adapters inspect` finds out about an adapter, and how it is laid out.

Owns the facts that are told and their words. Knows nothing about how an adapter is judged. Imports torch, as
`rehearsal` does.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.adapters.format.checkpoint import Checkpoint
from server.adapters.format.lora_file import LoraFile
from server.adapters.method import Edit
from server.adapters.methods import method_for
from server.adapters.served_base import BaseClaim
from server.adapters.store.folder_store import (
    FolderDigest,
    StoredVersion,
    base_fingerprint_of,
    base_model_of,
    folder_digest,
)
from server.cli.adapters import shown_size, shown_time
from server.cli.rehearsal import Rehearsal, Tried
from server.cli.table import columns, facts
from server.ground.errors import AdapterRejected
from server.model.site import Site

_LORA_METHODS = ("lora", "rslora", "dora")  # those with a factor before B, which their config gives
_VECTORS = ("in_scale", "mid_scale", "mid_shift", "up_scale", "out_scale", "out_shift")


@dataclass(frozen=True, slots=True)
class SiteFacts:
    """What an adapter does at one site."""

    path: str
    d_in: int
    d_out: int
    rank: int
    scaling: float | None  # None for methods without one
    vectors: tuple[str, ...]  # of the normal form, those that it fills in


@dataclass(frozen=True, slots=True)
class Inspected:
    """An adapter's folder, and what a server with these settings would make of it."""

    folder: Path
    version: StoredVersion | None  # None for a folder outside of the store
    content: FolderDigest | None  # None where a file is missing
    base_model: str | None  # that it says it was trained on
    base: str  # that it was tried on
    dtype: str  # of that base, in which its rank rows are kept
    num_base_sites: int
    method: str | None
    tried: Tried | None
    warnings: tuple[str, ...]
    sites: tuple[SiteFacts, ...]
    refusal: str | None

    def as_text(self, *, shows_sites: bool) -> str:
        """Facts by name, and with `shows_sites` a table of the sites."""
        told = facts([*self._identity(), *self._effect()])
        return told + ("\n" + self._site_table() if shows_sites and self.sites else "")

    def as_json(self, *, shows_sites: bool) -> dict[str, Any]:
        """The same, by the API's words; null where the adapter was refused before it could be told."""
        lowered = self.tried.lowered if self.tried is not None else None
        shown: dict[str, Any] = {
            "folder": str(self.folder),
            "version": self.version.digest if self.version else self.content.digest if self.content else None,
            "bytes": self.content.content_bytes if self.content else None,
            "base_model": self.base_model,
            "base": self.base,
            "dtype": self.dtype,
            "method": self.method,
            "rank": lowered.rank if lowered else None,
            "scaling": sorted(self._scalings()),
            "parameters": lowered.num_parameters if lowered else None,
            "sites": len(self.sites) if lowered else None,
            "device_bytes": self.tried.resident_bytes if self.tried else None,
            "warnings": list(self.warnings),
            "refusal": self.refusal,
        }
        if shows_sites:
            shown["edits"] = [_site_as_json(site) for site in self.sites]
        return shown

    def _identity(self) -> list[tuple[str, str]]:
        told = []
        if self.version is not None:
            told += [("name", self.version.name), ("version", self.version.digest[:12])]
            told.append(("added", shown_time(self.version.record.created)))
        elif self.content is not None:
            told.append(("version", self.content.digest[:12]))
        told.append(("folder", _shown_path(self.folder)))
        if self.content is not None:
            told.append(("on disk", _bytes(self.content.content_bytes)))
        told += [("trained on", self.base_model or "not said"), ("tried on", self.base)]
        told.append(("method", self.method or "none that is served"))
        return told

    def _effect(self) -> list[tuple[str, str]]:
        told = []
        if self.tried is not None:
            lowered = self.tried.lowered
            told = [
                ("rank", str(lowered.rank)),
                ("scaling", _range(self._scalings())),
                ("sites", f"{len(self.sites)} of {self.num_base_sites}: {_by_last_name(self.sites)}"),
                *([("positions", str(lowered.positions))] if lowered.positions is not None else []),
                *([("virtual tokens", str(lowered.num_virtual_tokens))] if lowered.num_virtual_tokens else []),
                ("parameters", f"{lowered.num_parameters:,}"),
                ("on device", f"{_bytes(self.tried.resident_bytes)} in {self.dtype}"),
            ]
        told += [("warning", warning) for warning in self.warnings]
        if self.refusal is not None:
            told.append(("refused", self.refusal))
        return told

    def _scalings(self) -> set[float]:
        return {site.scaling for site in self.sites if site.scaling is not None}

    def _site_table(self) -> str:
        rows = [
            (site.path, f"{site.d_in} > {site.d_out}", str(site.rank), _number(site.scaling), " ".join(site.vectors))
            for site in self.sites
        ]
        return columns(("SITE", "WIDTHS", "RANK", "SCALING", "FIELDS"), rows, right=(2, 3))


def inspect(folder: Path, rehearsal: Rehearsal, version: StoredVersion | None = None) -> Inspected:
    """Looks at a folder and tries the adapter in it on the rehearsal's base; a refusal is one of the facts."""
    method, content, tried, scalings = None, None, None, {}
    try:
        checkpoint = Checkpoint.open(folder)
        content = folder_digest(folder)
        method = method_for(checkpoint.config).name
        tried = rehearsal.try_on(folder)
        method = tried.lowered.method
        scalings = _scalings(folder, method, rehearsal.sites)
        refusal = None
    except AdapterRejected as rejected:
        refusal = rejected.message
    edits = tried.lowered.edits.items() if tried is not None else ()
    return Inspected(
        folder=folder,
        version=version,
        content=content,
        base_model=base_model_of(folder),
        base=rehearsal.base_name,
        dtype=rehearsal.dtype_name,
        num_base_sites=len(rehearsal.sites),
        method=method,
        tried=tried,
        warnings=(tried.lowered.warnings if tried is not None else ()) + rehearsal.doubts(_claim(folder, version)),
        sites=tuple(_site(rehearsal.sites[path], edit, scalings.get(path)) for path, edit in edits),
        refusal=refusal,
    )


def _claim(folder: Path, version: StoredVersion | None) -> BaseClaim:
    if version is None:
        return BaseClaim(base_model_of(folder), base_fingerprint_of(folder))
    record = version.record
    return BaseClaim(record.base_model, record.base_fingerprint, record.checked_name, record.checked_fingerprint)


def _scalings(folder: Path, method: str, sites: Mapping[str, Site]) -> dict[str, float]:
    """The factor s of s B A by site path."""
    if method not in _LORA_METHODS:
        return {}
    file = LoraFile(Checkpoint.open(folder), sites)
    pairs = ((part.site.path, file.pair(part)) for part in file.parts)
    return {path: pair.scaling for path, pair in pairs if pair is not None}


def _site(site: Site, edit: Edit, scaling: float | None) -> SiteFacts:
    vectors = (*(name for name in _VECTORS if name in edit.tensors()), *edit.ops)
    return SiteFacts(site.path, site.d_in, site.d_out, edit.rank, scaling, vectors)


def _site_as_json(site: SiteFacts) -> dict[str, Any]:
    return {
        "site": site.path,
        "d_in": site.d_in,
        "d_out": site.d_out,
        "rank": site.rank,
        "scaling": site.scaling,
        "vectors": list(site.vectors),
    }


def _by_last_name(sites: tuple[SiteFacts, ...]) -> str:
    counts = Counter(site.path.rpartition(".")[2] for site in sites)
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def _shown_path(path: Path) -> str:
    """From here, where it lies below."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _bytes(num_bytes: int) -> str:
    return f"{shown_size(num_bytes)} ({num_bytes:,} bytes)"


def _range(values: set[float]) -> str:
    if len(values) > 1:
        return f"{_number(min(values))} to {_number(max(values))}"
    return _number(next(iter(values), None))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"

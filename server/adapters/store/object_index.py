"""The index of one name in an object store: its versions, and where the files of each lie.

Owns the JSON of an index, and which objects it may name. Knows nothing about how objects are read or written; no torch.

    {"format": 1, "versions": [{"digest": "...", "upload": "...", "files": {"adapter_config.json": {"bytes": 1,
     "sha256": "..."}, ...}, "record": {...}}]}

The last version is the current one. An index without versions is an empty object: the name was deleted.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from server.adapters.format.content import CONTENT_FILES, REQUIRED_FILES
from server.adapters.store.folder_store import FileDigest, Record, record_from, version_digest

_FORMAT = 1
_DIGEST = re.compile(r"[0-9a-f]{64}")
_UPLOAD = re.compile(r"[0-9a-f]{32}")


class BrokenIndex(Exception):
    """An index that does not hold together; the message says how."""


@dataclass(frozen=True, slots=True)
class ObjectVersion:
    """One version, and the upload that brought its files: no two uploads share an object."""

    digest: str
    upload: str  # 32 hex digits
    files: Mapping[str, FileDigest] = field(hash=False)
    record: Record

    @property
    def content_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files.values())


@dataclass(frozen=True, slots=True)
class ObjectIndex:
    """The versions of a name in the order in which they became current; none of a name that there is not."""

    versions: tuple[ObjectVersion, ...] = ()

    @property
    def current(self) -> ObjectVersion | None:
        return self.versions[-1] if self.versions else None

    def find(self, digest: str) -> ObjectVersion | None:
        return next((version for version in self.versions if version.digest == digest), None)

    def with_current(self, version: ObjectVersion) -> "ObjectIndex":
        return ObjectIndex((*self.without(version.digest).versions, version))

    def without(self, digest: str) -> "ObjectIndex":
        return ObjectIndex(tuple(version for version in self.versions if version.digest != digest))

    def to_bytes(self) -> bytes:
        """The object's content."""
        if not self.versions:
            return b""
        return json.dumps({"format": _FORMAT, "versions": list(map(_as_json, self.versions))}, indent=1).encode()


def index_from(content: bytes) -> ObjectIndex:
    """An index from its object's content. Raises BrokenIndex."""
    if not content:
        return ObjectIndex()
    try:
        parsed = json.loads(content)
        if parsed["format"] != _FORMAT:
            raise BrokenIndex(f"its format is {parsed['format']!r:.20}, and this server knows {_FORMAT}: update it")
        versions = tuple(_version_from(entry) for entry in parsed["versions"])
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError) as error:
        raise BrokenIndex(f"it cannot be read: {error!r:.200}") from error
    if not versions or len({version.digest for version in versions}) < len(versions):
        raise BrokenIndex("it lists no version, or one of them twice")
    return ObjectIndex(versions)


def _as_json(version: ObjectVersion) -> dict[str, Any]:
    return {
        "digest": version.digest,
        "upload": version.upload,
        "files": {name: {"bytes": file.num_bytes, "sha256": file.sha256.hex()} for name, file in version.files.items()},
        "record": dataclasses.asdict(version.record),
    }


def _version_from(entry: Mapping[str, Any]) -> ObjectVersion:
    digest, upload = entry["digest"], entry["upload"]
    files = {
        name: FileDigest(int(file["bytes"]), bytes.fromhex(file["sha256"])) for name, file in entry["files"].items()
    }
    if not (_DIGEST.fullmatch(digest) and _UPLOAD.fullmatch(upload)):
        raise BrokenIndex("it names something that is no version")
    # Names become paths, and the files' own sums are what downloads are held to.
    if not set(REQUIRED_FILES) <= set(files) <= set(CONTENT_FILES) or version_digest(files) != digest:
        raise BrokenIndex(f"the files that it lists are not those of the version {digest[:12]}")
    return ObjectVersion(digest, upload, files, record_from(entry["record"]))

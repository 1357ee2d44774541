"""The disk tier: adapter files under names and versions, changed only by whole steps.

Owns the layout of the store folder, the version digest and what a crash may leave behind. Knows nothing about tensors,
methods or who uses an adapter; no torch.

    <root>/<name>/current.json                the name's index: the version it means, and the versions it has
    <root>/<name>/<digest>/                   one version: adapter_config.json, adapter_model.safetensors,
                                              manifest.json where there is one, record.json (bookkeeping, not hashed)
    <root>/.incoming/<random>/                work in progress: uploads, and what was deleted but is still being read

Every change is decided by one rename: of a new name's finished folder, of an index, or of a deleted name's folder into
`.incoming`. What a crash leaves lies in `.incoming`, or is a version that its index does not list; opening the store
removes both. A folder in `.incoming` is locked by the process that works in it, so that several processes can share a
store and none removes another's upload.
"""

import dataclasses
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import stat
import struct
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from server.adapters.asker import current_asker
from server.adapters.format.content import CONFIG_FILE, CONTENT_FILES, MANIFEST_FILE, REQUIRED_FILES, WEIGHTS_FILE
from server.adapters.naming import label
from server.adapters.store.quota import Claim, StoreLimits, StoreRoom
from server.ground.errors import (
    AdapterDamaged,
    AdapterNotFound,
    AdapterRejected,
    BadRequest,
    Conflict,
    GraftError,
    StartupRefused,
    StorageFull,
    StoreUnreachable,
    TooLarge,
)

_RECORD_FILE = "record.json"
_INDEX_FILE = "current.json"
INCOMING_FOLDER = ".incoming"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_CHUNK_BYTES = 1 << 20
_MAX_TEXT_FILE_BYTES = 1 << 20  # of a config or a manifest; a larger one is refused when it is loaded
_MAX_TEXT_CHARS = 1024  # of a name in it that is looked at before it is checked
# What the system says of a full disk, a spent quota of its own and a file that may grow no further.
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_NO_RECORD = (OSError, ValueError, RecursionError, TypeError, KeyError)  # what reading one may raise

_log = logging.getLogger(__name__)


def is_valid_name(name: str) -> bool:
    """Whether the store can hold an adapter of this name."""
    return _NAME.fullmatch(name) is not None


def check_name(name: str) -> None:
    """Raises BadRequest for a name that the store cannot hold."""
    if not is_valid_name(name):
        raise BadRequest(
            f"{name!r:.80} cannot name an adapter: use 1 to 63 of a-z, 0-9, '.', '_' and '-', beginning with a letter "
            f"or a digit.",
            param="name",
        )


@dataclass(frozen=True, slots=True)
class FileDigest:
    """One file of an adapter, as far as its version is concerned."""

    num_bytes: int
    sha256: bytes  # (32,)


def version_digest(files: Mapping[str, FileDigest]) -> str:
    """The version of an adapter with these files, by name: 64 lower-case hex digits.

    SHA-256 over the files sorted by name, and for each of them: the length of its name as 8 bytes big-endian, the name
    in UTF-8, the length of the file as 8 bytes big-endian, and the 32 bytes of the SHA-256 of its bytes. The bytes
    enter through a hash of their own so that files can be hashed while they arrive, in whatever order.
    """
    total = hashlib.sha256()
    for name in sorted(files):
        encoded = name.encode()
        total.update(struct.pack(">Q", len(encoded)) + encoded)
        total.update(struct.pack(">Q", files[name].num_bytes) + files[name].sha256)
    return total.hexdigest()


@dataclass(frozen=True, slots=True)
class FolderDigest:
    """An adapter folder's version, and the bytes of its content files."""

    digest: str
    content_bytes: int


def content_files(folder: Path) -> tuple[Path, ...]:
    """The files of an adapter folder that make its version. Raises AdapterRejected where one is missing."""
    for name in REQUIRED_FILES:
        if not (folder / name).is_file():
            raise AdapterRejected(
                f"{folder} has no {name}: an adapter is a folder with {CONFIG_FILE} and {WEIGHTS_FILE}, as PEFT's "
                f"save_pretrained writes it. Weights in another format must be converted to safetensors first, and the "
                f"adapter.safetensors of AdapterHub's library must be renamed."
            )
    return tuple(folder / name for name in CONTENT_FILES if (folder / name).is_file())


def folder_digest(folder: Path) -> FolderDigest:
    """Reads and hashes a whole adapter folder. Raises AdapterRejected where a file is missing."""
    files = {path.name: _file_digest(path) for path in content_files(folder)}
    return FolderDigest(version_digest(files), sum(file.num_bytes for file in files.values()))


def folder_signature(folder: Path) -> tuple[tuple[str, int, int, int], ...]:
    """What changes when the files do, without reading them: name, inode, bytes, mtime_ns. () where there is none."""
    with suppress(FileNotFoundError):
        stats = ((path.name, path.stat()) for path in sorted(folder.iterdir()))
        return tuple((name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats)
    return ()


def unreadable(error: OSError) -> StoreUnreachable:
    """What to raise where the operating system does not give an adapter's files: it may do so again."""
    return StoreUnreachable(
        f"The adapter's files cannot be read ({error.strerror or error}): ask again; if that does not help, the "
        f"server's disk needs a look."
    )


def base_model_of(folder: Path) -> str | None:
    """The base that an adapter folder says it was trained on, or None where it does not say."""
    return _text_in(folder / CONFIG_FILE, "base_model_name_or_path")


def base_fingerprint_of(folder: Path) -> str | None:
    """The fingerprint of the base that an adapter folder's manifest says it was made for, or None."""
    return _text_in(folder / MANIFEST_FILE, "base_fingerprint")


def _text_in(path: Path, key: str) -> str | None:
    """A string in a JSON object on disk, fit to be shown; None where there is none that can be read."""
    try:
        with path.open("rb") as file:
            content = json.loads(file.read(_MAX_TEXT_FILE_BYTES))  # of a larger one a part, which is no JSON
    except (OSError, ValueError, RecursionError):
        return None
    value = content.get(key) if isinstance(content, dict) else None
    if not isinstance(value, str) or not value:
        return None
    # JSON can escape half of a surrogate pair, which no answer in UTF-8 can repeat.
    return value[:_MAX_TEXT_CHARS].encode(errors="replace").decode()


@dataclass(frozen=True, slots=True)
class Record:
    """What is remembered of a stored version beside its content; None where nobody has lowered it yet."""

    created: int  # Unix time
    method: str | None = None
    rank: int | None = None
    num_parameters: int | None = None
    num_sites: int | None = None
    content_bytes: int = 0  # set by the store
    base_model: str | None = None  # as its config names it
    base_fingerprint: str | None = None  # of the base that its maker says it is for
    checked_name: str | None = None  # the base that it was validated against, by whoever stored it last
    checked_fingerprint: str | None = None
    warnings: tuple[str, ...] = ()
    source: str | None = None  # that it was fetched from, if it was
    source_revision: str | None = None
    owner: str | None = None  # set by the store: whose it is; None: the operator's

    def with_base_of(self, other: "Record") -> "Record":
        """This record with what another says about the base, where that says anything."""
        checked = other if other.checked_name is not None else self
        return dataclasses.replace(
            self,
            base_fingerprint=other.base_fingerprint or self.base_fingerprint,
            checked_name=checked.checked_name,
            checked_fingerprint=checked.checked_fingerprint,
        )


@dataclass(frozen=True, slots=True)
class StoredVersion:
    """One version on disk."""

    name: str
    digest: str
    folder: Path
    record: Record


@dataclass(frozen=True, slots=True)
class StoredName:
    """A name, the version that it means now, and all its versions, the current one last."""

    name: str
    current: str
    versions: tuple[StoredVersion, ...]


@dataclass(frozen=True, slots=True)
class _Index:
    current: str
    versions: tuple[str, ...]  # in the order in which they became current; what is not listed is not stored

    def with_current(self, digest: str) -> "_Index":
        return _Index(digest, (*(known for known in self.versions if known != digest), digest))

    def without(self, digest: str) -> "_Index":
        return _Index(self.current, tuple(known for known in self.versions if known != digest))


class _Broken(Exception):
    """A folder in the store that does not hold together; the message says how."""


class Store:
    """The store folder. Safe for many threads and for many processes; every call reads the disk."""

    is_shared = False  # a server reads it once, and keeps others from changing it: see `presence`

    def __init__(self, root: Path, *, create: bool, limits: StoreLimits | None = None) -> None:
        """Opens `root` and clears what a crash left in it. Raises StartupRefused if it is missing and not `create`.

        Uploads that would pass `limits` raise StorageFull; there are none if None.
        """
        if create:
            with suppress(OSError):  # what went wrong shows in the next line
                root.mkdir(parents=True, exist_ok=True)
        if not root.is_dir():
            raise StartupRefused(f"The adapter store {root} is not a folder: create it, or name another with --store.")
        self.root = root.resolve()
        self.room = StoreRoom(self.root, limits or StoreLimits())
        self._incoming_root = self.root / INCOMING_FOLDER
        self._sound: dict[Path, int] = {}  # by folder, the signature of files that were held to its digest
        with self._exclusive():
            self._clear_incoming()
            for name in self._entry_names():
                self._clear_unlisted(name)

    # Reading

    def names(self) -> tuple[str, ...]:
        """The names in the store, sorted."""
        return tuple(stored.name for stored in self.scan())

    def scan(self) -> tuple[StoredName, ...]:
        """Every name that is whole, sorted by name. A broken entry is left out, and logged with what is wrong."""
        found = []
        for name in self._entry_names():
            try:
                found.append(self._read_name(name))
            except _Broken as broken:
                _log.warning("The store entry %s is left out: %s", self.root / name, broken)
        return tuple(found)

    def current(self, name: str) -> str:
        """The digest of the version that the name means. Raises AdapterNotFound."""
        return self._stored_name(name).current

    def versions(self, name: str) -> tuple[StoredVersion, ...]:
        """The versions of a name, the current one last. Raises AdapterNotFound."""
        return self._stored_name(name).versions

    def folder(self, name: str, digest: str) -> Path:
        """The folder of one version. Raises AdapterNotFound."""
        for version in self.versions(name):
            if version.digest == digest:
                return version.folder
        raise AdapterNotFound(f"The adapter {name!r} has no version {digest[:12]!r} in the store.", param="adapter")

    @property
    def location(self) -> str:
        """What stands after --store."""
        return str(self.root)

    def close(self) -> None:
        """Nothing is brought here from elsewhere."""

    def reading(self, folder: Path) -> AbstractContextManager[None]:
        """Around the reading of a version's files, which are first held to its digest.

        Raises StoreUnreachable where the disk does not give them, AdapterDamaged where they are not what was stored.
        """
        if folder.parent.parent == self.root and _DIGEST.fullmatch(folder.name) and not self._is_sound(folder):
            raise AdapterDamaged(
                f"The files of {label(folder.name)} in the store are damaged: upload the adapter again, or roll it "
                f"back to an earlier version.",
                param="adapter",
            )
        return nullcontext()

    def _is_sound(self, folder: Path) -> bool:
        """Whether the files are those of the version; read once, unless they change. Raises StoreUnreachable."""
        try:
            signature = hash(folder_signature(folder))
            if self._sound.get(folder) == signature:
                return True
            is_sound = folder_digest(folder).digest == folder.name
        except AdapterRejected:
            is_sound = False
        except OSError as error:
            _log.warning("The adapter in %s cannot be read: %s", folder, error)
            raise unreadable(error) from error
        if is_sound:
            self._sound[folder] = signature
        elif not folder.parent.is_dir():
            raise StoreUnreachable(f"The adapter store {self.root} is not there: mount it again, or restore it.")
        return is_sound

    # Writing

    def staged(self, incoming: "Incoming", name: str, *, replace: bool) -> AbstractContextManager[None]:
        """Around `put`: does what takes long and needs no lock, which here is nothing."""
        return nullcontext()

    def incoming(self, *, max_bytes: int | None = None) -> "Incoming":
        """A place for one upload of at most `max_bytes` (no limit if None); leave it as a context manager."""
        scratch = self._scratch()
        try:
            return Incoming(scratch, max_bytes, self.room.claim())
        except GraftError:
            scratch.remove()
            raise

    def put(self, incoming: "Incoming", name: str, record: Record, *, replace: bool) -> tuple[StoredVersion, bool]:
        """Makes the upload the current version of `name`; whether that changed what the name means comes with it.

        Of content that is there already the files stay, and its record learns what this one says about the base. Raises
        Conflict if the name exists with other content and not `replace`. The upload is used up if this returns.
        """
        check_name(name)
        digest = incoming.digest()
        with _disk_errors(self.root), self._exclusive():
            record = dataclasses.replace(record, content_bytes=incoming.num_bytes, owner=self._owner_for(name))
            incoming.write_record(record)
            with self.room.settling(incoming.claim):
                created = self._install(incoming, name, digest, replace)
            self._renew_record(incoming.scratch, self.root / name / digest, record)
        incoming.discard()
        return self._read_version(name, digest), created

    def add_folder(self, folder: Path, name: str, *, replace: bool = False) -> tuple[StoredVersion, bool]:
        """Copies a local PEFT folder into the store, as `put` does. Raises AdapterRejected where a file is missing."""
        check_name(name)
        record = Record(
            created=int(time.time()), base_model=base_model_of(folder), base_fingerprint=base_fingerprint_of(folder)
        )
        with self.incoming() as incoming:
            incoming.copy(folder)
            return self.put(incoming, name, record, replace=replace)

    def make_current(self, name: str, digest: str) -> None:
        """Makes a version that the name has already the one that it means. Raises AdapterNotFound."""
        with _disk_errors(self.root), self._exclusive():
            self._check_may_change(name)
            self.folder(name, digest)
            index = self._read_index(name)
            if index.current == digest:
                return
            with ExitStack() as at_the_end:
                scratch = self._scratch_locked(at_the_end)
                self._write_index(self.root / name, index.with_current(digest), scratch)

    def discard(self, name: str) -> tuple["Discarded", ...]:
        """Takes a name and its versions out of the store at once; each one's files stay readable until removed.

        Raises AdapterNotFound.
        """
        with _disk_errors(self.root), self._exclusive():
            self._check_may_change(name)
            versions = self._stored_name(name).versions
            with ExitStack() as on_failure:
                doomed = self._scratch_locked(on_failure)
                kept = [(version.digest, self._scratch_locked(on_failure)) for version in versions]
                os.rename(self.root / name, doomed.folder / "name")
                _sync_folder(self.root)
                for digest, scratch in kept:
                    os.rename(doomed.folder / "name" / digest, scratch.version_folder)
                on_failure.pop_all()
        doomed.remove()
        for digest, _ in kept:
            self._sound.pop(self.root / name / digest, None)
        return tuple(Discarded(digest, scratch) for digest, scratch in kept)

    def delete(self, name: str) -> None:
        """Removes a name with all its versions. Raises AdapterNotFound."""
        for version in self.discard(name):
            version.remove()

    def delete_version(self, name: str, digest: str) -> None:
        """Removes one version. Raises AdapterNotFound, and Conflict for the current one."""
        self.discard_version(name, digest).remove()

    def discard_version(self, name: str, digest: str) -> "Discarded":
        """Takes one version out of the store at once; its files stay readable until removed.

        Raises AdapterNotFound, and Conflict for the current one.
        """
        with _disk_errors(self.root), self._exclusive():
            self._check_may_change(name)
            folder = self.folder(name, digest)
            index = self._read_index(name)
            if index.current == digest:
                raise Conflict(
                    f"{digest[:12]} is the current version of {name!r}: delete the name, or replace it first.",
                    param="adapter",
                )
            with ExitStack() as on_failure:
                scratch = self._scratch_locked(on_failure)
                self._write_index(self.root / name, index.without(digest), scratch)
                os.rename(folder, scratch.version_folder)
                on_failure.pop_all()
        self._sound.pop(folder, None)
        return Discarded(digest, scratch)

    # The steps of a change; each runs under the store's lock

    def _owner_for(self, name: str) -> str | None:
        """Whose a new version of a name is. Raises Conflict where the name is another owner's."""
        index = self._index_of(name)
        owner = self._owner(name, index) if index is not None else None
        return current_asker().owner_for(name, owner, exists=index is not None)

    def _check_may_change(self, name: str) -> None:
        """Raises what is raised for a name that there is not where it is another owner's now."""
        index = self._index_of(name)
        if index is not None:  # else there is nothing to change, which is told by who looks for it
            current_asker().check_may_change(name, self._owner(name, index))

    def _owner(self, name: str, index: _Index) -> str | None:
        """Whose a name is: the current version says so, or the last one whose record is left."""
        for digest in reversed(index.versions):
            with suppress(*_NO_RECORD):
                return _recorded(self.root / name / digest).owner
        return None

    def _index_of(self, name: str) -> _Index | None:
        """The index of a name; None where there is none that can be read."""
        try:
            return self._read_index(name) if is_valid_name(name) else None
        except _Broken:
            return None

    def _install(self, incoming: "Incoming", name: str, digest: str, replace: bool) -> bool:
        if not (self.root / name).exists():
            self._install_first(incoming, name, digest)
            return True
        try:
            index = self._read_index(name)
        except _Broken as broken:
            raise Conflict(
                f"{self.root / name} is in the way and is no adapter of this store ({broken}): remove it, or choose "
                f"another name.",
                param="name",
            ) from broken
        if _is_intact(self.root / name / index.current):
            if index.current == digest:
                if self._is_sound(self.root / name / digest):
                    return False
            elif not replace:
                raise taken(name, index.current)
        self._install_next(incoming, name, digest, index)
        return True

    def _install_first(self, incoming: "Incoming", name: str, digest: str) -> None:
        """A new name is built whole beside the store and appears by one rename."""
        finished = incoming.scratch.folder / "name"
        finished.mkdir()
        os.rename(incoming.folder, finished / digest)
        self._write_index(finished, _Index(digest, (digest,)), incoming.scratch)
        os.rename(finished, self.root / name)
        _sync_folder(self.root)

    def _install_next(self, incoming: "Incoming", name: str, digest: str, index: _Index) -> None:
        """A further version comes first, unlisted, and then the index that lists it."""
        target = self.root / name / digest
        is_added = digest not in index.versions or not (_is_intact(target) and self._is_sound(target))
        if is_added:
            if os.path.lexists(target):
                os.rename(target, incoming.scratch.folder / "replaced")
            os.rename(incoming.folder, target)
        try:
            self._write_index(self.root / name, index.with_current(digest), incoming.scratch)
        except OSError:
            if is_added and self._read_index(name) == index:  # what no index lists must not stay
                os.rename(target, incoming.folder)
            raise

    def _renew_record(self, scratch: "_Scratch", folder: Path, record: Record) -> None:
        """The base is no part of a version's identity, so what is said of it later may change the record.

        The owner is the name's, whatever a record says that was lost.
        """
        known = _read_record(folder)
        renewed = dataclasses.replace(known.with_base_of(record), owner=record.owner)
        if renewed != known:
            draft = scratch.folder / _RECORD_FILE
            _write_json(draft, dataclasses.asdict(renewed))
            os.rename(draft, folder / _RECORD_FILE)
            _sync_folder(folder)

    def _write_index(self, folder: Path, index: _Index, scratch: "_Scratch") -> None:
        _sync_folder(folder)
        draft = scratch.folder / _INDEX_FILE
        _write_json(draft, dataclasses.asdict(index))
        os.rename(draft, folder / _INDEX_FILE)
        _sync_folder(folder)

    def _scratch(self) -> "_Scratch":
        with _disk_errors(self.root), self._exclusive():
            return self._scratch_locked(ExitStack())

    def _scratch_locked(self, ending: ExitStack) -> "_Scratch":
        """A new scratch folder, which `ending` removes if it is closed."""
        self._incoming_root.mkdir(exist_ok=True)
        scratch = _Scratch(self._incoming_root / secrets.token_hex(8))
        ending.callback(scratch.remove)
        return scratch

    def _clear_incoming(self) -> None:
        for leftover in sorted(self._incoming_root.iterdir()) if self._incoming_root.is_dir() else ():
            if not leftover.is_dir() or leftover.is_symlink():
                with suppress(OSError):  # a store that cannot be written can still be read
                    leftover.unlink()
            elif (lock := try_lock(leftover)) is not None:  # else another process is at work in it
                shutil.rmtree(leftover, ignore_errors=True)
                os.close(lock)

    def _clear_unlisted(self, name: str) -> None:
        """Removes the versions that a crash left between their rename and their index."""
        try:
            listed = self._read_index(name).versions
        except _Broken:
            return  # without an index nothing says what is left over and what is precious
        for entry in (self.root / name).iterdir():
            if _DIGEST.fullmatch(entry.name) and entry.name not in listed and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """One change at a time, over all threads and processes: a lock on the root that dies with its holder."""
        root = os.open(self.root, os.O_RDONLY)
        try:
            fcntl.flock(root, fcntl.LOCK_EX)
            yield
        finally:
            os.close(root)

    # The layout

    def _entry_names(self) -> list[str]:
        """What may be an adapter: everything but hidden entries and plain files (a README, say)."""
        with os.scandir(self.root) as entries:
            return sorted(e.name for e in entries if not e.name.startswith(".") and (e.is_symlink() or e.is_dir()))

    def _stored_name(self, name: str) -> StoredName:
        if not is_valid_name(name) or not os.path.lexists(self.root / name):
            raise AdapterNotFound(f"The store has no adapter {name!r}.", param="adapter")
        try:
            return self._read_name(name)
        except _Broken as broken:
            raise AdapterNotFound(f"The store entry {name!r} is broken: {broken}.", param="adapter") from broken

    def _read_name(self, name: str) -> StoredName:
        if not is_valid_name(name):
            raise _Broken("its name cannot name an adapter")
        index = self._read_index(name)
        if not _is_intact(self.root / name / index.current):
            raise _Broken(f"the files of its current version {index.current[:12]} are missing or are symbolic links")
        whole = [digest for digest in index.versions if _is_intact(self.root / name / digest)]
        for digest in set(index.versions) - set(whole):
            _log.warning("The version %s of the adapter %s has lost its files.", digest[:12], name)
        return StoredName(name, index.current, tuple(self._read_version(name, digest) for digest in whole))

    def _read_version(self, name: str, digest: str) -> StoredVersion:
        folder = self.root / name / digest
        return StoredVersion(name, digest, folder, _read_record(folder))

    def _read_index(self, name: str) -> _Index:
        folder = self.root / name
        if folder.is_symlink():
            raise _Broken("it is a symbolic link; the store holds adapters as plain folders")
        try:
            content = json.loads((folder / _INDEX_FILE).read_bytes())
            index = _Index(content["current"], tuple(content["versions"]))
        except (OSError, ValueError, RecursionError, TypeError, KeyError) as error:
            raise _Broken(f"its {_INDEX_FILE} cannot be read: {error!r}") from error
        digests = all(isinstance(digest, str) and _DIGEST.fullmatch(digest) for digest in index.versions)
        if not digests or index.current not in index.versions:
            raise _Broken(f"its {_INDEX_FILE} names something that is no version of it")
        return index


class Incoming:
    """One upload: files that are hashed and counted while they are written. Not for use by two threads at once.

    As a context manager it removes on leaving whatever was not put into the store.
    """

    def __init__(self, scratch: "_Scratch", max_bytes: int | None, claim: Claim) -> None:
        self.scratch = scratch
        self.claim = claim
        self.folder = scratch.version_folder
        with _disk_errors(self.folder):
            self.folder.mkdir()
        self.num_bytes = 0
        self._max_bytes = max_bytes
        self._files: dict[str, FileDigest] = {}

    def open_file(self, filename: str) -> "IncomingFile":
        """Opens one of CONTENT_FILES for writing. Raises BadRequest for any other name, and for one sent twice."""
        if filename not in CONTENT_FILES:
            raise BadRequest(f"{filename!r} is no file of an adapter: send {', '.join(CONTENT_FILES)}.", param="file")
        if (self.folder / filename).exists():
            raise BadRequest(f"{filename} was sent twice: send each file once.", param="file")
        with _disk_errors(self.folder):
            return IncomingFile(self, self.folder / filename)

    @property
    def workspace(self) -> Path:
        """A folder that vanishes with the upload, for what is made on the way to its files."""
        return self.scratch.folder

    def expect(self, num_bytes: int) -> None:
        """Refuses bytes that will follow before they come. Raises TooLarge, and StorageFull where there is no room."""
        self._check_size(self.num_bytes + num_bytes)
        self.claim.expect(num_bytes)

    def copy(self, folder: Path) -> None:
        """Writes the content files of a local adapter folder. Raises AdapterRejected where one is missing."""
        paths = content_files(folder)
        self.expect(sum(path.stat().st_size for path in paths))
        for path in paths:
            with path.open("rb") as source, self.open_file(path.name) as target:
                while chunk := source.read(_CHUNK_BYTES):
                    target.write(chunk)

    @property
    def files(self) -> Mapping[str, FileDigest]:
        """The files that are complete, by name."""
        return self._files

    def digest(self) -> str:
        """The version of what was written. Raises BadRequest where a required file is missing or still open."""
        for name in REQUIRED_FILES:
            if name not in self._files:
                raise BadRequest(f"The upload has no {name}: send both {CONFIG_FILE} and {WEIGHTS_FILE}.", param="file")
        return version_digest(self._files)

    def discard(self) -> None:
        """Removes what was written; does nothing the second time."""
        self.scratch.remove()
        self.claim.end()

    def count(self, num_bytes: int) -> None:
        """Counts bytes about to be written. Raises TooLarge when the upload outgrows its limit, or StorageFull."""
        self.num_bytes += num_bytes
        self._check_size(self.num_bytes)
        self.claim.write(num_bytes)

    def _check_size(self, num_bytes: int) -> None:
        if self._max_bytes is not None and num_bytes > self._max_bytes:
            raise TooLarge(
                f"The upload is larger than {self._max_bytes} bytes: upload a smaller adapter, or start the server "
                f"with a larger --max-upload-bytes.",
                param="weights",
            )

    def finish_file(self, filename: str, digest: FileDigest) -> None:
        """Takes note of a file that is complete."""
        self._files[filename] = digest

    def write_record(self, record: Record) -> None:
        """Writes the bookkeeping beside the content, and makes the folder's entries durable."""
        _write_json(self.folder / _RECORD_FILE, dataclasses.asdict(record))
        _sync_folder(self.folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.discard()


class IncomingFile:
    """A file of an upload; leave it as a context manager. One left by an exception does not count as sent."""

    def __init__(self, incoming: Incoming, path: Path) -> None:
        self._incoming = incoming
        self._path = path
        self._file: BinaryIO = path.open("xb")
        self._sha256 = hashlib.sha256()
        self._num_bytes = 0

    def write(self, chunk: bytes) -> None:
        """Appends to the file. Raises TooLarge when the upload outgrows its limit, StorageFull when the disk does."""
        self._incoming.count(len(chunk))
        self._sha256.update(chunk)
        self._num_bytes += len(chunk)
        with _disk_errors(self._path):
            self._file.write(chunk)

    def close(self) -> None:
        """Makes the file durable and takes it into the upload's digest."""
        with _disk_errors(self._path), self._file:
            _sync_file(self._file)
        self._incoming.finish_file(self._path.name, FileDigest(self._num_bytes, self._sha256.digest()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is None:
            self.close()
        else:
            with suppress(OSError):  # a full disk refuses the rest of the buffer, too; the file is closed all the same
                self._file.close()


class Discarded:
    """A version that no name means any more: readable in `folder` until removed, by the next opening at the latest."""

    def __init__(self, digest: str, scratch: "_Scratch") -> None:
        self.digest = digest
        self.folder = scratch.version_folder
        self._scratch = scratch

    def remove(self) -> None:
        """Removes the files; does nothing the second time."""
        self._scratch.remove()


class _Scratch:
    """A folder in `.incoming`, locked for as long as this object works in it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.version_folder = folder / "version"
        self._lock: int | None = try_lock(folder)

    def remove(self) -> None:
        if self._lock is not None:
            shutil.rmtree(self.folder, ignore_errors=True)  # what cannot be removed now is cleared by the next opening
            os.close(self._lock)
            self._lock = None


def taken(name: str, current: str) -> Conflict:
    """What to raise where a name means other content than what comes, and nobody said that it may be replaced."""
    return Conflict(
        f"The adapter {name!r} exists with other content (version {current[:12]}): choose another name, or send "
        f"replace=true to make this its new version.",
        param="name",
    )


def try_lock(folder: Path) -> int | None:
    """A descriptor that locks the folder until it is closed, or None if another holds it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


@contextmanager
def _disk_errors(where: Path) -> Iterator[None]:
    """Turns the operating system's refusals into a sentence."""
    try:
        yield
    except OSError as error:
        kind, code = (StorageFull, "disk_full") if error.errno in FULL_DISK else (GraftError, "store_unwritable")
        raise kind(
            f"The adapter store cannot be written at {where} ({error.strerror or error}): free some space or mend its "
            f"permissions, or start with another --store.",
            code=code,
        ) from error


def _file_digest(path: Path) -> FileDigest:
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256")
        return FileDigest(file.tell(), sha256.digest())


def _is_intact(folder: Path) -> bool:
    """Whether a version's folder and its required files are there, and nothing in it is a symbolic link."""
    try:
        is_folder = stat.S_ISDIR(os.lstat(folder).st_mode)
        modes = {name: os.lstat(folder / name).st_mode for name in os.listdir(folder)}
    except OSError:
        return False
    has_all = all(stat.S_ISREG(modes.get(name, 0)) for name in REQUIRED_FILES)
    return is_folder and has_all and not any(stat.S_ISLNK(mode) for mode in modes.values())


def _read_record(folder: Path) -> Record:
    """The record of a version; one that cannot be read costs what it said, and a warning, not the adapter."""
    try:
        return _recorded(folder)
    except _NO_RECORD as error:
        _log.warning("The record of %s cannot be read: %r", folder, error)
        content_bytes = sum(path.stat().st_size for path in content_files(folder))
        return Record(
            int(folder.stat().st_mtime),
            content_bytes=content_bytes,
            base_model=base_model_of(folder),
            base_fingerprint=base_fingerprint_of(folder),
        )


def _recorded(folder: Path) -> Record:
    """The record of a version. Raises one of _NO_RECORD."""
    return record_from(json.loads((folder / _RECORD_FILE).read_bytes()))


def record_from(content: Mapping[str, Any]) -> Record:
    """A record from its JSON object. Raises ValueError, TypeError or KeyError for what is none."""
    return Record(
        created=int(content["created"]),
        method=content.get("method"),
        rank=content.get("rank"),
        num_parameters=content.get("num_parameters"),
        num_sites=content.get("num_sites"),
        content_bytes=int(content.get("content_bytes", 0)),
        base_model=content.get("base_model"),
        base_fingerprint=content.get("base_fingerprint"),
        checked_name=content.get("checked_name"),
        checked_fingerprint=content.get("checked_fingerprint"),
        warnings=tuple(content.get("warnings", ())),
        source=content.get("source"),
        source_revision=content.get("source_revision"),
        owner=content.get("owner"),
    )


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    with path.open("wb") as file:
        file.write(json.dumps(value, indent=2).encode() + b"\n")
        _sync_file(file)


def _sync_file(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Makes the folder's entries durable: a rename may otherwise be forgotten by a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""The file of keys: read with every mistake named, and changed without touching what people wrote around a key.

Owns the format, a YAML list with an entry per key. Knows nothing about who uses the keys.
"""

import fcntl
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError

from server.adapters.remote.address import AllowList
from server.api.keys.key import Key, Limits, Scope, with_owners_limits
from server.ground.errors import BadRequest, NotFound, StartupRefused

MAX_FILE_BYTES = 1 << 20
MAX_KEYS = 2000
_MAX_PATTERNS = 64
_HASH = "sha256:"
# A tenth of the time where PyYAML has its part in C: a file may be read again while requests run.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_Count = Annotated[int, Field(ge=1, le=2**53)]
_Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
_Pattern = Annotated[str, Field(pattern=r"^[a-z0-9._*?-]{1,63}$")]


class KeysUnreadable(StartupRefused):
    """The file could not be opened or read; the next try may succeed though nobody changes it."""


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _LimitsEntry(_Entry):
    requests_per_minute: _Count | None = None
    concurrent_requests: _Count | None = None
    tokens_per_minute: _Count | None = None
    tokens_per_day: _Count | None = None
    storage_bytes: Annotated[ByteSize, Field(ge=1)] | None = None
    adapters: _Count | None = None


class _KeyEntry(_Entry):
    name: _Word
    hash: Annotated[str, Field(pattern=rf"^{_HASH}[0-9a-f]{{64}}$")]
    scopes: Annotated[list[Annotated[Scope, Field(strict=False)]], Field(min_length=1)]
    owner: _Word | None = None
    adapters: Annotated[list[_Pattern], Field(max_length=_MAX_PATTERNS)] | None = None
    sources: Annotated[list[str], Field(max_length=_MAX_PATTERNS)] = []
    limits: _LimitsEntry = _LimitsEntry()


def read_keys(path: Path) -> tuple[Key, ...]:
    """The keys of a file. Raises StartupRefused with a line for each mistake in it."""
    return parse_keys(read_text(path), str(path))


def read_text(path: Path) -> str:
    """Raises KeysUnreadable for a file that cannot be read, StartupRefused for one that is too large or no text."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        text = content.decode()
    except OSError as error:
        raise KeysUnreadable(f"--api-keys {path} cannot be read: {error}. graft keys add makes one.") from None
    except UnicodeDecodeError as error:
        raise StartupRefused(f"--api-keys {path} is not UTF-8: {error}.") from None
    if len(content) > MAX_FILE_BYTES:
        raise StartupRefused(f"--api-keys {path} has more than {MAX_FILE_BYTES} bytes: keep fewer keys.")
    return text


def parse_keys(text: str, where: str) -> tuple[Key, ...]:
    """As `read_keys`, of a text; `where` stands before each mistake."""
    listed = _loaded(text, where)
    if not isinstance(listed, list):  # an empty file is one that is being written: [] says that there are no keys
        raise StartupRefused(f"{where} must be a list of keys: '- name: ...' begins each of them, [] is an empty list.")
    if len(listed) > MAX_KEYS:
        raise StartupRefused(f"{where} has {len(listed)} keys; at most {MAX_KEYS} are taken.")
    keys: list[Key] = []
    mistakes: list[str] = []
    for number, entry in enumerate(listed, 1):
        try:
            keys.append(_key(_KeyEntry.model_validate(entry)))
        except ValidationError as error:
            mistakes += [f"{where}, {_called(number, entry)}: {said}" for said in _sentences(error)]
        except StartupRefused as error:
            mistakes.append(f"{where}, {_called(number, entry)}: {error.message}")
    mistakes += [f"{where}: {said}" for said in _doubles(keys)]
    if mistakes:
        raise StartupRefused("\n".join(mistakes))
    return with_owners_limits(keys)


def _loaded(text: str, where: str) -> object:
    """What a text says as YAML. Raises StartupRefused, also where it says a field twice: YAML would take the last."""
    try:
        loader = _LOADER(text)
        try:
            document = loader.get_single_node()
            _check_fields(document, where)
            return loader.construct_document(document) if document is not None else None
        finally:
            loader.dispose()
    # PyYAML lets through what its own reading of dates, numbers and truths raises: '2026-99-99' is a ValueError.
    except (
        yaml.YAMLError,
        RecursionError,
        ArithmeticError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
    ) as error:
        raise StartupRefused(
            f"{where} is not YAML: {_one_line(error)}. Texts that look like dates want quotes."
        ) from None


def _check_fields(document: yaml.Node | None, where: str) -> None:
    nodes, seen = [document], set[int]()
    while nodes:
        node = nodes.pop()
        if id(node) in seen or not isinstance(node, yaml.CollectionNode):
            continue
        seen.add(id(node))  # an alias may lead back to it
        if not isinstance(node, yaml.MappingNode):
            nodes += node.value
            continue
        nodes += [value for _, value in node.value]
        for field, count in Counter(name.value for name, _ in node.value if isinstance(name, yaml.ScalarNode)).items():
            if count > 1:
                line = node.start_mark.line + 1
                raise StartupRefused(f"{where}, line {line}: {field!r:.80} is there {count} times; say it once.")


def _key(entry: _KeyEntry) -> Key:
    scopes = frozenset(entry.scopes)
    everything = ("*",) if Scope.ADMIN in scopes else ()
    return Key(
        name=entry.name,
        digest=bytes.fromhex(entry.hash.removeprefix(_HASH)),
        scopes=scopes,
        owner=entry.owner or entry.name,
        adapters=everything if entry.adapters is None else tuple(entry.adapters),
        sources=AllowList(entry.sources),
        limits=Limits(**entry.limits.model_dump()),
    )


def _called(number: int, entry: object) -> str:
    name = entry.get("name") if isinstance(entry, Mapping) else None
    return f"key {number} ({name!r:.80})" if isinstance(name, str) else f"key {number}"


def _sentences(error: ValidationError) -> Iterator[str]:
    """What is wrong, without the value of a hash: it might be a key that was put there by mistake."""
    for problem in error.errors():
        field = ".".join(map(str, problem["loc"])) or "the entry"
        if problem["type"] == "extra_forbidden":
            yield f"{field} is not known here; known are {', '.join(_known(problem['loc']))}."
        elif problem["type"] == "model_type":
            yield "it must have the fields of a key: name, hash, scopes, ..."
        elif field == "hash" and problem["type"] != "missing":
            yield "hash must be sha256: and 64 hex digits, as graft keys add writes it; never the key itself."
        else:
            yield f"{field}: {problem['msg'].removeprefix('Value error, ')}."


def _known(location: Sequence[str | int]) -> list[str]:
    return list((_LimitsEntry if location[0] == "limits" else _KeyEntry).model_fields)


def _doubles(keys: Sequence[Key]) -> Iterator[str]:
    names, digests = Counter(key.name for key in keys), Counter(key.digest for key in keys)
    yield from (f"two keys are called {name!r}." for name, count in names.items() if count > 1)
    for digest in (digest for digest, count in digests.items() if count > 1):
        shared = ", ".join(key.name for key in keys if key.digest == digest)
        yield f"the keys {shared} have one hash: make each its own."


# Changing


def with_key(text: str, entry: Mapping[str, Any], where: str) -> str:
    """The text with one more key at its end. Raises BadRequest for such a key, StartupRefused for such a file."""
    listed = yaml.safe_dump([dict(entry)], sort_keys=False, allow_unicode=True)
    body = "" if not parse_keys(text or "[]", where) else text.rstrip("\n") + "\n\n"
    try:
        parse_keys(body + listed, where)
    except StartupRefused as error:
        raise BadRequest(f"The key cannot be added: {error.message}") from None
    return body + listed


def without_key(text: str, name: str, where: str) -> str:
    """The text without the lines of one key. Raises NotFound, and StartupRefused for a file that is none."""
    keys = parse_keys(text, where)
    if name not in {key.name for key in keys}:
        raise NotFound(f"{where} has no key {name!r:.80}; graft keys list shows those that there are.")
    if len(keys) == 1:
        return "[]\n"
    document = yaml.compose(text, Loader=_LOADER)
    assert isinstance(document, yaml.SequenceNode)
    nodes = document.value
    at = next(index for index, key in enumerate(keys) if key.name == name)
    lines = text.splitlines(keepends=True)
    first = nodes[at].start_mark.line
    last = nodes[at + 1].start_mark.line if at + 1 < len(nodes) else len(lines)
    rest = "".join(lines[:first] + lines[last:])
    if _names(rest) != {key.name for key in keys} - {name}:
        raise BadRequest(f"{where} has keys that share a line: remove {name!r} by hand.")
    return rest


def _names(text: str) -> set[str] | None:
    """Of the keys in a text; None for a text that is no list of keys."""
    try:
        return {key.name for key in parse_keys(text, "")}
    except StartupRefused:
        return None


@contextmanager
def changing(path: Path) -> Iterator[None]:
    """Nobody else changes the file meanwhile: for its reading and writing together. Waits for who does.

    Raises BadRequest where its folder cannot be locked. The lock is the folder's, since the file is replaced.
    """
    folder = path.resolve().parent
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise BadRequest(f"{path} cannot be written: {folder}: {error.strerror}.") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            raise BadRequest(f"{folder} cannot be locked: {error.strerror}. Keep the keys on a local disk.") from None
        yield
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Replaces the file in one step, readable by its owner alone: a server that looks meanwhile sees one or the other.

    One that was there keeps its owner and mode. Raises BadRequest where it cannot be written, or not for its owner.
    """
    path = path.resolve()  # of a link the file
    try:
        handle, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            if path.exists():
                _make_like(draft, path.stat())
            os.replace(draft, path)
        except BaseException:
            os.unlink(draft)
            raise
    except OSError as error:
        raise BadRequest(f"{path} cannot be written: {error.strerror or error}.") from None


def _make_like(draft: str, old: os.stat_result) -> None:
    new = os.stat(draft)
    if (new.st_uid, new.st_gid) != (old.st_uid, old.st_gid):
        os.chown(draft, old.st_uid, old.st_gid)  # else a server of that user could not read it any more
    os.chmod(draft, old.st_mode & 0o777)


def hash_text(digest: bytes) -> str:
    """A digest as the file has it."""
    return _HASH + digest.hex()


def _one_line(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error))[:300]

"""A tar of an adapter folder, read while it arrives: its content files go to disk, nothing is extracted by name.

Owns what an archive may hold. Knows nothing about HTTP, and of a file's name only whether it is one of the adapter's.

The headers are parsed here and not by `tarfile`, for three reasons. That module pulls, so that each slow client would
hold a thread; this parser is pushed. It reads extended headers into memory whatever size they declare. And it knows
many kinds of members (links, devices, sparse files) none of which an adapter needs. What is left is a block of 512
bytes: POSIX.1-2017, "pax", ustar Interchange Format; GNU tar's long names beside it.
"""

import zlib
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from server.adapters.format.content import CONFIG_FILE, CONTENT_FILES, MANIFEST_FILE
from server.adapters.format.manifest import MAX_MANIFEST_BYTES
from server.api.faces import IncomingFace, IncomingFileFace
from server.ground.errors import BadRequest, TooLarge

_BLOCK = 512
_MAX_EXTENDED_BYTES = 64 * 1024  # of one extended header; the kernel's longest path takes 4096
_MAX_OTHER_BYTES = 1024**2  # of headers, padding and ends beside what the limit of uploads is about
_MAX_HEADERS = 10_000
_MAX_NAMED = 50  # ignored files that the answer names
_INFLATE_BYTES = 1024**2  # what is decompressed at once
_GZIP_MAGIC = b"\x1f\x8b"
_MAX_FILE_BYTES = {CONFIG_FILE: 1024**2, MANIFEST_FILE: MAX_MANIFEST_BYTES}
# Other weights: what an adapter's folder may have beside the ones that are read, and must not be lost in silence.
_WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".pkl",
    ".pickle",
    ".gguf",
    ".h5",
    ".msgpack",
    ".npz",
    ".npy",
)
_KINDS = {
    b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a pipe",
    b"S": "a sparse file",
}  # fmt: skip
_DIRECTORY, _PAX, _GLOBAL_PAX, _LONG_NAME, _LONG_LINK = b"5", b"x", b"g", b"L", b"K"


@dataclass(frozen=True, slots=True)
class Ignored:
    """The files of an archive that are no part of an adapter."""

    num_files: int
    names: tuple[str, ...]  # of the first of them


@dataclass(slots=True)
class _Announced:
    """What extended headers say of the member that follows them."""

    path: str | None = None
    num_bytes: int | None = None


@dataclass(slots=True)
class _Member:
    """The member that is being read, and what becomes of its bytes."""

    left_bytes: int = 0
    padding_bytes: int = 0
    take: Callable[[bytes], None] | None = None  # None: they are dropped
    end: Callable[[], None] | None = None
    extended: bytearray = field(default_factory=bytearray)


class ArchiveReader:
    """Push parser: bytes of a tar, perhaps gzipped, in; files of `incoming` out. Closes an open file when left."""

    def __init__(
        self, incoming: IncomingFace, max_bytes: int, check_room: Callable[[int], None] = lambda num_bytes: None
    ) -> None:
        """`max_bytes` bounds the archive, as it is sent and once it is decompressed.

        `check_room` is told how many bytes the content files have at least, before those of the next one are taken; it
        raises where there is no room for them.
        """
        self._incoming = incoming
        self._check_room = check_room
        self._max_bytes = max_bytes
        self._num_sent_bytes = self._num_bytes = 0
        self._start = bytearray()  # until it is known whether this is gzip
        self._inflate: zlib._Decompress | None = None
        self._has_begun = False
        self._block = bytearray()  # a header that is not complete
        self._member: _Member | None = None
        self._announced = _Announced()
        self._num_zero_blocks = 0
        self._num_headers = 0
        self._folder: tuple[str, ...] | None = None  # the one in which all content files lie
        self._ignored: list[str] = []
        self._num_ignored = 0
        self._opened = ExitStack()  # holds the file, so that one left by an error does not count as sent

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._opened.__exit__(kind, error, at)

    def write(self, data: bytes) -> None:
        """Takes the next bytes, writing what belongs to files; blocks on the disk."""
        self._num_sent_bytes += len(data)
        self.check_size(self._num_sent_bytes)
        if not self._has_begun:
            self._start += data
            if len(self._start) < len(_GZIP_MAGIC):
                return
            data, self._has_begun = bytes(self._start), True
            if data.startswith(_GZIP_MAGIC):
                self._inflate = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
        if self._inflate is None:
            self._read(data)
        else:
            self._decompress(self._inflate, data)

    def finish(self) -> Ignored:
        """What was left out, once everything is there. Raises BadRequest for an archive that was cut short."""
        is_whole = self._num_zero_blocks >= 2 and not self._block and (self._inflate is None or self._inflate.eof)
        if not is_whole:
            raise _refusal("it ends in the middle: send it again")
        return Ignored(self._num_ignored, tuple(self._ignored))

    # The stream

    def check_size(self, num_bytes: int) -> None:
        """Raises TooLarge for an archive, or a file of it, that has this many bytes and may not."""
        if num_bytes > self._max_bytes + _MAX_OTHER_BYTES:
            raise TooLarge(
                f"The archive is larger than {self._max_bytes} bytes, as it is sent or decompressed: leave out what is "
                f"no part of the adapter, or start the server with a larger --max-upload-bytes.",
                param="archive",
            )

    def _decompress(self, inflate: "zlib._Decompress", data: bytes) -> None:
        while data and not inflate.eof:
            try:
                self._read(inflate.decompress(data, _INFLATE_BYTES))
            except zlib.error as error:
                raise _refusal(f"its compression is broken ({error})") from error
            data = inflate.unconsumed_tail
        if inflate.unused_data.strip(b"\0") or (inflate.eof and data.strip(b"\0")):
            raise _refusal("there is more after the end of its gzip stream: send one stream")

    def _read(self, data: bytes) -> None:
        self._num_bytes += len(data)
        self.check_size(self._num_bytes)
        at = 0
        while at < len(data):
            if self._member is not None:
                at += self._read_member(self._member, memoryview(data)[at:])
                continue
            part = data[at : at + _BLOCK - len(self._block)]
            self._block += part
            at += len(part)
            if len(self._block) == _BLOCK:
                block, self._block = bytes(self._block), bytearray()
                self._read_header(block)

    def _read_member(self, member: _Member, data: memoryview) -> int:
        """Takes what of `data` belongs to the member; how much that was."""
        own = min(member.left_bytes, len(data))
        if own and member.take is not None:
            member.take(bytes(data[:own]))
        member.left_bytes -= own
        padding = min(member.padding_bytes, len(data) - own)
        member.padding_bytes -= padding
        self._end_member_if_over()
        return own + padding

    def _end_member_if_over(self) -> None:
        member = self._member
        if member is not None and not member.left_bytes and not member.padding_bytes:
            self._member = None
            if member.end is not None:
                member.end()

    # Headers

    def _read_header(self, block: bytes) -> None:
        if not any(block):
            self._num_zero_blocks += 1
            return
        if self._num_zero_blocks:
            raise _refusal("there is more after its end: send one archive")
        if not _is_header(block):
            raise _refusal("this is no tar, or a broken one: send a tar of the adapter's folder, as it is or gzipped")
        self._num_headers += 1
        if self._num_headers > _MAX_HEADERS:
            raise _refusal(f"it has more than {_MAX_HEADERS} headers: pack the adapter's folder alone")
        kind, num_bytes = block[156:157], _number(block[124:136])
        if kind in (_PAX, _GLOBAL_PAX, _LONG_NAME, _LONG_LINK):
            self._begin_extended(kind, num_bytes)
        else:
            announced, self._announced = self._announced, _Announced()
            name = announced.path if announced.path is not None else _name_in(block)
            self._begin_file(kind, name, num_bytes if announced.num_bytes is None else announced.num_bytes)
        self._end_member_if_over()

    def _begin_extended(self, kind: bytes, num_bytes: int) -> None:
        if num_bytes > _MAX_EXTENDED_BYTES:
            raise _refusal(f"an extended header of it has {num_bytes} bytes; the limit is {_MAX_EXTENDED_BYTES}")
        member = self._begin(num_bytes)
        member.take = member.extended.extend
        member.end = lambda: self._end_extended(kind, bytes(member.extended))

    def _end_extended(self, kind: bytes, content: bytes) -> None:
        if kind == _LONG_NAME:
            self._announced.path = _text(content)
        elif kind in (_PAX, _GLOBAL_PAX):
            records = _pax_records(content)
            meant = {key for key in records if key in ("path", "size") or key.startswith("GNU.sparse.")}
            if any(key.startswith("GNU.sparse.") for key in meant):
                raise _refusal("it has a sparse file: make it with tar and no --sparse")
            if kind == _GLOBAL_PAX and meant:
                raise _refusal("one header gives all of its files one name or size")
            self._announced.path = records.get("path", self._announced.path)
            if "size" in records:
                self._announced.num_bytes = _decimal(records["size"])

    def _begin_file(self, kind: bytes, name: str, num_bytes: int) -> None:
        parts = _parts(name)
        if kind == _DIRECTORY or (kind in (b"0", b"\0") and name.endswith("/")):
            if num_bytes:
                raise _refusal(f"the folder {_shown(name)} of it has bytes of its own")
            return
        if kind not in (b"0", b"\0"):
            what = _KINDS.get(kind, f"of the kind {kind!r}")
            raise _refusal(f"{_shown(name)} is {what}: pack plain files (tar -h follows links)")
        if not parts:
            raise _refusal("a file of it has no name")
        self.check_size(num_bytes)
        member = self._begin(num_bytes)
        if parts[-1] in CONTENT_FILES:
            self._begin_content(member, parts, num_bytes)
        else:
            self._ignore(name, parts[-1])

    def _begin(self, num_bytes: int) -> _Member:
        self._member = _Member(num_bytes, -num_bytes % _BLOCK)
        return self._member

    def _begin_content(self, member: _Member, parts: tuple[str, ...], num_bytes: int) -> None:
        *folder, filename = parts
        if self._folder is None:
            self._folder = tuple(folder)
        if self._folder != tuple(folder):
            raise _refusal(
                f"it has the files of more than one adapter ({_shown('/'.join(self._folder) or '.')} and "
                f"{_shown('/'.join(folder) or '.')}): pack one folder"
            )
        limit = _MAX_FILE_BYTES.get(filename)
        if limit is not None and num_bytes > limit:
            raise TooLarge(f"{filename} is larger than {limit} bytes.", param=filename)
        file: IncomingFileFace = self._opened.enter_context(self._incoming.open_file(filename))
        self._check_room(self._incoming.num_bytes + num_bytes)  # before it claims what all owners share
        self._incoming.expect(num_bytes)
        member.take, member.end = file.write, self._opened.close

    def _ignore(self, name: str, filename: str) -> None:
        """Takes note of a file that says nothing about the answers. Raises BadRequest for one that may."""
        if filename.lower().endswith(_WEIGHTS) and not filename.startswith("._"):  # "._x" is macOS's note on x
            raise _refusal(
                f"{_shown(name)} may hold weights, which this server would not read: leave it out (tar --exclude), or "
                f"convert or rename it to adapter_model.safetensors"
            )
        self._num_ignored += 1
        if len(self._ignored) < _MAX_NAMED:
            self._ignored.append(_shown(name))


def _is_header(block: bytes) -> bool:
    """Whether the sum of its bytes, its own field taken as spaces, is what it says; of ustar, GNU's or the old form."""
    told = block[148:156].strip(b" \0")
    is_octal = bool(told) and all(digit in b"01234567" for digit in told)
    return is_octal and int(told, 8) == sum(block) - sum(block[148:156]) + 8 * ord(" ")


def _number(digits: bytes) -> int:
    """Octal, or GNU's binary for what has too many digits."""
    if digits[0] == 0x80:
        return int.from_bytes(digits[1:])
    text = digits.strip(b" \0")
    if not all(digit in b"01234567" for digit in text):
        raise _refusal("a size in it is no number")
    return int(text or b"0", 8)


def _decimal(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= 20):
        raise _refusal("a size in it is no number")
    return int(text)


def _name_in(block: bytes) -> str:
    name, prefix = _text(block[:100]), _text(block[345:500]) if block[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _text(field_bytes: bytes) -> str:
    return field_bytes.split(b"\0", 1)[0].decode("utf-8", "replace")


def _pax_records(content: bytes) -> dict[str, str]:
    """Records of the form "<length> <key>=<value>\\n", the length counting all of it."""
    records: dict[str, str] = {}
    while content.strip(b"\0"):
        digits, space, _ = content.partition(b" ")
        length = int(digits) if space and digits.isdigit() and len(digits) < 8 else 0
        record, content = content[len(digits) + 1 : length], content[length:]
        key, equals, value = record.partition(b"=")
        if length <= len(digits) + 1 or not equals or not value.endswith(b"\n"):
            raise _refusal("an extended header of it is malformed")
        if b"\0" in value and key == b"path":
            raise _refusal("a name in it has a zero byte")
        records[key.decode("utf-8", "replace")] = value[:-1].decode("utf-8", "replace")
    return records


def _parts(name: str) -> tuple[str, ...]:
    """A path's parts. Raises BadRequest for one that leads out of the archive."""
    parts = tuple(part for part in name.split("/") if part not in ("", "."))
    if name.startswith("/") or ".." in parts:
        raise _refusal(f"the path {_shown(name)} leads out of it: pack with tar -C FOLDER -c .")
    return parts


def _shown(name: str) -> str:
    shown = "".join(letter if letter.isprintable() else "?" for letter in name)
    return shown if len(shown) <= 120 else f"{shown[:120]}..."


def _refusal(problem: str) -> BadRequest:
    return BadRequest(f"The archive cannot be taken: {problem}.", param="archive", code="invalid_archive")

"""An adapter's upload: a multipart form, or a tar, whose files go to disk, hashed, while they arrive.

Owns the way of a body to disk, and the form: its fields, their sizes, their order (any). Nothing of a file is kept in
memory, and what is written belongs to the store's `Incoming`, which its user discards. Knows nothing about what the
files say.
"""

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Self

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from server.adapters.audit import about
from server.adapters.format.content import CONFIG_FILE, MANIFEST_FILE, WEIGHTS_FILE
from server.adapters.format.manifest import MAX_MANIFEST_BYTES
from server.adapters.served_base import FINGERPRINT
from server.adapters.store.folder_store import check_name
from server.api.archive import ArchiveReader, Ignored
from server.api.body import body_chunks, declared_bytes, discard
from server.api.errors import echo
from server.api.faces import IncomingFace, IncomingFileFace
from server.api.lanes import Lane
from server.ground.errors import BadRequest, GraftError, TooLarge

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

FILES: Mapping[str, str] = {"config": CONFIG_FILE, "weights": WEIGHTS_FILE, "manifest": MANIFEST_FILE}
_TEXTS = ("name", "base_fingerprint")
_REQUIRED = ("name", "config", "weights")
_MAX_FIELD_BYTES: Mapping[str, int] = {
    "name": 1024,
    "base_fingerprint": 1024,
    "config": 1024**2,
    "manifest": MAX_MANIFEST_BYTES,
}
_MAX_FRAME_BYTES = 64 * 1024  # of the form around the files: boundaries, headers, the name
_WRITE_BYTES = 1024**2  # how much is gathered for one trip to a worker thread
_MAX_HEADER_BYTES = 4096

CheckRoom = Callable[[int, str | None], None]  # `Registry.check_room`


@dataclass(frozen=True, slots=True)
class UploadForm:
    """The fields of the form that are no files."""

    name: str
    base_fingerprint: str | None  # of the base that the adapter was made for, if its maker says so


async def receive_upload(
    request: Request, incoming: IncomingFace, max_bytes: int, check_room: CheckRoom, lane: Lane
) -> UploadForm:
    """Write the form's files to `incoming`, in threads of `lane`, and return its other fields.

    `check_room` is asked before the body is read, and again when that has told the name.

    Raises BadRequest for a form that is not as documented, TooLarge above `max_bytes` and StorageFull where its owner
    or the store has no room (both while it arrives), and ClientGone if the client leaves.
    """
    chunks = body_chunks(request.receive)
    try:
        declared = declared_bytes(request.scope)
        if declared > max_bytes + _MAX_FRAME_BYTES:
            raise _too_large(max_bytes)
        _check_is_plain(request)
        announced = max(declared - _MAX_FRAME_BYTES, 0)
        with _Form(_boundary(request), incoming, max_bytes, partial(check_room, announced)) as form:
            await lane.run(check_room, announced, None)  # before it claims what all owners share
            await lane.run(incoming.expect, announced)
            await _feed(form.write, chunks, lane)
            return form.finish()
    except GraftError:
        await discard(chunks)
        raise


async def receive_archive(
    request: Request, incoming: IncomingFace, max_bytes: int, check_room: Callable[[int], None], lane: Lane
) -> Ignored:
    """Write the content files of a tar to `incoming`, in threads of `lane`; what else was in it.

    Raises as `receive_upload` does.
    """
    chunks = body_chunks(request.receive)
    try:
        with ArchiveReader(incoming, max_bytes, check_room) as archive:
            archive.check_size(declared_bytes(request.scope))
            await _feed(archive.write, chunks, lane)
            return archive.finish()
    except GraftError:
        await discard(chunks)
        raise


async def _feed(write: Callable[[bytes], None], chunks: AsyncIterator[bytes], lane: Lane) -> None:
    gathered = bytearray()
    async for chunk in chunks:
        gathered += chunk
        if len(gathered) >= _WRITE_BYTES:
            await lane.run(write, bytes(gathered))
            gathered.clear()
    await lane.run(write, bytes(gathered))


def _check_is_plain(request: Request) -> None:
    """A compressed body is not unpacked: what it grows to is known only afterwards."""
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise BadRequest(f"Send the form as it is: a body with Content-Encoding {echo(encoding)} is not unpacked.")


def _boundary(request: Request) -> bytes:
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise BadRequest("Send the adapter as multipart/form-data with the fields name, config and weights.")
    return options[b"boundary"]


class _Form:
    """Push parser: bytes in, fields and files out. Closes an open file when it is left."""

    def __init__(
        self, boundary: bytes, incoming: IncomingFace, max_bytes: int, check_room_of: Callable[[str], None]
    ) -> None:
        """`check_room_of` is told the adapter's name as soon as it is there."""
        self._incoming = incoming
        self._check_room_of = check_room_of
        self._max_bytes = max_bytes + _MAX_FRAME_BYTES
        self._num_bytes = 0
        self._texts = {field: bytearray() for field in _TEXTS}
        self._seen: set[str] = set()
        self._part = ""
        self._part_bytes = 0
        self._file: IncomingFileFace | None = None
        self._opened = ExitStack()  # holds the file, so that one left by an error does not count as sent
        self._header = (bytearray(), bytearray())  # of the current part: a header's name and value
        self._disposition = b""
        self._is_complete = False
        self._parser = _parser(self, boundary)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._opened.__exit__(kind, error, at)

    def write(self, data: bytes) -> None:
        """Parse the next bytes, writing what belongs to files; blocks on the disk."""
        self._num_bytes += len(data)
        if self._num_bytes > self._max_bytes:
            raise _too_large(self._max_bytes - _MAX_FRAME_BYTES)
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise BadRequest(f"The form is not valid multipart/form-data: {echo(error)}.") from error

    def finish(self) -> UploadForm:
        """The fields that are no files, once everything is there."""
        if not self._is_complete:
            raise BadRequest("The form ends in the middle; send it again.")
        for field in _REQUIRED:
            if field not in self._seen:
                raise BadRequest(f"The form has no field '{field}'.", param=field, code="missing_field")
        return UploadForm(self._text("name"), self._text("base_fingerprint") or None)

    def _text(self, field: str) -> str:
        return self._texts[field].decode("utf-8", "replace")

    # Called by the parser, in the order of the form.

    def begin_part(self) -> None:
        self._disposition = b""

    def add_header_name(self, data: bytes, start: int, end: int) -> None:
        self._header[0].extend(data[start:end])

    def add_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header[1].extend(data[start:end])

    def end_header(self) -> None:
        name, value = (bytes(part) for part in self._header)
        if name.lower() == b"content-disposition":
            self._disposition = value
        self._header = (bytearray(), bytearray())

    def end_headers(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._part = options.get(b"name", b"").decode("utf-8", "replace")
        self._part_bytes = 0
        if self._part not in _TEXTS and self._part not in FILES:
            known = ", ".join((*_TEXTS, *FILES))
            raise BadRequest(f"The form has a field '{echo(self._part)}'; known are {known}.", param=echo(self._part))
        if self._part in self._seen:
            raise BadRequest(f"The form has '{self._part}' twice.", param=self._part)
        self._seen.add(self._part)
        if self._part in FILES:
            self._file = self._opened.enter_context(self._incoming.open_file(FILES[self._part]))

    def add_data(self, data: bytes, start: int, end: int) -> None:
        self._part_bytes += end - start
        limit = _MAX_FIELD_BYTES.get(self._part)
        if limit is not None and self._part_bytes > limit:
            raise TooLarge(f"'{self._part}' is larger than {limit} bytes.", param=self._part)
        if self._file is None:
            self._texts[self._part] += data[start:end]
        else:
            self._file.write(data[start:end])

    def end_part(self) -> None:
        if self._part == "name":
            about(self._text("name"))
            check_name(self._text("name"))
            self._check_room_of(self._text("name"))
        if self._part == "base_fingerprint":
            check_fingerprint(self._text("base_fingerprint"))
        self._opened.close()
        self._file = None

    def end(self) -> None:
        self._is_complete = True


def _parser(form: _Form, boundary: bytes) -> MultipartParser:
    callbacks: MultipartCallbacks = {
        "on_part_begin": form.begin_part,
        "on_part_data": form.add_data,
        "on_part_end": form.end_part,
        "on_header_field": form.add_header_name,
        "on_header_value": form.add_header_value,
        "on_header_end": form.end_header,
        "on_headers_finished": form.end_headers,
        "on_end": form.end,
    }
    try:
        return MultipartParser(boundary, callbacks, max_header_size=_MAX_HEADER_BYTES)
    except FormParserError as error:
        raise BadRequest(f"The form is not valid multipart/form-data: {echo(error)}.") from error


def check_fingerprint(text: str) -> None:
    """Raises BadRequest for what is no fingerprint of a base; an empty text counts as none."""
    if text and not FINGERPRINT.fullmatch(text):
        raise BadRequest(
            "'base_fingerprint' must be 64 lower-case hex digits, perhaps with 'packed-' before them: GET /v1/models "
            "shows that of the base.",
            param="base_fingerprint",
        )


def _too_large(max_bytes: int) -> TooLarge:
    return TooLarge(
        f"The upload is larger than {max_bytes} bytes: upload a smaller adapter, or start the server with a larger "
        f"--max-upload-bytes.",
        param="weights",
    )

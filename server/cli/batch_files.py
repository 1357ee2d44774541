"""The two files of a batch, in OpenAI's format: requests, all read and judged before any is sent, and answers.

Owns what a line may say, and that the file of answers never holds two answers to one custom_id, whenever the process
dies. Knows nothing about servers.
"""

import fcntl
import json
import os
import uuid
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from server.ground.errors import BadRequest, Conflict, StorageFull

PATHS = ("/v1/chat/completions", "/v1/completions")
_FIELDS = ("custom_id", "method", "url", "body")
_MAX_TOLD = 10  # problems of one file that are named
_MAX_SHOWN = 60  # characters of a value that a sentence repeats
_BEGINNING = b'{"id":"batch_req_'  # of every answer
_BOM = b"\xef\xbb\xbf"  # with which editors on Windows begin a file


@dataclass(frozen=True, slots=True)
class Line:
    """One request of the input: where it stands, so that bodies need not be kept in memory."""

    custom_id: str
    number: int  # counted from 1
    offset: int  # bytes
    num_bytes: int


class Requests:
    """The lines of an input file, every one of them checked."""

    def __init__(self, path: Path) -> None:
        """Raises BadRequest with a sentence for each of the first bad lines."""
        self.path = path
        try:
            if not path.is_file():
                raise BadRequest(f"{path} is no file; give the file with the requests, one JSON object per line.")
            self._file = path.open("rb")
        except OSError as error:
            raise BadRequest(f"{path} cannot be read: {error.strerror}.") from None
        self.lines: dict[str, Line] = {}  # by custom_id, in order
        problems = self._read()
        if not problems and not self.lines:
            problems = [f"{path} has no requests; each is one line, a JSON object with {', '.join(_FIELDS)}."]
        if problems:
            self._file.close()
            told, more = problems[:_MAX_TOLD], len(problems) - _MAX_TOLD
            raise BadRequest("\n".join([*told, *([f"{path}: {more} more lines are wrong."] if more > 0 else [])]))

    def _read(self) -> list[str]:
        problems, offset = [], 0
        for number, raw in enumerate(self._file, 1):
            if raw.strip():
                try:
                    self._add(Line(_custom_id(_request(raw)), number, offset, len(raw)))
                except ValueError as error:
                    problems.append(f"{self.path} line {number}: {error}")
            offset += len(raw)
        return problems

    def _add(self, line: Line) -> None:
        first = self.lines.setdefault(line.custom_id, line)
        if first is not line:
            raise ValueError(f"custom_id {_shown(line.custom_id)} is that of line {first.number}; give each its own.")

    def request(self, line: Line) -> dict[str, Any]:
        """The request of a line, read again. Raises Conflict if the file has changed meanwhile."""
        raw = os.pread(self._file.fileno(), line.num_bytes, line.offset)
        try:
            request = _request(raw)
            if _custom_id(request) == line.custom_id:
                return request
        except ValueError:
            pass
        raise Conflict(f"{self.path} line {line.number} has changed since it was checked; run the command again.")

    def close(self) -> None:
        self._file.close()


def _request(raw: bytes) -> dict[str, Any]:
    """A line's object. Raises ValueError with a sentence."""
    request = _object(raw.removeprefix(_BOM))
    for name in request:
        if name not in _FIELDS:
            raise ValueError(f"{_shown(name)} is not a field of a batch line; it has {', '.join(_FIELDS)}.")
    for name in _FIELDS:
        if name not in request:
            raise ValueError(f"{name} is missing; a line has {', '.join(_FIELDS)}.")
    if request["method"] != "POST":
        raise ValueError(f'method is {_shown(request["method"])}; it must be "POST".')
    if request["url"] not in PATHS:
        raise ValueError(f"url is {_shown(request['url'])}; it must be {' or '.join(PATHS)}.")
    if not isinstance(request["body"], dict):
        raise ValueError("body must be a JSON object, the request.")
    if request["body"].get("stream"):
        raise ValueError("body.stream is true; answers of a batch are whole: leave it out.")
    return request


def _object(raw: bytes) -> dict[str, Any]:
    try:
        value = json.loads(raw, object_pairs_hook=_with_single_names)
    except _SentTwice:
        raise
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not valid JSON ({str(error)[:_MAX_SHOWN]}).") from None
    if not isinstance(value, dict):
        raise ValueError("it must be a JSON object.")
    return value


class _SentTwice(ValueError):
    """A field that is twice in one object, of which readers may take either."""


def _with_single_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise _SentTwice(f"{_shown(name)} is twice in one JSON object; write it once.")
        found[name] = value
    return found


def _custom_id(record: Mapping[str, Any]) -> str:
    custom_id = record.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        raise ValueError(f"custom_id is {_shown(custom_id)}; it must be a text that is not empty.")
    try:
        custom_id.encode()
    except UnicodeEncodeError:
        raise ValueError("custom_id has half of a surrogate pair; use whole characters.") from None
    return custom_id


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def answer_record(
    custom_id: str, response: Mapping[str, Any] | None, error: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """A line of the output: `response` {status_code, request_id, body}, or where none came `error` {code, message}."""
    return {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": custom_id, "response": response, "error": error}


@dataclass(frozen=True, slots=True)
class _Place:
    offset: int
    num_bytes: int
    is_ok: bool


class Answers:
    """The output file, opened for this process alone and grown by whole lines.

    A line that was cut when a process died is taken away when the file is opened. Writing and `settle` raise
    StorageFull when the disk does not take it; what was whole stays.
    """

    def __init__(self, path: Path, asked: Collection[str]) -> None:
        """Raises Conflict if another process writes the file, or if it has other content than answers to `asked`."""
        self.path = path
        self._real = path.resolve()  # a link stays one when the file it leads to is replaced
        self._asked = asked
        self._places: dict[str, _Place] = {}
        self._is_new = not path.exists()
        if not self._is_new and not path.is_file():
            raise BadRequest(f"{path} is no file; name a file for the answers.")
        try:
            self._file = path.open("a+b", buffering=0)
        except OSError as error:
            raise BadRequest(f"{path} cannot be written: {error.strerror}.") from None
        try:
            self._lock(self._file)
            self._end = self._read()
        except BaseException:
            self._file.close()
            raise

    def __contains__(self, custom_id: str) -> bool:
        return custom_id in self._places

    def __len__(self) -> int:
        return len(self._places)

    @property
    def failed(self) -> list[str]:
        """The custom_ids whose answer is an error."""
        return [custom_id for custom_id, place in self._places.items() if not place.is_ok]

    def add(self, record: Mapping[str, Any]) -> None:
        """Append an answer."""
        text = json.dumps(record, ensure_ascii=False, separators=(",", ":"))
        raw = text.encode(errors="replace") + b"\n"  # JSON can escape half of a surrogate pair, UTF-8 cannot hold it
        try:
            _write_all(self._file, raw)
        except OSError as error:
            # Else the next line would go on where this one was cut.
            os.ftruncate(self._file.fileno(), self._end)
            raise self._full(error) from None
        self._places[record["custom_id"]] = _Place(self._end, len(raw), is_ok(record))
        self._end += len(raw)

    def forget(self, custom_ids: Collection[str]) -> None:
        """Take these answers out of the file."""
        gone = set(custom_ids)
        if gone:
            self._rewrite([known for known in self._places if known not in gone])

    def settle(self) -> None:
        """Bring the answers into the order of the requests."""
        in_order = [custom_id for custom_id in self._asked if custom_id in self._places]
        if in_order != list(self._places):
            self._rewrite(in_order)

    def close(self) -> None:
        """A file that was made for nothing is taken away again."""
        if self._is_new and not self._places:
            self._real.unlink(missing_ok=True)
        self._file.close()

    def _lock(self, file: IO[bytes]) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_mine = os.path.samestat(os.fstat(file.fileno()), os.stat(self._real))
        except OSError:  # locked, or just replaced by who held it
            is_mine = False
        if not is_mine:
            raise Conflict(f"{self.path} is being written by another graft batch; wait for it, or name another file.")

    def _read(self) -> int:
        """Learns the answers that are there; the number of their bytes. What follows them is cut off."""
        self._file.seek(0)
        end = 0
        with open(self._file.fileno(), "rb", closefd=False) as reader:
            for number, raw in enumerate(reader, 1):
                is_whole = raw.endswith(b"\n")
                line = raw if is_whole else raw + b"\n"  # a place holds its line feed, too: it is copied with it
                try:
                    custom_id, place = self._answer(line, end)
                except ValueError as error:
                    if not is_whole and raw[: len(_BEGINNING)] == _BEGINNING[: len(raw)]:
                        break  # ours, cut when a process died
                    raise Conflict(
                        f"{self.path} line {number} {error}; repair the line, or name another file."
                    ) from None
                if not is_whole:
                    self._file.write(b"\n")
                self._places[custom_id] = place
                end += len(line)
        os.ftruncate(self._file.fileno(), end)
        return end

    def _answer(self, raw: bytes, offset: int) -> tuple[str, _Place]:
        try:
            record = _object(raw)
            custom_id = _custom_id(record)
        except ValueError:
            raise ValueError("is no answer of a batch") from None
        if "response" not in record or "error" not in record:
            raise ValueError("is no answer of a batch")
        if custom_id not in self._asked:
            raise ValueError(f"answers custom_id {_shown(custom_id)}, which no request has")
        if custom_id in self._places:
            raise ValueError(f"answers custom_id {_shown(custom_id)} a second time")
        return custom_id, _Place(offset, len(raw), is_ok(record))

    def _rewrite(self, custom_ids: list[str]) -> None:
        """A new file with these answers takes the old one's place, all at once."""
        beside = self._real.with_name(f".{self._real.name}.graft-batch")  # a name that no user gives a file
        try:
            beside.unlink(missing_ok=True)  # of a process that died
            new = beside.open("a+b", buffering=0)
            try:
                # Before it takes the name: who opens it after that must find it locked.
                fcntl.flock(new, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.fchmod(new.fileno(), os.fstat(self._file.fileno()).st_mode & 0o7777)
                places = dict(self._copy(custom_ids, new))
                os.fsync(new.fileno())
                os.replace(beside, self._real)
            except BaseException:
                new.close()
                beside.unlink(missing_ok=True)
                raise
        except OSError as error:
            raise self._full(error) from None
        self._file.close()
        self._file, self._places = new, places
        self._end = sum(place.num_bytes for place in places.values())

    def _copy(self, custom_ids: list[str], new: IO[bytes]) -> Iterator[tuple[str, _Place]]:
        offset = 0
        for custom_id in custom_ids:
            old = self._places[custom_id]
            _write_all(new, os.pread(self._file.fileno(), old.num_bytes, old.offset))
            yield custom_id, _Place(offset, old.num_bytes, old.is_ok)
            offset += old.num_bytes

    def _full(self, error: OSError) -> StorageFull:
        return StorageFull(
            f"{self.path} cannot be written: {error.strerror}. Its {len(self)} answers are whole: make room and run "
            "the command again."
        )


def _write_all(file: IO[bytes], raw: bytes) -> None:
    """A full disk may take a part and refuse the rest at the next call."""
    view = memoryview(raw)
    while view:
        view = view[file.write(view) :]


def is_ok(record: Mapping[str, Any]) -> bool:
    """Whether an answer is one that was asked for, and not an error."""
    response = record["response"]
    return isinstance(response, dict) and response.get("status_code") == 200 and record["error"] is None


def pending(requests: Requests, answers: Answers) -> list[Line]:
    """The requests that have no answer, in order."""
    return [line for custom_id, line in requests.lines.items() if custom_id not in answers]

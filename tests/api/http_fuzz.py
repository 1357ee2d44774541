"""A fuzz of the HTTP face: requests that are almost right, or not at all, and what must hold of every answer.

All choices come from one `Random`, so that a seed and a number bring a case back:

    python -m tests.api.http_fuzz --cases 5000 --seed 7
    python -m tests.api.http_fuzz --cases 1 --seed 7 --first 1234
"""

import argparse
import copy
import json
import re
import socket
import struct
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from tests.api.adapter_files import lora_files
from tests.api.tar_fuzz import changed_tar

KEY = "secret-of-fuzz"
HIDDEN = "acme-treasure"  # an adapter of another owner: no answer may name it
PATIENCE_S = 120
GOOD_FAULTS = {501, 502, 503, 504, 507}  # a 5xx that says what it is; a 500 is a finding

_SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
_FUNCTION = {"name": "look", "description": "x", "parameters": {"type": "object", "properties": {"q": {}}}}
_BODIES: Sequence[tuple[str, dict[str, Any]]] = (
    ("/v1/completions", {"prompt": "Hi", "max_tokens": 2, "temperature": 0.5, "stop": ["x"], "n": 2, "logprobs": 1}),
    ("/v1/completions", {"prompt": [[5, 6], [7]], "max_tokens": 1, "stream": True, "logit_bias": {"5": 3}}),
    ("/v1/completions", {"prompt": "Hi", "max_tokens": 2, "structured_outputs": {"choice": ["a", "b"]}}),
    ("/v1/completions", {"prompt": "Hi", "max_tokens": 1, "adapter": [{"name": "mine", "weight": 0.5}, "public"]}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, "adapter": "mine"}),
    (
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
            "tools": [{"type": "function", "function": _FUNCTION}],
            "tool_choice": "auto",
            "max_tokens": 2,
        },
    ),
    (
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": "Hi"}],
            "max_tokens": 2,
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": _SCHEMA}},
        },
    ),
    ("/tokenize", {"prompt": "Hi", "add_special_tokens": False}),
    ("/detokenize", {"tokens": [5, 6, 7]}),
    ("/v1/adapters", {"name": "fetched", "source": "hf://org/repo", "wait": True}),
    ("/v1/adapters/merge", {"name": "mine", "adapters": [{"name": "mine", "weight": 1.0}, {"name": "public"}]}),
    ("/v1/load_lora_adapter", {"lora_name": "mine", "lora_path": "/etc"}),
    ("/v1/unload_lora_adapter", {"lora_name": "nobody"}),
    ("/v1/adapters/mine/rollback", {"version": "0123456789"}),
)  # fmt: skip
_PATHS = (
    "/v1/models", f"/v1/models/{HIDDEN}", "/v1/adapters", f"/v1/adapters/{HIDDEN}", "/v1/adapters/mine/versions",
    f"/v1/adapters/{HIDDEN}/fetch", "/v1/adapters?limit=0", "/v1/adapters?after=%00", "/health", "/metrics", "/load",
    "/openapi.json", "/v1/../health", "/%2e%2e/etc/passwd", "//", "/v1/adapters/%ff", "/v1/adapters/..%2f..",
)  # fmt: skip
_ODD: Sequence[Any] = (
    None, True, -1, 0, 1, 2**31, 2**63, 2**64, -(2**70), 1e308, -0.0, "", "x", "\x00", "\ud800", "a" * 5000, "\u202e",
    [], {}, [[]], [None], {"": ""}, [1, "a"], {"name": HIDDEN}, HIDDEN, "../../etc/passwd", "{{7*7}}", "<script>", "*",
    "@", "mine@", "mine@000000", ["mine"] * 20, [0] * 5000, "name\nx: y",
)  # fmt: skip


class After(Enum):
    """What a client does when it has sent what it sends."""

    READ = auto()  # all of the answer
    LEAVE = auto()  # at once
    READ_AND_LEAVE = auto()  # after the first part
    STALL = auto()  # after the first part; it never reads again
    STALL_AND_READ = auto()  # the rest, when many others have had theirs
    VANISH = auto()  # at once, without an orderly end
    READ_AND_VANISH = auto()


Sent = tuple[bytes, After]
_LEAVING = {After.LEAVE, After.READ_AND_LEAVE, After.VANISH, After.READ_AND_VANISH}
_VANISHING = {After.VANISH, After.READ_AND_VANISH}
_STALLING = {After.STALL, After.STALL_AND_READ}
_READING_FIRST = {After.READ_AND_LEAVE, After.READ_AND_VANISH}
_FIRST_BYTES = 300
_NUM_STALLED = 8  # at once


@dataclass(frozen=True)
class Case:
    """What is sent, and what its client does then."""

    number: int
    kind: str
    sent: bytes
    after: After


def make(seed: int, number: int) -> Case:
    """The case of a number."""
    random = Random(f"{seed} {number}")
    kind = random.choice(list(KINDS))
    sent, after = KINDS[kind](random)
    return Case(number, kind, sent, after)


def _json(random: Random) -> Sent:
    path, body = copy.deepcopy(random.choice(_BODIES))
    for _ in range(random.randint(0, 3)):
        _mutate(random, body)
    return _request(random, "POST", path, json.dumps(body).encode()), After.READ


def _mutate(random: Random, value: Any) -> None:
    """One change somewhere in a JSON value."""
    while isinstance(value, dict | list) and value:
        key = random.choice(list(value) if isinstance(value, dict) else range(len(value)))
        if not isinstance(value[key], dict | list) or not value[key] or random.random() < 0.4:
            break
        value = value[key]
    if not isinstance(value, dict | list) or not value:
        return
    change = random.randrange(4)
    if change == 0:
        value[key] = copy.deepcopy(random.choice(_ODD))
    elif change == 1 and isinstance(value, dict):
        value[random.choice(["x", "adapter", "model", "n", "seed", "guided_json", "", "cache_salt"])] = random.choice(
            _ODD
        )
    elif change == 2:
        del value[key]
    else:
        value[key] = _nested(random.choice([3, 70, 200]), value[key])


def _nested(depth: int, inside: Any) -> Any:
    for _ in range(depth):
        inside = {"a": inside} if depth % 2 else [inside]
    return inside


def _bytes(random: Random) -> Sent:
    """A body that is no JSON, or that is not all there."""
    path, body = random.choice(_BODIES)
    content = bytearray(json.dumps(body).encode())
    for _ in range(random.randint(1, 8)):
        at = random.randrange(len(content) + 1)
        content[at : at + random.randint(0, 3)] = random.randbytes(random.randint(0, 3))
    if random.random() < 0.3:
        content = bytearray(
            random.choice([b"[" * 100_000, b'{"a":' * 5000, b"1" * 10_000, b"\xff\xfe", b"NaN", b"{}{}"])
        )
    declared = len(content) + random.choice([0, 0, 0, 1, 1000])
    return _request(random, "POST", path, bytes(content), declared), After.READ


def _heads(random: Random) -> Sent:
    """A head that is odd."""
    odd = [
        b"content-length: 5\r\ncontent-length: 6", b"transfer-encoding: chunked\r\ncontent-length: 3",
        b"transfer-encoding: gzip, chunked", b"content-encoding: gzip", b"expect: 100-continue", b"upgrade: websocket",
        b"connection: upgrade\r\nupgrade: h2c", b"x: " + b"y" * random.choice([10, 5000, 60_000]),
        b"\r\n".join(b"x-%d: y" % n for n in range(random.choice([50, 150]))), b"x-request-id: \x01",
        b"range: bytes=0-1", b"host: a\r\nhost: b", b"authorization: Bearer", b"authorization: Basic xyz",
        b"content-type: multipart/form-data; boundary=" + b"b" * 300,
        b" folded: x", b"no colon", b"x-request-id: " + b"a" * 200, b"origin: null", b"if-none-match: *", b"x:\x00",
        b"endpoint-load-metrics-format: JSON", b"content-type: application/json; charset=utf-16", b"content-length: -1",
        b"content-length: 99999999999999999999", b"accept-encoding: " + b"gzip," * 500,
    ]  # fmt: skip
    method = random.choice(["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "TRACE", "PATCH", "get", "A" * 50])
    target = random.choice([*_PATHS, *(path for path, _ in _BODIES), "*", "http://x/health", "/" + "a" * 9000])
    lines = [f"{method} {target} HTTP/{random.choice(['1.1', '1.1', '1.0', '2.0', '9'])}".encode(), b"host: x"]
    lines += random.sample(odd, random.randint(1, 3))
    lines += [f"authorization: Bearer {random.choice([KEY, KEY, KEY, 'x', ''])}".encode(), b"connection: close"]
    return b"\r\n".join(lines) + b"\r\n\r\n" + random.choice([b"", b"{}", b"3\r\nabc\r\n0\r\n\r\n"]), After.READ


def _form(random: Random) -> Sent:
    """An upload whose form is damaged."""
    files = lora_files(random.randrange(3))
    parts = [
        (b'form-data; name="name"', b"mine"),
        (b'form-data; name="config"; filename="adapter_config.json"', files.config),
        (b'form-data; name="weights"; filename="../../x"', files.weights),
    ]
    for _ in range(random.randint(0, 3)):
        at = random.randrange(len(parts))
        disposition, content = parts[at]
        parts[at] = random.choice(
            [
                (disposition, content[: random.randrange(len(content) + 1)]),
                (disposition, random.randbytes(50) + content),
                (disposition, content.replace(b'"r"', b'"R"')),
                (b'form-data; name="' + random.choice([b"", b"x", b"name", b"\xff", b"a" * 5000]) + b'"', content),
                (b"attachment", content),
                (b'form-data; name="name"', random.choice([b"../x", b"", b"a" * 2000, HIDDEN.encode(), b"\xff"])),
            ]
        )
    random.shuffle(parts)
    body = b"".join(b"--b\r\ncontent-disposition: " + said + b"\r\n\r\n" + data + b"\r\n" for said, data in parts)
    body += random.choice([b"--b--\r\n", b"--b--", b"", b"--b", b"--c--\r\n"])
    if random.random() < 0.2:
        body = random.randbytes(random.randrange(200)) + body
    path = random.choice(["/v1/adapters", "/v1/adapters?replace=true", "/v1/adapters?replace=x"])
    return _request(random, "POST", path, body, kind="multipart/form-data; boundary=b"), After.READ


def _tar(random: Random) -> Sent:
    """The tar of an adapter, changed."""
    body = changed_tar(random)
    name = random.choice(["mine", "mine", "fuzzed", "fuzzed", HIDDEN, "..", "x" * 80, "%00"])
    return _request(random, "PUT", f"/v1/adapters/{name}", body, kind="application/x-tar"), After.READ


def _leaver(random: Random) -> Sent:
    """A stream whose reader leaves after some bytes, or at once."""
    return _stream(random), random.choice([After.LEAVE, After.READ_AND_LEAVE])


def _staller(random: Random) -> Sent:
    """A stream whose reader stops in its middle, and goes on much later or never."""
    return _stream(random, is_large=random.random() < 0.03), random.choice([After.STALL, After.STALL_AND_READ])


def _vanisher(random: Random) -> Sent:
    """A client that is reset in the middle of what it sends, or of its answer."""
    whole = random.choice([_stream(random), _form(random)[0], _tar(random)[0]])
    if random.random() < 0.5:
        whole = whole[: random.randrange(len(whole))]
    return whole, random.choice([After.VANISH, After.READ_AND_VANISH])


def _stream(random: Random, *, is_large: bool = False) -> bytes:
    """A request for a stream; a large answer does not fit into what the system buffers of a connection."""
    body: dict[str, Any] = {"prompt": "Hi", "max_tokens": random.choice([1, 20, 100]), "n": random.choice([1, 4])}
    body |= {"ignore_eos": True, "adapter": random.choice([None, "mine", "public"])}
    if is_large:
        body |= {"prompt": [*range(5, 245)], "max_tokens": 1, "n": 32, "echo": True, "logprobs": 20}
    return _request(random, "POST", "/v1/completions", json.dumps(body | {"stream": True}).encode())


KINDS: dict[str, Callable[[Random], Sent]] = {
    "json": _json, "bytes": _bytes, "heads": _heads, "form": _form, "tar": _tar, "leaver": _leaver,
    "staller": _staller, "vanisher": _vanisher,
}  # fmt: skip


def _request(
    random: Random, method: str, path: str, body: bytes, declared: int | None = None, kind: str = "application/json"
) -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\nconnection: close\r\n"
    if declared is None and random.random() < 0.1:
        size = random.randint(1, max(len(body), 1))
        chunks = [body[at : at + size] for at in range(0, len(body), size)]
        framed = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
        return f"{head}content-type: {kind}\r\ntransfer-encoding: chunked\r\n\r\n".encode() + framed
    length = len(body) if declared is None else declared
    return f"{head}content-type: {kind}\r\ncontent-length: {length}\r\n\r\n".encode() + body


@dataclass(frozen=True)
class Outcome:
    """What came of a case: a status as text, or what else; or the finding, where that is not as it must be."""

    case: Case
    said: str = ""
    finding: Exception | None = None


Stalled = tuple[Case, socket.socket, bytes]  # with the first part of its answer


def run(address: tuple[str, int], cases: Iterable[Case]) -> Iterator[Outcome]:
    """Sends the cases one after the other, while some that have stalled stay connected. One outcome for each."""
    stalled: deque[Stalled] = deque()
    for case in cases:
        if case.after in _STALLING:
            stalled.append(_stall(address, case))
        else:
            yield _found(case, partial(_sent, address, case))
        if len(stalled) > _NUM_STALLED:
            yield _found(stalled[0][0], partial(_followed, *stalled.popleft()))
    for each in stalled:
        yield _found(each[0], partial(_followed, *each))


def _found(case: Case, part: Callable[[], str]) -> Outcome:
    try:
        return Outcome(case, part())
    except (AssertionError, TimeoutError, ValueError) as finding:
        return Outcome(case, finding=finding)


def _sent(address: tuple[str, int], case: Case) -> str:
    """Sends a case and judges the answer. Raises AssertionError."""
    with closing(_connected(address)) as connection:
        try:
            connection.sendall(case.sent)
            if case.after in _LEAVING:
                _leave(connection, case)
                return "left"
            connection.shutdown(socket.SHUT_WR) if _is_cut_short(case) else None
            answer = _read(connection)
        except ConnectionError:  # the server had answered, and does not listen to the rest
            return "closed"
    return _judged(case, answer) if answer else "closed"


def _stall(address: tuple[str, int], case: Case) -> Stalled:
    connection = _connected(address, is_deaf=True)
    connection.sendall(case.sent)
    return case, connection, connection.recv(_FIRST_BYTES)


def _followed(case: Case, connection: socket.socket, first: bytes) -> str:
    """What comes of a client that has stalled, many cases later."""
    with closing(connection):
        if case.after is After.STALL:
            return "given up"
        answer = first + _read(connection)
    status = _judged(case, answer)
    assert status != "200" or b"data: [DONE]\n\n" in answer, f"a stream without its end: {answer[-300:]!r}"
    return status


def _connected(address: tuple[str, int], *, is_deaf: bool = False) -> socket.socket:
    connection = socket.socket()
    if is_deaf:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(PATIENCE_S)
    connection.connect(address)
    return connection


def _leave(connection: socket.socket, case: Case) -> None:
    """Where a first part is waited for: not for long, as the server may wait for the rest of the request."""
    if case.after in _READING_FIRST:
        connection.settimeout(0.02 if case.after in _VANISHING else PATIENCE_S)
        with suppress(TimeoutError):
            connection.recv(_FIRST_BYTES)
    if case.after in _VANISHING:  # a reset in the place of an end
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def _read(connection: socket.socket) -> bytes:
    received = bytearray()
    while part := connection.recv(1 << 16):
        received += part
    return bytes(received).removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")


def _is_cut_short(case: Case) -> bool:
    """Whether the server might wait for more."""
    return case.kind in ("bytes", "heads")


def _judged(case: Case, received: bytes) -> str:
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 "), f"this is no HTTP: {received[:200]!r}"
    status = int(head[9:12])
    assert status < 500 or status in GOOD_FAULTS, f"answered with {received[:600]!r}"
    asked = re.sub(rb"\r\n[0-9a-f]+\r\n", b"", case.sent)  # without the marks of its chunks
    if status < 400 or HIDDEN.encode() not in asked:  # a refusal repeats what it refuses
        assert HIDDEN.encode() not in received, received[:600]
    has_body = not case.sent.startswith(b"HEAD ") and b"chunked" not in head
    if status >= 400 and has_body and b"application/json" in head:
        error = json.loads(body)["error"]
        assert error["message"], body
    return str(status)


def main() -> int:
    """A server with keys, `--cases` cases, and what came of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    from tests.api.test_http_fuzz import served, sound

    begun_s, said, num_findings = time.monotonic(), Counter[tuple[str, str]](), 0
    cases = (make(given.seed, number) for number in range(given.first, given.first + given.cases))
    with tempfile.TemporaryDirectory() as scratch, served(Path(scratch)) as live:
        for outcome in run(live.address, cases):
            case = outcome.case
            said[case.kind, "finding" if outcome.finding else outcome.said] += 1
            if outcome.finding is not None:
                num_findings += 1
                sys.stdout.write(f"case {case.number}: {case.kind}: {case.sent[:300]!r}: {outcome.finding!r}\n")
        sound(live)
    for kind in KINDS:
        of_kind = {what: count for (each, what), count in sorted(said.items()) if each == kind}
        sys.stdout.write(f"{kind:9} {sum(of_kind.values()):5} {of_kind}\n")
    sys.stdout.write(f"{said.total()} cases, {num_findings} findings, {time.monotonic() - begun_s:.0f} s\n")
    return int(num_findings > 0)


if __name__ == "__main__":
    sys.exit(main())

"""Bad uploads, each kind once: refused with a sentence that names the cause, nothing left, everybody else served.

The kinds of file are in `bad_files.py`, the kinds of form below. All go to one server, which has one good adapter and
keeps it.
"""

import gzip
import json
import re
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from server.adapters.format.content import CONFIG_FILE, WEIGHTS_FILE
from server.adapters.store.folder_store import Store
from server.cli.rehearsal import Rehearsal
from server.ground.config import Settings
from server.ground.errors import GraftError
from tests.api.adapter_files import AdapterFiles, lora_files
from tests.api.bad_files import BAD_FILES, CODE_FILE, GOOD, Bad
from tests.api.conftest import Gate, Live, eventually, serving

MAX_UPLOAD_BYTES = 12 << 20
MAX_BOMB_BYTES = 128 << 20  # of Python's memory, client and server together, for a body of up to 12 MiB
MAX_CPU_S = 4.0  # of the whole process for one refusal: the longest takes 0.5 s, and more where the machine is busy
BOUNDARY = "one-and-only"


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder from which the server reads adapters in place, and by vLLM's verb."""
    return tmp_path_factory.mktemp("shelf")


@pytest.fixture(scope="module")
def served(settings: Callable[..., Settings], shelf: Path) -> Settings:
    return settings(max_upload_bytes=MAX_UPLOAD_BYTES, dtype="float16", adapters=shelf, adapter_paths=(shelf,))


@pytest.fixture(scope="module")
def live(served: Settings) -> Iterator[Live]:
    with serving(served) as live:
        assert live.upload("good", lora_files(7)).status_code == 201
        yield live


@pytest.fixture(scope="module")
def expected(live: Live) -> str:
    return said(live)


def said(live: Live, adapter: str = "good", num_tokens: int = 3) -> str:
    body = {"prompt": "The harbour was empty", "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
    answer = live.post("/v1/completions", adapter=adapter, **body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def files_in(store: Path) -> dict[str, bytes | None]:
    """Every file of the store with its bytes, and every folder."""
    found = sorted(store.rglob("*"))
    return {str(path.relative_to(store)): path.read_bytes() if path.is_file() else None for path in found}


@pytest.fixture
def nothing_changes(live: Live, expected: str) -> Iterator[None]:
    """Around a bad upload: the store stays as it is to the byte, no name is new, and the answers are the same."""
    before = files_in(live.store)
    yield
    eventually(lambda: list((live.store / ".incoming").iterdir()) == [])
    assert files_in(live.store) == before
    assert [shown["name"] for shown in live.http.get("/v1/adapters").json()["data"]] == ["good"]
    assert live.http.get("/v1/adapters/bad").status_code == 404
    assert live.server.registry.check_integrity() == ()
    assert said(live) == expected


def check_refused(answer: httpx.Response, says: str, status: int, param: str | None) -> None:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert re.search(says, error["message"]), error["message"]
    assert len(error["message"]) < 500
    assert error["param"] == param


# Files


@pytest.mark.parametrize("bad", BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_bad_file_is_refused_by_its_cause_and_leaves_nothing(bad: Bad, live: Live, nothing_changes: None) -> None:
    files = bad.make()
    begun_s = time.process_time()
    answer = live.upload("bad", files)
    cpu_s = time.process_time() - begun_s
    check_refused(answer, bad.says, bad.status, bad.param)
    assert cpu_s < MAX_CPU_S


@pytest.mark.parametrize("kind", ["header-of-empty-lists", "header-of-many-names", "zip-bomb", "vera-of-a-huge-rank"])
def test_a_bomb_takes_little_memory(kind: str, live: Live) -> None:
    files = BAD_FILES[kind].make()
    tracemalloc.start()
    try:
        live.upload("bad", files)
        assert tracemalloc.get_traced_memory()[1] < MAX_BOMB_BYTES
    finally:
        tracemalloc.stop()


def test_the_kinds_are_told_apart() -> None:
    refusals = [bad.says for bad in BAD_FILES.values()] + [bad.says for bad in BAD_FORMS.values()]
    assert len(set(refusals)) == len(refusals) >= 150


# Forms


@dataclass(frozen=True)
class BadForm:
    body: Callable[[], bytes]
    says: str
    status: int = 400
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    query: str = ""
    is_chunked: bool = False


def form(**fields: bytes | None) -> bytes:
    """The good form with fields set or added; None leaves one out."""
    plain = {"name": b"bad", "config": GOOD.config, "weights": GOOD.weights}
    return body_of(*[(name, value) for name, value in (plain | fields).items() if value is not None])


def body_of(*fields: tuple[str, bytes], end: bytes = b"--") -> bytes:
    parts = [
        f'--{BOUNDARY}\r\ncontent-disposition: form-data; name="{name}"\r\n\r\n'.encode() + value + b"\r\n"
        for name, value in fields
    ]
    return b"".join(parts) + f"--{BOUNDARY}".encode() + end + b"\r\n"


def named(name: str | bytes, says: str) -> BadForm:
    encoded = name if isinstance(name, bytes) else name.encode()
    return BadForm(lambda: form(name=encoded), rf"^{says} cannot name an adapter: use 1 to 63 of", param="name")


def sent_as(content_type: str, says: str) -> BadForm:
    return BadForm(form, says, headers={"content-type": content_type})


HALF = len(form()) // 2
BAD_FORMS: dict[str, BadForm] = {
    "name-empty": named("", "''"),
    "name-with-a-slash": named("team/bad", "'team/bad'"),
    "name-a-path-upwards": named("../../bad", r"'\.\./\.\./bad'"),
    "name-of-two-dots": named("..", r"'\.\.'"),
    "name-hidden": named(".incoming", r"'\.incoming'"),
    "name-absolute": named("/etc/passwd", "'/etc/passwd'"),
    "name-of-windows": named("C:\\bad", r"'C:\\\\bad'"),
    "name-percent-encoded": named("%2e%2e%2fbad", "'%2e%2e%2fbad'"),
    "name-in-capitals": named("Bad", "'Bad'"),
    "name-with-a-space": named("b ad", "'b ad'"),
    "name-with-a-line-break": named("bad\r\n", r"'bad\\r\\n'"),
    "name-with-a-zero-byte": named("bad\0.safetensors", r"'bad\\x00.safetensors'"),
    "name-with-a-version": named("bad@0123456789", "'bad@0123456789'"),
    "name-with-an-umlaut": named("schlösser", "'schlösser'"),
    "name-of-full-width-letters": named("ｂａｄ", "'ｂａｄ'"),
    "name-turned-around": named("bad\u202etxt", r"'bad\\u202etxt'"),
    "name-an-emoji": named("🐙", "'🐙'"),
    "name-not-utf-8": named(b"b\xffd", "'b\ufffdd'"),
    "name-beginning-with-a-dash": named("-rf", "'-rf'"),
    "name-of-64-letters": named("b" * 64, "'b{64}'"),
    "name-of-1000-letters": named("c" * 1000, "'c{79}"),
    "name-endless": BadForm(lambda: form(name=b"n" * 200_000), "'name' is larger than 1024 bytes", 413, "name"),
    "name-of-the-base": BadForm(lambda: form(name=b"tiny"), "'tiny' is a name of the base", 409, "name"),
    "name-taken": BadForm(lambda: form(name=b"good"), "'good' exists with other content", 409, "name"),
    "no-name": BadForm(lambda: form(name=None), "The form has no field 'name'", param="name"),
    "no-config": BadForm(lambda: form(config=None), "no field 'config'", param="config"),
    "no-weights": BadForm(lambda: form(weights=None), "no field 'weights'", param="weights"),
    "no-field-at-all": BadForm(lambda: f"--{BOUNDARY}--\r\n".encode(), "form", param="name"),
    "name-twice": BadForm(lambda: body_of(("name", b"bad"), ("name", b"good")), "has 'name' twice", param="name"),
    "config-twice": BadForm(
        lambda: body_of(("config", GOOD.config), ("config", b"{}")), "has 'config' twice", param="config"
    ),
    "weights-twice": BadForm(
        lambda: body_of(("weights", GOOD.weights), ("weights", GOOD.weights)), "has 'weights' twice", param="weights"
    ),
    "a-field-unknown": BadForm(lambda: form(tokenizer=b"{}"), "has a field 'tokenizer'; known are", param="tokenizer"),
    "a-field-without-a-name": BadForm(
        lambda: f"--{BOUNDARY}\r\n\r\nnameless\r\n--{BOUNDARY}--\r\n".encode(), "has a field ''; known", param=""
    ),
    "a-fingerprint-of-words": BadForm(
        lambda: form(base_fingerprint=b"llama"), "must be 64 lower-case hex", param="base_fingerprint"
    ),
    "replace-a-word": BadForm(form, "'replace': Input should be", param="replace", query="?replace=maybe"),
    "sent-as-text": sent_as("text/plain", "Send the adapter as multipart"),
    "sent-as-a-web-form": sent_as("application/x-www-form-urlencoded", "as multipart/form-data with the fields"),
    "without-a-content-type": sent_as("", "multipart/form-data with the fields name, config"),
    "boundary-missing": sent_as("multipart/form-data", "form-data with the fields name"),
    "boundary-of-another-form": sent_as("multipart/form-data; boundary=other", "The form is not valid"),
    "boundary-too-long": sent_as(
        f"multipart/form-data; boundary={'b' * 2000}", "The form is not valid multipart/form-data"
    ),
    "body-empty": BadForm(lambda: b"", "The form ends in the middle"),
    "body-cut-short": BadForm(lambda: form()[:HALF], "form ends in the middle; send it again"),
    "body-without-its-end": BadForm(lambda: body_of(("name", b"bad"), end=b""), "^The form ends in the middle; send"),
    "headers-without-end": BadForm(
        lambda: f"--{BOUNDARY}\r\n{'h' * 100_000}: y\r\n\r\n".encode(), "not valid multipart/form-data: .*[Hh]eader"
    ),
    "body-compressed": BadForm(
        lambda: gzip.compress(form()), "Content-Encoding gzip is not unpacked", headers={"content-encoding": "gzip"}
    ),
    "body-a-zip-bomb": BadForm(
        lambda: gzip.compress(bytes(64 << 20)), "Encoding GZIP is not", headers={"content-encoding": "GZIP"}
    ),
    "too-large-by-declaration": BadForm(
        lambda: form(weights=bytes(MAX_UPLOAD_BYTES + 99)), f"larger than {MAX_UPLOAD_BYTES} bytes", 413, "weights"
    ),
    "too-large-while-it-arrives": BadForm(
        lambda: form(weights=bytes(MAX_UPLOAD_BYTES + 99)),
        "The upload is larger .*--max-upload-bytes",
        413,
        "weights",
        is_chunked=True,
    ),
}


def pieces(body: bytes) -> Iterator[bytes]:
    return (body[at : at + 65_536] for at in range(0, len(body), 65_536))


@pytest.mark.parametrize("bad", BAD_FORMS.values(), ids=BAD_FORMS.keys())
def test_a_bad_form_is_refused_by_its_cause_and_leaves_nothing(bad: BadForm, live: Live, nothing_changes: None) -> None:
    body = bad.body()
    headers = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"} | dict(bad.headers)
    answer = live.http.post(
        f"/v1/adapters{bad.query}", content=pieces(body) if bad.is_chunked else body, headers=headers
    )
    check_refused(answer, bad.says, bad.status, bad.param)


@pytest.mark.parametrize("framing", ["content-length", "chunked"])
def test_a_body_that_breaks_off_leaves_nothing(framing: str, live: Live, nothing_changes: None) -> None:
    """The connection is closed in the middle of the weights; nobody is left to be answered."""
    gone = {"route": "/v1/adapters", "status": "499"}
    before, half = live.metric("graft_requests_total", **gone), form()[:HALF]
    length = f"content-length: {HALF * 2}" if framing == "content-length" else "transfer-encoding: chunked"
    start = b"" if framing == "content-length" else f"{HALF:x}\r\n".encode()
    head = (
        f"POST /v1/adapters HTTP/1.1\r\nhost: x\r\ncontent-type: multipart/form-data; boundary={BOUNDARY}\r\n{length}"
    )
    with live.connect() as connection:
        connection.sendall(f"{head}\r\n\r\n".encode() + start + half)
        eventually(lambda: bool(list((live.store / ".incoming").iterdir())))
    eventually(lambda: live.metric("graft_requests_total", **gone) == before + 1)


# What is harmless, because it is never acted on


@pytest.mark.parametrize(
    "filename", ["../../../escaped.safetensors", "/tmp/escaped.safetensors", "a\\..\\escaped", "\0"]
)
def test_a_file_name_in_the_form_is_not_used(filename: str, live: Live) -> None:
    part = f'--{BOUNDARY}\r\ncontent-disposition: form-data; name="config"; filename="{filename}"\r\n\r\n'
    body = part.encode() + GOOD.config + b"\r\n" + body_of(("name", b"kept"), ("weights", GOOD.weights))
    answer = live.http.post(
        "/v1/adapters", content=body, headers={"content-type": f"multipart/form-data; boundary={BOUNDARY}"}
    )
    assert answer.status_code == 201, answer.text
    stored = files_in(live.store)
    assert live.http.delete("/v1/adapters/kept").status_code == 200
    assert {Path(path).name for path in stored if path.startswith("kept/")} == {
        answer.json()["version"], "current.json", "record.json", CONFIG_FILE, WEIGHTS_FILE,
    }  # fmt: skip
    assert list(live.store.parent.rglob("escaped*")) == []


@pytest.mark.parametrize(
    "fields",
    [
        {"auto_mapping": {"base_model_class": "Evil", "parent_library": "bad_upload_was_here"}},
        {"megatron_core": "bad_upload_was_here"},
        {"base_model_name_or_path": f"__import__('pathlib').Path('{CODE_FILE}').touch()"},
        {"target_modules": "(a+)+$(b|b)*" * 2000},
        {"layers_pattern": ["(x+x+)+y"], "exclude_modules": "((a*)*)*b"},
    ],
    ids=["auto-mapping", "megatron-core", "base-name", "modules", "layers-pattern"],
)
def test_what_peft_would_import_or_match_is_only_data_here(fields: dict[str, object], live: Live) -> None:
    """PEFT writes these fields itself, so they are no reason to refuse an adapter; nothing here follows them."""
    begun_s = time.process_time()
    assert live.upload("kept", GOOD.with_config(**fields)).status_code == 201
    assert time.process_time() - begun_s < MAX_CPU_S
    assert live.http.delete("/v1/adapters/kept").status_code == 200
    assert "bad_upload_was_here" not in sys.modules
    assert not Path(CODE_FILE).exists()


# Everybody else


def test_a_running_request_is_answered_as_if_nothing_had_come(
    live: Live, monkeypatch: pytest.MonkeyPatch, nothing_changes: None
) -> None:
    """One generation, a step of it between every two bad uploads; the server takes and refuses them beside it."""
    bad = list(BAD_FILES.values())[:: len(BAD_FILES) // 24]
    num_tokens = len(bad) + 1
    alone = said(live, num_tokens=num_tokens)
    gate = Gate(live.server.runner.run)
    monkeypatch.setattr(live.server.runner, "run", gate)
    told: list[str] = []
    asking = threading.Thread(target=lambda: told.append(said(live, num_tokens=num_tokens)))
    try:
        gate.allow(1)
        asking.start()
        eventually(lambda: live.server.registry.stats().num_residencies == 1)
        for one in bad:
            assert live.upload("bad", one.make()).status_code == one.status
            assert live.server.engine.stats().num_in_flight == 1
            gate.allow(1)
    finally:
        gate.allow(1_000_000)
        asking.join(120)
    assert told == [alone]


def test_many_bombs_at_once_leave_others_served(live: Live, expected: str, nothing_changes: None) -> None:
    bombs = [bad for bad in BAD_FILES.values() if bad.is_bomb]
    statuses: list[tuple[int, int]] = []
    sending = [
        threading.Thread(
            target=lambda one=one: statuses.append((one.status, live.upload("bad", one.make()).status_code))
        )
        for one in bombs
    ]
    for thread in sending:
        thread.start()
    while any(thread.is_alive() for thread in sending):
        assert said(live) == expected
    assert len(statuses) == len(bombs)
    assert all(wanted == got for wanted, got in statuses)


# One reader: the same files, however they come

SOME = (
    "truncated-in-the-header", "torch-bin-renamed", "git-lfs-pointer", "header-of-empty-lists", "offsets-overlapping",
    "type-float8", "config-in-utf-16", "base-name-that-never-ends", "alpha-pattern-of-many-choices",
    "code-by-auto-map", "nan", "modules-of-another-model", "a-transposed", "no-tensors",
)  # fmt: skip


def write(folder: Path, files: AdapterFiles) -> Path:
    folder.mkdir()
    (folder / CONFIG_FILE).write_bytes(files.config)
    (folder / WEIGHTS_FILE).write_bytes(files.weights)
    return folder


@pytest.fixture(scope="module")
def rehearsal(served: Settings) -> Rehearsal:
    return Rehearsal(served)


@pytest.mark.parametrize("kind", SOME)
def test_every_way_in_has_the_same_reader(
    kind: str, live: Live, shelf: Path, rehearsal: Rehearsal, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Read in place, by vLLM's verb and by `graft adapters`: the sentence is the upload's, and nothing is kept."""
    files = BAD_FILES[kind].make()
    message = live.upload("bad", files).json()["error"]["message"]
    folder = write(shelf / f"lies-{kind}", files)
    loaded = live.post("/v1/load_lora_adapter", lora_name="bad", lora_path=str(folder))
    assert (loaded.status_code, loaded.json()["error"]["message"]) == (400, message)
    live.server.registry.rescan()
    asked = live.post("/v1/completions", prompt="Hi", adapter=folder.name)
    assert (asked.status_code, asked.json()["error"]["message"]) == (400, message)
    with pytest.raises(GraftError) as refused:
        rehearsal.register(Store(tmp_path / "store", create=True), folder, "bad", replace=False)
    assert refused.value.message.encode(errors="replace").decode() == message
    assert files_in(tmp_path / "store").keys() <= {".incoming"}
    assert live.http.get("/v1/adapters/bad").status_code == 404
    for path in (folder / CONFIG_FILE, folder / WEIGHTS_FILE, folder):
        path.rmdir() if path.is_dir() else path.unlink()
    live.server.registry.rescan()
    assert folder.name not in json.dumps(live.http.get("/v1/adapters").json())

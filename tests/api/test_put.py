"""PUT of an adapter's folder: the name means it afterwards, and nothing is left of what was refused."""

import io
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from server.adapters.format.content import CONFIG_FILE, WEIGHTS_FILE
from tests.api.adapter_files import AdapterFiles, lora_files
from tests.api.conftest import KEY, MAX_UPLOAD_BYTES, Live, eventually

PATH = "/v1/adapters/put"


@pytest.fixture(scope="module")
def files() -> AdapterFiles:
    return lora_files(41)


@pytest.fixture(autouse=True)
def _nothing_is_left(strict: Live) -> Iterator[None]:
    yield
    strict.http.delete(PATH)
    eventually(lambda: not list((strict.store / ".incoming").iterdir()))
    assert [path.name for path in strict.store.iterdir()] == [".incoming"]


def tar(files: AdapterFiles, **extra: bytes) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, data in {CONFIG_FILE: files.config, WEIGHTS_FILE: files.weights, **extra}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return packed.getvalue()


def put(strict: Live, body: bytes | Iterator[bytes], query: str = "", **headers: str) -> httpx.Response:
    return strict.http.put(PATH + query, content=body, headers=headers)


def test_a_put_makes_the_name_mean_what_was_sent(strict: Live, files: AdapterFiles) -> None:
    other = lora_files(42)
    new = put(strict, tar(files, **{"README.md": b"about"}))
    assert new.status_code == 201, new.text
    assert new.json()["ignored_files"] == {"count": 1, "names": ["README.md"]}
    assert put(strict, tar(files)).status_code == 200
    replaced = put(strict, tar(other))
    assert replaced.status_code == 201
    assert replaced.json()["versions"] == [new.json()["version"], replaced.json()["version"]]
    back = put(strict, tar(files))
    assert (back.status_code, back.json()["version"]) == (201, new.json()["version"])
    answer = strict.post("/v1/completions", adapter="put", prompt="Hi", max_tokens=2).json()
    assert answer["adapter"]["version"] == new.json()["version"]


def test_the_form_and_the_tar_of_one_folder_are_one_version(strict: Live, files: AdapterFiles) -> None:
    sent = put(strict, tar(files)).json()
    assert strict.upload("put", files).status_code == 200
    assert sent["version"] == strict.http.get(PATH).json()["version"]


def test_a_put_may_be_for_a_new_name_only(strict: Live, files: AdapterFiles) -> None:
    assert put(strict, tar(files), **{"if-none-match": "*"}).status_code == 201
    same = put(strict, tar(files), **{"if-none-match": "*"})
    assert (same.status_code, same.json()["error"]["code"]) == (412, "precondition_failed")
    assert put(strict, tar(files), "?replace=false").status_code == 200
    other = put(strict, tar(lora_files(42)), "?replace=false")
    assert (other.status_code, other.json()["error"]["code"]) == (409, "conflict")


@pytest.mark.parametrize(
    ("query", "headers"),
    [
        ("?replace=perhaps", {}),
        ("?repalce=false", {}),
        ("?base_fingerprint=mine", {}),
        ("?replace=true", {"if-none-match": "*"}),
        ("", {"if-none-match": '"633333"'}),
        ("", {"if-match": "*"}),
    ],
)
def test_what_is_asked_for_otherwise_is_refused(
    strict: Live, files: AdapterFiles, query: str, headers: dict[str, str]
) -> None:
    assert put(strict, tar(files), query, **headers).status_code == 400


@pytest.mark.parametrize("name", ["Not-A-Name", "a@633333", "%2e%2e", "a" * 64])
def test_a_name_that_cannot_be_is_refused_before_the_body(strict: Live, name: str) -> None:
    assert strict.http.put(f"/v1/adapters/{name}", content=b"").json()["error"]["param"] == "name"


def test_a_name_of_the_base_is_taken(strict: Live, files: AdapterFiles) -> None:
    assert strict.http.put("/v1/adapters/tiny", content=tar(files)).status_code == 409


def test_the_base_may_be_named_by_its_fingerprint(strict: Live, files: AdapterFiles) -> None:
    fingerprint = strict.http.get("/v1/models/tiny").json()["fingerprint"]
    assert put(strict, tar(files), f"?base_fingerprint={fingerprint}").json()["base_fingerprint"] == fingerprint
    other = put(strict, tar(files), f"?base_fingerprint={'0' * 64}").json()
    assert "fingerprint" in other["warnings"][0]


@pytest.mark.parametrize("is_declared", [True, False], ids=["declared", "chunked"])
def test_an_archive_over_the_limit_is_refused_while_it_arrives(
    strict: Live, files: AdapterFiles, is_declared: bool
) -> None:
    body = tar(files, **{"tokenizer.json": bytes(MAX_UPLOAD_BYTES + 2 * 1024**2)})
    pieces = (body[at : at + 65536] for at in range(0, len(body), 65536))
    refused = put(strict, body if is_declared else pieces)
    assert (refused.status_code, refused.json()["error"]["param"]) == (413, "archive")


@pytest.mark.parametrize("body", [b"", b"no tar", b'{"peft_type": "LORA"}' * 100])
def test_what_is_no_archive_is_refused_and_leaves_nothing(strict: Live, body: bytes) -> None:
    refused = put(strict, body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_archive")
    assert strict.http.get(PATH).status_code == 404


def test_an_adapter_that_cannot_be_served_leaves_the_old_version(strict: Live, files: AdapterFiles) -> None:
    version = put(strict, tar(files)).json()["version"]
    assert put(strict, tar(files.with_config(r=7))).status_code == 400
    assert strict.http.get(PATH).json()["versions"] == [version]


def test_a_client_that_leaves_in_the_middle_leaves_nothing(strict: Live, files: AdapterFiles) -> None:
    left = {"route": "/v1/adapters/{name}", "status": "499"}
    before = strict.metric("graft_requests_total", **left)
    body = tar(files)
    head = f"PUT {PATH} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\ncontent-length: {len(body)}\r\n\r\n"
    connection = strict.connect()
    connection.sendall(head.encode() + body[: len(body) // 2])
    eventually(lambda: bool(list((strict.store / ".incoming").iterdir())))
    connection.close()
    eventually(lambda: strict.metric("graft_requests_total", **left) == before + 1)
    assert strict.http.get(PATH).status_code == 404


@pytest.mark.skipif(not (shutil.which("tar") and shutil.which("curl")), reason="tar and curl are not installed")
@pytest.mark.parametrize("flags", ["-c", "-cz", "--format=ustar -c", "--format=pax -c"])
def test_the_documented_line_works(strict: Live, files: AdapterFiles, flags: str, tmp_path: Path) -> None:
    (tmp_path / CONFIG_FILE).write_bytes(files.config)
    (tmp_path / WEIGHTS_FILE).write_bytes(files.weights)
    (tmp_path / "README.md").write_text("about")
    line = f"tar -C {tmp_path} {flags} . | curl -sS -T - -H 'Authorization: Bearer {KEY}' {strict.url}{PATH}"
    done = subprocess.run(line, shell=True, capture_output=True, text=True, check=True, timeout=120)
    assert strict.http.get(PATH).json()["version"] in done.stdout

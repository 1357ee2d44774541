"""The form of an upload: fields in any order, limits while it arrives, and nothing left of what breaks off."""

import json
from collections.abc import Iterator

import httpx
import pytest

from tests.api.adapter_files import AdapterFiles, lora_files
from tests.api.conftest import KEY, MAX_UPLOAD_BYTES, Live, eventually

BOUNDARY = "one-and-only"
TYPE = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}


@pytest.fixture(scope="module")
def files() -> AdapterFiles:
    return lora_files(31)


@pytest.fixture(autouse=True)
def _nothing_is_left(strict: Live) -> Iterator[None]:
    """Whatever a test sends: no work in progress stays, and the name that it may have used is free again."""
    yield
    strict.http.delete("/v1/adapters/a")
    eventually(lambda: not list((strict.store / ".incoming").iterdir()))
    assert [path.name for path in strict.store.iterdir()] == [".incoming"]


def form(*fields: tuple[str, bytes], end: bytes = b"--") -> bytes:
    parts = [
        f'--{BOUNDARY}\r\ncontent-disposition: form-data; name="{name}"\r\n\r\n'.encode() + value + b"\r\n"
        for name, value in fields
    ]
    return b"".join(parts) + f"--{BOUNDARY}".encode() + end + b"\r\n"


def post(strict: Live, body: bytes | Iterator[bytes], **headers: str) -> httpx.Response:
    return strict.http.post("/v1/adapters", content=body, headers={**TYPE, **headers})


def test_fields_come_in_any_order(strict: Live, files: AdapterFiles) -> None:
    name, config, weights = ("name", b"a"), ("config", files.config), ("weights", files.weights)
    assert post(strict, form(name, config, weights)).status_code == 201
    for order in ((weights, config, name), (weights, name, config), (config, weights, name)):
        assert post(strict, form(*order)).status_code == 200


def test_a_manifest_is_part_of_the_version_and_its_recipe_is_shown(strict: Live, files: AdapterFiles) -> None:
    fields = [("name", b"a"), ("config", files.config), ("weights", files.weights)]
    plain = post(strict, form(*fields)).json()
    assert strict.http.get("/v1/adapters/a").json()["recipe"] is None
    recipe = {"strategy": "linear", "inputs": [{"name": "x", "weight": 0.5}]}
    manifest = json.dumps({"recipe": recipe}).encode()
    answer = strict.http.post("/v1/adapters?replace=true", content=form(("manifest", manifest), *fields), headers=TYPE)
    assert answer.status_code == 201
    assert answer.json()["version"] != plain["version"]
    assert strict.http.get("/v1/adapters/a").json()["recipe"] == recipe


@pytest.mark.parametrize("manifest", [b"[]", b'{"recipe": 5}', b"{", b'{"base_fingerprint": "mine"}'])
def test_a_manifest_that_is_none_is_refused(strict: Live, files: AdapterFiles, manifest: bytes) -> None:
    fields = [("name", b"a"), ("config", files.config), ("weights", files.weights), ("manifest", manifest)]
    refused = post(strict, form(*fields))
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] in ("manifest", "base_fingerprint")


def test_a_manifest_over_its_limit_is_refused(strict: Live) -> None:
    refused = post(strict, form(("name", b"a"), ("manifest", b" " * (256 * 1024 + 1))))
    assert refused.status_code == 413


def test_two_fingerprints_must_be_one(strict: Live, files: AdapterFiles) -> None:
    one, other = strict.http.get("/v1/models/tiny").json()["fingerprint"], "0" * 64
    fields = [("name", b"a"), ("config", files.config), ("weights", files.weights)]
    manifest = ("manifest", json.dumps({"base_fingerprint": one}).encode())
    refused = post(strict, form(*fields, manifest, ("base_fingerprint", other.encode())))
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "base_fingerprint"
    assert "make them agree" in refused.json()["error"]["message"]
    assert post(strict, form(*fields, manifest, ("base_fingerprint", one.encode()))).status_code == 201


@pytest.mark.parametrize("chunk_bytes", [1, 7, 1000])
def test_the_form_may_arrive_in_any_pieces(strict: Live, files: AdapterFiles, chunk_bytes: int) -> None:
    body = form(("name", b"a"), ("config", files.config), ("weights", files.weights))
    answer = post(strict, (body[at : at + chunk_bytes] for at in range(0, len(body), chunk_bytes)))
    assert answer.status_code == 201


@pytest.mark.parametrize("missing", ["name", "config", "weights"])
def test_a_missing_field_is_named(strict: Live, files: AdapterFiles, missing: str) -> None:
    fields = {"name": b"a", "config": files.config, "weights": files.weights}
    del fields[missing]
    refused = post(strict, form(*fields.items()))
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == missing


def test_unknown_and_repeated_fields_are_refused_by_name(strict: Live, files: AdapterFiles) -> None:
    for extra in (("archive", b"zip"), ("config", b"{}"), ("name", b"b")):
        refused = post(strict, form(("name", b"a"), ("config", files.config), extra, ("weights", files.weights)))
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == extra[0]


def test_what_is_no_form_is_refused(strict: Live, files: AdapterFiles) -> None:
    whole = form(("name", b"a"), ("config", files.config), ("weights", files.weights))
    assert strict.post("/v1/adapters", name="a").status_code == 400
    for body, content_type in (
        (whole, "multipart/form-data"),
        (whole, "multipart/form-data; boundary=" + "x" * 1000),
        (whole, "multipart/form-data; boundary=another"),
        (whole, "application/x-www-form-urlencoded"),
        (whole[: len(whole) // 2], TYPE["content-type"]),
        (form(("name", b"a"), end=b""), TYPE["content-type"]),
        (f"--{BOUNDARY}\r\n\r\nnameless\r\n--{BOUNDARY}--\r\n".encode(), TYPE["content-type"]),
        (f"--{BOUNDARY}\r\n{'x' * 100_000}: y\r\n\r\n".encode(), TYPE["content-type"]),
        (b"", TYPE["content-type"]),
    ):
        refused = post(strict, body, **{"content-type": content_type})
        assert refused.status_code == 400, refused.text
        assert len(refused.text) < 1000


def test_a_bad_query_is_refused_by_name(strict: Live, files: AdapterFiles) -> None:
    refused = strict.upload("a", files, replace="maybe")
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "replace"


@pytest.mark.parametrize("num_bytes", [MAX_UPLOAD_BYTES + 1, MAX_UPLOAD_BYTES * 3, MAX_UPLOAD_BYTES * 60])
@pytest.mark.parametrize("is_declared", [True, False], ids=["declared", "chunked"])
def test_an_upload_over_the_limit_is_refused_while_it_arrives(strict: Live, num_bytes: int, is_declared: bool) -> None:
    body = form(("name", b"a"), ("config", b"{}"), ("weights", bytes(num_bytes)))
    pieces = (body[at : at + 65536] for at in range(0, len(body), 65536))
    refused = post(strict, body if is_declared else pieces)
    assert refused.status_code == 413
    error = refused.json()["error"]
    assert error["code"] == "too_large"
    assert str(MAX_UPLOAD_BYTES) in error["message"]
    assert "--max-upload-bytes" in error["message"]


def test_an_endless_name_is_refused(strict: Live) -> None:
    refused = post(strict, form(("name", b"a" * 100_000)))
    assert refused.status_code == 413
    assert refused.json()["error"]["param"] == "name"


def test_a_client_that_leaves_in_the_middle_leaves_nothing(strict: Live, files: AdapterFiles) -> None:
    body = form(("name", b"a"), ("config", files.config), ("weights", files.weights))
    left = {"route": "/v1/adapters", "status": "499"}
    before = strict.metric("graft_requests_total", **left)
    connection = strict.connect()
    head = (
        "POST /v1/adapters HTTP/1.1\r\nhost: x\r\n"
        f"authorization: Bearer {KEY}\r\ncontent-type: {TYPE['content-type']}\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    connection.sendall(head.encode() + body[: len(body) // 2])
    eventually(lambda: bool(list((strict.store / ".incoming").iterdir())))
    connection.close()
    eventually(lambda: strict.metric("graft_requests_total", **left) == before + 1)
    assert strict.http.get("/v1/adapters/a").status_code == 404

"""Object stores as places: S3 as moto emulates it, and fsspec's memory; what is read is of one state."""

from collections.abc import Callable, Iterator
from typing import Any

import fsspec
import pytest

from server.adapters.remote.address import Address
from server.adapters.remote.buckets import BucketPlace
from server.adapters.remote.places import check_complete, check_installed
from server.ground.errors import AdapterRejected, BadRequest, SourceFailed, StartupRefused
from tests.adapters.remote.s3 import BUCKET, s3_service

CONFIG, WEIGHTS, MANIFEST = "adapter_config.json", "adapter_model.safetensors", "manifest.json"
LARGE = bytes(range(256)) * 40_000  # more than two requests

Put = Callable[[str, bytes], None]


@pytest.fixture(scope="module")
def s3() -> Iterator[Any]:
    with s3_service() as client:
        yield client


@pytest.fixture(params=["s3", "memory"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def put(kind: str, s3: Any) -> Put:
    def put(path: str, content: bytes) -> None:
        if kind == "s3":
            s3.put_object(Bucket=BUCKET, Key=path, Body=content)
        else:
            fsspec.filesystem("memory").pipe_file(f"{BUCKET}/{path}", content)

    return put


def address(kind: str, path: str) -> Address:
    return Address.parse(f"{kind}://{BUCKET}/{path}")


def test_the_files_of_a_folder_are_read_with_their_sizes(kind: str, put: Put) -> None:
    files = {CONFIG: b"{}", WEIGHTS: LARGE, MANIFEST: b'{"x": 1}'}
    for name, content in {**files, "README.md": b"#", "adapter_model.bin": b"pickle"}.items():
        put(f"team/legal/{name}", content)
    with BucketPlace.open(address(kind, "team/legal")) as place:
        assert place.sizes == {name: len(content) for name, content in files.items()}
        assert {name: b"".join(place.read(name)) for name in files} == files
        assert (place.revision is not None) == (kind == "s3")  # the ETag of the weights
        place.check_unchanged()


def test_a_file_that_changes_meanwhile_is_noticed(kind: str, put: Put) -> None:
    for name, content in {CONFIG: b"{}", WEIGHTS: LARGE}.items():
        put(f"team/moving/{name}", content)
    with BucketPlace.open(address(kind, "team/moving")) as place:
        b"".join(place.read(WEIGHTS))
        put(f"team/moving/{CONFIG}", b"{ }")
        with pytest.raises(SourceFailed, match="changed"):
            place.check_unchanged()


def test_an_object_is_not_read_in_two_states(s3: Any) -> None:
    for name, content in {CONFIG: b"{}", WEIGHTS: LARGE}.items():
        s3.put_object(Bucket=BUCKET, Key=f"team/torn/{name}", Body=content)
    with BucketPlace.open(address("s3", "team/torn")) as place:
        chunks = place.read(WEIGHTS)
        next(chunks)
        s3.put_object(Bucket=BUCKET, Key=f"team/torn/{WEIGHTS}", Body=LARGE[::-1])
        with pytest.raises(SourceFailed, match="changed"):
            next(chunks)


def test_what_is_no_adapter_is_told_by_its_file(kind: str, put: Put) -> None:
    put(f"team/none/{CONFIG}", b"{}")
    put("team/none/adapter_model.bin", b"pickle")
    with (
        BucketPlace.open(address(kind, "team/none")) as place,
        pytest.raises(AdapterRejected, match="save_pretrained"),
    ):
        check_complete(place, address(kind, "team/none"))
    for path in ("team/nothing", f"team/none/{CONFIG}", "team"):
        with BucketPlace.open(address(kind, path)) as place, pytest.raises(BadRequest, match=CONFIG):
            check_complete(place, address(kind, path))


def test_a_scheme_whose_package_is_missing_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_installed({"hf", "file", "https"})
    with pytest.raises(StartupRefused, match=r"graftserve\[remote\]"):
        check_installed({"s3"})

"""An owner's limit of storage is held against what a body announces, before the body is read."""

import io
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import pytest
from safetensors.torch import load, save

from server.ground.config import Settings
from tests.api.adapter_files import lora_files
from tests.api.conftest import eventually, serving
from tests.api.keys.conftest import write_source
from tests.api.keys.tenants import Tenant, entry, write_keys

ROOM = 1 << 20
SMALL = lora_files(1)
# Its weights' header says much that nobody reads.
LARGE = replace(SMALL, weights=save(load(SMALL.weights), metadata={"note": "x" * 500_000}))
FORM = {"content-type": "multipart/form-data; boundary=b"}


@dataclass(frozen=True)
class World:
    acme: Tenant
    tight: Tenant
    source: Path


@pytest.fixture(scope="module")
def world(settings: Callable[..., Settings], tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """`acme` has about half of what it may have in the store, which is LARGE; `tight` may have no more than that."""
    root = tmp_path_factory.mktemp("room")
    source = root / "source"
    write_source(source)
    allowed = (f"file://{source}",)
    file = write_keys(
        root / "keys.yaml",
        entry("acme", adapters=["*"], sources=[*allowed], limits={"storage_bytes": ROOM}),
        entry("acme-app", owner="acme", adapters=["*"], limits={"requests_per_minute": 1}),
        entry("tight", adapters=["*"], limits={"storage_bytes": LARGE.num_bytes}),
    )
    with serving(settings(api_keys=file, allow_source=allowed, adapter_paths=(root,))) as live:
        acme = Tenant(live, "acme")
        assert acme.upload("large", LARGE).status_code == 201
        yield World(acme, Tenant(live, "tight"), source)


def is_over(answer: httpx.Response) -> bool:
    return (answer.status_code, answer.json()["error"].get("code")) == (507, "quota_exceeded")


def test_a_form_is_refused_by_its_length_beside_what_is_stored(world: World) -> None:
    refused = world.acme.ask("POST", "/v1/adapters", content=b"x" * 700_000, headers=FORM)
    assert is_over(refused), "before the form is looked at"
    message = refused.json()["error"]["message"]
    assert f"may take {ROOM} bytes" in message
    assert f"They take {LARGE.num_bytes}" in message
    assert "delete some" in message
    broken = world.acme.ask("POST", "/v1/adapters", content=b"x" * 300_000, headers=FORM)
    assert broken.status_code == 400, "for what there is room"


def test_keys_of_one_owner_share_its_room_and_not_their_requests(world: World) -> None:
    """The limit of storage is in the entry of one key and holds for the other; the limit of requests is one's own."""
    app = Tenant(world.acme.live, "acme-app")
    assert is_over(app.ask("POST", "/v1/adapters", content=b"x" * 700_000, headers=FORM))
    assert app.ask("GET", "/v1/models").status_code == 429
    assert world.acme.ask("GET", "/v1/models").status_code == 200


def test_a_form_whose_name_says_that_it_is_none_of_what_is_there_is_refused_there(world: World) -> None:
    """Under the name of LARGE these bytes might be LARGE's again; under another there is no room for them."""

    def answer(name: str) -> httpx.Response:
        named = b'--b\r\ncontent-disposition: form-data; name="name"\r\n\r\n' + name.encode()
        rest = b'\r\n--b\r\ncontent-disposition: form-data; name="nonsense"\r\n\r\n' + b"x" * LARGE.num_bytes
        return world.tight.ask("POST", "/v1/adapters", content=named + rest, headers=FORM)

    assert world.tight.upload("tight", LARGE).status_code == 201
    assert (answer("tight").status_code, answer("tight").json()["error"]["param"]) == (400, "nonsense")
    assert is_over(answer("other"))


def test_a_tar_is_refused_at_the_first_file_that_has_no_room(world: World) -> None:
    member = tarfile.TarInfo("adapter/adapter_model.safetensors")
    member.size = ROOM - LARGE.num_bytes + 1
    refused = world.acme.ask("PUT", "/v1/adapters/next", content=member.tobuf() + b"x" * 512)
    assert is_over(refused), "and not because it ends in the middle"


def test_what_is_stored_already_may_come_again(world: World) -> None:
    assert world.acme.upload("large", LARGE).status_code == 200
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, content in LARGE.parts().values():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    assert world.acme.ask("PUT", "/v1/adapters/large", content=packed.getvalue()).status_code == 200


def test_a_fetch_is_refused_before_its_first_byte(world: World) -> None:
    config = world.source / "adapter_config.json"
    config.write_bytes(LARGE.config + b" " * (ROOM - len(LARGE.config)))
    order = {"name": "fetched", "source": f"file://{world.source}"}
    assert world.acme.ask("POST", "/v1/adapters", order).status_code == 202
    path = "/v1/adapters/fetched/fetch"
    eventually(lambda: world.acme.ask("GET", path).json().get("status") == "failed")
    told = world.acme.ask("GET", path).json()
    assert told["bytes_done"] == 0
    assert "may take" in str(told)

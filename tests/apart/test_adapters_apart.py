"""The life of an adapter on a server whose registry and store are in another process."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.adapters.store.folder_store import INCOMING_FOLDER
from server.ground.config import Settings
from tests.apart.conftest import in_two
from tests.api.adapter_files import AdapterFiles
from tests.api.conftest import Live, eventually, serving
from tests.api.test_put import tar
from tests.demo_files import ADAPTERS, STORE


def files_of(name: str) -> AdapterFiles:
    """Those of a demo adapter's only version."""
    (folder,) = (path.parent for path in (STORE / name).glob("*/adapter_model.safetensors"))
    return AdapterFiles(
        (folder / "adapter_config.json").read_bytes(), (folder / "adapter_model.safetensors").read_bytes()
    )


def said(live: Live, adapter: str | None) -> str:
    asked = {"prompt": "The old boat", "max_tokens": 12, "temperature": 0}
    answer = live.post("/v1/completions", **asked | ({} if adapter is None else {"adapter": adapter}))
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def left_in_store(live: Live) -> list[Path]:
    return list((live.store / INCOMING_FOLDER).iterdir())


def test_it_is_uploaded_asked_replaced_rolled_back_and_deleted(two: Live) -> None:
    first, second = files_of("pirate-lora"), files_of("robot-ia3")
    uploaded = two.upload("mine", first)
    assert (uploaded.status_code, uploaded.json()["method"]) == (201, "lora")
    assert said(two, "mine") == said(two, "pirate-lora")
    assert two.upload("mine", first).status_code == 200, "the very same content"
    assert two.upload("mine", second).status_code == 409
    assert two.upload("mine", second, replace="true").status_code == 201
    assert said(two, "mine") == said(two, "robot-ia3")
    assert len(two.http.get("/v1/adapters/mine/versions").json()["data"]) == 2
    assert two.post("/v1/adapters/mine/rollback").status_code == 200
    assert said(two, "mine") == said(two, "pirate-lora")
    assert two.http.delete("/v1/adapters/mine").status_code == 200
    assert two.post("/v1/completions", prompt="Hi", adapter="mine").status_code == 404
    eventually(lambda: not left_in_store(two))


def test_a_tar_is_put_and_what_breaks_off_leaves_nothing(two: Live) -> None:
    files = files_of("shout-rslora")
    content = tar(files, **{"README.md": b"Hi"})
    put = two.http.put("/v1/adapters/packed", content=content)
    assert (put.status_code, put.json()["ignored_files"]) == (201, {"count": 1, "names": ["README.md"]})
    assert two.http.put("/v1/adapters/packed", content=content, headers={"if-none-match": "*"}).status_code == 412
    assert said(two, "packed") == said(two, "shout-rslora")
    assert two.http.put("/v1/adapters/broken", content=content[: len(content) // 2]).status_code == 400
    with two.connect() as leaving:
        head = f"PUT /v1/adapters/left HTTP/1.1\r\nhost: x\r\ncontent-length: {len(content)}\r\n\r\n"
        leaving.sendall(head.encode() + content[:4096])
    eventually(lambda: not left_in_store(two))
    assert two.http.delete("/v1/adapters/packed").status_code == 200


def test_one_that_cannot_be_applied_is_refused_as_in_one_process(one: Live, two: Live) -> None:
    files = files_of("pirate-lora").with_config(r=3)
    expected, found = (live.upload("wrong", files) for live in (one, two))
    assert expected.status_code == 400
    assert (found.status_code, found.text) == (expected.status_code, expected.text)
    eventually(lambda: not left_in_store(two))


def test_it_is_loaded_pinned_unloaded_by_hand(two: Live) -> None:
    def verb(word: str) -> httpx.Response:
        return two.post(f"/v1/adapters/poet-dora/{word}")

    assert set(verb("load").json()["tiers"]) == {"store", "host", "device"}
    assert verb("pin").json()["pinned"]
    assert verb("unload").status_code == 409, "it is pinned"
    assert not verb("unpin").json()["pinned"]
    assert verb("unload").json()["freed_bytes"]["device"] > 0
    assert verb("lift_quarantine").json()["name"] == "poet-dora"


def test_a_folder_of_the_machine_is_read(two: Live, folder_of_adapters: Path) -> None:
    (folder,) = (path.parent for path in (STORE / "robot-ia3").glob("*/adapter_model.safetensors"))
    shutil.copytree(folder, folder_of_adapters / "robot")
    asked = {"lora_name": "read", "lora_path": str(folder_of_adapters / "robot")}
    assert two.post("/v1/load_lora_adapter", **asked).text.startswith("Success")
    assert said(two, "read") == said(two, "robot-ia3")
    assert two.post("/v1/unload_lora_adapter", lora_name="read").status_code == 200


def test_adapters_are_merged(two: Live) -> None:
    order = {"name": "merged", "adapters": [{"name": "pirate-lora"}, {"name": "shout-rslora", "weight": 0.5}]}
    made = two.post("/v1/adapters/merge", **order)
    assert (made.status_code, made.json()["recipe"]["strategy"]) == (201, "linear")
    assert made.json()["merge"]["sites"] > 0
    assert two.http.get("/v1/adapters/merged").json()["recipe"] == made.json()["recipe"]
    assert said(two, "merged")
    assert two.http.delete("/v1/adapters/merged").status_code == 200
    eventually(lambda: not left_in_store(two))


def test_the_lists_are_those_of_one_process(one: Live, two: Live) -> None:
    def cards(live: Live) -> list[Any]:
        return [card["id"] for card in live.http.get("/v1/models").json()["data"]]

    assert cards(two) == cards(one) == ["demo", *sorted(ADAPTERS)]
    page = two.http.get("/v1/adapters", params={"limit": 2}).json()
    assert (len(page["data"]), page["has_more"]) == (2, True)


@pytest.fixture(scope="module")
def fetching(demo_settings: Callable[..., Settings], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server in two processes that may fetch from a folder, which is `store`'s neighbour `source`."""
    source = tmp_path_factory.mktemp("source")
    (folder,) = (path.parent for path in (STORE / "robot-ia3").glob("*/adapter_model.safetensors"))
    shutil.copytree(folder, source / "robot")
    with serving(demo_settings(allow_source=(f"file://{source}/",)), assembled=in_two) as live:
        live.http.headers["x-source"] = f"file://{source}"
        yield live


def test_one_is_fetched_and_a_failure_is_told(fetching: Live) -> None:
    source = fetching.http.headers["x-source"]
    done = fetching.post("/v1/adapters", name="fetched", source=f"{source}/robot", wait=True)
    assert (done.status_code, done.json()["source"]) == (201, f"{source}/robot")
    assert said(fetching, "fetched") == said(fetching, "robot-ia3")
    failed = fetching.post("/v1/adapters", name="lost", source=f"{source}/nothing", wait=True)
    assert failed.status_code >= 400
    remembered = fetching.http.get("/v1/adapters/lost/fetch").json()
    assert (remembered["status"], remembered["error"]) == ("failed", failed.json()["error"])
    assert fetching.http.delete("/v1/adapters/lost/fetch").status_code == 200
    begun = fetching.post("/v1/adapters", name="later", source=f"{source}/robot")
    assert begun.status_code == 202
    eventually(lambda: fetching.http.get("/v1/adapters/later").json()["version"] is not None)
    assert fetching.metric("graft_adapter_fetches_total", outcome="done") == 2
    assert fetching.metric("graft_adapter_fetches_total", outcome="failed") == 1

"""Adapters fetched from elsewhere over HTTP: ordered, watched, cancelled, refused. The sources are real servers."""

import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.adapters.remote import fetches
from server.adapters.store.folder_store import INCOMING_FOLDER
from server.ground.config import Settings
from tests.adapters.remote.s3 import BUCKET, s3_service
from tests.adapters.remote.site import Page, Repository, Site
from tests.api.adapter_files import AdapterFiles, lora_files
from tests.api.conftest import MAX_UPLOAD_BYTES, Live, eventually, serving

WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class World:
    """A server, a web server that it may fetch from (under /team), and a folder of its machine."""

    live: Live
    site: Site
    folder: Path

    def order(self, name: str, source: str, **fields: Any) -> httpx.Response:
        return self.live.post("/v1/adapters", name=name, source=source, **fields)

    def fetched(self, name: str, source: str, **fields: Any) -> dict[str, Any]:
        """The adapter, once it is there."""
        answer = self.order(name, source, wait=True, **fields)
        assert answer.status_code in (200, 201), answer.text
        shown: dict[str, Any] = answer.json()
        return shown

    def refusal(self, name: str, source: str, **fields: Any) -> tuple[int, str, str]:
        """Status, code and message of a fetch that fails; nothing may be left of it but the failure."""
        answer = self.order(name, source, wait=True, **fields)
        error = answer.json()["error"]
        assert self.live.http.get(f"/v1/adapters/{name}/fetch").json().get("status", "failed") == "failed"
        assert self.leftovers() == []
        return answer.status_code, error["code"], error["message"]

    def shown(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.live.http.get(f"/v1/adapters/{name}").json()
        return found

    def leftovers(self) -> list[Path]:
        return list((self.live.store / INCOMING_FOLDER).iterdir())

    def ask(self, name: str) -> httpx.Response:
        return self.live.post("/v1/completions", prompt="Hello", max_tokens=4, adapter=name)

    def is_idle(self) -> bool:
        all_fetches = self.live.server.fetches
        return all_fetches.counts() == (0, 0) and not self.leftovers()


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with Site() as site:
        yield site


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("allowed")


@pytest.fixture(scope="module")
def live(settings: Callable[..., Settings], site: Site, folder: Path) -> Iterator[Live]:
    allowed = (f"{site.url}/team/", f"file://{folder}", "hf://org/", f"s3://{BUCKET}/team/")
    with serving(settings(allow_source=allowed, max_upload_bytes=MAX_UPLOAD_BYTES)) as live:
        assert live.upload("here", lora_files(1)).status_code == 201
        yield live


@pytest.fixture
def world(live: Live, site: Site, folder: Path) -> Iterator[World]:
    world = World(live, site, folder)
    yield world
    for page in site.pages.values():
        if page.gate is not None:
            page.gate.set()
    for fetch in live.http.get("/v1/adapters").json()["fetches"]:
        live.http.delete(f"/v1/adapters/{fetch['name']}")
    eventually(world.is_idle)
    site.pages.clear()
    for adapter in live.http.get("/v1/adapters").json()["data"]:
        if adapter["name"] != "here":
            live.http.delete(f"/v1/adapters/{adapter['name']}")


@pytest.fixture
def gate() -> threading.Event:
    return threading.Event()


# The course of a fetch


def test_a_fetch_is_shown_from_its_order_to_the_adapter(world: World, gate: threading.Event) -> None:
    files = lora_files(2)
    source = world.site.put("team/slow", files, gate)
    ordered = world.order("slow", source)
    assert ordered.status_code == 202
    assert ordered.headers["location"] == "/v1/adapters/slow/fetch"
    assert (ordered.json()["name"], ordered.json()["source"]) == ("slow", source)
    assert ordered.json()["status"] in ("queued", "fetching")

    eventually(lambda: (world.shown("slow")["fetch"]["progress"] or 0) > 0.4)
    shown = world.shown("slow")
    assert shown["version"] is None
    assert shown["fetch"]["status"] == "fetching"
    assert shown["fetch"]["bytes_total"] == files.num_bytes
    assert len(files.config) < shown["fetch"]["bytes_done"] < files.num_bytes
    listed = world.live.http.get("/v1/adapters").json()
    assert [fetch["name"] for fetch in listed["fetches"]] == ["slow"]
    assert [adapter["name"] for adapter in listed["data"]] == ["here"]
    assert world.live.metric("graft_adapter_fetches_running") == 1

    gate.set()
    eventually(lambda: world.shown("slow")["version"] is not None)
    shown = world.shown("slow")
    assert (shown["source"], shown["source_revision"], shown["fetch"]) == (source, "w1", None)
    assert world.ask("slow").status_code == 200
    record = world.live.server.store.versions("slow")[-1].record  # what a restart reads
    assert (record.source, record.source_revision) == (source, "w1")
    assert world.live.http.get("/v1/adapters/slow/fetch").status_code == 404


def test_who_waits_gets_what_an_upload_is_answered(world: World) -> None:
    files = lora_files(3)
    source = world.site.put("team/waited", files)
    answers = [world.order("waited", source, wait=True) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [201, 200]
    assert answers[0].json()["version"] == answers[1].json()["version"]
    assert world.live.upload("twin", files).json()["version"] == answers[0].json()["version"]
    assert world.shown("twin")["source"] is None


def test_a_slow_source_keeps_nobody_else_waiting(world: World, gate: threading.Event) -> None:
    world.order("slow", world.site.put("team/slow", lora_files(2), gate))
    assert world.fetched("quick", world.site.put("team/quick", lora_files(4)))["version"]
    assert world.ask("here").status_code == 200
    assert world.live.upload("uploaded", lora_files(5)).status_code == 201
    assert world.shown("slow")["fetch"]["status"] == "fetching"


def test_a_request_for_an_adapter_on_its_way_is_told_when_to_come_again(world: World, gate: threading.Event) -> None:
    world.order("slow", world.site.put("team/slow", lora_files(2), gate))
    eventually(lambda: (world.shown("slow")["fetch"]["progress"] or 0) > 0.4)
    for body in ({"adapter": "slow"}, {"model": "slow"}, {"adapter": [{"name": "here"}, {"name": "slow"}]}):
        answer = world.live.post("/v1/completions", prompt="Hello", max_tokens=4, **body)
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "adapter_on_its_way"
        assert "%" in answer.json()["error"]["message"]
        assert 1 <= int(answer.headers["retry-after"]) <= 30


def test_a_replacement_on_its_way_leaves_the_old_version_in_use(world: World, gate: threading.Event) -> None:
    old = world.fetched("legal", world.site.put("team/one", lora_files(6)))["version"]
    source = world.site.put("team/two", lora_files(7), gate)
    assert world.order("legal", source, replace=True).status_code == 202
    assert world.ask("legal").status_code == 200
    shown = world.shown("legal")
    assert (shown["version"], shown["fetch"]["source"]) == (old, source)
    gate.set()
    eventually(lambda: world.shown("legal")["version"] != old)
    assert world.shown("legal")["versions"][0] == old


def test_what_an_upload_may_not_replace_a_fetch_may_not(world: World) -> None:
    world.fetched("legal", world.site.put("team/one", lora_files(6)))
    other = world.site.put("team/two", lora_files(7))
    assert world.refusal("legal", other)[:2] == (409, "conflict")
    shown = world.shown("legal")
    assert shown["fetch"]["status"] == "failed"
    assert shown["fetch"]["error"]["code"] == "conflict"
    assert world.ask("legal").status_code == 200
    assert world.refusal("tiny", other)[:2] == (409, "conflict")  # a name of the base


def test_the_same_order_twice_is_one_fetch_and_another_one_a_conflict(world: World, gate: threading.Event) -> None:
    source = world.site.put("team/slow", lora_files(2), gate)
    world.site.asked.clear()
    assert [world.order("slow", source).status_code for _ in range(3)] == [202] * 3
    for other in ({"source": f"{source}2"}, {"source": source, "replace": True}):
        refused = world.order("slow", **other)
        assert refused.status_code == 409
        assert source in refused.json()["error"]["message"]
    gate.set()
    eventually(lambda: world.shown("slow")["version"] is not None)
    assert len([path for path in world.site.asked if path.endswith(WEIGHTS)]) == 1


def test_only_so_many_are_fetched_at_once_and_the_others_queue(
    world: World, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"slow-{number}" for number in range(fetches.MAX_RUNNING + 2)]
    for number, name in enumerate(names):
        world.order(name, world.site.put(f"team/{name}", lora_files(number), gate))
    statuses = [world.live.http.get(f"/v1/adapters/{name}/fetch").json()["status"] for name in names]
    assert statuses == ["fetching"] * fetches.MAX_RUNNING + ["queued"] * 2
    assert world.live.metric("graft_adapter_fetches_waiting") == 2
    monkeypatch.setattr(fetches, "MAX_WAITING", 2)
    assert world.order("one-more", f"{world.site.url}/team/x").status_code == 503
    assert world.live.http.delete(f"/v1/adapters/{names[-1]}").status_code == 200
    assert world.live.http.delete(f"/v1/adapters/{names[0]}").status_code == 200
    eventually(lambda: world.live.http.get(f"/v1/adapters/{names[-2]}/fetch").json()["status"] == "fetching")
    gate.set()
    eventually(lambda: all(world.shown(name).get("version") for name in names[1:-1]))
    assert world.shown(names[0])["error"]["code"] == world.shown(names[-1])["error"]["code"] == "adapter_not_found"


# Endings before the end


def test_a_deletion_cancels_at_once_and_leaves_nothing(world: World, gate: threading.Event) -> None:
    source = world.site.put("team/slow", lora_files(2), gate)
    before = world.live.metric("graft_adapter_fetches_total", outcome="cancelled")
    answers: list[httpx.Response] = []
    waiting = threading.Thread(target=lambda: answers.append(world.order("slow", source, wait=True)))
    waiting.start()
    eventually(lambda: (world.shown("slow").get("fetch") or {}).get("bytes_done", 0) > 0)
    assert world.live.http.delete("/v1/adapters/slow").status_code == 200
    waiting.join()
    assert (answers[0].status_code, answers[0].json()["error"]["code"]) == (409, "fetch_cancelled")
    assert world.live.http.get("/v1/adapters/slow").status_code == 404
    assert world.ask("slow").status_code == 404
    assert world.live.metric("graft_adapter_fetches_total", outcome="cancelled") == before + 1
    assert world.fetched("slow", world.site.put("team/quick", lora_files(8)))["version"]  # the name is free
    gate.set()
    eventually(lambda: not world.leftovers())


def test_a_fetch_can_be_cancelled_without_the_adapter(world: World, gate: threading.Event) -> None:
    old = world.fetched("legal", world.site.put("team/one", lora_files(6)))["version"]
    world.order("legal", world.site.put("team/two", lora_files(7), gate), replace=True)
    assert world.live.http.delete("/v1/adapters/legal/fetch").json() == {
        "name": "legal", "object": "fetch", "deleted": True
    }  # fmt: skip
    assert world.live.http.delete("/v1/adapters/legal/fetch").status_code == 404
    gate.set()
    assert (world.shown("legal")["version"], world.shown("legal")["fetch"]) == (old, None)


def test_stuck_threads_of_cancelled_fetches_are_bounded(
    world: World, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetches, "MAX_THREADS", 1)
    world.order("stuck", world.site.put("team/stuck", lora_files(2), gate))
    eventually(lambda: (world.shown("stuck").get("fetch") or {}).get("bytes_done", 0) > 0)
    world.live.http.delete("/v1/adapters/stuck/fetch")
    world.order("next", world.site.put("team/next", lora_files(3)))
    assert world.shown("next")["fetch"]["status"] == "queued"
    gate.set()
    eventually(lambda: world.shown("next")["version"] is not None)


@pytest.mark.parametrize("verb", ["/fetch", ""])
def test_what_is_being_validated_is_too_late_to_cancel_but_not_to_delete(
    world: World, gate: threading.Event, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    registry = world.live.server.registry
    load = registry._load
    monkeypatch.setattr(registry, "_load", lambda *asked: (gate.wait(120), load(*asked))[1])
    world.order("late", world.site.put("team/late", lora_files(21)))
    eventually(lambda: world.shown("late")["fetch"]["status"] == "validating")
    answers: list[httpx.Response] = []
    deleting = threading.Thread(target=lambda: answers.append(world.live.http.delete(f"/v1/adapters/late{verb}")))
    deleting.start()
    gate.set()
    deleting.join()
    assert answers[0].status_code == (404 if verb else 200)
    assert world.live.http.get("/v1/adapters/late").status_code == (200 if verb else 404)


def test_a_client_that_leaves_cancels_nothing(world: World, gate: threading.Event) -> None:
    source = world.site.put("team/slow", lora_files(2), gate)
    connection = world.live.send("/v1/adapters", name="slow", source=source, wait=True)
    eventually(lambda: (world.shown("slow").get("fetch") or {}).get("bytes_done", 0) > 0)
    connection.close()
    gate.set()
    eventually(lambda: world.shown("slow").get("version") is not None)


def test_a_failure_is_remembered_until_it_is_cleared_or_tried_again(world: World) -> None:
    source = f"{world.site.url}/team/nothing"
    assert world.order("gone", source).status_code == 202
    eventually(lambda: world.shown("gone")["fetch"]["status"] == "failed")
    fetch = world.shown("gone")["fetch"]
    assert fetch["error"]["code"] == "source_not_found"
    assert "adapter_config.json" in fetch["error"]["message"]
    asked = world.ask("gone")
    assert (asked.status_code, asked.json()["error"]["code"]) == (404, "adapter_not_found")
    assert fetch["error"]["message"] in asked.json()["error"]["message"]
    assert world.live.http.delete("/v1/adapters/gone/fetch").status_code == 200
    assert world.live.http.get("/v1/adapters/gone").status_code == 404

    assert world.refusal("gone", source)[0] == 400
    world.fetched("gone", world.site.put("team/nothing", lora_files(9)))
    assert world.shown("gone")["fetch"] is None


def test_failures_are_remembered_within_bounds(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetches, "MAX_FAILURES", 2)
    for name in ("a", "b", "c"):
        world.refusal(name, f"{world.site.url}/team/nothing")
    assert [fetch["name"] for fetch in world.live.http.get("/v1/adapters").json()["fetches"]] == ["b", "c"]
    monkeypatch.setattr(fetches, "FAILURE_MEMORY_S", -1.0)
    assert world.live.http.get("/v1/adapters").json()["fetches"] == []


def test_a_server_that_stops_tells_who_waits_and_leaves_nothing(
    settings: Callable[..., Settings], site: Site, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetches, "_CLOSING_S", 0.01)  # the source answers only after the server's end
    same = settings(allow_source=(f"{site.url}/",))
    source = site.put("team/slow", lora_files(2), gate)
    answers: list[httpx.Response] = []
    with serving(same) as live:
        world = World(live, site, Path())
        waiting = threading.Thread(target=lambda: answers.append(world.order("slow", source, wait=True)))
        waiting.start()
        eventually(lambda: (world.shown("slow").get("fetch") or {}).get("bytes_done", 0) > 0)
        live.server.fetches.stop()
        waiting.join()
        assert answers[0].status_code == 503
        assert world.order("late", source).status_code == 503
    gate.set()
    eventually(lambda: not [thread for thread in threading.enumerate() if thread.name == "fetch-slow"])
    with serving(same) as live:
        assert live.http.get("/v1/adapters").json()["data"] == []
        assert World(live, site, Path()).leftovers() == []


# Bad sources


@pytest.mark.parametrize("is_announced", [True, False])
def test_what_is_too_large_is_stopped(world: World, gate: threading.Event, is_announced: bool) -> None:
    """By the announced size before the first byte, or else by the byte that is too many: never at the end."""
    source = world.site.put("team/large", lora_files(2))
    content = b"x" * (4 * MAX_UPLOAD_BYTES)
    announced = len(content) if is_announced else None
    world.site.pages[f"/team/large/{WEIGHTS}"] = Page(content, gate=gate, announced=announced)
    before = world.live.metric("graft_adapter_fetched_bytes_total")
    status, code, message = world.refusal("large", source)
    assert (status, code) == (413, "too_large")
    assert "--max-upload-bytes" in message
    if is_announced:
        assert world.live.metric("graft_adapter_fetched_bytes_total") == before


@pytest.mark.parametrize(
    ("pages", "status", "code", "words"),
    [
        ({WEIGHTS: None}, 400, "source_not_found", WEIGHTS),
        ({"adapter_config.json": None}, 400, "source_not_found", "adapter_config.json"),
        ({WEIGHTS: None, "adapter_model.bin": Page(b"pickle")}, 400, "invalid_adapter", "save_pretrained"),
        ({WEIGHTS: Page(b"no tensors")}, 400, "invalid_adapter", ""),
        ({"adapter_config.json": Page(b"{")}, 400, "invalid_adapter", "adapter_config.json"),
        ({"adapter_config.json": Page(b"[" * (1 << 18))}, 413, "too_large", ""),
        ({"manifest.json": Page(b"[]")}, 400, "invalid_value", "manifest"),
        ({"manifest.json": Page(b'{"base_fingerprint": "x"}')}, 400, "invalid_value", "base_fingerprint"),
        ({WEIGHTS: Page(b"half", announced=8)}, 502, "source_failed", ""),
        ({WEIGHTS: Page(status=500)}, 502, "source_failed", "500"),
        ({WEIGHTS: Page(status=403)}, 502, "source_denied", "credentials"),
        ({WEIGHTS: Page(status=302, headers={"Location": "/elsewhere/x"})}, 502, "source_not_allowed", "redirects"),
        ({WEIGHTS: Page(status=302, headers={"Location": "http://10.0.0.1/team/x"})}, 502, "source_not_allowed", "10."),
        ({WEIGHTS: Page(status=302, headers={"Location": "file:///etc/x"})}, 502, "source_failed", "302"),
        ({WEIGHTS: Page(status=302, headers={"Location": f"/team/bad/{WEIGHTS}"})}, 502, "source_failed", ""),
    ],
    ids=str,
)
def test_a_bad_source_is_refused_with_its_reason(
    world: World, pages: dict[str, Page | None], status: int, code: str, words: str
) -> None:
    source = world.site.put("team/bad", lora_files(2))
    for name, page in pages.items():
        world.site.pages[f"/team/bad/{name}"] = page or Page(status=404)
    found_status, found_code, message = world.refusal("bad", source)
    assert (found_status, found_code) == (status, code), message
    assert words in message


def test_a_redirect_within_what_is_allowed_is_followed(world: World) -> None:
    world.site.put("team/real", lora_files(10))
    target = f"/team/real/{WEIGHTS}?signature=1"
    world.site.pages[target] = world.site.pages[f"/team/real/{WEIGHTS}"]
    source = world.site.put("team/moved", lora_files(10))
    world.site.pages[f"/team/moved/{WEIGHTS}"] = Page(status=307, headers={"Location": target})
    assert world.fetched("moved", source)["source"] == source


@pytest.mark.parametrize(
    ("source", "status", "code"),
    [
        ("hf://other/repo", 403, "source_not_allowed"),
        ("http://127.0.0.1:1/team/x", 403, "source_not_allowed"),
        ("file:///etc/passwd", 403, "source_not_allowed"),
        ("hf://org/../repo", 400, "invalid_source"),
        ("http://user:secret@127.0.0.1/team/x", 400, "invalid_source"),
        ("legal", 400, "invalid_source"),
        (5, 400, "invalid_value"),
        ("\ud800", 400, "invalid_value"),
    ],
)
def test_what_is_not_allowed_is_refused_before_it_is_asked(world: World, source: Any, status: int, code: str) -> None:
    refused = world.order("x", source)
    assert (refused.status_code, refused.json()["error"]["code"]) == (status, code)
    assert "secret" not in refused.text
    assert world.live.http.get("/v1/adapters/x").status_code == 404


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not valid JSON"),
        (b"[" * 100_000, "JSON"),
        (b"[]", "JSON object"),
        (b'{"name": "x"}', "'source' is required"),
        (b'{"name": "X y", "source": "hf://org/repo"}', "cannot name an adapter"),
        (b'{"name": "x", "source": "hf://org/repo", "token": "t"}', "'token' is not supported"),
        (b'{"name": "x", "source": "hf://org/repo", "wait": "yes"}', "'wait'"),
        (b'{"name": "x", "source": "hf://org/repo", "base_fingerprint": "y"}', "'base_fingerprint'"),
        (b" " * 70_000, "multipart/form-data"),
    ],
    ids=[*"abcdefghi"],
)
def test_a_body_that_is_no_order_is_refused(world: World, body: bytes, words: str) -> None:
    answer = world.live.http.post("/v1/adapters", content=body, headers={"content-type": "application/json; x=y"})
    assert answer.status_code in (400, 413)
    assert words in answer.json()["error"]["message"]


def test_a_server_that_was_allowed_nothing_names_the_flag(strict: Live) -> None:
    refused = strict.post("/v1/adapters", name="x", source="hf://org/repo")
    assert refused.status_code == 403
    assert "--allow-source" in refused.json()["error"]["message"]


# Folders of the machine


def save(folder: Path, files: AdapterFiles) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_bytes(files.config)
    (folder / WEIGHTS).write_bytes(files.weights)
    return folder


def test_a_folder_is_fetched_and_a_link_out_of_what_is_allowed_is_not(world: World, tmp_path: Path) -> None:
    inside = save(world.folder / "legal", lora_files(11))
    assert world.fetched("legal", f"file://{inside}")["source"] == f"file://{inside}"
    outside = save(tmp_path / "outside", lora_files(12))
    (world.folder / "folder-link").symlink_to(outside)
    half = save(world.folder / "file-link", lora_files(12))
    (half / WEIGHTS).unlink()
    (half / WEIGHTS).symlink_to(outside / WEIGHTS)
    for name in ("folder-link", "file-link"):
        assert world.refusal("linked", f"file://{world.folder}/{name}")[:2] == (403, "source_not_allowed")
    (world.folder / "inner-link").symlink_to(inside)
    assert world.fetched("inner", f"file://{world.folder}/inner-link")["version"]


def test_what_is_no_plain_file_is_not_waited_for(world: World) -> None:
    folder = save(world.folder / "pipe", lora_files(11))
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)
    assert world.refusal("pipe", f"file://{folder}")[1] == "source_not_found"


# Object stores


def test_an_adapter_comes_out_of_a_bucket(world: World) -> None:
    files = lora_files(16)
    with s3_service() as s3:
        for name, content in {"adapter_config.json": files.config, WEIGHTS: files.weights}.items():
            s3.put_object(Bucket=BUCKET, Key=f"team/fetched/{name}", Body=content)
        shown = world.fetched("legal", f"s3://{BUCKET}/team/fetched")
        assert shown["source_revision"] == s3.head_object(Bucket=BUCKET, Key=f"team/fetched/{WEIGHTS}")["ETag"].strip(
            '"'
        )
        assert world.refusal("none", f"s3://{BUCKET}/team/absent")[1] == "source_not_found"
        assert world.refusal("other", f"s3://{BUCKET}/teams/legal")[1] == "source_not_allowed"
    assert world.refusal("unreachable", f"s3://{BUCKET}/team/fetched")[1] == "source_failed"


# The hub


@pytest.fixture
def hub(world: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("HF_ENDPOINT", world.site.url)
    # Whoever runs the tests may forbid the real hub; this one is on this machine.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield world.site
    world.site.repositories.clear()


def repository(name: str, *versions: AdapterFiles, folder: str = "") -> Repository:
    """A repository with a commit for each version, main being the last."""
    commits = {
        f"{number:040x}": {
            f"{folder}adapter_config.json": files.config, f"{folder}{WEIGHTS}": files.weights, "README.md": b"#"
        }
        for number, files in enumerate(versions)
    }  # fmt: skip
    branches = {"main": list(commits)[-1], "v1": next(iter(commits)), "refs/pr/1": next(iter(commits))}
    return Repository(name, branches, commits)


def test_a_revision_of_the_hub_is_pinned_to_its_commit(world: World, hub: Site) -> None:
    first, second = lora_files(13), lora_files(14)
    hub.repositories["org/legal"] = repository("org/legal", first, second)
    main = world.fetched("legal", "hf://org/legal")
    assert (main["source"], main["source_revision"]) == ("hf://org/legal", f"{1:040x}")
    for revision in ("v1", f"{0:040x}", "refs%2Fpr%2F1"):
        pinned = world.fetched("old", f"hf://org/legal@{revision}", replace=True)
        assert pinned["version"] == world.fetched("twin", f"hf://org/legal@{0:040x}")["version"]
        assert pinned["source_revision"] == f"{0:040x}"
    assert main["version"] != pinned["version"]


def test_a_branch_that_has_not_moved_is_not_read_again(world: World, hub: Site) -> None:
    hub.repositories["org/legal"] = repository("org/legal", lora_files(13))
    version = world.fetched("legal", "hf://org/legal")["version"]
    hub.asked.clear()
    assert world.order("legal", "hf://org/legal", wait=True).status_code == 200
    assert [path for path in hub.asked if "/resolve/" in path] == []
    hub.repositories["org/legal"] = repository("org/legal", lora_files(13), lora_files(14))
    assert world.fetched("legal", "hf://org/legal", replace=True)["version"] != version


def test_a_folder_of_a_repository_can_be_named(world: World, hub: Site) -> None:
    hub.repositories["org/many"] = repository("org/many", lora_files(15), folder="adapters/legal/")
    assert world.fetched("legal", "hf://org/many@main/adapters/legal")["source_revision"] == f"{0:040x}"


def test_what_the_hub_has_not_is_refused(world: World, hub: Site) -> None:
    hub.repositories["org/legal"] = repository("org/legal", lora_files(13))
    hub.repositories["org/renamed"] = repository("elsewhere/legal", lora_files(13))
    pickled = {"adapter_config.json": b"{}", "adapter_model.bin": b"pickle"}
    hub.repositories["org/pickled"] = Repository("org/pickled", {"main": "a" * 40}, {"a" * 40: pickled})
    for source, code, words in (
        ("hf://org/legal@v9", "source_not_found", "revision"),
        ("hf://org/none", "source_not_found", "HF_TOKEN"),
        ("hf://org/renamed", "source_not_allowed", "elsewhere"),
        ("hf://org/pickled", "invalid_adapter", "save_pretrained"),
    ):
        _, found, message = world.refusal("x", source)
        assert found == code, message
        assert words in message

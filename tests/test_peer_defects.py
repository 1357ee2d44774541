"""Defects that users of another server have met: each situation is made anew here, and must end well.

| issue        | what was met there                                                        |
|--------------|---------------------------------------------------------------------------|
| vLLM #42125  | a reload under the same name was answered from the old one's cached prefix |
| vLLM #54839  | an unload forgot the name, and the memory stayed taken                    |
| vLLM #47724  | a request in flight was answered with another tenant's adapter            |
| vLLM #55193  | an adapter that matches no module was accepted, and the base answered      |
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.adapters.content import CONFIG_FILE, WEIGHTS_FILE
from server.ground.config import Settings
from tests.api.adapter_files import AdapterFiles, lora_files
from tests.api.conftest import Gate, Live, eventually, serving

PROMPT = "The old fisherman went down to the harbour before the sun had risen, and there he saw that his boat was gone."
NUM_TOKENS = 24


@dataclass
class Scene:
    """Servers on the tiny base that may load adapters from `shelf`, until the test ends."""

    model: Path
    scratch: Path
    shelf: Path
    closing: ExitStack
    num_servers: int = 0

    def server(self, **changes: Any) -> Live:
        self.num_servers += 1
        plain: dict[str, Any] = {
            "model": str(self.model),
            "quantize": "none",
            "dtype": "float32",
            "device": "cpu",
            "store": self.scratch / f"store-{self.num_servers}",
            "adapter_paths": (self.shelf,),
            "block_size": 16,
        }
        return self.closing.enter_context(serving(Settings(**(plain | changes))))

    def write(self, name: str, files: AdapterFiles) -> Path:
        folder = self.shelf / name
        folder.mkdir(exist_ok=True)
        (folder / CONFIG_FILE).write_bytes(files.config)
        (folder / WEIGHTS_FILE).write_bytes(files.weights)
        return folder


@pytest.fixture
def scene(tiny_llama: Path, tmp_path: Path) -> Iterator[Scene]:
    (tmp_path / "shelf").mkdir()
    with ExitStack() as closing:
        yield Scene(tiny_llama, tmp_path, tmp_path / "shelf", closing)


def load(live: Live, name: str, folder: Path, **options: bool) -> httpx.Response:
    return live.post("/v1/load_lora_adapter", lora_name=name, lora_path=str(folder), **options)


def ask(live: Live, name: str | None) -> str:
    choice = {} if name is None else {"model": name}
    body = {"prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
    answer = live.post("/v1/completions", **body, **choice)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def stale_prefix_after_a_same_name_reload(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    live, control = scene.server(), scene.server(prefix_reuse="off")
    folder = scene.write("sql", lora_files(1))
    assert load(live, "sql", folder).status_code == 200
    old = ask(live, "sql")
    assert ask(live, "sql") == old
    num_hits = live.server.engine.stats().num_hit_tokens
    assert num_hits > 0, "the prefix is in the cache, and would be found under the name and the path"
    scene.write("sql", lora_files(2))  # the same name, the same path, other weights
    assert load(live, "sql", folder, load_inplace=True).status_code == 200
    assert load(control, "sql", folder).status_code == 200
    assert ask(live, "sql") == ask(control, "sql") != old
    assert live.server.engine.stats().num_hit_tokens == num_hits


def an_unload_that_does_not_unload(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    live = scene.server()
    folder = scene.write("sql", lora_files(1))

    def used() -> tuple[int, int, int]:
        stats = live.server.registry.stats()
        return stats.host_used_bytes, live.server.adapters.used_bytes, live.server.adapters.num_slots

    assert load(live, "sql", folder).status_code == 200
    for verb, body in (("adapters/sql/unload", {}), ("unload_lora_adapter", {"lora_name": "sql"})):
        ask(live, "sql")
        assert min(used()) > 0
        assert live.post(f"/v1/{verb}", **body).status_code == 200
        assert used() == (0, 0, 0)


def a_request_in_flight_gets_another_tenants_adapter(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """The greedy control twice, to know that it is deterministic; then the same under loads, unloads and reloads.

    The device holds two adapters at most, so that the tenants that come and go are given the freed rows and slots.
    """
    live = scene.server(adapter_memory=20 * 1024, prefix_reuse="off")
    folders = {f"tenant{seed}": scene.write(f"tenant{seed}", lora_files(seed)) for seed in range(5)}
    for name in ("tenant0", "tenant1"):
        assert load(live, name, folders[name]).status_code == 200
    alone = ask(live, "tenant0")
    assert ask(live, "tenant0") == alone
    assert len({alone, ask(live, "tenant1"), ask(live, None)}) == 3, "one taken for another would show"
    gate = Gate(live.server.runner.run)
    monkeypatch.setattr(live.server.runner, "run", gate)
    said: list[str] = []
    asking = threading.Thread(target=lambda: said.append(ask(live, "tenant0")))
    try:
        gate.allow(2)
        asking.start()
        eventually(lambda: live.http.get("/v1/adapters/tenant0").json()["num_running"] == 1)
        for name in ("tenant2", "tenant3", "tenant4"):
            assert load(live, name, folders[name]).status_code == 200
            assert "device" in live.post(f"/v1/adapters/{name}/load").json()["tiers"]
            gate.allow(3)
            assert live.post("/v1/unload_lora_adapter", lora_name=name).status_code == 200
        assert live.server.registry.stats().device_evictions_total > 0, "rows changed hands"
        assert load(live, "tenant0", scene.write("other", lora_files(9)), load_inplace=True).status_code == 200
    finally:
        gate.allow(1_000_000)
        asking.join(120)
    assert said == [alone]
    assert ask(live, "tenant0") != alone, "the next request gets the new one"


def an_adapter_that_matches_nothing(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    live = scene.server()
    nothing = {
        "another-model": lora_files(1, parent="cross_attn"),
        "other-names": lora_files(1, parent="mixer").with_config(target_modules=["mixer.q_proj", "mixer.v_proj"]),
        "no-weights": AdapterFiles(lora_files(1).config, b"\x02\0\0\0\0\0\0\0{}"),
    }
    for name, files in nothing.items():
        for refused in (load(live, name, scene.write(name, files)), live.upload(name, files)):
            assert refused.status_code == 400, f"{name}: {refused.text}"
            assert len(refused.json()["error"]["message"]) > 20
        assert live.post("/v1/completions", prompt="Hi", model=name).status_code == 404
    assert live.http.get("/v1/adapters").json()["data"] == []


DEFECTS: dict[str, Callable[[Scene, pytest.MonkeyPatch], None]] = {
    "vllm-42125": stale_prefix_after_a_same_name_reload,
    "vllm-54839": an_unload_that_does_not_unload,
    "vllm-47724": a_request_in_flight_gets_another_tenants_adapter,
    "vllm-55193": an_adapter_that_matches_nothing,
}


@pytest.mark.parametrize("issue", DEFECTS)
def test_a_defect_of_a_peer_is_not_met_here(issue: str, scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    DEFECTS[issue](scene, monkeypatch)

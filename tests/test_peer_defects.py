"""Defects that users of another server have met: each situation is made anew here, and must end well.

| issue           | what was met there                                                                 |
|-----------------|------------------------------------------------------------------------------------|
| vLLM #42125     | a reload under the same name was answered from the old one's cached prefix         |
| vLLM #54839     | an unload forgot the name, and the memory stayed taken                             |
| vLLM #47724     | a request in flight was answered with another tenant's adapter                     |
| vLLM #55193     | an adapter that matches no module was accepted, and the base answered              |
| vLLM #38606     | adapters that alternate fast corrupted each other's KV blocks                      |
| vLLM #10798     | the answers differ from PEFT's with the same adapter                               |
| SGLang #40835   | use_rslora is passed over, and the adapter is sqrt(r) times too weak               |
| SGLang #13349   | one adapter more than fit, and the first token takes 6,278 ms instead of 40        |
| LoRAX's queue   | whoever comes after an adapter that is slow to arrive waits for it (its scheduler) |
| LoRAX's merging | A and B are merged apart, so that their product has cross terms (its strategies)   |
"""

import json
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load as tensors_in
from safetensors.torch import save
from transformers import AutoModelForCausalLM

from server.adapters.format.content import CONFIG_FILE, WEIGHTS_FILE
from server.adapters.method import Lowered
from server.cli import main
from server.engine.sequence import SamplingParams
from server.ground.config import Settings
from tests.adapters.peft_adapters import make_adapter, peft_logits
from tests.api.adapter_files import RANK, AdapterFiles, lora_files
from tests.api.conftest import Gate, Live, eventually, serving
from tests.serving import Ask, answer_all
from tests.test_isolation import check_nothing_leaks, compared

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


def adapters_that_alternate_fast(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """All requests at once, from tenant to tenant and back, with prompts that begin alike.

    The device holds two of the five adapters, and the cache some of the sequences, so that slots, rows and blocks
    change hands all the time. Each must get what it gets alone, on a server that is short of nothing and reuses none.
    """
    short = {"adapter_memory": 20 * 1024, "kv_memory": 192 * 1024, "max_sequences": 16, "max_batch_tokens": 96}
    live, control = scene.server(**short), scene.server(prefix_reuse="off")
    names = [f"tenant{seed}" for seed in range(5)]
    for seed, name in enumerate(names):
        folder = scene.write(name, lora_files(seed))
        assert load(live, name, folder).status_code == load(control, name, folder).status_code == 200
    stem = tuple(random.Random(1).randrange(256) for _ in range(56))
    params = SamplingParams(12, temperature=0.0, ignore_eos=True, logprobs=2)
    order = [name for pair in zip(names, names[1:] + names[:1], strict=True) for name in pair * 2]
    asks = [Ask(name, (*stem, turn), params) for turn, name in enumerate(order)]
    alone = [answer_all(control.server, [one])[0] for one in asks]
    for wave in (asks, asks[::-1]):
        expected = alone if wave is asks else alone[::-1]
        answers = answer_all(live.server, wave)
        num_compared = sum(compared(a, b) for a, b in zip(expected, answers, strict=True))
        assert num_compared >= 0.99 * params.max_tokens * len(asks)
    engine = live.server.engine.stats()
    assert min(engine.num_preemptions, engine.num_hit_tokens) > 0
    assert live.server.registry.stats().device_evictions_total > 0
    check_nothing_leaks(live.server)


def answers_that_differ_from_pefts(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy, beside requests for the base and for others: each token is PEFT's, with its probability."""
    dense = AutoModelForCausalLM.from_pretrained(scene.model, dtype=torch.float32).eval()
    kinds = ("lora", "rslora-patterns", "dora")
    folders = {kind: make_adapter(dense, kind, scene.shelf / kind, seed) for seed, kind in enumerate(kinds)}
    live = scene.server(adapters=scene.shelf)
    prompt = tuple(PROMPT.encode())
    params = SamplingParams(NUM_TOKENS, temperature=0.0, ignore_eos=True, logprobs=1)
    answers = answer_all(live.server, [Ask(kind, prompt, params) for kind in (*kinds, None)])
    for kind, answer in zip(kinds, answers, strict=False):
        logits = peft_logits(dense, folders[kind], torch.tensor([[*prompt, *answer.token_ids]]))
        own = logits[0, len(prompt) - 1 : -1].log_softmax(-1)  # (NUM_TOKENS, vocabulary)
        assert own.argmax(-1).tolist() == list(answer.token_ids)
        said = torch.tensor([scores.top[0][1] for scores in answer.logprobs])
        torch.testing.assert_close(said, own.amax(-1), rtol=0, atol=1e-3)


def an_rslora_that_is_too_weak(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """alpha / sqrt(r), and not alpha / r: the same numbers as a plain adapter with sqrt(r) times the alpha."""
    live = scene.server()
    files = lora_files(1, scale=0.3)
    alpha, times = json.loads(files.config)["lora_alpha"], int(RANK**0.5)
    assert load(live, "rs", scene.write("rs", files.with_config(use_rslora=True))).status_code == 200
    assert load(live, "equal", scene.write("equal", files.with_config(lora_alpha=alpha * times))).status_code == 200
    assert load(live, "weak", scene.write("weak", files)).status_code == 200
    assert live.http.get("/v1/adapters/rs").json()["method"] == "rslora"
    assert ask(live, "rs") == ask(live, "equal") != ask(live, "weak")


def one_adapter_more_than_fit(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """No clock: what a request costs is counted. Three adapters take turns on a device for two.

    Asked for one by one, a request takes as many steps as with two. All at once, none takes more than its turn: no more
    steps altogether than one by one. Nothing is read from the disk again.
    """
    live = scene.server(adapter_memory=20 * 1024, prefix_reuse="off")
    names = ["one", "two", "three"]
    for seed, name in enumerate(names):
        assert load(live, name, scene.write(name, lora_files(seed))).status_code == 200

    def num_steps(order: Sequence[str]) -> int:
        before = live.server.engine.stats().num_steps
        for name in order:
            ask(live, name)
        return live.server.engine.stats().num_steps - before

    fitting = num_steps(names[:2] * 3)
    evictions = live.server.registry.stats().device_evictions_total
    assert num_steps(names * 2) == fitting
    stats = live.server.registry.stats()
    assert stats.device_evictions_total > evictions, "some had to make room for others"
    before = live.server.engine.stats().num_steps
    params = SamplingParams(NUM_TOKENS, temperature=0.0, ignore_eos=True)
    answers = answer_all(live.server, [Ask(name, tuple(PROMPT.encode()), params) for name in names * 2])
    assert [len(answer.token_ids) for answer in answers] == [NUM_TOKENS] * 6
    assert live.server.engine.stats().num_steps - before <= fitting
    assert live.server.registry.stats().loads_total == 0, "the uploads were kept on the host"


def others_behind_an_adapter_that_is_slow_to_arrive(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files cannot be read until everybody behind it has been answered: the base, and an adapter as cold as it."""
    for seed, name in enumerate(("slow", "quick")):
        scene.write(name, lora_files(seed))
    live = scene.server(adapters=scene.shelf)
    is_read, may_read = threading.Event(), threading.Event()
    read = live.server.registry._load

    def read_slowly(folder: Path) -> Lowered:
        if folder.name == "slow":
            is_read.set()
            assert may_read.wait(120)
        return read(folder)

    monkeypatch.setattr(live.server.registry, "_load", read_slowly)
    said: list[str] = []
    asking = threading.Thread(target=lambda: said.append(ask(live, "slow")))
    asking.start()
    try:
        assert is_read.wait(120)
        behind = [ask(live, None), ask(live, "quick"), ask(live, "quick")]
        assert said == []
    finally:
        may_read.set()
        asking.join(120)
    assert len(said) == 1
    assert said[0] not in behind


def a_merge_with_cross_terms(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """(B1 A1 + B2 A2) / 2, written out as one adapter of twice the rank, and not the product of the two means."""
    live = scene.server()
    one, other = lora_files(1), lora_files(2)
    folders = [scene.write("one", one), scene.write("other", other)]
    flags = ["--model", str(scene.model), "--quantize", "none", "--dtype", "float32", "--device", "cpu"]
    asked = [word for folder in folders for word in ("--adapter", f"{folder}=0.5")]
    assert main(["merge", str(scene.shelf / "merged"), *asked, *flags, "--store", str(scene.scratch / "none")]) == 0
    pairs = [(key, tensors_in(one.weights)[key], tensors_in(other.weights)[key]) for key in tensors_in(one.weights)]
    summed = {key: torch.cat((a, b), 0) if "lora_A" in key else torch.cat((a / 2, b / 2), 1) for key, a, b in pairs}
    crossed = {key: (a + b) / 2 for key, a, b in pairs}
    alpha = json.loads(one.config)["lora_alpha"]
    scene.write("summed", AdapterFiles(one.with_config(r=2 * RANK, lora_alpha=2 * alpha).config, save(summed)))
    scene.write("crossed", AdapterFiles(one.config, save(crossed)))
    for name in ("merged", "summed", "crossed"):
        assert load(live, name, scene.shelf / name).status_code == 200
    assert ask(live, "merged") == ask(live, "summed") != ask(live, "crossed")


DEFECTS: dict[str, Callable[[Scene, pytest.MonkeyPatch], None]] = {
    "vllm-42125": stale_prefix_after_a_same_name_reload,
    "vllm-54839": an_unload_that_does_not_unload,
    "vllm-47724": a_request_in_flight_gets_another_tenants_adapter,
    "vllm-55193": an_adapter_that_matches_nothing,
    "vllm-38606": adapters_that_alternate_fast,
    "vllm-10798": answers_that_differ_from_pefts,
    "sglang-40835": an_rslora_that_is_too_weak,
    "sglang-13349": one_adapter_more_than_fit,
    "lorax-queue": others_behind_an_adapter_that_is_slow_to_arrive,
    "lorax-merging": a_merge_with_cross_terms,
}


@pytest.mark.parametrize("issue", DEFECTS)
def test_a_defect_of_a_peer_is_not_met_here(issue: str, scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    DEFECTS[issue](scene, monkeypatch)

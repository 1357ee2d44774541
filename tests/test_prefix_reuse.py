"""Prefix reuse: blocks of the KV cache that hold a prompt's beginning are not computed again, and no answer changes.

Law 4 on a running server: what is shared has the same tokens, the same edits and the same salt.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from load_tests import prefix_reuse
from server.assemble import Server
from server.engine.sequence import FinishReason, SamplingParams
from server.ground.config import Settings
from server.model.base import Base
from tests.adapters.peft_adapters import make_adapter
from tests.api.adapter_files import lora_files
from tests.api.conftest import Live, eventually
from tests.api.conftest import serving as listening
from tests.serving import Answer, Ask, answer_all, serving
from tests.test_isolation import check_nothing_leaks, compared

BLOCK_SIZE = 16
GREEDY = SamplingParams(6, temperature=0.0, ignore_eos=True, logprobs=2)
KINDS = ("lora", "rslora", "dora", "dora-attention", "vera", "ia3", "ia3-feedforward", "lora-bias-of-b")
NUM_STEM = 100  # tokens, of which six blocks can be found


@pytest.fixture(scope="module")
def adapters(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an adapter of each kind."""
    folder = tmp_path_factory.mktemp("adapters")
    dense = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    for seed, kind in enumerate(KINDS):
        make_adapter(dense, kind, folder / kind, seed)
    return folder


@pytest.fixture
def stem(request: pytest.FixtureRequest) -> tuple[int, ...]:
    """A prompt that no other test has, so that tests can share a server."""
    dice = random.Random(request.node.name)
    return tuple(dice.randrange(256) for _ in range(NUM_STEM))


class Reusing:
    """A server, and what it has found in its cache since the test began."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._num_before = server.engine.stats().num_hit_tokens

    def ask(self, name: str | None, prompt: tuple[int, ...], params: SamplingParams = GREEDY) -> Answer:
        return answer_all(self.server, [Ask(name, prompt, params)])[0]

    @property
    def num_hits(self) -> int:
        return self.server.engine.stats().num_hit_tokens - self._num_before


@pytest.fixture(scope="module")
def server(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory, adapters: Path) -> Iterator[Server]:
    scratch = tmp_path_factory.mktemp("reuse")
    twin = f"twin={adapters / 'lora'}"
    with serving(tiny_llama, scratch, adapters=str(adapters), adapter=twin, block_size=str(BLOCK_SIZE)) as server:
        yield server


@pytest.fixture
def reusing(server: Server) -> Reusing:
    return Reusing(server)


# The same answers


def asks(dice: random.Random, count: int) -> list[Ask]:
    """Requests over the base and eight adapters whose prompts share beginnings of all lengths."""
    stems = [tuple(dice.randrange(256) for _ in range(110)) for _ in range(4)]

    def prompt() -> tuple[int, ...]:
        shared = dice.choice(stems)[: dice.randint(1, 110)]
        return shared + tuple(dice.randrange(256) for _ in range(dice.choice((0, 1, 5, 20))))

    return [Ask(dice.choice((None, *KINDS)), prompt(), GREEDY) for _ in range(count)]


def test_five_hundred_requests_over_eight_adapters_answer_alike_with_reuse_and_without(
    tiny_llama: Path, tmp_path: Path, adapters: Path
) -> None:
    requests = asks(random.Random(5), 500)
    answers: dict[str, list[Answer]] = {}
    for reuse in ("off", "on"):
        flags = {"adapters": str(adapters), "block_size": str(BLOCK_SIZE), "prefix_reuse": reuse}
        # A short cache, so that blocks are given away and found again all the time.
        with serving(tiny_llama, tmp_path, **flags, kv_memory="4MiB") as server:
            waves = [requests[i : i + 100] for i in range(0, len(requests), 100)]
            answers[reuse] = [answer for wave in waves for answer in answer_all(server, wave)]
            stats = server.engine.stats()
            check_nothing_leaks(server)
        if reuse == "off":
            assert (stats.num_queried_tokens, stats.num_hit_tokens, stats.num_kept_blocks) == (0, 0, 0)
    assert stats.num_queried_tokens == sum(len(ask.prompt) for ask in requests)
    assert stats.num_hit_tokens > 0.1 * stats.num_queried_tokens
    num_compared = sum(compared(off, on) for off, on in zip(answers["off"], answers["on"], strict=True))
    assert num_compared >= 0.99 * sum(len(answer.token_ids) for answer in answers["off"])


def test_a_prompt_that_is_known_up_to_one_token_is_decoded_and_answers_alike(
    reusing: Reusing, stem: tuple[int, ...]
) -> None:
    """48 tokens are found and one is computed: the first step of this sequence looks like a decode."""
    first, again = (reusing.ask("dora", stem[:49]) for _ in range(2))
    assert reusing.num_hits == 48
    assert_alike(first, again)


def test_a_conversation_finds_its_own_turns(reusing: Reusing, stem: tuple[int, ...]) -> None:
    first = reusing.ask("vera", stem[:43])
    reusing.ask("vera", (*stem[:43], *first.token_ids, 1, 2, 3))
    assert reusing.num_hits == 48  # of 43 tokens of the prompt and 5 of the answer; its sixth was never computed


def test_two_names_of_the_same_content_share(reusing: Reusing, stem: tuple[int, ...]) -> None:
    first, second = (reusing.ask(name, stem) for name in ("lora", "twin"))
    assert reusing.num_hits == 96
    assert_alike(first, second)


def assert_alike(first: Answer, second: Answer) -> None:
    assert first.error is second.error is None
    compared(first, second)


# What is not shared


def test_nothing_is_shared_among_adapters_and_the_base(reusing: Reusing, stem: tuple[int, ...]) -> None:
    for name in (None, "lora", "dora", "ia3"):
        reusing.ask(name, stem)
    assert reusing.num_hits == 0
    reusing.ask("dora", stem)
    assert reusing.num_hits == 96


def test_a_scored_prompt_is_computed_whole(reusing: Reusing, stem: tuple[int, ...]) -> None:
    params = SamplingParams(2, temperature=0.0, ignore_eos=True, prompt_logprobs=1)
    for _ in range(2):
        assert len(reusing.ask("lora", stem, params).prompt_logprobs) == len(stem)
    assert reusing.num_hits == 0
    reusing.ask("lora", stem)
    assert reusing.num_hits == 96, "others find what it has computed"


def test_a_failed_step_leaves_nothing_behind(
    reusing: Reusing, stem: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second chunk fails, and the first is not found again."""
    run, num_steps = reusing.server.runner.run, iter(range(99))

    def fail_at_second(*step: Any) -> Any:
        if next(num_steps) == 1:
            raise RuntimeError("the device fell off the bus")
        return run(*step)

    with monkeypatch.context() as patch:
        patch.setattr(reusing.server.runner, "run", fail_at_second)
        assert reusing.ask(None, stem).finish_reason is FinishReason.ERROR
    assert reusing.ask(None, stem).finish_reason is FinishReason.LENGTH
    assert reusing.num_hits == 0


def test_an_answer_that_overflows_leaves_nothing_behind(
    tiny_llama: Path, tmp_path: Path, adapters: Path, stem: tuple[int, ...]
) -> None:
    """Its prompt is read in chunks, so that full blocks were known before the overflow was seen."""
    folder = tmp_path / "adapters" / "huge"
    folder.mkdir(parents=True)
    config = json.loads((adapters / "lora" / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 1e30}))
    (folder / "adapter_model.safetensors").write_bytes((adapters / "lora" / "adapter_model.safetensors").read_bytes())
    flags = {"adapters": str(folder.parent), "block_size": str(BLOCK_SIZE), "max_batch_tokens": "64"}
    with serving(tiny_llama, tmp_path, **flags) as server:
        for _ in range(2):
            assert answer_all(server, [Ask("huge", stem, GREEDY)])[0].finish_reason is FinishReason.ERROR
        stats = server.engine.stats()
        assert (stats.num_hit_tokens, stats.num_kept_blocks) == (0, 0)


def test_a_base_whose_angles_depend_on_the_length_runs_without_reuse(
    tiny_llama: Path,
    tmp_path: Path,
    stem: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(Base, "has_length_dependent_rope", True)
    with caplog.at_level("INFO"), serving(tiny_llama, tmp_path, block_size=str(BLOCK_SIZE)) as server:
        for _ in range(2):
            answer_all(server, [Ask(None, stem, GREEDY)])
        assert server.engine.stats().num_queried_tokens == 0
    assert "not reused" in caplog.text


# What it saves


def test_the_measurement_of_it_measures_it(tiny_llama: Path, tmp_path: Path) -> None:
    sizes = ["--block-sizes", "16", "--shared-tokens", "96", "--tail-tokens", "4", "--decode-tokens", "2"]
    counts = ["--rounds", "1", "--requests", "3", "--streams", "2", "--device", "cpu"]
    out = tmp_path / "report.json"
    assert prefix_reuse.main(["--model", str(tiny_llama), *sizes, *counts, "--out", str(out)]) == 0
    on, off = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert (on["prefix_reuse"], off["prefix_reuse"]) == ("on", "off")
    assert on["hit_rate"] == pytest.approx(2 * 96 / (3 * 100))  # the first of three requests finds nothing
    assert off["hit_rate"] == 0
    assert min(row[name] for row in (on, off) for name in ("cold_ttft_ms", "warm_ttft_ms", "decode_tokens_per_s")) > 0


# Over HTTP


@pytest.fixture(scope="module")
def live(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    flags: dict[str, Any] = {"quantize": "none", "dtype": "float32", "device": "cpu", "block_size": BLOCK_SIZE}
    settings = Settings(
        model=str(tiny_llama), served_model_name=("tiny",), store=tmp_path_factory.mktemp("store"), **flags
    )
    with listening(settings) as live:
        yield live


def completed(live: Live, prompt: Any, **body: Any) -> dict[str, Any]:
    plain = {"prompt": prompt, "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    answer = live.post("/v1/completions", **(plain | body))
    assert answer.status_code == 200, answer.text
    return answer.json()  # type: ignore[no-any-return]


def cached(answer: dict[str, Any]) -> int:
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"]  # type: ignore[no-any-return]


def test_usage_tells_how_many_tokens_were_found(live: Live, stem: tuple[int, ...]) -> None:
    assert [cached(completed(live, stem)) for _ in range(2)] == [0, 96]
    assert cached(completed(live, [stem, stem[:50], [1, 2, 3]])) == 96 + 48
    assert cached(completed(live, stem, n=3, temperature=1)) == 96, "a prompt counts once, however many choices it has"
    assert cached(completed(live, stem, echo=True, logprobs=1)) == 0, "all rows of a scored prompt are computed"


def test_openais_client_reads_it(live: Live) -> None:
    messages: Any = [{"role": "user", "content": "Tell me a story that begins in the harbour."}]
    usages = [live.openai.chat.completions.create(model="tiny", messages=messages, max_tokens=2).usage for _ in "12"]
    details = [usage.prompt_tokens_details.cached_tokens for usage in usages]  # type: ignore[union-attr]
    assert details[0] == 0
    assert details[1] == usages[1].prompt_tokens // BLOCK_SIZE * BLOCK_SIZE > 0  # type: ignore[union-attr]


@pytest.mark.parametrize("is_continuous", [False, True])
def test_a_stream_tells_it_too(live: Live, stem: tuple[int, ...], is_continuous: bool) -> None:
    completed(live, stem)
    options = {"include_usage": True, "continuous_usage_stats": is_continuous}
    body = {"prompt": stem, "max_tokens": 4, "ignore_eos": True, "stream": True, "stream_options": options}
    with live.http.stream("POST", "/v1/completions", json=body) as answer:
        chunks = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]
    told = [cached(chunk) for chunk in chunks if chunk["usage"] is not None]
    assert told == [96] * (len(chunks) if is_continuous else 1)


def test_a_salt_keeps_tenants_apart(live: Live, stem: tuple[int, ...]) -> None:
    salts = (None, "tenant-a", "tenant-b", "tenant-a", None)
    assert [cached(completed(live, stem, cache_salt=salt)) for salt in salts] == [0, 0, 0, 96, 96]


@pytest.mark.parametrize("salt", ["", "x" * 257, 5])
def test_a_salt_is_a_text_of_some_length(live: Live, salt: Any) -> None:
    bodies = {"completions": {"prompt": "a"}, "chat/completions": {"messages": [{"role": "user", "content": "a"}]}}
    for path, body in bodies.items():
        refused = live.post(f"/v1/{path}", cache_salt=salt, **body)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "cache_salt"


def test_a_replaced_adapter_answers_by_itself(live: Live, stem: tuple[int, ...]) -> None:
    """The same name, other content: what the old version computed is of no use, and of use again when it returns."""
    texts = []
    for seed, expected in ((1, [0, 96]), (2, [0, 96]), (1, [96, 96])):
        assert live.upload("voice", lora_files(seed), replace="true").is_success
        answers = [completed(live, stem, adapter="voice") for _ in range(2)]
        assert [cached(answer) for answer in answers] == expected
        texts += [answer["choices"][0]["text"] for answer in answers]
    assert texts[0] == texts[1] == texts[4] == texts[5]
    assert texts[2] == texts[3] != texts[0]


def test_metrics_count_tokens_looked_up_and_found(live: Live, stem: tuple[int, ...]) -> None:
    def told() -> list[float]:
        return [live.metric(f"graft_prefix_cache_{what}_total") for what in ("queries", "hits")]

    before = told()
    for _ in range(2):
        completed(live, stem)
    # The counters move at the end of a step, which the answer need not wait for.
    eventually(lambda: [after - then for after, then in zip(told(), before, strict=True)] == [200, 96])

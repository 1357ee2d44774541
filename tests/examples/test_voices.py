"""`examples/voices.py`: one prompt, every voice of a live server, and what the engine did meanwhile."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from examples import voices
from server.ground.config import Settings
from tests.api.adapter_files import lora_files
from tests.api.conftest import Live, serving

NAMES = [f"voice-{i}" for i in range(6)]


@pytest.fixture(scope="module")
def live(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    store = tmp_path_factory.mktemp("store")
    settings = Settings(
        model=str(tiny_llama), quantize="none", dtype="float32", device="cpu", store=store, api_key="sesame"
    )
    with serving(settings) as live:
        for seed, name in enumerate(NAMES):
            assert live.upload(name, lora_files(seed)).status_code == 201
        yield live


@pytest.fixture
def ask(live: Live, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """What the program prints, line by line."""
    monkeypatch.setenv("GRAFT_API_KEY", "sesame")

    def run(*arguments: str) -> list[str]:
        voices.main([*arguments, "--url", live.url, "--max-tokens", "8"])
        return capsys.readouterr().out.splitlines()

    return run


def test_the_base_and_every_adapter_answer_one_line_each(ask: Callable[..., list[str]]) -> None:
    *spoken, _ = ask("Hello")
    assert [line.split()[:2] for line in spoken] == [["base", "-"], *([name, "lora"] for name in NAMES)]
    answers = {line.split(maxsplit=2)[2] for line in spoken}
    assert len(answers) == len(spoken)


def test_the_last_line_says_how_fast_and_how_many_adapters_shared_a_step(ask: Callable[..., list[str]]) -> None:
    found = re.fullmatch(
        r"7 answers, (\d+) tokens in [\d.]+ s: \d+ tokens/s; ([\d.]+) adapters per step on average, (\d+) steps",
        ask("Hello")[-1],
    )
    assert found
    num_tokens, num_adapters, num_steps = int(found[1]), float(found[2]), int(found[3])
    assert 7 <= num_tokens <= 56
    assert 1 < num_adapters <= 6
    assert num_steps < num_tokens


def test_control_characters_of_an_answer_do_not_reach_the_terminal() -> None:
    assert voices.CONTROL.sub("\ufffd", "a\x1b[2Jb\nc") == "a\ufffd[2Jb\nc"


@pytest.mark.parametrize(("url", "words"), [(None, "401"), ("http://127.0.0.1:9", "onnect")])
def test_a_wrong_key_or_address_ends_in_a_sentence(
    live: Live, url: str | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GRAFT_API_KEY", raising=False)
    with pytest.raises(SystemExit, match=words):
        voices.main(["Hello", "--url", url or live.url])

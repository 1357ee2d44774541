"""`graft complete`: what it prints, and how it ends."""

import io
import os
import signal
import sys

import pytest

from server.cli import main
from tests.api.conftest import Live
from tests.cli.conftest import Scripted, streamed

FLAGS = ["--max-tokens", "6", "--temperature", "0"]


def text_of(live: Live, prompt: str, model: str = "tiny") -> str:
    answer = live.post("/v1/completions", model=model, prompt=prompt, max_tokens=6, temperature=0).json()
    text: str = answer["choices"][0]["text"]
    return text if text.endswith("\n") else f"{text}\n"


def test_it_prints_what_the_server_writes(live: Live, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["complete", "Hi", "--url", live.url, *FLAGS]) == 0
    assert capsys.readouterr().out == text_of(live, "Hi")


def test_a_prompt_may_come_from_standard_input(
    live: Live, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("two\nlines"))
    assert main(["complete", "-", "--url", live.url, *FLAGS]) == 0
    assert capsys.readouterr().out == text_of(live, "two\nlines")


def test_several_adapters_answer_one_after_another_where_there_is_no_terminal(
    live: Live, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["complete", "Hi", "--url", live.url, "--adapter", "first", "--adapter", "tiny", *FLAGS]
    assert main(command) == 0
    assert capsys.readouterr().out == f"[first]\n{text_of(live, 'Hi', 'first')}[tiny]\n{text_of(live, 'Hi')}"


def test_what_is_asked_for_reaches_the_server(scripted: Scripted, capsys: pytest.CaptureFixture[str]) -> None:
    scripted.answer = lambda body: streamed("é", "🎉")
    flags = ["--top-p", "0.5", "--seed", "-3", "--stop", "a", "--stop", "b", "--adapter", "x"]
    assert main(["complete", "Hi", "--url", scripted.url, *FLAGS, *flags]) == 0
    assert capsys.readouterr().out == "é🎉\n"
    assert scripted.asked.get() == {
        "model": "x", "prompt": "Hi", "stream": True, "max_tokens": 6, "temperature": 0.0, "top_p": 0.5, "seed": -3,
        "stop": ["a", "b"],
    }  # fmt: skip


def test_one_of_several_without_an_answer_is_named(live: Live, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["complete", "Hi", "--url", live.url, "--adapter", "nobody", "--adapter", "tiny", *FLAGS]) == 1
    printed = capsys.readouterr()
    assert printed.out == f"[nobody]\n[tiny]\n{text_of(live, 'Hi')}"
    assert "nobody: There is no model or adapter 'nobody'" in printed.err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["Hi", "--adapter", "nobody"], "nobody"),
        (["Hi", "--temperature", "7"], "'temperature'"),
        (["Hi\udcff"], "surrogate"),  # an argument that is not UTF-8
        ([""], "prompt is empty"),
    ],
)
def test_a_refusal_is_a_sentence(live: Live, flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["complete", *flags, "--url", live.url]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert words in printed.err
    assert len(printed.err.splitlines()) == 1


def test_what_came_before_a_failure_is_printed(scripted: Scripted, capsys: pytest.CaptureFixture[str]) -> None:
    scripted.answer = lambda body: streamed("half of it", ending=b'data: {"error": {"message": "it broke"}}\n\n')
    assert main(["complete", "Hi", "--url", scripted.url, "--adapter", "x"]) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("half of it\n", "graft: it broke\n")


def test_a_reader_that_has_gone_is_no_failure_to_talk_of(
    scripted: Scripted, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted.answer = lambda body: streamed("first", "second")
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert main(["complete", "Hi", "--url", scripted.url, "--adapter", "x"]) == 128 + signal.SIGPIPE
    assert capsys.readouterr().err == ""

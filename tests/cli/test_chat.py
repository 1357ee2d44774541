"""`graft chat`: the conversation, the words that begin with a slash, scripts, and a real terminal."""

import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from server.cli import main
from server.cli.chat import WORDS, Conversation, Turn
from tests.api.conftest import Gate, Live, eventually
from tests.cli.conftest import Reply, Scripted, streamed

ROOT = Path(__file__).parents[2]
Printed = tuple[int, str, str]


# The conversation


def test_each_voice_remembers_its_own_answers() -> None:
    talk = Conversation(["a", "b"], system=None)
    talk.turns += [Turn("one", {"a": "a1", "b": "b1"}), Turn("two", {"a": "a2"})]
    assert talk.messages("b", "three") == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "b1"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "a2"},
        {"role": "user", "content": "three"},
    ]
    assert [message["content"] for message in talk.messages("new", "x")] == ["one", "a1", "two", "a2", "x"]


def test_a_voice_that_is_named_twice_answers_once() -> None:
    assert Conversation(["a", "b", "a"], system=None).names == ("a", "b")


def test_what_the_model_is_told_comes_first() -> None:
    assert Conversation(["a"], "Be brief.").messages("a", "Hi")[0] == {"role": "system", "content": "Be brief."}


# Scripts: lines on standard input


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    def run(lines: str, url: str, *flags: str) -> Printed:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        code = main(["chat", "--url", url, *flags])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


@pytest.fixture
def echo(scripted: Scripted) -> Scripted:
    """Answers with its model's name and the last message."""
    scripted.answer = lambda body: streamed(f"{body['model']}: ", body["messages"][-1]["content"])
    return scripted


def asked(server: Scripted) -> list[list[str]]:
    """What each request's messages said."""
    return [[m["content"] for m in server.asked.get()["messages"]] for _ in range(server.asked.qsize())]


def test_lines_are_questions_and_answers_go_to_standard_output(script, echo: Scripted) -> None:  # type: ignore[no-untyped-def]
    assert script("one\n\ntwo\r\n", echo.url) == (0, "tiny: one\ntiny: two\n", "")
    assert asked(echo) == [["one"], ["one", "tiny: one", "two"]]


def test_flags_are_for_every_question(script, echo: Scripted) -> None:  # type: ignore[no-untyped-def]
    script("one\n", echo.url, "--adapter", "x", "--system", "Rhyme.", "--max-tokens", "9", "--seed", "1")
    assert echo.asked.get() == {
        "model": "x", "stream": True, "max_tokens": 9, "seed": 1,
        "messages": [{"role": "system", "content": "Rhyme."}, {"role": "user", "content": "one"}],
    }  # fmt: skip


def test_two_adapters_are_asked_at_once_and_keep_apart(script, echo: Scripted) -> None:  # type: ignore[no-untyped-def]
    code, out, _ = script("one\ntwo\n", echo.url, "--adapter", "a", "--adapter", "b")
    assert (code, out) == (0, "[a]\na: one\n[b]\nb: one\n[a]\na: two\n[b]\nb: two\n")
    assert sorted(asked(echo)) == [["one"], ["one"], ["one", "a: one", "two"], ["one", "b: one", "two"]]


def test_who_answers_can_change(script, echo: Scripted) -> None:  # type: ignore[no-untyped-def]
    _, out, err = script("one\n/adapter a b a\ntwo\n/adapter\n", echo.url)
    assert out == "tiny: one\n[a]\na: two\n[b]\nb: two\n"
    assert err == "graft: a and b will answer\n" * 2


def test_the_last_question_can_be_asked_again(script, echo: Scripted) -> None:  # type: ignore[no-untyped-def]
    script("/retry\none\ntwo\n/adapter b\n/retry\nthree\n", echo.url)
    assert asked(echo)[2:] == [["one", "tiny: one", "two"], ["one", "tiny: one", "two", "b: two", "three"]]


def test_a_conversation_can_begin_anew_and_be_told_something(script, echo: Scripted) -> None:  # type: ignore[no-untyped-def]
    script("one\n/clear\n/system Be brief.\ntwo\n/system\n/clear\nthree\n", echo.url)
    assert asked(echo) == [["one"], ["Be brief.", "two"], ["three"]]


def test_a_question_may_begin_with_a_slash(script, echo: Scripted) -> None:  # type: ignore[no-untyped-def]
    assert script("//help me\n", echo.url)[1] == "tiny: /help me\n"


def test_quit_leaves_the_rest_unread(script, echo: Scripted) -> None:  # type: ignore[no-untyped-def]
    assert script("one\n/quit\ntwo\n", echo.url)[:2] == (0, "tiny: one\n")


def test_the_conversation_is_shown_and_saved(script, echo: Scripted, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "talk.json"
    code, out, err = script(
        f"/system é\none\n/history\n/save {path}\n/save {path}\n/save\n/save {tmp_path}/x/y\n", echo.url
    )
    assert code == 1
    assert out == "tiny: one\n> one\n[tiny] tiny: one\n"
    assert json.loads(path.read_text()) == {"system": "é", "turns": [{"user": "one", "answers": {"tiny": "tiny: one"}}]}
    assert [word for word in ("saved in", "exists already", "needs the name", "No such file") if word not in err] == []


def test_the_help_lists_every_word(script, echo: Scripted) -> None:  # type: ignore[no-untyped-def]
    _, out, _ = script("/help\n", echo.url)
    assert [name for name in (*WORDS, "quit") if f"\n/{name}" not in out] == []


def test_the_docs_tell_of_every_word() -> None:
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert [name for name, word in WORDS.items() if f"| `/{name} {word.argument}".rstrip() not in page] == []


def test_an_unknown_word_is_not_sent_to_the_model(script, echo: Scripted) -> None:  # type: ignore[no-untyped-def]
    code, out, err = script("/adpater x\n", echo.url)
    assert (code, out) == (1, "")
    assert "/adpater is no word here" in err
    assert echo.asked.empty()


def test_a_question_that_fails_is_not_part_of_the_conversation(script, scripted: Scripted) -> None:  # type: ignore[no-untyped-def]
    replies = iter([Reply(503, (b'{"error": {"message": "full"}}',)), streamed("yes")])
    scripted.answer = lambda body: next(replies)
    code, out, err = script("one\ntwo\n", scripted.url)
    assert (code, out, err) == (1, "yes\n", "graft: full (status 503)\n")
    assert asked(scripted) == [["one"], ["two"]]


def test_without_a_server_it_says_so_at_once(script) -> None:  # type: ignore[no-untyped-def]
    code, out, err = script("one\n", "http://127.0.0.1:9")
    assert (code, out) == (2, "")
    assert "No server answers" in err


def test_the_adapters_are_those_of_the_server(script, live: Live) -> None:  # type: ignore[no-untyped-def]
    _, out, _ = script("/adapters\n", live.url)
    assert re.search(r"^first +tiny$", out, re.MULTILINE)
    assert re.search(r"^tiny$", out, re.MULTILINE)


def test_names_of_a_server_are_not_obeyed(script, scripted: Scripted) -> None:  # type: ignore[no-untyped-def]
    scripted.cards = json.dumps({"data": [{"id": "a\x1b[2J" + "x" * 500, "parent": "\x9bp"}]}).encode()
    _, out, err = script("/adapters\n/adapter\n", scripted.url)
    assert re.search("^a\ufffd\\[2Jx{195} +\ufffdp$", out, re.MULTILINE)
    assert "\x1b" not in out + err


# A terminal


class Terminal:
    """The other end of a pseudo-terminal on which the command runs."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self._descriptor, text.encode())

    def until(self, text: str) -> str:
        """What is shown up to `text`, which is taken off."""
        deadline = time.monotonic() + 120
        while text not in self.seen:
            ready, _, _ = select.select([self._descriptor], [], [], max(deadline - time.monotonic(), 0))
            assert ready, f"{text!r} did not come: {self.seen!r}"
            raw = os.read(self._descriptor, 65536).decode(errors="replace")
            self.seen += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", raw)
        before, _, self.seen = self.seen.partition(text)
        return before


# A session leader takes the terminal for its own, so that a typed Ctrl-C becomes a signal.
ON_A_TERMINAL = """
import fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from server.cli import main
sys.exit(main())
"""


@contextmanager
def terminal(*arguments: str) -> Iterator[tuple[Terminal, "subprocess.Popen[bytes]"]]:
    mine, its = pty.openpty()
    command = [sys.executable, "-c", ON_A_TERMINAL, *arguments]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "80", "LINES": "24", "INPUTRC": "/dev/null"}
    with subprocess.Popen(
        command, cwd=ROOT, stdin=its, stdout=its, stderr=its, env=environment, start_new_session=True
    ) as process:
        os.close(its)
        try:
            yield Terminal(mine), process
        finally:
            process.kill()
            os.close(mine)


def test_ctrl_c_stops_the_answer_and_not_the_conversation(live: Live, gate: Gate) -> None:
    engine = live.server.engine
    num_aborted = live.metric("graft_sequences_finished_total", finish_reason="abort")
    flags = ["--max-tokens", "40", "--temperature", "0", "--adapter", "first", "--adapter", "second"]
    with terminal("chat", "--url", live.url, *flags) as (screen, process):
        screen.until("> ")
        screen.type("Hello\r")
        gate.allow(3)
        eventually(lambda: engine.stats().num_in_flight == 2)
        screen.until("first")  # the columns are up
        screen.type("\x03")
        screen.until("> ")
        # The connections are closed; the server learns of it between two steps.
        eventually(lambda: live.metric("graft_sequences_finished_total", finish_reason="abort") == num_aborted + 2)
        gate.allow(1)
        eventually(lambda: engine.stats().num_in_flight == 0)
        screen.type("\x03")  # where nothing is to be stopped
        screen.until("Ctrl-D or /quit leaves")
        screen.until("> ")
        gate.allow(1_000_000)
        screen.type("/adapter first\r")
        screen.until("first will answer")
        screen.until("> ")
        screen.type("/history\r")
        screen.until("> ")
        screen.type("two \\\r")
        screen.until("... ")
        screen.type("lines\r")
        screen.until("> ")
        screen.type("\x04")
        assert process.wait(120) == 0

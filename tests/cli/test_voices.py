"""How answers are shown: as plain lines where nobody looks, in columns on a terminal that has room for them."""

import io
import re

import pytest

from server.cli.voices import Voice, screen_for, shown


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _of_known_size(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "12"}.items():
        monkeypatch.setenv(name, value)
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


def voices(*names: str) -> list[Voice]:
    return [Voice(name, {}) for name in names]


def say(voice: Voice, text: str) -> str:
    voice.text += text
    return text


def without_codes(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_one_voice_is_its_text_and_a_last_line_feed() -> None:
    out, (voice,) = io.StringIO(), voices("a")
    with screen_for([voice], out) as screen:
        screen.heard(0, "Hello")
        assert out.getvalue() == "Hello"
        screen.heard(0, " you")
        screen.ended(0)
    assert out.getvalue() == "Hello you\n"


@pytest.mark.parametrize(("text", "printed"), [("", ""), ("a\n", "a\n")])
def test_no_line_feed_is_added_where_there_is_one(text: str, printed: str) -> None:
    out = io.StringIO()
    with screen_for(voices("a"), out) as screen:
        screen.heard(0, text)
        screen.ended(0)
    assert out.getvalue() == printed


def test_of_several_each_speaks_when_those_before_it_have_ended() -> None:
    out = io.StringIO()
    with screen_for(voices("a", "b", "c"), out) as screen:
        screen.heard(1, "second ")
        screen.heard(0, "first")
        assert out.getvalue() == "[a]\nfirst"
        screen.heard(2, "third")
        screen.ended(2)
        screen.ended(0)
        assert out.getvalue() == "[a]\nfirst\n[b]\nsecond "
        screen.heard(1, "again")
        screen.ended(1)
    assert out.getvalue() == "[a]\nfirst\n[b]\nsecond again\n[c]\nthird\n"


def test_what_was_stopped_before_its_turn_is_shown_all_the_same() -> None:
    out = io.StringIO()
    with screen_for(voices("a", "b"), out) as screen:
        screen.heard(1, "half")
    assert out.getvalue() == "[a]\n[b]\nhalf\n"


def test_on_a_terminal_two_voices_stand_side_by_side() -> None:
    out, both = Terminal(), voices("poet", "robot")
    with screen_for(both, out) as screen:
        for number in range(40):  # more lines than the terminal has
            screen.heard(0, say(both[0], f"verse {number}\n"))
            screen.heard(1, say(both[1], "BEEP 你 🎉 "))
        screen.ended(0)
    *_, last = without_codes(out.getvalue()).split("poet")
    lines = [line.rstrip() for line in last.splitlines()]
    assert lines[0].split() == ["robot"]
    assert [line.split("  ")[0] for line in lines[1:41]] == [f"verse {number}" for number in range(40)]
    assert "BEEP 你 🎉" in lines[1]


def test_while_they_speak_the_end_of_what_they_say_is_seen() -> None:
    out, both = Terminal(), voices("poet", "robot")
    with screen_for(both, out) as screen:
        say(both[0], "".join(f"verse {number}\n" for number in range(40)))
        tail = screen.tail()  # type: ignore[attr-defined]
        columns = [str(cell) for column in tail.columns for cell in column.cells]
    assert "verse 39" in columns[1]
    assert "verse 0\n" not in columns[1]
    assert columns[1].count("\n") < 12


@pytest.mark.parametrize("changed", [{"COLUMNS": "40"}, {"TERM": "dumb"}])
def test_a_terminal_without_room_for_columns_gets_lines(
    changed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in changed.items():
        monkeypatch.setenv(name, value)
    out = Terminal()
    with screen_for(voices("a", "b"), out) as screen:
        screen.heard(0, "first")
    assert out.getvalue() == "[a]\nfirst\n[b]\n"


def test_a_terminal_does_not_obey_a_model() -> None:
    attack = "\x1b]52;c;cm0gLXJm\x07 \x9b2J \r\x08\x7f plain\ttext\n"
    assert shown(attack, io.StringIO()) == attack
    assert shown(attack, Terminal()) == "�]52;c;cm0gLXJm� �2J ��� plain\ttext\n"
    out, both = Terminal(), voices("a", "b")
    with screen_for(both, out):
        say(both[0], attack)
    assert "\x1b]52" not in out.getvalue()
    assert "\x9b" not in out.getvalue()


def test_what_a_voice_thinks_stands_dimmed_on_its_own_lines_before_the_answer() -> None:
    out, both = Terminal(), voices("a", "b")
    with screen_for(both[:1], out) as screen:
        screen.heard(0, "Hm", is_thought=True)
        screen.heard(0, "\x07.", is_thought=True)
        screen.heard(0, "Yes.")
        screen.ended(0)
    assert out.getvalue() == "\x1b[2mHm�.\n\x1b[22mYes.\n"
    out = Terminal()
    with screen_for(both, out):
        both[0].reasoning = "Hm."
        say(both[0], "Yes.")
    lines = out.getvalue().split("\n")
    assert any("\x1b[2mHm." in line for line in lines)
    assert any(without_codes(line).startswith("Yes.") for line in lines)


def test_where_there_is_no_terminal_only_answers_are_written() -> None:
    out = io.StringIO()
    with screen_for(voices("a", "b"), out) as screen:
        for voice in (0, 1):
            screen.heard(voice, "Hm", is_thought=True)
            screen.heard(voice, "Yes.")
    assert out.getvalue() == "[a]\nYes.\n[b]\nYes.\n"

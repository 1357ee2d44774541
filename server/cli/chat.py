"""`graft chat`: a conversation with a server, whose answers may come from several adapters side by side.

Owns the conversation, the words that begin with a slash, and where lines come from. Knows nothing about how answers
look.
"""

import argparse
import asyncio
import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from server.cli.client import address_of, models, without_control
from server.cli.command import say
from server.cli.table import columns
from server.cli.voices import Voice, add_flags, connected, fields_of, hear, shown
from server.ground.errors import BadRequest, GraftError

_PATH = "/v1/chat/completions"
_MAX_NAME_CHARS = 200  # that are shown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(parser)
    parser.add_argument("--system", default=None, metavar="TEXT", help="what the model is told before the conversation")


def run(arguments: argparse.Namespace) -> int:
    """0; 1 if it was a script whose questions were not all answered."""
    with connected(address_of(arguments)) as (runner, http):
        cards = runner.run(models(http))
        names = arguments.adapter or [cards[0]["id"]]
        chat = Chat(runner, http, Conversation(names, arguments.system), fields_of(arguments))
        is_interactive = sys.stdin.isatty() and sys.stdout.isatty()
        if is_interactive:
            say(f"{_listed(names)} at {http.base_url}; /help lists what else there is, Ctrl-D leaves")
        for line in _typed() if is_interactive else _read():
            if not chat.take(line):
                break
            if chat.is_stopped and not is_interactive:
                raise KeyboardInterrupt
    return 0 if is_interactive or not chat.has_failed else 1


def _listed(names: Sequence[str]) -> str:
    """Names that may be the server's, as a terminal may have them."""
    return " and ".join(_name(name) for name in names)


def _name(name: object) -> str:
    return without_control(str(name))[:_MAX_NAME_CHARS]


def _read() -> Iterator[str]:
    for line in sys.stdin:
        yield line.rstrip("\r\n")


def _typed() -> Iterator[str]:
    """What is typed, until Ctrl-D. A line that ends in a backslash goes on in the next."""
    with contextlib.suppress(ImportError):  # Python may be built without it: then there is no editing of lines
        import readline  # noqa: F401
    text = ""
    while True:
        try:
            text += input("... " if text else "> ")
        except EOFError:
            sys.stdout.write("\n")
            return
        except KeyboardInterrupt:
            text = ""
            sys.stdout.write("\n")
            say("Ctrl-D or /quit leaves")
            continue
        if text.endswith("\\"):
            text = text[:-1] + "\n"
            continue
        yield text
        text = ""


@dataclass(frozen=True, slots=True)
class Turn:
    """A question, and what each voice that was asked has answered."""

    question: str
    answers: Mapping[str, str]


class Conversation:
    """What was said so far. A voice remembers its own answers, and of turns without it the first one."""

    def __init__(self, names: Sequence[str], system: str | None) -> None:
        self.names = tuple(dict.fromkeys(names))  # of the voices that answer
        self.system = system
        self.turns: list[Turn] = []

    def messages(self, name: str, question: str) -> list[dict[str, str]]:
        """As the voice `name` is to be asked."""
        said = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns:
            answer = turn.answers.get(name, next(iter(turn.answers.values())))
            said += [{"role": "user", "content": turn.question}, {"role": "assistant", "content": answer}]
        return [*said, {"role": "user", "content": question}]

    def as_json(self) -> str:
        turns = [{"user": turn.question, "answers": dict(turn.answers)} for turn in self.turns]
        return json.dumps({"system": self.system, "turns": turns}, ensure_ascii=False, indent=2) + "\n"


class Chat:
    """Takes lines one by one: questions, and words that begin with a slash."""

    def __init__(
        self,
        runner: asyncio.Runner,
        http: httpx.AsyncClient,
        conversation: Conversation,
        fields: Mapping[str, Any],
    ) -> None:
        self._runner = runner
        self._http = http
        self._conversation = conversation
        self._fields = fields
        self._question = ""  # the last one, which may have no answer
        self.has_failed = False  # whether any question or word was refused
        self.is_stopped = False  # whether Ctrl-C has stopped the last answer

    def take(self, line: str) -> bool:
        """Answers or obeys; False for the end."""
        self.is_stopped = False
        if not line.startswith("/") or line.startswith("//"):
            self._ask(line.removeprefix("/") if line.startswith("//") else line)
            return True
        name, _, rest = line[1:].partition(" ")
        if name == "quit":
            return False
        try:
            word = WORDS.get(name)
            if word is None:
                raise BadRequest(f"/{name} is no word here; /help lists them, and //{name} asks the model.")
            word.obey(self, rest.strip())
        except GraftError as error:
            self._refuse(error.message)
        return True

    def _refuse(self, sentence: str) -> None:
        self.has_failed = True
        say(sentence)

    def _ask(self, question: str) -> None:
        if not question.strip():
            return
        self._question = question
        talk = self._conversation
        voices = [
            Voice(name, {"model": name, "messages": talk.messages(name, question), **self._fields})
            for name in talk.names
        ]
        self.is_stopped = not hear(self._runner, self._http, _PATH, voices)
        for voice in voices:
            if voice.error is not None:
                self._refuse(f"{_name(voice.name)}: {voice.error}" if len(voices) > 1 else str(voice.error))
            elif voice.finish_reason == "length":
                say(f"{_name(voice.name)} was cut at the limit of tokens")
        # What was stopped or broken off has been read all the same: the conversation goes on from it.
        answers = {voice.name: voice.text for voice in voices if voice.text or voice.finish_reason}
        if answers:
            talk.turns.append(Turn(question, answers))

    def choose(self, names: str) -> None:
        if names:
            self._conversation.names = tuple(dict.fromkeys(names.split()))
        say(f"{_listed(self._conversation.names)} will answer")

    def list_adapters(self, _: str) -> None:
        cards = self._runner.run(models(self._http))
        rows = [(_name(card["id"]), _name(card.get("parent") or "")) for card in cards]
        sys.stdout.write(columns(("NAME", "ADAPTER OF"), rows))

    def set_system(self, text: str) -> None:
        self._conversation.system = text or None

    def retry(self, _: str) -> None:
        """Asks the last question again, in the place of its answers."""
        turns = self._conversation.turns
        if not self._question:
            raise BadRequest("Nothing has been asked yet.")
        if turns and turns[-1].question == self._question:
            turns.pop()
        self._ask(self._question)

    def show_history(self, _: str) -> None:
        for turn in self._conversation.turns:
            sys.stdout.write(f"> {turn.question}\n")
            for name, answer in turn.answers.items():
                sys.stdout.write(f"[{_name(name)}] {shown(answer, sys.stdout)}\n")

    def clear(self, _: str) -> None:
        self._conversation.turns.clear()

    def save(self, path: str) -> None:
        if not path:
            raise BadRequest("/save needs the name of a file.")
        try:
            with Path(path).expanduser().open("x", encoding="utf-8") as file:
                file.write(self._conversation.as_json())
        except FileExistsError:
            raise BadRequest(f"{path} exists already; name another file.") from None
        except OSError as error:
            raise BadRequest(f"{path} cannot be written: {error.strerror}.") from None
        say(f"saved in {path}")

    def help(self, _: str) -> None:
        rows = [(f"/{name} {word.argument}", word.summary) for name, word in WORDS.items()]
        sys.stdout.write(columns(("WORD", ""), [*rows, ("/quit", "leave; so does Ctrl-D")]))


@dataclass(frozen=True, slots=True)
class Word:
    """What may follow a slash: its argument as the help names it, its line there, and what it does."""

    argument: str
    summary: str
    obey: Callable[[Chat, str], None]


WORDS: Mapping[str, Word] = {
    "adapter": Word("NAME [NAME]", "who answers from now on: adapters, or a name of the base", Chat.choose),
    "adapters": Word("", "list who can answer", Chat.list_adapters),
    "system": Word(
        "[TEXT]", "what the model is told before the conversation; without a text, nothing", Chat.set_system
    ),
    "retry": Word("", "ask the last question again", Chat.retry),
    "history": Word("", "show the conversation", Chat.show_history),
    "clear": Word("", "begin a new conversation", Chat.clear),
    "save": Word("FILE", "write the conversation into a new file, as JSON", Chat.save),
    "help": Word("", "show this", Chat.help),
}

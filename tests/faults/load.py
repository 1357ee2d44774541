"""Requests of mixed adapters that go on while something breaks, and the three counts: lost, wrong, left over.

Owns the clients, what each answer should be, and how an end is told from none. Knows nothing about what breaks.
"""

import json
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import httpx

MODEL = Path(__file__).parents[2] / "demo" / "base"
STORE = Path(__file__).parents[2] / "adapters_store"
# A method each: what two of them share on their way to an answer is the server.
ADAPTERS = ("pirate-lora", "poet-dora", "news-vera", "robot-ia3", "judge-loreft")
PROMPTS = ("The old boat", "A cat sat on")
PATIENCE_S = 120.0  # for a server that hangs, not for one that is slow
_NUM_CLIENTS = 4
_DONE = "[DONE]"


@dataclass(frozen=True, slots=True)
class Case:
    """One request that is sent again and again: greedy, so that it has one right answer."""

    adapter: str | None
    prompt: str
    max_tokens: int = 12

    def body(self, *, stream: bool) -> dict[str, Any]:
        asked = {"prompt": self.prompt, "max_tokens": self.max_tokens, "temperature": 0, "stream": stream}
        return asked if self.adapter is None else asked | {"adapter": self.adapter}


CASES = tuple(Case(adapter, prompt) for prompt in PROMPTS for adapter in (None, *ADAPTERS))


@dataclass(frozen=True, slots=True)
class End:
    """How a request ended: with `text`, with an error's `code`, or (both None) not at all."""

    text: str | None = None
    code: str | None = None
    detail: str = ""


def ask(http: httpx.Client, case: Case, *, stream: bool) -> End:
    """Sends a request and reads it to its end. A connection that breaks, or a stream that just stops, is no end."""
    try:
        if stream:
            return _streamed(http, case)
        answer = http.post("/v1/completions", json=case.body(stream=False))
        if answer.status_code != 200:
            return End(code=answer.json()["error"]["code"], detail=answer.text)
        return End(text=answer.json()["choices"][0]["text"])
    except (httpx.HTTPError, ValueError, KeyError) as error:
        return End(detail=repr(error))


def _streamed(http: httpx.Client, case: Case) -> End:
    text, is_done = "", False
    with http.stream("POST", "/v1/completions", json=case.body(stream=True)) as answer:
        if answer.status_code != 200:
            said = answer.read().decode()
            return End(code=json.loads(said)["error"]["code"], detail=said)
        for line in answer.iter_lines():
            data = line.removeprefix("data: ")
            is_done = is_done or data == _DONE
            if line.startswith("data: ") and data != _DONE:
                event = json.loads(data)
                if "error" in event:
                    return End(code=event["error"]["code"], detail=data)
                text += "".join(choice["text"] for choice in event["choices"])
    return End(text=text) if is_done else End(detail="the stream stopped")


def right_answers(http: httpx.Client, cases: Sequence[Case] = CASES) -> dict[Case, str]:
    """What each case is answered alone, before anything breaks."""
    answers = {}
    for case in cases:
        end = ask(http, case, stream=False)
        assert end.text, end
        answers[case] = end.text
    return answers


@dataclass
class Load:
    """Clients that ask without a pause, and what has become of their requests."""

    url: str
    right: Mapping[Case, str]
    num_right: Counter[Case] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)  # by code
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def running(self) -> Iterator["Load"]:
        """The load, from its first right answers on; at the end every request that was sent has had its end."""
        numbers = count()
        threads = [threading.Thread(target=self._client, args=[numbers]) for _ in range(_NUM_CLIENTS)]
        for thread in threads:
            thread.start()
        try:
            self.await_right()
            yield self
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()

    def _client(self, numbers: Iterator[int]) -> None:
        cases = list(self.right)
        with httpx.Client(base_url=self.url, timeout=PATIENCE_S) as http:
            while not self._stop.is_set():
                number = next(numbers)
                case = cases[number % len(cases)]
                self._note(case, ask(http, case, stream=number % 3 == 0))

    def _note(self, case: Case, end: End) -> None:
        if end.code is not None:
            self.refused[end.code] += 1
            self._stop.wait(0.01)
        elif end.text is None:
            self.lost.append(f"{case}: {end.detail}")
            self._stop.wait(0.1)
        elif end.text == self.right[case]:
            self.num_right[case] += 1
        else:
            self.wrong.append(f"{case}: {end.text!r} and not {self.right[case]!r}")

    def await_right(self, cases: Collection[Case] | None = None) -> None:
        """Waits for one more right answer to each case (of all of them, if none are named)."""
        before = Counter(self.num_right)
        waited = tuple(self.right if cases is None else cases)
        await_that(lambda: all(self.num_right[case] > before[case] for case in waited), lambda: str(self))

    def await_refused(self, code: str, times: int = 1) -> None:
        """Waits for so many more refusals of this kind."""
        before = self.refused[code]
        await_that(lambda: self.refused[code] >= before + times, lambda: str(self))

    def check(self, *, may_refuse: Collection[str] = (), must_refuse: Collection[str] = (), max_lost: int = 0) -> None:
        """The first two counts: none lost, none wrong, and no errors but those that the fault explains."""
        assert self.wrong == []
        assert len(self.lost) <= max_lost, self.lost
        assert set(must_refuse) <= set(self.refused) <= set(must_refuse) | set(may_refuse), self.refused


def cases_of(*adapters: str | None) -> list[Case]:
    return [case for case in CASES if case.adapter in adapters]


def await_that(is_so: Any, said: Any = lambda: "it did not happen") -> None:
    """Waits for what other threads or processes do."""
    deadline = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline, said()
        time.sleep(0.01)

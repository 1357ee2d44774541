"""Requests of mixed adapters that go on while something breaks, and the three counts: lost, wrong, left over.

Owns the clients, what each answer should be, and how an end is told from none. Knows nothing about what breaks.
"""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import httpx

from tests.faults.record import MAX_RESTART_S, Counts, current_fault, note

MODEL = Path(__file__).parents[2] / "demo" / "base"
STORE = Path(__file__).parents[2] / "adapters_store"
# A method each: what two of them share on their way to an answer is the server.
ADAPTERS = ("pirate-lora", "poet-dora", "news-vera", "robot-ia3", "judge-loreft")
PROMPTS = ("The old boat", "A cat sat on")
PATIENCE_S = 120.0  # for a server that hangs, not for one that is slow
SLACK = 4  # threads and descriptors that come and go with connections
NUM_CLIENTS = 4  # each with one request at a time
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
    """How a request ended: with `text`, with an error's `code`, or (both None) not at all.

    One that is not even `sent`, because nobody listens, has no end and needs none.
    """

    text: str | None = None
    code: str | None = None
    detail: str = ""
    is_sent: bool = True


def ask(http: httpx.Client, case: Case, *, stream: bool) -> End:
    """Sends a request and reads it to its end. A connection that breaks, or a stream that just stops, is no end."""
    try:
        if stream:
            return _streamed(http, case)
        answer = http.post("/v1/completions", json=case.body(stream=False))
        if answer.status_code != 200:
            return End(code=answer.json()["error"]["code"], detail=answer.text)
        return End(text=answer.json()["choices"][0]["text"])
    except httpx.ConnectError as error:
        return End(detail=repr(error), is_sent=False)
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


@dataclass(frozen=True, slots=True)
class Lost:
    """A request that was sent to the server at `url` and had no end."""

    url: str
    said: str


@dataclass
class Load:
    """Clients that ask without a pause, and what has become of their requests.

    `where` is the server's address, which changes when it is started again; those in `killed` were taken away from
    their requests, and `left_over` is what was found when all was over.
    """

    where: Callable[[], str]
    right: Mapping[Case, str]
    num_right: Counter[Case] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)  # by code
    wrong: list[str] = field(default_factory=list)
    lost: list[Lost] = field(default_factory=list)
    num_unreached: int = 0
    killed: Collection[str] = ()
    restarts_s: Sequence[float] = ()
    left_over: Mapping[str, int] = field(default_factory=dict)
    _stop: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def running(self) -> Iterator["Load"]:
        """The load, from its first right answers on; at the end every request that was sent has had its end."""
        numbers = count()
        threads = [threading.Thread(target=self._client, args=[numbers]) for _ in range(NUM_CLIENTS)]
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
        while not self._stop.is_set():
            url = self.where()
            with httpx.Client(base_url=url, timeout=PATIENCE_S) as http:
                while self.where() == url and not self._stop.is_set():
                    self._ask_next(http, url, next(numbers))

    def _ask_next(self, http: httpx.Client, url: str, number: int) -> None:
        cases = list(self.right)
        case = cases[number % len(cases)]
        self._note(case, ask(http, case, stream=number % 3 == 0), url)

    def _note(self, case: Case, end: End, url: str) -> None:
        if not end.is_sent:
            self.num_unreached += 1
            self._stop.wait(0.1)
        elif end.code is not None:
            self.refused[end.code] += 1
            self._stop.wait(0.01)
        elif end.text is None:
            self.lost.append(Lost(url, f"{case}: {end.detail}"))
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

    def check(self, *, may_refuse: Collection[str] = (), must_refuse: Collection[str] = ()) -> None:
        """The three counts, which are noted first, and no errors but those that the fault explains."""
        gone = [each for each in self.lost if each.url in self.killed]
        lost = [each for each in self.lost if each.url not in self.killed]
        note(self._counts(len(lost), len(gone)))
        assert self.wrong == []
        assert lost == []
        assert len(gone) <= NUM_CLIENTS * len(self.killed), gone  # those in flight when it was killed
        assert self.num_unreached == 0 or self.killed
        assert all(took_s < MAX_RESTART_S for took_s in self.restarts_s), self.restarts_s
        assert not any(self.left_over.values()), self.left_over
        assert set(must_refuse) <= set(self.refused) <= set(must_refuse) | set(may_refuse), self.refused

    def _counts(self, num_lost: int, num_gone: int) -> Counts:
        return Counts(
            fault=current_fault(),
            num_right=self.num_right.total(),
            refused=dict(self.refused),
            num_lost=num_lost,
            num_wrong=len(self.wrong),
            left_over=dict(self.left_over),
            num_lost_with_process=num_gone,
            num_killed=len(self.killed),
            num_unreached=self.num_unreached,
            restarts_s=tuple(self.restarts_s),
        )


def cases_of(*adapters: str | None) -> list[Case]:
    return [case for case in CASES if case.adapter in adapters]


def await_that(is_so: Any, said: Any = lambda: "it did not happen") -> None:
    """Waits for what other threads or processes do."""
    deadline = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline, said()
        time.sleep(0.01)


def settled(left_over: Callable[[], Mapping[str, int]]) -> Mapping[str, int]:
    """What is left over, once nothing is, or at the end of all patience."""
    deadline = time.monotonic() + PATIENCE_S
    while any((found := left_over()).values()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found

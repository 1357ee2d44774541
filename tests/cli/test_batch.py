"""`graft batch`: against real servers, killed at any moment and run again, and with an engine of its own."""

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.cli import batch, main
from tests.api.conftest import Live
from tests.cli.conftest import Reply, Scripted, completed

ROOT = Path(__file__).parents[2]
GRAFT = [sys.executable, "-c", "import sys; from server.cli import main; sys.exit(main())"]
Body = dict[str, Any]


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "_FIRST_WAIT_S", 0.0)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


@pytest.fixture
def asking(tmp_path: Path) -> Callable[..., Path]:
    """Writes an input file of completions, or of other requests by url."""

    def write(*bodies: Body, url: str = "/v1/completions") -> Path:
        path = tmp_path / "in.jsonl"
        lines = [{"custom_id": f"r{i}", "method": "POST", "url": url, "body": body} for i, body in enumerate(bodies)]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        return path

    return write


def run(source: Path, out: Path, url: str, *flags: str) -> int:
    return main(["batch", str(source), str(out), "--url", url, *flags])


def answers(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text(encoding="utf-8").split("\n")[:-1]]


def texts(out: Path) -> list[str]:
    return [answer["response"]["body"]["choices"][0]["text"] for answer in answers(out)]


def num_asked(server: Scripted) -> int:
    return server.asked.qsize()


# What the answers are


def test_each_request_has_the_answer_that_the_server_gives_it(
    live: Live, asking: Callable[..., Path], out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bodies = [
        {"prompt": "Hi", "seed": 1, "max_tokens": 8},
        {"prompt": "é\u2028🎉", "seed": 2, "max_tokens": 8, "adapter": "first"},
        {"prompt": [1, 2], "seed": 3, "max_tokens": 4, "n": 2},
        {"prompt": "Hi", "adapter": "nobody"},
    ]
    assert run(asking(*bodies), out, live.url) == 1
    told = answers(out)
    assert [answer["custom_id"] for answer in told] == ["r0", "r1", "r2", "r3"]
    for body, answer in zip(bodies, told, strict=True):
        direct = live.post("/v1/completions", **body)
        assert answer.keys() == {"id", "custom_id", "response", "error"}
        assert answer["error"] is None
        assert answer["response"]["status_code"] == direct.status_code
        assert answer["response"]["request_id"]
        said, meant = answer["response"]["body"], direct.json()
        assert said.get("choices") == meant.get("choices")
        assert said.get("error") == meant.get("error")
    assert len({answer["id"] for answer in told}) == 4
    printed = capsys.readouterr().out
    assert "4 requests have answers" in printed
    assert "1 of the answers are errors" in printed


def test_chat_completions_are_answered(live: Live, asking: Callable[..., Path], out: Path) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3, "ignore_eos": True}
    assert run(asking(body, url="/v1/chat/completions"), out, live.url) == 0
    (answer,) = answers(out)
    assert answer["response"]["body"]["usage"]["completion_tokens"] == 3


def test_the_key_comes_from_the_environment(
    scripted: Scripted,
    asking: Callable[..., Path],
    out: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scripted.key = "sesame"
    source = asking({"prompt": "Hi"})
    assert run(source, out, scripted.url) == 2
    assert "GRAFT_API_KEY" in capsys.readouterr().err
    assert num_asked(scripted) == 0
    monkeypatch.setenv("GRAFT_API_KEY", "sesame")
    assert run(source, out, f"{scripted.url}/v1/") == 0


def test_without_a_url_the_engine_runs_here(tiny_llama: Path, asking: Callable[..., Path], out: Path) -> None:
    source = asking(*({"prompt": f"Say {i}", "max_tokens": 2} for i in range(3)), {"prompt": "x", "adapter": "nobody"})
    flags = ["--model", str(tiny_llama), "--quantize", "none", "--device", "cpu", "--store", str(out.parent / "store")]
    assert main(["batch", str(source), str(out), *flags]) == 1
    assert [answer["response"]["status_code"] for answer in answers(out)] == [200, 200, 200, 404]


# What is sent again, and when


def test_a_second_run_sends_what_has_no_answer(scripted: Scripted, asking: Callable[..., Path], out: Path) -> None:
    scripted.answer = lambda body: completed(body["prompt"])
    source = asking(*({"prompt": str(i)} for i in range(5)))
    assert run(source, out, scripted.url) == 0
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    out.write_bytes(lines[3] + lines[0] + lines[4][:40])
    assert run(source, out, scripted.url) == 0
    assert texts(out) == ["0", "1", "2", "3", "4"]
    assert num_asked(scripted) == 5 + 3
    assert run(source, out, "http://127.0.0.1:9") == 0  # nothing is left to ask
    assert num_asked(scripted) == 8


def test_errors_are_sent_again_when_that_is_asked_for(
    scripted: Scripted, asking: Callable[..., Path], out: Path
) -> None:
    scripted.answer = lambda body: Reply(500) if body["prompt"] == "1" else completed(body["prompt"])
    source = asking({"prompt": "0"}, {"prompt": "1"})
    assert run(source, out, scripted.url) == 1
    assert run(source, out, scripted.url) == 1
    assert num_asked(scripted) == 2
    scripted.answer = lambda body: completed(f"{body['prompt']} again")
    assert run(source, out, scripted.url, "--retry-errors") == 0
    assert texts(out) == ["0", "1 again"]
    assert num_asked(scripted) == 3


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_server_that_is_full_is_asked_again(
    scripted: Scripted, asking: Callable[..., Path], out: Path, status: int
) -> None:
    replies = iter([Reply(status, headers={"Retry-After": "0"}), Reply(status), completed("now")])
    scripted.answer = lambda body: next(replies)
    assert run(asking({"prompt": "x"}), out, scripted.url) == 0
    assert texts(out) == ["now"]


def test_a_server_that_stays_full_has_answered_so(scripted: Scripted, asking: Callable[..., Path], out: Path) -> None:
    scripted.answer = lambda body: Reply(503, (b"<html>full</html>",))
    assert run(asking({"prompt": "x"}), out, scripted.url) == 1
    (answer,) = answers(out)
    assert answer["response"] == {"status_code": 503, "request_id": "", "body": "<html>full</html>"}
    assert num_asked(scripted) == batch._MAX_ATTEMPTS


@pytest.mark.parametrize(
    ("status", "headers", "wait_s"),
    [
        (503, {}, 0),
        (503, {"retry-after": "7"}, 7),
        (429, {"retry-after": "Thu, 01 Jan 1970 00:00:00 GMT"}, 0),
        (503, {"retry-after": "soon"}, 0),
        (503, {"retry-after": "100000"}, None),  # that is no wait, that is an answer
        (504, {"x-should-retry": "false"}, None),
        (500, {}, None),
        (500, {"x-should-retry": "true"}, 0),
        (400, {}, None),
        (200, {}, None),
    ],
)
def test_the_wait_is_the_one_that_the_server_asks_for(
    status: int, headers: dict[str, str], wait_s: float | None
) -> None:
    assert batch._asked_wait_s(httpx.Response(status, headers=headers)) == wait_s


def test_waits_grow_and_are_never_the_same_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "_FIRST_WAIT_S", 0.5)
    for num_attempts, longest_s in ((1, 0.5), (2, 1), (5, 8), (9, 30)):
        assert longest_s * 0.75 <= batch._backoff_s(num_attempts) <= longest_s


def test_a_connection_that_breaks_is_tried_again(scripted: Scripted, asking: Callable[..., Path], out: Path) -> None:
    replies = iter([Reply(parts=(b"{",), hangs_up=True), completed("whole")])
    scripted.answer = lambda body: next(replies)
    assert run(asking({"prompt": "x"}), out, scripted.url) == 0
    assert texts(out) == ["whole"]


def test_a_request_on_which_every_connection_breaks_has_an_error(
    scripted: Scripted, asking: Callable[..., Path], out: Path
) -> None:
    scripted.answer = lambda body: Reply(hangs_up=body["prompt"] == "bad")
    assert run(asking({"prompt": "bad"}, {"prompt": "good"}), out, scripted.url) == 1
    bad, good = answers(out)
    assert (bad["response"], bad["error"]["code"]) == (None, "no_answer")
    assert good["error"] is None


# Ends before the end


def test_a_server_that_goes_away_ends_the_run_and_loses_nothing(
    scripted: Scripted,
    asking: Callable[..., Path],
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    gone = threading.Event()

    def answer(body: Body) -> Reply:
        if body["prompt"] != "2":
            return completed(body["prompt"])
        if not gone.is_set():
            gone.set()
            threading.Thread(target=scripted.close).start()
        return Reply(parts=(b"{",), hangs_up=True)

    scripted.answer = answer
    source = asking(*({"prompt": str(i)} for i in range(4)))
    assert run(source, out, scripted.url, "--concurrency", "1") == 2
    said = capsys.readouterr().err
    assert "2 of 4 requests have answers" in said
    assert "goes on from there" in said
    assert "No server answers" in said
    assert texts(out) == ["0", "1"]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_killed_goes_on_with_what_is_missing(
    scripted: Scripted, asking: Callable[..., Path], out: Path, how: signal.Signals
) -> None:
    """The server holds every third answer back for as long as the first process lives."""
    num_requests = 12
    reached, released = threading.Semaphore(0), threading.Event()

    def answer(body: Body) -> Reply:
        if int(body["prompt"]) % 3 == 2 and not released.is_set():
            reached.release()
            assert released.wait(120)
        return completed(body["prompt"])

    scripted.answer = answer
    source = asking(*({"prompt": str(i)} for i in range(num_requests)))
    command = [*GRAFT, "batch", str(source), str(out), "--url", scripted.url, "--concurrency", "4"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for _ in range(4):  # all it may have under way
            assert reached.acquire(timeout=120)
        process.send_signal(how)
        _, said = process.communicate(timeout=120)
    assert process.returncode == (130 if how is signal.SIGINT else -how)
    assert ("goes on from there" in said) == (how is signal.SIGINT)
    num_before = len(answers(out))
    assert num_before == 8
    released.set()
    num_sent = num_asked(scripted)
    assert run(source, out, scripted.url) == 0
    assert num_asked(scripted) - num_sent == num_requests - num_before
    assert [answer["custom_id"] for answer in answers(out)] == [f"r{i}" for i in range(num_requests)]
    assert texts(out) == [str(i) for i in range(num_requests)]


# Refused before anything is sent


def test_bad_lines_are_named_and_nothing_is_sent(
    scripted: Scripted, tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in.jsonl"
    good = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}
    source.write_text(f"{json.dumps(good)}\n{json.dumps(good)}\nnonsense\n")
    assert run(source, out, scripted.url) == 2
    said = capsys.readouterr().err
    assert 'line 2: custom_id "a" is that of line 1' in said
    assert "line 3: it is not valid JSON" in said
    assert num_asked(scripted) == 0
    assert not out.exists()


def test_the_input_is_not_written_over(scripted: Scripted, asking: Callable[..., Path]) -> None:
    source = asking({"prompt": "x"})
    before = source.read_bytes()
    assert run(source, source, scripted.url) == 2
    assert source.read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--url", "localhost:8000"], "must be an address"),
        (["--url", "http://127.0.0.1:9"], "No server answers at http://127.0.0.1:9"),
        (["--url", "http://127.0.0.1:9", "--quantize", "int8"], "--quantize is for an engine started here"),
        (["--model", "no/such/model", "--device", "nowhere"], "--device"),
    ],
)
def test_where_to_send_it_must_be_clear(
    asking: Callable[..., Path], out: Path, flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["batch", str(asking({"prompt": "x"})), str(out), *flags]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("number", ["0", "-1", "9999", "many"])
def test_the_number_under_way_is_bounded(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["batch", "in", "out", "--concurrency", number])
    assert "from 1 to 1024" in capsys.readouterr().err


def test_no_more_are_under_way_than_allowed(scripted: Scripted, asking: Callable[..., Path], out: Path) -> None:
    lock, under_way, most = threading.Lock(), 0, 0
    together = threading.Barrier(3)

    def answer(body: Body) -> Reply:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        together.wait(120)  # until three are here
        with lock:
            under_way -= 1
        return completed()

    scripted.answer = answer
    assert run(asking(*({"prompt": str(i)} for i in range(9))), out, scripted.url, "--concurrency", "3") == 0
    assert most == 3

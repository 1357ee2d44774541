"""The two processes of `graft serve --engine-process on`: how they begin, and that neither outlives the other."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from server.adapters.store.folder_store import INCOMING_FOLDER
from server.apart.front import assemble_apart
from server.ground.config import Settings
from server.ground.errors import StartupRefused
from tests.apart.prepared import PANICKING, defect, panicking, unhurried
from tests.api.conftest import event_data, eventually
from tests.api.conftest import serving as serving_here
from tests.demo_files import BASE, ROOT, store_of_five

SERVE = [sys.executable, "-c", "import sys; from server.cli import main; sys.exit(main())", "serve"]
LONG = {"prompt": "The old boat", "max_tokens": 900, "ignore_eos": True, "adapter": "pirate-lora"}


@dataclass
class Pair:
    """A server's two processes, and its log."""

    front: subprocess.Popen[str]
    url: str
    log: Path
    store: Path

    @property
    def child(self) -> int:
        (child,) = [pid for pid in children(self.front.pid) if "server.apart" in command_of(pid)]
        return child

    def said(self) -> str:
        return self.log.read_text()


def children(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def command_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()


def is_there(pid: int) -> bool:
    """Whether it runs. One that has ended and was not waited for by its parent, which may be the system's, does not."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@contextmanager
def serving(scratch: Path, *flags: str) -> Iterator[Pair]:
    store, log = store_of_five(scratch / "store"), scratch / "log"
    flags = ("--engine-process", "on", "--quantize", "none", "--device", "cpu", "--kv-memory", "64MiB", *flags)
    command = [*SERVE, str(BASE), "--port", "0", "--store", str(store), "--adapter-memory", "64MiB", *flags]
    with (
        log.open("w") as said,
        subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        ) as front,
    ):
        assert front.stdout is not None
        banner = "".join(iter(front.stdout.readline, "  Try it:\n"))
        found = re.search(r"http://\S+", banner)
        assert found is not None, log.read_text()
        try:
            yield Pair(front, found.group(), log, store)
        finally:
            front.kill()


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    with serving(tmp_path) as pair:
        yield pair


@contextmanager
def streaming(pair: Pair) -> Iterator[Iterator[str]]:
    """The events of an answer that would go on for long, its first one read."""
    with (
        httpx.Client(base_url=pair.url, timeout=120) as http,
        http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as answer,
    ):
        events = event_data(answer)
        assert "choices" in json.loads(next(events))
        yield events


@pytest.mark.slow
def test_a_child_that_is_killed_ends_every_stream_with_one_error_and_the_process_with_another_code(pair: Pair) -> None:
    with streaming(pair) as events, streaming(pair) as others:
        os.kill(pair.child, signal.SIGKILL)
        for told in (list(events), list(others)):
            assert "[DONE]" not in told
            (error,) = [json.loads(event)["error"] for event in told if "error" in json.loads(event)]
            assert error["code"] == "engine_dead"
            assert "error" in json.loads(told[-1])
    assert pair.front.wait(120) == 1
    assert "the engine has stopped" in pair.said()


@pytest.mark.slow
def test_a_front_that_is_killed_takes_its_child_along(pair: Pair) -> None:
    child = pair.child
    descendants = [child, *children(child)]
    with streaming(pair):
        pair.front.kill()
        eventually(lambda: not any(is_there(pid) for pid in descendants), within_s=30)


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_both_lets_what_runs_finish_and_leaves_nothing(pair: Pair, sent: signal.Signals) -> None:
    """As a terminal sends it, and a service's supervisor."""
    child = pair.child
    with httpx.Client(base_url=pair.url, timeout=120) as http:
        body = {**LONG, "max_tokens": 300, "stream": True}
        with http.stream("POST", "/v1/completions", json=body) as answer:
            events = event_data(answer)
            next(events)
            for pid in (child, pair.front.pid):
                os.kill(pid, sent)
            eventually(lambda: "finishing what is running" in pair.said())
            assert httpx.get(f"{pair.url}/ready").status_code == 503
            refused = httpx.post(f"{pair.url}/v1/completions", json=LONG)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
            told = list(events)
    assert told[-1] == "[DONE]"
    assert pair.front.wait(120) == 0
    assert not is_there(child)
    assert not list((pair.store / INCOMING_FOLDER).iterdir())
    assert "Traceback" not in pair.said()


@pytest.mark.slow
def test_a_second_signal_aborts_what_runs(pair: Pair) -> None:
    with streaming(pair) as events:
        pair.front.send_signal(signal.SIGTERM)
        eventually(lambda: "finishing" in pair.said())
        pair.front.send_signal(signal.SIGTERM)
        last = json.loads(list(events)[-1])
    assert last["error"]["code"] == "overloaded"
    assert pair.front.wait(120) == 0


@pytest.mark.slow
def test_a_step_that_hangs_is_told_to_the_front(tmp_path: Path) -> None:
    """A process that stands still as a whole: it says nothing any more, which is noticed after longer than a step."""
    with serving(tmp_path, "--step-timeout", "1") as pair:
        started_s = time.monotonic()
        with streaming(pair) as events:
            os.kill(pair.child, signal.SIGSTOP)
            assert json.loads(list(events)[-1])["error"]["code"] == "engine_dead"
        assert pair.front.wait(120) == 1
        assert time.monotonic() - started_s < 100


@pytest.mark.slow
def test_a_child_that_stands_still_does_not_keep_a_front_that_is_to_end(tmp_path: Path) -> None:
    with serving(tmp_path, "--step-timeout", "1", "--drain-timeout", "2") as pair:
        child = pair.child
        os.kill(child, signal.SIGSTOP)
        pair.front.terminate()
        pair.front.wait(120)
        assert not is_there(child)


@pytest.mark.slow
def test_a_child_that_takes_nothing_holds_up_nobody(tmp_path: Path) -> None:
    """More orders than fit into the way to it: who asks for health is answered, until it counts as lost."""
    with serving(tmp_path, "--step-timeout", "1", "--drain-timeout", "2") as pair:
        child = pair.child
        os.kill(child, signal.SIGSTOP)
        large = {"enum": [f"{number:08d}" for number in range(3000)]}
        asking = [
            subprocess.Popen(
                ["curl", "-s", "-o", os.devnull, f"{pair.url}/v1/completions", "-H", "content-type: application/json",
                 "-d", json.dumps({"prompt": "Hi", "structured_outputs": {"json": large | {"title": str(number)}}})]
            )
            for number in range(20)
        ]  # fmt: skip
        with httpx.Client(base_url=pair.url, timeout=10) as http:
            for _ in range(10):
                assert http.get("/health").status_code == 200
                time.sleep(0.2)
        assert pair.front.wait(120) == 1
        assert not is_there(child)
        for one in asking:
            one.wait(60)


@pytest.mark.slow
def test_an_upload_to_a_child_that_stands_still_leaves_no_child_behind(tmp_path: Path) -> None:
    with serving(tmp_path, "--step-timeout", "1", "--drain-timeout", "2") as pair:
        child = pair.child
        weights = tmp_path / "weights"
        weights.write_bytes(bytes(60 << 20))
        form = ["-F", "name=large", "-F", 'config={"peft_type": "LORA"};type=application/json']
        upload = subprocess.Popen(
            ["curl", "-s", "-o", os.devnull, "--limit-rate", "8M", f"{pair.url}/v1/adapters", *form,
             "-F", f"weights=@{weights}"]
        )  # fmt: skip
        eventually(lambda: any((pair.store / INCOMING_FOLDER).iterdir()))
        os.kill(child, signal.SIGSTOP)
        assert pair.front.wait(120) == 1
        assert not is_there(child)
        upload.wait(60)


@pytest.mark.slow
def test_an_end_in_good_order_takes_its_time(demo_settings: Callable[..., Settings]) -> None:
    settings = demo_settings()
    assemble_apart(settings, unhurried).close()
    assert (settings.store / "closed").exists()


def test_a_panic_in_the_child_is_an_error_of_one_request(demo_settings: Callable[..., Settings]) -> None:
    with serving_here(demo_settings(), assembled=lambda settings: assemble_apart(settings, panicking)) as live:
        answer = httpx.get(f"{live.url}/v1/adapters/{PANICKING}", timeout=60)
        assert answer.status_code == 500
        assert httpx.get(f"{live.url}/v1/adapters/poet-dora", timeout=60).status_code == 200


def test_the_child_knows_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFT_API_KEY", "a-secret-of-the-front")
    with serving(tmp_path) as pair:
        assert httpx.get(f"{pair.url}/v1/models").status_code == 401
        for pid in (pair.child, *children(pair.child)):
            assert b"a-secret-of-the-front" not in Path(f"/proc/{pid}/environ").read_bytes()


@pytest.mark.slow
def test_the_child_logs_as_it_was_told(tmp_path: Path) -> None:
    audit = tmp_path / "audit"
    with serving(tmp_path, "--log-format", "json", "--audit-log", str(audit)) as pair:
        deleted = httpx.delete(f"{pair.url}/v1/adapters/robot-ia3", headers={"x-request-id": "asked-1"})
        assert deleted.status_code == 200
        assert httpx.delete(f"{pair.url}/v1/adapters/robot-ia3").status_code == 404
        assert httpx.delete(f"{pair.url}/v1/adapters/.../fetch").status_code == 404
        pair.front.terminate()
        assert pair.front.wait(120) == 0
    lines = [json.loads(line) for line in audit.read_text().splitlines()]
    assert [(line["verb"], line["adapter"], line["result"]) for line in lines] == [
        ("delete", "robot-ia3", "done"),
        ("delete", "robot-ia3", "adapter_not_found"),
        ("cancel fetch", "...", "not_found"),
    ]
    logged = [line for line in pair.said().splitlines() if "memory of the cpu" in line]
    assert [json.loads(line)["logger"] for line in logged] == ["server.assemble"]


def test_what_the_child_refuses_the_front_refuses(demo_settings: Callable[..., Settings]) -> None:
    with pytest.raises(StartupRefused, match="--max-context 999999"):
        assemble_apart(demo_settings(max_context=999_999))


def test_a_defect_while_it_loads_is_no_silence(
    demo_settings: Callable[..., Settings], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(StartupRefused, match="ended while it started: its process has ended with exit code 1"):
        assemble_apart(demo_settings(), defect)
    assert "a defect that nobody foresaw" in capfd.readouterr().err

"""The command: its help, its refusals and the life of the serving process, with a real socket and real signals."""

import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from server import __version__
from server.cli import bind, main
from server.ground.config import Settings, flag_name, load

# An application whose answer takes three beats, so that a signal meets it in the middle. It serves behind the real
# socket, banner and signal code; only the model is missing.
SLOW_SERVER = """
import asyncio, sys
from server.cli import bind, listen, serve
from server.ground.config import load

async def beats(scope, receive, send):
    if scope["type"] == "lifespan":
        while (message := await receive())["type"] != "lifespan.shutdown":
            await send({"type": "lifespan.startup.complete"})
        return await send({"type": "lifespan.shutdown.complete"})
    await send({"type": "http.response.start", "status": 200, "headers": []})
    if scope["path"] == "/generation":
        generating.append(scope)
    Slow.is_alive = scope["path"] != "/fatal"
    for beat in range(3 if scope["path"] == "/slow" else 10_000):
        if scope["path"] in ("/generation", "/fatal") and aborted.is_set():
            await send({"type": "http.response.body", "body": b"last words\\n", "more_body": True})
            break
        await send({"type": "http.response.body", "body": b"beat\\n", "more_body": True})
        await asyncio.sleep(0.2)
    await send({"type": "http.response.body", "body": b"", "more_body": False})

aborted = asyncio.Event()
generating = []

class Slow:
    app = staticmethod(beats)
    is_alive = True

    def abandon(self):
        print("abandoned", flush=True)
        aborted.set()

    async def drain(self, timeout_s):
        print("drains within", timeout_s, flush=True)
        if timeout_s == 0:
            aborted.set()
        elif generating:
            await aborted.wait()

    def kill(self):
        print("killed", flush=True)

    def banner(self):
        return f"listening on {settings.url}"

    def close(self):
        print("closed", flush=True)

serve._LAST_WORDS_S = float(sys.argv[2])
settings = load({"model": "m", "port": "0", "host": sys.argv[1], "drain_timeout": sys.argv[3]})
with bind(settings) as listener:
    settings = settings.model_copy(update={"port": listener.getsockname()[1]})
    server = Slow()
    try:
        code = listen(server, settings, listener)
    finally:
        server.close()
sys.exit(code)
"""


@contextmanager
def running_server(last_words_s: float, drain_s: float = 30) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A running process and its URL; ended by the test, or killed after it."""
    command = [sys.executable, "-c", SLOW_SERVER, "127.0.0.1", str(last_words_s), str(drain_s)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        found = re.search(r"http://\S+", process.stdout.readline())
        assert found is not None
        yield process, found.group()
        process.kill()


@pytest.fixture
def slow_server() -> Iterator[tuple[subprocess.Popen[str], str]]:
    with running_server(last_words_s=2) as running:
        yield running


@pytest.fixture
def patient_server() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """One that gives aborted answers so long to end that a slow machine cannot matter."""
    with running_server(last_words_s=28, drain_s=90) as running:
        yield running


@pytest.mark.parametrize("name", Settings.model_fields)
def test_the_help_lists_every_setting(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["serve", "--help"])
    assert left.value.code == 0
    assert flag_name(name) in capsys.readouterr().out


def test_version_names_what_answers_may_depend_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    printed = capsys.readouterr().out
    assert f"graftserve {__version__}" in printed
    assert re.search(r"^torch \d", printed, re.MULTILINE)
    assert re.search(r"^transformers \d", printed, re.MULTILINE)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["serve", "m", "--port", "x"], ["--port", "'x'"]),
        (["serve", "m", "--host", "0.0.0.0"], ["API key"]),
        (["serve", "m", "--config", "none.yaml"], ["none.yaml"]),
    ],
)
def test_what_is_refused_is_one_sentence_and_exit_code_2(
    argv: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert [word for word in words if word not in said] == []


@pytest.mark.parametrize("argv", [["serve", "m", "--max-contex", "1"], ["serve", "m", "more"], ["sreve"], []])
def test_an_unknown_word_is_refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(argv)
    assert left.value.code == 2
    assert "graft" in capsys.readouterr().err


def test_a_taken_port_is_refused_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with bind(load({"model": "m", "port": "0"})) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", "no-such-model", "--port", str(port)]) == 2
    said = capsys.readouterr().err
    assert f"port {port}" in said
    assert "--port" in said
    assert "loading" not in said


def test_a_host_that_is_not_ours_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "m", "--host", "192.0.2.1", "--api-key", "k", "--port", "0"]) == 2
    assert "192.0.2.1" in capsys.readouterr().err


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_lets_running_answers_finish(
    slow_server: tuple[subprocess.Popen[str], str], sent: signal.Signals
) -> None:
    process, url = slow_server
    with urllib.request.urlopen(f"{url}/slow", timeout=120) as answer:
        assert answer.readline() == b"beat\n"
        process.send_signal(sent)
        assert answer.read() == b"beat\nbeat\n"
    printed, _ = process.communicate(timeout=120)
    assert printed == "drains within 28.0\nclosed\n"
    assert process.returncode == 0


def test_what_the_second_signal_aborts_can_tell_its_clients(
    patient_server: tuple[subprocess.Popen[str], str],
) -> None:
    process, url = patient_server
    with urllib.request.urlopen(f"{url}/generation", timeout=120) as answer:
        assert answer.readline() == b"beat\n"
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        assert "finishing" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        assert answer.read().endswith(b"last words\n")
        process.communicate(timeout=120)
    assert process.returncode == 0


def test_the_second_signal_aborts_what_is_running(slow_server: tuple[subprocess.Popen[str], str]) -> None:
    process, url = slow_server
    with urllib.request.urlopen(f"{url}/endless", timeout=120) as answer:
        assert answer.readline() == b"beat\n"
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        assert "finishing" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        printed, _ = process.communicate(timeout=120)
    assert printed == "drains within 28.0\ndrains within 0\nclosed\n"
    assert process.returncode == 0


def test_a_server_that_is_not_alive_any_more_tells_its_clients_and_ends_with_another_code(
    slow_server: tuple[subprocess.Popen[str], str],
) -> None:
    process, url = slow_server
    with urllib.request.urlopen(f"{url}/fatal", timeout=120) as answer:
        assert answer.read().endswith(b"last words\n")
    printed, said = process.communicate(timeout=120)
    assert printed == "abandoned\nclosed\n"
    assert "the engine has stopped" in said
    assert process.returncode == 1


def test_while_it_drains_it_still_answers(patient_server: tuple[subprocess.Popen[str], str]) -> None:
    process, url = patient_server
    with urllib.request.urlopen(f"{url}/generation", timeout=120) as answer:
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        assert "finishing" in process.stderr.readline()
        with urllib.request.urlopen(f"{url}/slow", timeout=120) as other:
            assert other.status == 200
        process.send_signal(signal.SIGTERM)
        assert answer.read().endswith(b"last words\n")
    process.communicate(timeout=120)


def test_a_benchmark_without_its_packages_says_how_to_get_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "server.bench", raising=False)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert main(["bench", "--help"]) == 2
    assert "graftserve[bench]" in capsys.readouterr().err


def test_the_command_is_installed() -> None:
    graft = Path(sys.executable).with_name("graft")
    if not graft.exists():
        pytest.skip("the package is not installed here; make test installs it")
    done = subprocess.run([graft, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"graftserve {__version__}\n"

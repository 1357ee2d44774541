"""The README's own commands, run against the server that `graft serve` starts."""

import json
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.demo_files import ADAPTERS, INSTALLED, ROOT, STORE

README = (ROOT / "README.md").read_text(encoding="utf-8")
PRINTED = "http://127.0.0.1:8000"
SERVE = [sys.executable, "-c", "import sys; from server.cli import main; sys.exit(main())", "serve"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands(word: str) -> list[str]:
    """The `$ word ...` commands of the console blocks, continuation lines included."""
    found = [part for block in blocks("console") for part in block.split("$ ")[1:]]
    return [command.strip() for command in found if command.startswith(word)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands are typed: a copy of the store, and a folder `legal` that PEFT has saved."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(STORE, folder / "store")
    digest = json.loads((STORE / ADAPTERS[0] / "current.json").read_text())["current"]
    shutil.copytree(STORE / ADAPTERS[0] / digest, folder / "legal")
    return folder


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    """A server started by the command on the built-in demo; its address as the banner prints it."""
    command = [*SERVE, "--port", "0", "--store", str(folder / "store")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        try:
            banner = ""
            while "curl" not in banner:
                line = process.stdout.readline()
                assert line, f"the server ended:\n{banner}"
                banner += line
            found = re.search(r"http://127\.0\.0\.1:\d+", banner)
            assert found
            assert all(adapter in banner for adapter in INSTALLED[:8])
            assert f"and {len(INSTALLED) - 8} more" in banner
            yield found.group()
        finally:
            process.terminate()
            process.wait(timeout=120)


def run(command: list[str] | str, folder: Path) -> str:
    return subprocess.run(
        command, cwd=folder, shell=isinstance(command, str), check=True, capture_output=True, text=True, timeout=120
    ).stdout


def test_the_question_with_curl_is_answered_by_the_adapter(address: str, folder: Path) -> None:
    chat = next(command for command in commands("curl") if "chat/completions" in command)
    answer = json.loads(run(chat.replace(PRINTED, address), folder))
    assert answer["choices"][0]["message"]["content"]
    assert answer["adapter"]["name"] in ADAPTERS


def test_the_upload_with_curl_answers_and_goes_again(address: str, folder: Path) -> None:
    upload = next(command for command in commands("curl") if "/v1/adapters" in command)
    uploaded = json.loads(run(upload.replace(PRINTED, address), folder))
    assert (uploaded["name"], uploaded["method"]) == ("legal", "lora")
    request = urllib.request.Request(f"{address}/v1/adapters/legal", method="DELETE")
    with urllib.request.urlopen(request, timeout=120) as deleted:
        assert deleted.status in (200, 204)


def test_the_python_client_hears_both_voices(address: str, folder: Path) -> None:
    (program,) = blocks("python")
    lines = run([sys.executable, "-c", program.replace(PRINTED, address)], folder).splitlines()
    assert {word for line in lines for word in line.split()[:1] if word in ADAPTERS} == {"poet-dora", "robot-ia3"}


def test_the_examples_run(address: str, folder: Path) -> None:
    for name, arguments in {
        "two_voices.py": ["Tell me about the baker.", "pirate-lora"],
        "upload.py": ["mine", "legal", "Once upon a time"],
    }.items():
        program = (ROOT / "examples" / name).read_text(encoding="utf-8").replace(PRINTED, address)
        assert run([sys.executable, "-c", program, *arguments], folder)


def test_the_adapters_of_the_table_are_the_demo() -> None:
    assert tuple(re.findall(r"^\| `([a-z0-9-]+)` \|", README, re.MULTILINE)) == ADAPTERS


def test_every_file_that_it_links_to_exists() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert [link for link in links if not (ROOT / link).exists()] == []

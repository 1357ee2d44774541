"""How a command gets into the table of commands, and how tables are laid out."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from server.cli import COMMANDS, main
from server.cli.adapters import WORDS
from server.cli.command import found_in
from server.cli.table import columns, facts
from server.ground.errors import StartupRefused

ROOT = Path(__file__).parents[1]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module with a command in it."""
    (tmp_path / "a_command.py").write_text(
        "def add_arguments(parser):\n"
        "    parser.add_argument('--times', type=int, default=2)\n"
        "def run(arguments):\n"
        "    return arguments.times\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "a_command", raising=False)
    return "a_command"


def test_a_command_of_a_module_is_imported_when_it_is_given(module: str) -> None:
    command = found_in(module, "count")
    assert module not in sys.modules
    parser = argparse.ArgumentParser()
    command.add_flags(parser)
    assert command.run(parser.parse_args(["--times", "3"]), []) == 3


def test_a_package_that_it_lacks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needy_command.py").write_text("import a_package_that_nobody_has\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(StartupRefused, match="pip install a_package_that_nobody_has"):
        found_in("needy_command", "need").add_flags(argparse.ArgumentParser())


def test_a_module_of_ours_that_is_missing_is_a_defect() -> None:
    with pytest.raises(ModuleNotFoundError):
        found_in("server.no_such_command", "nothing").add_flags(argparse.ArgumentParser())


def test_the_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    listed = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("    ")}
    assert COMMANDS.keys() <= listed


@pytest.mark.parametrize("command", [name for name, command in COMMANDS.items() if not command.takes_rest])
def test_every_command_answers_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: graft {command}")


@pytest.mark.parametrize("argv", [["config"], ["adapters", "list"]])
def test_what_needs_no_tensors_runs_without_torch(argv: list[str]) -> None:
    blocked = "import sys; sys.modules.update(torch=None, transformers=None, bitsandbytes=None)"
    code = f"{blocked}; from server.cli import main; sys.exit(main({argv!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_docs_tell_of_every_command_and_word() -> None:
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert [name for name in COMMANDS if f"| `graft {name}` |" not in page] == []
    assert [word for word in WORDS if f"\n### {word}\n" not in page] == []


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    assert columns(("NAME", "RANK"), [("a", "8"), ("longer", "16")], right=(1,)) == (
        "NAME    RANK\na          8\nlonger    16\n"
    )


def test_a_long_fact_goes_on_under_itself() -> None:
    told = facts([("name", "x"), ("sites", "word " * 30)]).splitlines()
    assert told[0] == "name   x"
    assert told[1].startswith("sites  word")
    assert told[2].startswith("       word")
    assert max(map(len, told)) <= 80

"""What a command is: its line in the help, its flags, what it does; and how commands speak to people.

Owns the shape that every command has. Knows nothing about any particular one.
"""

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

from server.ground.config import Settings, load_some
from server.ground.errors import StartupRefused


@dataclass(frozen=True, slots=True)
class Command:
    """One word after `graft`: its line in the help, its flags, and what it does; `rest` is what its flags left over.

    `add_flags` is called for the command that was given and for no other, so it may import what is slow to import.
    """

    summary: str
    add_flags: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, Sequence[str]], int]
    takes_rest: bool = False


def found_in(module: str, summary: str) -> Command:
    """The command of a module with `add_arguments(parser)` and `run(arguments) -> int`; imported when it is given."""

    def imported() -> ModuleType:
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] == "server":
                raise  # ours: a defect, which no installing mends
            raise StartupRefused(f"{module} needs {error.name}: pip install {error.name}") from None

    def run(arguments: argparse.Namespace, _: Sequence[str]) -> int:
        code: int = imported().run(arguments)
        return code

    return Command(summary, lambda parser: imported().add_arguments(parser), run)


def settings_of(names: Collection[str], arguments: argparse.Namespace) -> Settings:
    """The settings `names` for a command that runs and ends, and whose warnings are sentences to people."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="graft: %(message)s")
    quieten_libraries()
    given = vars(arguments)
    return load_some(names, {name: given[name] for name in names if name in given})


def say(sentence: str) -> None:
    """One line for people, apart from what the command is asked to print."""
    sys.stderr.write(f"graft: {sentence}\n")


def quieten_libraries() -> None:
    """Keeps down the hub client's request lines, and what bitsandbytes says of a CPU kernel that it can do without."""
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")


def no_flags(_: argparse.ArgumentParser) -> None:
    """The command takes none, or has a parser of its own."""


@contextmanager
def quiet_registry() -> Iterator[None]:
    """For commands that print themselves what the registry and its loader say of an adapter."""
    log = logging.getLogger("server.adapters")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)

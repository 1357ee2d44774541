"""The `graft` command: one module for each of its words, gathered here.

Owns the table of commands, the parsing of their flags and the exit codes; every refusal is one readable sentence and
exit code 2. Knows nothing about what a command does.
"""

import argparse
import os
import signal
import sys
from collections.abc import Mapping, Sequence

from server import __version__
from server.cli.adapters import ADAPTERS
from server.cli.bench import BENCH
from server.cli.command import Command, found_in, say
from server.cli.config import CONFIG
from server.cli.convert import CONVERT
from server.cli.drop import DROP
from server.cli.fuse import FUSE
from server.cli.merge import MERGE
from server.cli.serve import SERVE, bind, listen
from server.cli.version import VERSION
from server.ground.errors import GraftError

__all__ = ["COMMANDS", "bind", "listen", "main", "say"]

COMMANDS: Mapping[str, Command] = {
    "serve": SERVE,
    "adapters": ADAPTERS,
    "merge": MERGE,
    "fuse": FUSE,
    "drop": DROP,
    "convert": CONVERT,
    "config": CONFIG,
    "doctor": found_in("server.cli.doctor", "look at the machine and the settings: what will be used, what is missing"),
    "keys": found_in("server.cli.keys", "make and look after API keys"),
    "bench": BENCH,
    "chat": found_in("server.cli.chat", "talk to a server, or to two adapters side by side"),
    "complete": found_in("server.cli.complete", "have a server go on with a text"),
    "batch": found_in("server.cli.batch", "answer a file of requests, in OpenAI's batch format"),
    "drift": found_in("server.drift", "measure how far quantization moves the base and its adapters"),
    "version": VERSION,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `graft` with `argv` (default: the process's own) and return the exit code: 0, 1 failed, 2 refused."""
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        parser = _parser(words)
        arguments, rest = parser.parse_known_args(words)
        command = COMMANDS[arguments.command]
        if rest and not command.takes_rest:
            parser.error(f"{rest[0]} is not known to graft {arguments.command}; see graft {arguments.command} --help")
        return command.run(arguments, rest)
    except GraftError as error:
        for line in error.message.splitlines():
            say(line)
        return 2
    except KeyboardInterrupt:
        say("stopped")
        return 128 + signal.SIGINT
    except BrokenPipeError:  # who reads what is printed has gone (`| head`); nor may Python print the rest at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="graft", description="Many adapters of any method on one quantized base.")
    parser.add_argument("--version", action="version", version=f"graftserve {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        # A command that takes the rest has a parser of its own further on, which also answers --help.
        sub = commands.add_parser(
            name,
            help=command.summary,
            description=command.summary,
            add_help=not command.takes_rest,
            argument_default=argparse.SUPPRESS,
            allow_abbrev=False,
        )
        if words[:1] == [name]:
            command.add_flags(sub)
    return parser

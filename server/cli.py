"""The `graft` command: sub-commands, flags made from the settings, and the life of the serving process.

Owns argument parsing, the listening socket, signals and what is printed; every refusal is one readable sentence and
exit code 2. Knows nothing of models, adapters or routes: `assemble` builds those.
"""

import argparse
import asyncio
import contextlib
import importlib.metadata
import logging
import os
import platform
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, Protocol

import uvicorn
from pydantic import ByteSize

from server import __version__
from server.ground import config
from server.ground.config import Flag, Settings
from server.ground.errors import GraftError, StartupRefused

DRAIN_TIMEOUT_S = 30
_LAST_WORDS_S = 2  # of the above: what aborted answers have to tell their clients so
_GROUPS = {
    "base": "base model",
    "adapters": "adapters",
    "http": "HTTP",
    "limits": "limits",
    "process": "process",
}
_VERSIONED = ("torch", "transformers", "bitsandbytes", "peft")


@dataclass(frozen=True, slots=True)
class Command:
    """One word after `graft`: its line in the help, its flags, and what it does; `rest` is what its flags left over."""

    summary: str
    add_flags: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, Sequence[str]], int]
    takes_rest: bool = False


class Served(Protocol):
    """What the command needs of an assembled server.

    `drain` takes nothing new, waits for what is in flight and aborts what is left after `timeout_s`, so that its
    clients are told; `close` may block until the engine has stopped.
    """

    @property
    def app(self) -> Any: ...
    def banner(self) -> str: ...
    async def drain(self, timeout_s: float) -> None: ...
    def close(self) -> None: ...


def main(argv: Sequence[str] | None = None) -> int:
    """Run `graft` with `argv` (default: the process's own) and return the exit code: 0, 1 failed, 2 refused."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    command = COMMANDS[arguments.command]
    if rest and not command.takes_rest:
        parser.error(f"{rest[0]} is not known to graft {arguments.command}; see graft {arguments.command} --help")
    try:
        return command.run(arguments, rest)
    except GraftError as error:
        for line in error.message.splitlines():
            say(line)
        return 2
    except KeyboardInterrupt:
        say("stopped")
        return 128 + signal.SIGINT


def say(sentence: str) -> None:
    """One line for people, apart from what the command is asked to print."""
    sys.stderr.write(f"graft: {sentence}\n")


def _parser() -> argparse.ArgumentParser:
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
        command.add_flags(sub)
    return parser


def add_settings(parser: argparse.ArgumentParser) -> None:
    """A flag for each setting. Only those given reach the namespace; values stay text, `config.load` judges them."""
    groups = {key: parser.add_argument_group(title) for key, title in _GROUPS.items()}
    for name, info in Settings.model_fields.items():
        flag = next(item for item in info.metadata if isinstance(item, Flag))
        is_repeatable = isinstance(info.get_default(), tuple)
        text = f"{flag.help} (default: {_shown_default(flag, info.get_default())})".replace("%", "%%")
        if name == "model":
            groups[flag.group].add_argument(name, nargs="?", metavar=flag.metavar, help=text)
        else:
            action = "append" if is_repeatable else "store"
            groups[flag.group].add_argument(
                config.flag_name(name), dest=name, action=action, metavar=flag.metavar, help=text
            )
    parser.epilog = (
        f"Every setting is also a variable ({config.variable_name('max_context')}) and a key of the --config file "
        "(max_context). A flag wins over a variable, a variable over the file."
    )


def _shown_default(flag: Flag, value: object) -> str:
    if flag.default is not None:
        return flag.default
    if isinstance(value, ByteSize):
        return value.human_readable().replace(".0", "")
    return "none" if value in (None, ()) else str(value)


def _serve(arguments: argparse.Namespace, _: Sequence[str]) -> int:
    flags = {name: value for name, value in vars(arguments).items() if name != "command"}
    settings = config.load(flags)
    for sentence in config.unknown_variables():
        say(sentence)
    _configure_output(settings)
    with bind(settings) as listener:
        # Bound before the base loads, so that a taken port is refused at once, and port 0 has its number.
        settings = settings.model_copy(update={"port": listener.getsockname()[1]})
        say(f"loading {settings.model} ...")
        # Imported here: it brings torch and transformers, which `--help`, `version` and refusals must not wait for.
        from server.assemble import assemble

        server = assemble(settings)
        try:
            return listen(server, settings, listener)
        finally:
            server.close()


def _configure_output(settings: Settings) -> None:
    logging.basicConfig(
        level=settings.log_level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    # The hub client's request lines would drown ours, and bitsandbytes warns of a CPU kernel that it can do without.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")


def bind(settings: Settings) -> socket.socket:
    """A bound socket that does not listen yet: nobody can connect before there is something to answer."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with contextlib.ExitStack() as on_failure:
            listener = on_failure.enter_context(socket.socket(family, socket.SOCK_STREAM))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            on_failure.pop_all()
    except OSError as error:
        raise _not_bindable(settings.host, settings.port, error) from None
    return listener


def _not_bindable(host: str, port: int, error: OSError) -> StartupRefused:
    return StartupRefused(
        f"cannot listen on {host} port {port}: {error.strerror or error}; "
        "stop what runs there, or choose another --host or --port (0 picks a free one)."
    )


class _Uvicorn(uvicorn.Server):
    """uvicorn that prints the banner once it listens, drains on the first signal and aborts on the second.

    It also swallows the signal that it has served: uvicorn would raise it again on the way out, and SIGTERM's default
    action would end the process before the engine has been closed.
    """

    def __init__(self, configuration: uvicorn.Config, banner: str, drain: Callable[[float], Awaitable[None]]) -> None:
        super().__init__(configuration)
        self._banner = banner
        self._drain = drain
        self._loop: asyncio.AbstractEventLoop | None = None
        self._endings: list[asyncio.Task[None]] = []  # kept, because the loop alone does not keep tasks alive

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        try:
            await super().startup(sockets=sockets)
        except OSError as error:  # another process bound the same address while the base was loading
            host, port = sockets[0].getsockname()[:2] if sockets else ("", 0)
            raise _not_bindable(host, port, error) from None
        if self.started:
            sys.stdout.write(f"{self._banner}\n")
            sys.stdout.flush()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            say("aborting what is still running")
            self._end(0)
        else:
            self.should_exit = True
            say(f"finishing what is running, at most {DRAIN_TIMEOUT_S} s; a second signal aborts it")
            self._end(DRAIN_TIMEOUT_S - _LAST_WORDS_S)

    def _end(self, timeout_s: float) -> None:
        """Called by the signal, which may interrupt the loop anywhere: the loop is to begin the ending itself."""
        if self._loop is not None:  # before startup there is nothing to end
            self._loop.call_soon_threadsafe(
                lambda: self._endings.append(asyncio.create_task(self._end_within(timeout_s)))
            )

    async def _end_within(self, timeout_s: float) -> None:
        """Have answers end, then give them time to be sent; a connection that is open after that is broken off."""
        with contextlib.suppress(TimeoutError):  # the engine is stuck in a step
            await asyncio.wait_for(self._drain(timeout_s), timeout_s + _LAST_WORDS_S / 2)
        if timeout_s > 0:
            return  # uvicorn waits for the rest
        state = self.server_state
        deadline = time.monotonic() + _LAST_WORDS_S / 2
        while state.connections or state.tasks:
            if time.monotonic() > deadline:
                self.force_exit = True
                for connection in list(state.connections):
                    connection.transport.abort()
                return
            await asyncio.sleep(0.02)


def listen(server: Served, settings: Settings, listener: socket.socket) -> int:
    """Answer requests until a signal comes; 0 if it ever started."""
    configuration = uvicorn.Config(
        server.app,
        log_config=None,
        log_level="debug" if settings.log_level == "debug" else "warning",
        access_log=settings.log_level == "debug",
        server_header=False,
        timeout_graceful_shutdown=DRAIN_TIMEOUT_S,
    )
    serving = _Uvicorn(configuration, server.banner(), server.drain)
    serving.run(sockets=[listener])
    return 0 if serving.started else 1


def _version(_: argparse.Namespace, __: Sequence[str]) -> int:
    sys.stdout.write(f"graftserve {__version__}\npython {platform.python_version()}\n")
    for name in _VERSIONED:
        try:
            sys.stdout.write(f"{name} {importlib.metadata.version(name)}\n")
        except importlib.metadata.PackageNotFoundError:
            continue
    return 0


def _bench(_: argparse.Namespace, rest: Sequence[str]) -> int:
    # Imported here, like `assemble`: it brings torch.
    try:
        from server.bench import main as measure
    except ModuleNotFoundError as error:
        raise StartupRefused(f"graft bench needs {error.name}: pip install 'graftserve[bench]'") from None
    return measure(rest)


def _no_flags(_: argparse.ArgumentParser) -> None:
    """The command takes none, or has a parser of its own."""


COMMANDS = {
    "serve": Command("start the server", add_settings, _serve),
    "bench": Command("measure the engine's throughput on this machine", _no_flags, _bench, takes_rest=True),
    "version": Command("print the versions of graftserve and of what it stands on", _no_flags, _version),
}

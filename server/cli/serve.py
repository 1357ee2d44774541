"""`graft serve`: the listening socket, signals, and the life of the serving process.

Owns what is printed while a server starts and ends. Knows nothing of models, adapters or routes: `assemble` builds
those.
"""

import argparse
import asyncio
import contextlib
import logging
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from types import FrameType
from typing import Any, Protocol

import uvicorn

from server.cli.command import Command, quieten_libraries, say
from server.cli.flags import add_settings
from server.ground import config
from server.ground.config import Settings
from server.ground.errors import StartupRefused
from server.ground.heap import keep_one_arena

DRAIN_TIMEOUT_S = 30
# Longer than clients keep an idle connection (httpx 5 s, proxies 60 s): who closes first must not be the server, or a
# request that is just being sent meets a reset.
_KEEP_ALIVE_S = 75
_LAST_WORDS_S = 2  # of the above: what aborted answers have to tell their clients so


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


def _serve(arguments: argparse.Namespace, _: Sequence[str]) -> int:
    keep_one_arena()  # before anything starts a thread
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
    quieten_libraries()


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
            self._end(0)
            say("aborting what is still running")
        else:
            self.should_exit = True
            # Before it is said: a second signal interrupts this one where it stands.
            self._end(DRAIN_TIMEOUT_S - _LAST_WORDS_S)
            say(f"finishing what is running, at most {DRAIN_TIMEOUT_S} s; a second signal aborts it")

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
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=DRAIN_TIMEOUT_S,
    )
    serving = _Uvicorn(configuration, server.banner(), server.drain)
    serving.run(sockets=[listener])
    return 0 if serving.started else 1


SERVE = Command("start the server", add_settings, _serve)

"""`graft serve`: the listening socket, signals, and the life of the serving process.

Owns what is printed while a server starts and ends. Knows nothing of models, adapters or routes: `assemble` builds
those.
"""

import argparse
import asyncio
import contextlib
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from logging.handlers import WatchedFileHandler
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import uvicorn

from server.adapters import audit
from server.api.connections import Patience, watched
from server.cli.command import Command, quieten_libraries, say
from server.cli.flags import add_settings
from server.cli.logs import configure_logging
from server.cli.open_files import room_for
from server.ground import config
from server.ground.config import Settings
from server.ground.errors import StartupRefused
from server.ground.heap import keep_one_arena, set_apart_what_stays

# Longer than clients keep an idle connection (httpx 5 s, proxies 60 s): who closes first must not be the server, or a
# request that is just being sent meets a reset.
_KEEP_ALIVE_S = 75
_MAX_WAITING = 2048  # connections that the system keeps until they are accepted; it may allow fewer
_LAST_WORDS_S = 2  # of --drain-timeout, at most half: what aborted answers have to tell their clients so
_HEARTBEAT_S = 0.25  # between two looks at whether the server is alive
_LOST_S = 15.0  # then a process that is lost ends whatever else hangs
EXIT_LOST = 1  # the process cannot answer any more, and who watches it should start another


class Served(Protocol):
    """What the command needs of an assembled server.

    `drain` takes nothing new, waits for what is in flight and aborts what is left after `timeout_s`, so that its
    clients are told; `close` may block until the engine has stopped. Once it is not alive it never will be again;
    `abandon` then ends what is in flight, and `kill`, which never blocks, what would outlive this process.
    """

    @property
    def app(self) -> Any: ...
    @property
    def is_alive(self) -> bool: ...
    def abandon(self) -> None: ...
    def kill(self) -> None: ...
    def banner(self) -> str: ...
    async def drain(self, timeout_s: float) -> None: ...
    def close(self) -> None: ...


def _serve(arguments: argparse.Namespace, _: Sequence[str]) -> int:
    keep_one_arena()  # before anything starts a thread
    flags = {name: value for name, value in vars(arguments).items() if name != "command"}
    settings = config.load(flags)
    for sentence in config.unknown_variables():
        say(sentence)
    configure_output(settings)
    with bind(settings) as listener:
        # Bound before the base loads, so that a taken port is refused at once, and port 0 has its number.
        settings = settings.model_copy(update={"port": listener.getsockname()[1]})
        say(f"loading {settings.model} ...")
        server = _assembled(settings)
        set_apart_what_stays()
        try:
            return listen(server, settings, listener)
        finally:
            server.close()


def _assembled(settings: Settings) -> "Served":
    # Imported here: it brings torch and transformers, which `--help`, `version` and refusals must not wait for.
    from server.sizing import has_engine_process

    if has_engine_process(settings):
        from server.apart.front import assemble_apart

        return assemble_apart(settings, configure_output)
    from server.assemble import assemble

    return assemble(settings)


def configure_output(settings: Settings) -> None:
    """Has the process log as the settings say. Raises StartupRefused for an audit log that cannot be written."""
    configure_logging(settings.log_level, settings.log_format)
    quieten_libraries()
    if settings.audit_log is not None:
        _write_audit_log(settings.audit_log)


def _write_audit_log(path: Path) -> None:
    """Into a file of its own, whatever --log-level is; a file that is moved away is begun anew."""
    try:
        handler = WatchedFileHandler(path, encoding="utf-8")
    except OSError as error:
        raise StartupRefused(f"--audit-log {path} cannot be written: {error.strerror or error}.") from None
    handler.setFormatter(logging.Formatter("%(message)s"))
    log = logging.getLogger(audit.LOGGER)
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


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

    While it drains it still listens, so that who asks whether it is ready is told no. It ends by itself when the server
    behind it is not alive any more. It also swallows the signal that it has served: uvicorn would raise it again on the
    way out, and SIGTERM's default action would end the process before the engine has been closed.
    """

    def __init__(self, configuration: uvicorn.Config, server: Served, drain_timeout_s: float) -> None:
        super().__init__(configuration)
        self.is_lost = False
        self._server = server
        self._drain_timeout_s = drain_timeout_s
        self._last_words_s = min(_LAST_WORDS_S, drain_timeout_s / 2)
        self._is_ending = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: list[asyncio.Task[None]] = []  # kept, because the loop alone does not keep tasks alive

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        try:
            await super().startup(sockets=sockets)
        except OSError as error:  # another process bound the same address while the base was loading
            host, port = sockets[0].getsockname()[:2] if sockets else ("", 0)
            raise _not_bindable(host, port, error) from None
        for listener in sockets or ():
            listener.listen(_MAX_WAITING)
        if self.started:
            self._tasks.append(asyncio.create_task(self._watch()))
            sys.stdout.write(f"{self._server.banner()}\n")
            sys.stdout.flush()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._is_ending:
            self._end(0)
            say("aborting what is still running")
        else:
            self._is_ending = True
            # Before it is said: a second signal interrupts this one where it stands.
            self._end(self._drain_timeout_s - self._last_words_s)
            say(f"finishing what is running, at most {self._drain_timeout_s:g} s; a second signal aborts it")

    def _end(self, timeout_s: float) -> None:
        """Called by the signal, which may interrupt the loop anywhere: the loop is to begin the ending itself."""
        if self._loop is None:  # before startup there is nothing to end
            self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(
                lambda: self._tasks.append(asyncio.create_task(self._end_within(timeout_s)))
            )

    async def _end_within(self, timeout_s: float) -> None:
        """Have answers end, then give them time to be sent; a connection that is open after that is broken off."""
        deadline = time.monotonic() + timeout_s + self._last_words_s
        with contextlib.suppress(TimeoutError):  # the engine is stuck in a step
            await asyncio.wait_for(self._server.drain(timeout_s), timeout_s + self._last_words_s / 2)
        if timeout_s == 0 or not self.should_exit:
            # What is no generation, an upload say, may take what is left. uvicorn waits for whole seconds.
            self.config.timeout_graceful_shutdown = max(1, round(deadline - time.monotonic()))
            self.should_exit = True
        if timeout_s == 0:
            await self._break_off_within(self._last_words_s / 2)

    async def _break_off_within(self, wait_s: float) -> None:
        state, deadline = self.server_state, time.monotonic() + wait_s
        while state.connections or state.tasks:
            if time.monotonic() > deadline:
                self.force_exit = True
                for connection in list(state.connections):
                    connection.transport.abort()
                return
            await asyncio.sleep(0.02)

    async def _watch(self) -> None:
        """Ends a process that cannot answer any more: after a while in which who asks for its health is told so."""
        while self._server.is_alive:
            await asyncio.sleep(_HEARTBEAT_S)
        self.is_lost = True
        say("the engine has stopped; the process ends, to be started again")
        threading.Thread(target=_end_the_process, args=(self._server,), daemon=True).start()
        self._server.abandon()
        await asyncio.sleep(self._last_words_s)
        self.config.timeout_graceful_shutdown = 1
        self.should_exit = True
        await self._break_off_within(self._last_words_s / 2)


def _end_the_process(server: Served) -> None:
    """Whatever hangs with the engine, a driver or a lock that its thread holds, must not keep the process."""
    time.sleep(_LOST_S)
    server.kill()
    os._exit(EXIT_LOST)


def listen(server: Served, settings: Settings, listener: socket.socket) -> int:
    """Answer requests until a signal comes: then 0. EXIT_LOST if it never started, or is not alive any more."""
    configuration = uvicorn.Config(
        server.app,
        log_config=None,
        log_level="debug" if settings.log_level == "debug" else "warning",
        access_log=settings.log_level == "debug",
        server_header=False,
        # asyncio accepts so many at a time, and fails as often where the process has no descriptor left, each time with
        # an error in the log and a new try a second later: with more than one the loop soon does nothing else. The
        # system is told in `startup` to keep more of them waiting.
        backlog=1,
        timeout_keep_alive=_KEEP_ALIVE_S,
        http=watched(Patience(max_connections=room_for(settings.max_connections))),
        ws="none",
    )
    serving = _Uvicorn(configuration, server, settings.drain_timeout)
    serving.run(sockets=[listener])
    return 0 if serving.started and not serving.is_lost else EXIT_LOST


SERVE = Command("start the server", add_settings, _serve)

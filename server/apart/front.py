"""A server in two processes, as `graft serve` sees it: the routes here, the engine and all that it needs in a child.

Owns the child's start and its end. The child's own is in `child`; what stands for its parts here in `twins`.
"""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass

from fastapi import FastAPI

from server.adapters.rescan import Rescan
from server.apart.calls import Calls
from server.apart.channel import Channel, ChannelClosed
from server.apart.entry import ApartEntry
from server.apart.messages import Ready, Refused, Start
from server.apart.twins import (
    EngineTwin,
    FetchesTwin,
    GrammarsTwin,
    MergesTwin,
    RegistryTwin,
    StateTwin,
    StoreTwin,
)
from server.api.app import create_app
from server.assemble import Figures, banner, key_rescans, keyring_of, load_tokenizer, metrics_of, services_of
from server.ground.config import Settings
from server.ground.errors import GraftError, StartupRefused
from server.model.tokenizer import Tokenizer

# What the child runs: with the folders in which this process finds its packages, whatever has told it of them.
_PROGRAM = "import runpy, sys; sys.path[:] = {path!r}; runpy.run_module('server.apart', run_name='__main__')"
_OWN_VARIABLES = ("GRAFT_API_KEY",)  # which the child has no use for
_SILENCE_S = 30.0  # beyond --step-timeout: a child that says nothing for so long is lost
_FAREWELL_S = 5.0  # for a child that is lost
_LOOK_S = 1.0  # between two looks at whether a child that is to end still lives
_LAST_BREATH_S = 5.0  # from the end of its channel to that of a child which has closed it by ending


def nothing(settings: Settings) -> None:
    """Prepares nothing."""


@dataclass(frozen=True, slots=True)
class ApartServer:
    """A server whose engine is another process."""

    app: FastAPI
    settings: Settings
    figures: Figures
    child: subprocess.Popen[bytes]
    channel: Channel
    calls: Calls
    entry: ApartEntry
    tokenizer: Tokenizer
    rescans: tuple[Rescan, ...]  # of the file of keys

    def banner(self) -> str:
        """What is loaded, the memory it takes, the address, and a line to try it."""
        return banner(self.settings, self.figures)

    async def drain(self, timeout_s: float) -> None:
        """Accepts nothing new and waits for what is in flight; what is left after `timeout_s` is aborted."""
        with suppress(GraftError):  # the child is lost: nothing is in flight
            await self.entry.drain(timeout_s)

    @property
    def is_alive(self) -> bool:
        """Whether requests can still be answered; a process whose server is not must end."""
        return self.calls.fault is None

    def abandon(self) -> None:
        """Tells those who wait for a server that is not alive."""
        self.entry.abandon(self.calls.fault or "it was given up")

    def kill(self) -> None:
        """Ends the child by force, whatever else hangs: this process is about to end likewise."""
        self.child.kill()

    def close(self) -> None:
        """Ends the child, and every thread here; what is in flight fails. Blocks until they are gone."""
        for rescan in self.rescans:
            rescan.close()
        self.calls.end()
        while self.is_alive and self.child.poll() is None:  # one that says nothing any more is lost, now too
            with suppress(subprocess.TimeoutExpired):
                self.child.wait(_LOOK_S)
        _end(self.child, self.channel)
        self.calls.close()
        self.entry.close()
        self.tokenizer.close()


def assemble_apart(settings: Settings, prepare: Callable[[Settings], None] = nothing) -> ApartServer:
    """Has a child load the base, and builds what the routes need here.

    `prepare`, a function of a module, is called in the child before it loads: the log's set-up. Raises StartupRefused
    with a sentence that says what to change.
    """
    keyring = keyring_of(settings)
    with ExitStack() as on_failure:
        child, channel, deltas = _spawned(on_failure)
        ready = _started(child, channel, settings, prepare)
        tokenizer = load_tokenizer(settings, ready.eos_ids)
        on_failure.callback(tokenizer.close)
        calls = Calls(channel, lambda: _fate(child), settings.step_timeout + _SILENCE_S)
        entry, metrics = ApartEntry(deltas), metrics_of(settings, ready.base.name, "http")
        metrics.include(lambda: child.pid)
        services = services_of(
            settings,
            keyring,
            engine=EngineTwin(calls, entry, ready),
            entry=entry,
            registry=RegistryTwin(calls, ready),
            store=StoreTwin(calls),
            merges=MergesTwin(calls),
            fetches=FetchesTwin(calls),
            tokenizer=tokenizer,
            grammars=GrammarsTwin(calls),
            base=ready.base,
            metrics=metrics,
            snapshot=StateTwin(calls, ready.snapshot).snapshot,
        )
        app, rescans = create_app(services), tuple(key_rescans(settings, keyring))
        on_failure.pop_all()
    return ApartServer(app, settings, ready.figures, child, channel, calls, entry, tokenizer, rescans)


def _spawned(on_failure: ExitStack) -> tuple[subprocess.Popen[bytes], Channel, socket.socket]:
    """The child, and the ends of its two channels: calls and deltas. `on_failure` ends it."""
    pairs = [socket.socketpair() for _ in range(2)]
    (calls, deltas), theirs = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    for end in (calls, deltas):
        on_failure.callback(end.close)
    try:
        child = subprocess.Popen(
            [sys.executable, "-P", "-c", _PROGRAM.format(path=sys.path), *(str(end.fileno()) for end in theirs)],
            pass_fds=[end.fileno() for end in theirs],
            stdin=subprocess.DEVNULL,
            env={name: value for name, value in os.environ.items() if name not in _OWN_VARIABLES},
        )
    except OSError as error:
        raise StartupRefused(
            f"the engine's process cannot be started ({error.strerror or error}): make room for it, or use "
            f"--engine-process off"
        ) from error
    finally:
        for end in theirs:
            end.close()
    channel = Channel(calls)
    on_failure.callback(_end, child, channel)
    return child, channel, deltas


def _started(
    child: "subprocess.Popen[bytes]", channel: Channel, settings: Settings, prepare: Callable[[Settings], None]
) -> Ready:
    """What the child says when it has loaded. Raises StartupRefused."""
    # Keys and templates stay here: the child has no use for them.
    needed = settings.model_copy(update={"api_key": None, "api_keys": None, "chat_template": None})
    try:
        channel.send(Start(needed, prepare))
        answer = channel.receive()
    except ChannelClosed:
        raise StartupRefused(f"the engine's process has ended while it started: {_fate(child)}") from None
    if isinstance(answer, Refused):
        raise StartupRefused(answer.sentence)
    assert isinstance(answer, Ready)
    return answer


def _fate(child: "subprocess.Popen[bytes]") -> str:
    """What became of a child that has closed its channel."""
    with suppress(subprocess.TimeoutExpired):
        child.wait(_LAST_BREATH_S)
    code = child.returncode
    if code is None:
        return "its process has closed the channel; its log says why"
    if code < 0:
        return f"its process was ended by {signal.Signals(-code).name}"
    return f"its process has ended with exit code {code}; its log says why"


def _end(child: "subprocess.Popen[bytes]", channel: Channel) -> None:
    """Ends a child that is lost, or not wanted any more: without its front it ends by itself, and else by force."""
    channel.close()  # which also frees who waits for it to take something
    try:
        child.wait(_FAREWELL_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()

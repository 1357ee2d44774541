"""The life of the engine's process: it loads, says that it is ready, answers, and ends with its front.

Owns when it begins and how it ends: in good order when it is told to or the front is gone, and by force if that takes
too long in the second case. Knows nothing about what is asked of it.
"""

import asyncio
import logging
import os
import socket
import sys
import threading
import time
from typing import NoReturn

from server.apart.channel import Channel, ChannelClosed, Sender
from server.apart.door import Door
from server.apart.hosted import Hosted, answer_frame
from server.apart.messages import Beat, Call, Close, Ready, Refused, Start
from server.assemble import Works, assemble_works
from server.ground.errors import GraftError
from server.ground.heap import set_apart_what_stays
from server.ground.metrics import Metrics

BEAT_S = 0.25  # between two words to the front that this process lives
_FAREWELL_S = 5.0  # without a front, for an end in good order

_log = logging.getLogger(__name__)


def run(calls: int, deltas: int) -> NoReturn:
    """The whole process, given the descriptors of its ends of the two channels."""
    channel = Channel(_end(calls))
    try:
        start = channel.receive()
        assert isinstance(start, Start)
        code = _Child(channel, _end(deltas), start).run()
    except ChannelClosed:
        code = 1  # the front is gone before it has said anything, or while this loads
    except Exception:
        _log.exception("the engine's process fails")
        code = 1
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads that still wait for a disk, or for a source, keep nobody


def _end(descriptor: int) -> socket.socket:
    end = socket.socket(fileno=descriptor)
    end.set_inheritable(False)
    return end


class _Child:
    def __init__(self, channel: Channel, deltas: socket.socket, start: Start) -> None:
        self._channel = channel
        self._deltas = deltas
        self._start = start
        self._lock = threading.Lock()  # the next three
        self._hosted: Hosted | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_over = False
        self._over = asyncio.Event()
        threading.Thread(target=self._hear, name="calls", daemon=True).start()

    def run(self) -> int:
        """Until the end; the exit code."""
        try:
            self._start.prepare(self._start.settings)
            works = assemble_works(self._start.settings, lambda base: Metrics(side="engine"))
        except GraftError as error:
            self._channel.send(Refused(error.message))
            return 2
        set_apart_what_stays()
        answers = Sender(self._channel, "answers", answer_frame)
        self._hosted = Hosted(works, answers)
        answers.send(_ready(works))
        threading.Thread(target=_beat, args=(works, answers), name="beat", daemon=True).start()
        door = asyncio.run(self._serve(works))
        self._hosted.close()
        works.close()
        door.close()
        answers.close()
        return 0

    async def _serve(self, works: Works) -> Door:
        """Lets sequences in until the end."""
        door = Door(works, Channel(self._deltas))
        with self._lock:
            self._loop = asyncio.get_running_loop()
            if self._is_over:
                self._over.set()
        await self._over.wait()
        with self._lock:
            self._loop = None
        return door

    def _hear(self) -> None:
        """Begins calls, until the front says that all is over or is gone."""
        try:
            while not isinstance(message := self._channel.receive(), Close):
                assert isinstance(message, Call)
                assert self._hosted is not None  # nobody calls before it is ready
                self._hosted.take(message)
        except ChannelClosed:
            _log.warning("the server is gone; its engine's process ends")
            threading.Thread(target=_end_by_force, daemon=True).start()
        except Exception:  # who is not understood is as good as gone
            _log.exception("the server cannot be understood; its engine's process ends")
            threading.Thread(target=_end_by_force, daemon=True).start()
        if self._hosted is None:
            os._exit(1)  # while it loads, nothing is there that could be left behind
        with self._lock:
            self._is_over = True
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._over.set)


def _ready(works: Works) -> Ready:
    return Ready(
        base=works.info,
        eos_ids=works.tokenizer.eos_ids,
        figures=works.figures(),
        snapshot=works.snapshot(()),
        max_versions=works.registry.max_versions,
        is_shared=works.store.is_shared,
    )


def _beat(works: Works, answers: Sender) -> None:
    while True:
        answers.send(Beat(works.is_alive))
        time.sleep(BEAT_S)


def _end_by_force() -> None:
    time.sleep(_FAREWELL_S)
    os._exit(1)

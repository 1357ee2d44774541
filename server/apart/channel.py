"""Frames over one end of a socket pair: values that the two processes exchange, each whole and in order.

Owns the framing: the length of a pickled value as 8 bytes, big-endian, then the value. Both ends are processes of one
server, and nobody else can reach the pair; so what comes is trusted as the server's own memory is. Knows nothing about
what the values mean.
"""

import asyncio
import logging
import pickle
import queue
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

_log = logging.getLogger(__name__)

_LENGTH = struct.Struct(">Q")
_PIECE_BYTES = 1 << 18  # read at once


class ChannelClosed(Exception):
    """The other process has closed its end, or is gone."""


def framed(value: object) -> bytes:
    """A value as it is sent."""
    content = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
    return _LENGTH.pack(len(content)) + content


class Frames:
    """The values in a stream of bytes that arrives in pieces."""

    def __init__(self) -> None:
        self._held = bytearray()

    def values(self, piece: bytes) -> Iterator[Any]:
        """Those that this piece completes."""
        self._held += piece
        while len(self._held) >= _LENGTH.size:
            end = _LENGTH.size + _LENGTH.unpack_from(self._held)[0]
            if len(self._held) < end:
                return
            content = bytes(self._held[_LENGTH.size : end])
            del self._held[:end]
            yield pickle.loads(content)


class Channel:
    """One end, for threads. Sending is for any of them, receiving for one."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._sending = threading.Lock()

    def send(self, value: object) -> None:
        """Returns when the system has taken all of it. Raises ChannelClosed, and what pickling it raises."""
        self.send_frame(framed(value))

    def send_frame(self, frame: bytes) -> None:
        """As `send`, of a value that is `framed` already."""
        try:
            with self._sending:
                self._end.sendall(frame)
        except OSError as error:
            raise ChannelClosed from error

    def receive(self) -> Any:
        """The next value; blocks. Raises ChannelClosed."""
        (length,) = _LENGTH.unpack(self._exactly(_LENGTH.size))
        return pickle.loads(self._exactly(length))

    def _exactly(self, num_bytes: int) -> bytearray:
        content = bytearray(num_bytes)
        rest = memoryview(content)
        while rest:
            try:
                taken = self._end.recv_into(rest, min(len(rest), _PIECE_BYTES))
            except OSError as error:
                raise ChannelClosed from error
            if not taken:
                raise ChannelClosed
            rest = rest[taken:]
        return content

    def close(self) -> None:
        """Ends both directions, also for a thread that receives."""
        with suppress(OSError):  # the other end has gone first
            self._end.shutdown(socket.SHUT_RDWR)
        self._end.close()


class LoopChannel:
    """One end on an event loop, of which nothing waits. For that loop alone; whoever closes the loop closes this."""

    def __init__(self, end: socket.socket, take: Callable[[Any], None], lose: Callable[[], None]) -> None:
        """Made on the running loop. `take` is called with each value that comes, `lose` once when none will."""
        self._loop = asyncio.get_running_loop()
        self._end = end
        self._take = take
        self._lose = lose
        self._frames = Frames()
        self._unsent = bytearray()
        self._is_waiting = False  # to send the rest
        self._is_open = True
        end.setblocking(False)
        self._loop.add_reader(end, self._read)

    def send(self, value: object) -> None:
        """What the system does not take at once is sent later; what nobody is left to receive is dropped."""
        if self._is_open:
            self._unsent += framed(value)
            self._write()

    def close(self) -> None:
        """Hears and sends nothing any more. The socket stays its owner's."""
        self._is_open = False
        if not self._loop.is_closed():
            self._loop.remove_reader(self._end)
            self._loop.remove_writer(self._end)

    def _read(self) -> None:
        try:
            piece = self._end.recv(_PIECE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            piece = b""
        try:
            for value in self._frames.values(piece):
                self._take(value)
        except Exception:  # what follows in the stream cannot be told from it any more
            _log.exception("what the engine's process says cannot be read")
            piece = b""
        if not piece and self._is_open:
            self.close()
            self._lose()

    def _write(self) -> None:
        try:
            del self._unsent[: self._end.send(self._unsent)]
        except BlockingIOError:
            pass
        except OSError:  # the reader hears that the other end has gone
            self._unsent.clear()
        if bool(self._unsent) != self._is_waiting:
            self._is_waiting = not self._is_waiting
            if self._is_waiting:
                self._loop.add_writer(self._end, self._write)
            else:
                self._loop.remove_writer(self._end)


class Sender:
    """Sends in a thread of its own, in order, so that who has something to tell never waits for a full pipe."""

    def __init__(self, channel: Channel, name: str, frame: Callable[[Any], bytes] = framed) -> None:
        """`frame` makes the frame of a value, or its frames, in that thread; it raises nothing."""
        self._channel = channel
        self._frame = frame
        self._waiting: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def send(self, value: object) -> None:
        """Never blocks, from any thread. What nobody is left to receive is dropped."""
        self._waiting.put(value)

    def close(self) -> None:
        """Sends what waits, and ends the thread."""
        self._waiting.put(_LAST)
        self._thread.join()

    def _run(self) -> None:
        is_open = True
        while (value := self._waiting.get()) is not _LAST:
            if is_open:
                try:
                    self._channel.send_frame(self._frame(value))
                except ChannelClosed:
                    is_open = False


_LAST = object()

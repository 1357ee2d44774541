"""Frames over one end of a socket pair: values that the two processes exchange, each whole and in order.

Owns the framing: the length of a pickled value as 8 bytes, big-endian, then the value. Both ends are processes of one
server, and nobody else can reach the pair; so what comes is trusted as the server's own memory is. Knows nothing about
what the values mean.
"""

import pickle
import queue
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

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
        begin = 0
        while len(self._held) - begin >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._held, begin)
            end = begin + _LENGTH.size + length
            if len(self._held) < end:
                break
            with memoryview(self._held) as held:
                value = pickle.loads(held[begin + _LENGTH.size : end])
            begin = end
            yield value
        del self._held[:begin]


class Channel:
    """One end, for threads. Sending is for any of them, receiving for one."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._sending = threading.Lock()

    def send(self, value: object) -> None:
        """Returns when the system has taken all of it. Raises ChannelClosed, and what pickling it raises."""
        frame = framed(value)
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


class Sender:
    """Sends in a thread of its own, in order, so that who has something to tell never waits for a full pipe."""

    def __init__(self, channel: Channel, name: str, made: Callable[[Any], object] = lambda value: value) -> None:
        """`made` turns a value into what is sent, in that thread."""
        self._channel = channel
        self._made = made
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
                    self._channel.send(self._made(value))
                except ChannelClosed:
                    is_open = False


_LAST = object()

"""Frames between two processes: whole, in order, whatever pieces they come in; and an end that is noticed."""

import socket
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.apart.channel import Channel, ChannelClosed, Frames, Sender, framed


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    here, there = (Channel(end) for end in socket.socketpair())
    yield here, there
    here.close()
    there.close()


@given(st.lists(st.binary(max_size=300)), st.integers(1, 100))
def test_pieces_of_any_size_give_the_same_values(sent: list[bytes], piece: int) -> None:
    stream = b"".join(map(framed, sent))
    frames = Frames()
    found = [value for at in range(0, len(stream), piece) for value in frames.values(stream[at : at + piece])]
    assert found == sent


def test_more_than_the_system_holds_is_received(ends: tuple[Channel, Channel]) -> None:
    here, there = ends
    content = bytes(range(256)) * 40_000
    sending = threading.Thread(target=here.send, args=(content,))
    sending.start()
    assert there.receive() == content
    sending.join()


def test_who_hands_over_to_a_sender_waits_for_nobody(ends: tuple[Channel, Channel]) -> None:
    here, there = ends
    sender = Sender(here, "test", lambda value: framed((value, len(value))))
    contents = [bytes([number]) * 1_000_000 for number in range(5)]
    for content in contents:  # far more than the pair holds, and nobody receives yet
        sender.send(content)
    assert [there.receive() for _ in contents] == [(content, len(content)) for content in contents]
    sender.close()


def test_nobody_else_can_reach_the_pair() -> None:
    """It has no name in the network or in a folder, and what this process starts does not inherit it."""
    for end in socket.socketpair():
        with end:
            assert end.family is socket.AF_UNIX
            assert (end.getsockname(), end.getpeername()) == ("", "")
            assert not end.get_inheritable()


def test_the_end_of_the_other_side_is_noticed(ends: tuple[Channel, Channel]) -> None:
    here, there = ends
    there.close()
    with pytest.raises(ChannelClosed):
        here.receive()
    with pytest.raises(ChannelClosed):
        here.send(b"x" * 1_000_000)
    sender = Sender(here, "test")
    sender.send("to nobody")
    sender.close()

"""Servers mark the store that they run on, and what must not meet a server sees the mark."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from server.adapters.store.presence import Presence, is_somebody_present, nobody_present
from server.ground.errors import Conflict, GraftError

# Marks the store, says so, and waits to be killed.
_SERVER = """
import sys
from pathlib import Path
from server.adapters.store.presence import Presence
presence = Presence(Path(sys.argv[1]))
print("present", flush=True)
sys.stdin.read()
"""


def test_a_server_is_seen_for_as_long_as_it_is_there(tmp_path: Path) -> None:
    assert not is_somebody_present(tmp_path)
    presence = Presence(tmp_path)
    assert is_somebody_present(tmp_path)
    presence.close()
    presence.close()
    assert not is_somebody_present(tmp_path)


def test_many_servers_may_share_a_store(tmp_path: Path) -> None:
    first, second = Presence(tmp_path), Presence(tmp_path)
    first.close()
    assert is_somebody_present(tmp_path)
    second.close()
    assert not is_somebody_present(tmp_path)


def test_a_start_that_failed_leaves_no_mark(tmp_path: Path) -> None:
    presence = Presence(tmp_path)
    assert is_somebody_present(tmp_path)
    del presence
    assert not is_somebody_present(tmp_path)


def test_a_server_of_another_process_is_seen_and_its_crash_ends_that(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _SERVER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "present\n"
        with (
            pytest.raises(Conflict, match=r"A server is running on the store .*: ask it\."),
            nobody_present(tmp_path, "ask it."),
        ):
            pass
        process.kill()
        process.wait()
        assert not is_somebody_present(tmp_path)


def test_a_server_that_starts_waits_for_the_end_of_a_change(tmp_path: Path) -> None:
    marked = threading.Event()

    def start() -> None:
        presence = Presence(tmp_path)
        marked.set()
        presence.close()

    server = threading.Thread(target=start)
    with nobody_present(tmp_path, "ask it."):
        server.start()
        assert not marked.is_set()  # and it cannot be: the mark is not to be had
    server.join()
    assert marked.is_set()


def test_a_store_that_servers_look_at_again_needs_no_mark() -> None:
    presence = Presence(None)
    assert not is_somebody_present(None)
    with nobody_present(None, "ask it."):
        presence.close()


def test_a_store_that_cannot_be_written_can_be_served_and_not_changed(tmp_path: Path) -> None:
    (tmp_path / ".incoming").write_text("in the way, as a lack of permission would be")
    Presence(tmp_path).close()
    with pytest.raises(GraftError, match="cannot be written"), nobody_present(tmp_path, "ask it."):
        pass

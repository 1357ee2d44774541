"""`--audit-log FILE`: the audit log in a file of its own."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.adapters.audit import LOGGER, note
from server.cli.serve import _write_audit_log
from server.ground.errors import StartupRefused


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    log = logging.getLogger(LOGGER)
    before = log.level, log.propagate, list(log.handlers)
    yield
    for handler in set(log.handlers) - set(before[2]):
        handler.close()
    log.setLevel(before[0])
    log.propagate, log.handlers = before[1], before[2]


def test_lines_go_to_the_file_and_a_moved_one_is_begun_anew(tmp_path: Path) -> None:
    file = tmp_path / "audit.jsonl"
    _write_audit_log(file)
    note("keys", added=["one"])
    file.rename(tmp_path / "old.jsonl")
    note("keys", added=["two"])
    for name, added in (("old.jsonl", "one"), ("audit.jsonl", "two")):
        (line,) = (tmp_path / name).read_text().splitlines()
        assert json.loads(line)["added"] == [added]


def test_a_file_that_cannot_be_written_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(StartupRefused, match="--audit-log"):
        _write_audit_log(tmp_path / "none" / "audit.jsonl")

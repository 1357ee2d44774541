"""The log's lines: for people, or an object each for machines."""

import json
import logging
import sys

from server.cli.logs import JsonLines


def record(message: str, *arguments: object, **more: object) -> logging.LogRecord:
    made = logging.LogRecord("server.api", logging.INFO, __file__, 1, message, arguments, None)
    made.__dict__.update(more)
    return made


def test_a_line_is_one_object_with_the_records_own_fields() -> None:
    made = record("request %s", "r1", fields={"request_id": "r1", "seconds": 0.25}, created=0.0, msecs=7.0)
    line = JsonLines().format(made)
    assert json.loads(line) == {
        "time": "1970-01-01T00:00:00.007Z",
        "level": "info",
        "logger": "server.api",
        "message": "request r1",
        "request_id": "r1",
        "seconds": 0.25,
    }


def test_nothing_that_is_logged_can_end_a_line_or_break_it() -> None:
    line = JsonLines().format(record('half "a\nline\u2028\ud800'))
    assert line.isascii()
    assert "\n" not in line
    assert json.loads(line)["message"] == 'half "a\nline\u2028\ud800'


def test_a_traceback_is_in_its_line() -> None:
    try:
        raise ZeroDivisionError("a defect")
    except ZeroDivisionError:
        line = JsonLines().format(record("it failed", exc_info=sys.exc_info()))
    assert "ZeroDivisionError: a defect" in json.loads(line)["exception"]
    assert "\n" not in line

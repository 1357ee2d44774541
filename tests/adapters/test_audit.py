"""The audit log: one line for each change, with who asked for it and how it ended."""

import json
import logging

import pytest

from server.adapters.asker import Asker, ask_as
from server.adapters.audit import LOGGER, note, noted
from server.ground.errors import Conflict


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, LOGGER)
    return caplog


def written(lines: pytest.LogCaptureFixture) -> list[dict[str, object]]:
    return [json.loads(record.message) for record in lines.records if record.name == LOGGER]


async def test_a_line_has_who_what_and_how_it_ended(lines: pytest.LogCaptureFixture) -> None:
    ask_as(Asker(who="acme-ci", owner="acme", request_id="req_1"))
    with noted("register", "legal", source=None) as facts:
        facts["version"] = "d" * 64
    with pytest.raises(Conflict), noted("delete", "legal"):
        raise Conflict("no")
    with pytest.raises(KeyError), noted("pin", "legal"):
        raise KeyError
    note("keys", added=["x"])
    common = {"who": "acme-ci", "owner": "acme", "request_id": "req_1"}
    expected = [
        {"verb": "register", "adapter": "legal", "source": None, "version": "d" * 64, "result": "done"},
        {"verb": "delete", "adapter": "legal", "result": "conflict"},
        {"verb": "pin", "adapter": "legal", "result": "failed"},
        {"verb": "keys", "added": ["x"]},
    ]
    found = written(lines)
    assert all(line.pop("time") for line in found)
    assert found == [{**common, **line} for line in expected]


def test_a_line_is_one_line_and_short_whatever_a_client_sends(lines: pytest.LogCaptureFixture) -> None:
    with noted("delete", 'x\n{"who": "root"}' + "y" * 10_000):
        pass
    (record,) = [record for record in lines.records if record.name == LOGGER]
    assert "\n" not in record.message
    assert len(record.message) < 500

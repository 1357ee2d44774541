"""The audit log: who changed which adapter, when, and how it ended, as one line of JSON each.

Owns the line. It has names, digests and error codes, and nothing of what a request or an adapter says. Knows nothing
about where lines go: the logger "graft.audit" does.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from server.adapters.asker import current_asker
from server.ground.errors import GraftError

LOGGER = "graft.audit"

_log = logging.getLogger(LOGGER)
_MAX_CHARS = 200  # of a name that a client made up


@contextmanager
def noted(verb: str, adapter: str, **facts: Any) -> Iterator[dict[str, Any]]:
    """Writes a line at the end of the block, whatever the end is; what is put into the dict is in it."""
    facts["result"] = "failed"
    try:
        yield facts
        facts["result"] = "done"
    except GraftError as error:
        facts["result"] = error.code
        raise
    finally:
        note(verb, adapter=adapter[:_MAX_CHARS], **facts)


def note(verb: str, **facts: Any) -> None:
    """Writes a line now."""
    asker = current_asker()
    line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "verb": verb, "who": asker.who}
    if asker.owner is not None:
        line["owner"] = asker.owner
    if asker.request_id is not None:
        line["request_id"] = asker.request_id
    _log.info(json.dumps(line | facts))

"""The process's log: lines for people, or one JSON object per line for machines.

Owns the shape of a line. Knows nothing about what is logged: a record's `fields` stand beside its message.
"""

import json
import logging
import sys
import time
from typing import Any, Literal


class JsonLines(logging.Formatter):
    """One object per record: time (UTC), level, logger, message, the record's own fields, and a traceback if any."""

    def format(self, record: logging.LogRecord) -> str:
        second = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{second}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)  # ASCII, so that no byte of a client's can end a line


def configure_logging(level: str, line: Literal["text", "json"]) -> None:
    """Has everything that is logged from `level` on written to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonLines() if line == "json" else text)
    logging.basicConfig(level=level.upper(), handlers=[handler])

"""`graft config`: what a server started here and now would run with, and where each value comes from.

Owns the layout of that. Knows nothing about what the settings are for.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from server.cli.command import Command, say
from server.cli.flags import add_settings, flag_of, shown_value
from server.cli.table import columns
from server.ground import config
from server.ground.config import NamedAdapter, Settings


def _add_flags(parser: argparse.ArgumentParser) -> None:
    add_settings(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def _config(arguments: argparse.Namespace, _: Sequence[str]) -> int:
    given = vars(arguments)
    flags = {name: value for name, value in given.items() if name in Settings.model_fields}
    settings, origins = config.load(flags), config.origins(flags)
    for sentence in config.unknown_variables():
        say(sentence)
    sys.stdout.write(_as_json(settings, origins) if given.get("json") else _as_table(settings, origins))
    return 0


def _as_table(settings: Settings, origins: Mapping[str, str]) -> str:
    rows = [(name, _shown(settings, name), origins[name]) for name in Settings.model_fields]
    return columns(("SETTING", "VALUE", "FROM"), rows)


def _shown(settings: Settings, name: str) -> str:
    """The value; for one that is computed later, the words for what it is computed from."""
    value, words = getattr(settings, name), flag_of(name).default
    return words if value in (None, ()) and words is not None else shown_value(value)


def _as_json(settings: Settings, origins: Mapping[str, str]) -> str:
    """By name, each with value and origin; null is what a server computes when it starts, sizes are in bytes."""
    shown = {name: {"value": _plain(getattr(settings, name)), "from": origin} for name, origin in origins.items()}
    return json.dumps(shown, indent=2) + "\n"


def _plain(value: object) -> Any:
    match value:
        case SecretStr():
            return shown_value(value)
        case Path():
            return str(value)
        case NamedAdapter():
            return {"name": value.name, "path": str(value.path)}
        case tuple():
            return [_plain(item) for item in value]
        case _:
            return value


CONFIG = Command("print the effective settings, and where each comes from", _add_flags, _config)

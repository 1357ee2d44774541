"""`graft doctor`: the machine, what is installed, what a server with these settings would use, and what is missing.

Owns the order, the layout and the exit code: 1 if something is missing that the server needs. Knows nothing about what
is looked at.
"""

import argparse
import itertools
import json
import logging
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from server.cli.command import quieten_libraries, say
from server.cli.flags import add_settings
from server.cli.table import facts
from server.ground import config
from server.ground.config import Settings
from server.ground.errors import StartupRefused


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.ERROR, stream=sys.stderr, format="graft: %(message)s")
    quieten_libraries()
    from server.cli.checkup import State  # brings torch, which `--help` must not wait for

    given = vars(arguments)
    found = list(_findings({name: value for name, value in given.items() if name in Settings.model_fields}))
    missing = [finding for finding in found if finding.state is State.MISSING]
    if given.get("json"):
        _write_json(found, is_ready=not missing)
    else:
        sys.stdout.write(_as_text(found))
        say(f"{len(missing)} missing: see the lines marked with !" if missing else "nothing is missing")
    return 1 if missing else 0


def _findings(flags: dict[str, Any]) -> Iterator[Any]:
    from server.cli import checkup
    from server.cli.checkup import Finding, State

    yield from checkup.machine()
    yield from checkup.versions()
    try:
        settings = config.load(flags)
    except StartupRefused as error:
        for number, sentence in enumerate(error.message.splitlines(), start=1):
            yield Finding("configuration", f"problem {number}", sentence, State.MISSING)
    else:
        yield Finding("configuration", "settings", "good; graft config lists them")
        yield from checkup.base(settings)
        yield from checkup.places(settings)
    for number, sentence in enumerate(config.unknown_variables(), start=1):
        yield Finding("configuration", f"variable {number}", sentence, State.NOTE)
    yield from checkup.extras()


def _as_text(found: Iterable[Any]) -> str:
    """Sections in the order in which they come; what is missing is marked with !, what is only told with -."""
    marks = {"ok": " ", "note": "-", "missing": "!"}
    parts = []
    for section, findings in itertools.groupby(found, key=lambda finding: finding.section):
        lines = [(f"{marks[finding.state]} {finding.name}", finding.text) for finding in findings]
        parts.append(f"{section}\n{facts(lines)}")
    return "\n".join(parts)


def _write_json(found: Iterable[Any], *, is_ready: bool) -> None:
    findings = [
        {"section": finding.section, "name": finding.name, "state": finding.state, "text": finding.text}
        for finding in found
    ]
    sys.stdout.write(json.dumps({"is_ready": is_ready, "findings": findings}, indent=2) + "\n")

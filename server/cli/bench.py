"""`graft bench`: hands its words over to the benchmark, which has a parser of its own."""

import argparse
from collections.abc import Sequence

from server.cli.command import Command, no_flags
from server.ground.errors import StartupRefused


def _bench(_: argparse.Namespace, rest: Sequence[str]) -> int:
    # Imported here: it brings torch.
    try:
        from server.bench import main as measure
    except ModuleNotFoundError as error:
        raise StartupRefused(f"graft bench needs {error.name}: pip install 'graftserve[bench]'") from None
    return measure(rest)


BENCH = Command("measure the engine's throughput on this machine", no_flags, _bench, takes_rest=True)

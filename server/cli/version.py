"""`graft version`: what answers may depend on."""

import argparse
import importlib.metadata
import platform
import sys
from collections.abc import Sequence

from server import __version__
from server.cli.command import Command, no_flags

_VERSIONED = ("torch", "transformers", "bitsandbytes", "peft")


def _version(_: argparse.Namespace, __: Sequence[str]) -> int:
    sys.stdout.write(f"graftserve {__version__}\npython {platform.python_version()}\n")
    for name in _VERSIONED:
        try:
            sys.stdout.write(f"{name} {importlib.metadata.version(name)}\n")
        except importlib.metadata.PackageNotFoundError:
            continue
    return 0


VERSION = Command("print the versions of graftserve and of what it stands on", no_flags, _version)

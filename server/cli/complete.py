"""`graft complete`: a server goes on with a text, and what it writes is printed as it comes.

Owns the command's flags and exit codes. Knows nothing about how answers look.
"""

import argparse
import sys

from server.cli.client import address_of, models
from server.cli.command import say
from server.cli.voices import Voice, add_flags, connected, fields_of, hear
from server.ground.errors import BadRequest

_PATH = "/v1/completions"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", metavar="PROMPT", help="the text to go on with; - reads it from standard input")
    add_flags(parser)
    text = "end where this text would come; may be repeated"
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help=text)


def run(arguments: argparse.Namespace) -> int:
    """0, or 1 if one of several adapters had no answer. Raises GraftError if there is no answer at all."""
    with connected(address_of(arguments)) as (runner, http):
        prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
        if not prompt:
            raise BadRequest("The prompt is empty; give a text to go on with.")
        fields = {**fields_of(arguments), **({"stop": arguments.stop} if arguments.stop else {})}
        names = arguments.adapter or [runner.run(models(http))[0]["id"]]
        voices = [Voice(name, {"model": name, "prompt": prompt, **fields}) for name in names]
        if not hear(runner, http, _PATH, voices):
            raise KeyboardInterrupt
    failed = [voice for voice in voices if voice.error is not None]
    if len(failed) == len(voices) and failed[0].error is not None:
        raise failed[0].error
    for voice in failed:
        say(f"{voice.name}: {voice.error}")
    return 1 if failed else 0

"""`graft batch`: a file of requests answered into a file of answers, by a running server or by an engine started here.

Owns how many requests are under way, which are sent again, what is printed and the exit codes. Knows nothing about what
the requests say.
"""

import argparse
import asyncio
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import httpx

from server.cli.batch_files import Answers, Line, Requests, answer_record, pending
from server.cli.client import (
    Address,
    NoAnswer,
    Silent,
    Unreachable,
    add_url,
    address_of,
    answering,
    as_json,
    connect,
    models,
)
from server.cli.command import say, settings_of
from server.cli.flags import add_some_settings
from server.cli.progress import ProgressBar
from server.ground.config import Settings, flag_name
from server.ground.errors import GraftError, StartupRefused

MAX_CONCURRENCY = 1024
_DEFAULT_CONCURRENCY = 32
_MAX_SILENCE_S = 3600.0  # whole answers come late: the queue before them, and all their tokens
_MAX_ATTEMPTS = 10  # of one request: with the waits below, about two minutes
_FIRST_WAIT_S = 0.5  # doubled after each attempt
_MAX_WAIT_S = 30.0
_MAX_ASKED_WAIT_S = 600.0  # of Retry-After: beyond, the error is the answer
_TRANSIENT = frozenset({429, 502, 503, 504})  # statuses; the header x-should-retry has the last word
# Settings that say nothing where nothing listens.
_OF_A_LISTENER = ("host", "port", "log_level", "engine_process")
_SETTINGS = tuple(name for name in Settings.model_fields if name not in _OF_A_LISTENER)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", type=Path, metavar="INPUT", help="the requests, JSON Lines in OpenAI's batch format")
    text = "the answers; requests that it has answers to already are not sent again"
    parser.add_argument("output", type=Path, metavar="OUTPUT", help=text)
    add_url(parser)
    text = f"requests under way at once (default: {_DEFAULT_CONCURRENCY})"
    parser.add_argument("--concurrency", type=_concurrency, default=_DEFAULT_CONCURRENCY, metavar="N", help=text)
    text = "send those again whose answer is an error"
    parser.add_argument("--retry-errors", action="store_true", default=False, help=text)
    add_some_settings(parser, _SETTINGS)
    parser.epilog = f"Without --url the engine is started here, for this batch. {parser.epilog}"


def _concurrency(text: str) -> int:
    if text.isascii() and text.isdigit() and 1 <= int(text) <= MAX_CONCURRENCY:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to {MAX_CONCURRENCY}")


def run(arguments: argparse.Namespace) -> int:
    """0: every request has the answer that it asked for; 1: some have errors.

    Raises a GraftError when the files do not do, with nothing sent, or when the answers stop coming.
    """
    _refuse_settings_of_another_process(arguments)
    with closing(Requests(arguments.input)) as requests:
        if arguments.output.exists() and arguments.output.samefile(arguments.input):
            raise StartupRefused(f"OUTPUT is INPUT ({arguments.output}); name another file for the answers.")
        with closing(Answers(arguments.output, requests.lines.keys())) as answers:
            if arguments.retry_errors:
                answers.forget(answers.failed)
            return _answer(arguments, requests, answers)


def _refuse_settings_of_another_process(arguments: argparse.Namespace) -> None:
    given = [name for name in _SETTINGS if name in arguments and name not in ("api_key", "config")]
    if arguments.url is not None and given:
        spelled = "--model" if given[0] == "model" else flag_name(given[0])
        raise StartupRefused(f"{spelled} is for an engine started here, and --url names a server: give one of the two.")


def _answer(arguments: argparse.Namespace, requests: Requests, answers: Answers) -> int:
    num_before, started_s = len(answers), time.monotonic()
    todo = pending(requests, answers)
    try:
        if todo:
            with _client(arguments) as http:
                asyncio.run(_send_all(http, requests, answers, todo, arguments.concurrency))
    except (GraftError, KeyboardInterrupt):
        say(
            f"{len(answers):,} of {len(requests.lines):,} requests have answers in {answers.path}; "
            "the same command goes on from there"
        )
        raise
    answers.settle()
    _report(answers, num_before, time.monotonic() - started_s)
    return 1 if answers.failed else 0


def _report(answers: Answers, num_before: int, duration_s: float) -> None:
    num_failed = len(answers.failed)
    before = f", {num_before:,} of them by an earlier run" if num_before else ""
    sys.stdout.write(f"{len(answers):,} requests have answers in {answers.path}{before}; {duration_s:.1f} s\n")
    if num_failed:
        sys.stdout.write(f"{num_failed:,} of the answers are errors; --retry-errors sends those requests again\n")


@contextmanager
def _client(arguments: argparse.Namespace) -> Iterator[httpx.AsyncClient]:
    if arguments.url is not None:
        address = address_of(arguments)
        yield connect(address, max_connections=arguments.concurrency, max_silence_s=_MAX_SILENCE_S)
        return
    settings = settings_of(_SETTINGS, arguments)
    say(f"loading {settings.model} ...")
    # Imported here: it brings torch and transformers, which refusals must not wait for.
    from server.assemble import assemble

    server = assemble(settings)
    try:
        key = settings.api_key.get_secret_value() if settings.api_key else None
        yield connect(Address("http://here", key), transport=httpx.ASGITransport(app=server.app))
    finally:
        server.close()


async def _send_all(
    http: httpx.AsyncClient, requests: Requests, answers: Answers, todo: Sequence[Line], concurrency: int
) -> None:
    progress = ProgressBar("answering")
    queue = iter(todo)

    async def work() -> None:
        for line in queue:
            answers.add(await _answered(http, line, requests.request(line)))
            progress(len(answers), len(requests.lines))

    async with http:
        await models(http)  # before any request: whether a server is there, and takes the key
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(concurrency, len(todo))):
                    group.create_task(work())
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None


async def _answered(http: httpx.AsyncClient, line: Line, request: Mapping[str, Any]) -> dict[str, Any]:
    """The answer to one request, after as many attempts as it takes. Raises Unreachable when there is no server."""
    num_attempts = 0
    while True:
        num_attempts += 1
        is_last = num_attempts == _MAX_ATTEMPTS
        try:
            with answering(http):
                answer = await http.post(request["url"], **as_json(request["body"]))
        except NoAnswer as error:
            if is_last and isinstance(error, Unreachable):
                raise
            if is_last or isinstance(error, Silent):
                return answer_record(line.custom_id, None, {"code": error.code, "message": error.message})
            asked_s = 0.0
        else:
            asked = _asked_wait_s(answer)
            if is_last or asked is None:
                return answer_record(line.custom_id, _response(answer))
            asked_s = asked
        await asyncio.sleep(max(asked_s, _backoff_s(num_attempts)))


def _backoff_s(num_attempts: int) -> float:
    """Longer after each attempt, and never the same for all."""
    return min(_FIRST_WAIT_S * 2.0 ** (num_attempts - 1), _MAX_WAIT_S) * random.uniform(0.75, 1.0)


def _asked_wait_s(answer: httpx.Response) -> float | None:
    """How long an answer asks to wait before the request is sent again; None: it is the answer."""
    verdict = answer.headers.get("x-should-retry", "").lower()
    if verdict == "false" or (verdict != "true" and answer.status_code not in _TRANSIENT):
        return None
    wait_s = _seconds(answer.headers.get("retry-after", ""))
    return wait_s if wait_s <= _MAX_ASKED_WAIT_S else None


def _seconds(retry_after: str) -> float:
    """Of a Retry-After header, a number of seconds or a date; 0 for neither."""
    if retry_after.isascii() and retry_after.isdigit():
        return float(retry_after)
    try:
        return max(parsedate_to_datetime(retry_after).timestamp() - time.time(), 0.0)
    except ValueError:
        return 0.0


def _response(answer: httpx.Response) -> dict[str, Any]:
    try:
        body = answer.json()
    except (ValueError, RecursionError):  # of something that stands before the server
        body = answer.text
    return {"status_code": answer.status_code, "request_id": answer.headers.get("x-request-id", ""), "body": body}

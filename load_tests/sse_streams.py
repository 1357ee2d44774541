"""`python -m load_tests.sse_streams`: what the engine's steps feel of 128 answers that are streamed over HTTP.

The same sequences are read in this process, from the engine itself; by a client in a process of its own, as server-sent
events of this process's HTTP server; and by such a client from a server whose engine has a process of its own
(`--engine-process on`); all in each round. On a CPU a base of real size hides what Python
takes (`--shape llama-25m`); a tiny one (`--shape tiny`) leaves hardly anything else, as on a GPU that computes beside
Python. Beside the time of a step stand the CPU time of the engine's thread and that of the event loop's: one who waits
for Python's lock uses none, and neither does one whose machine is busy. Owns this workload, its client and its report.
"""

import argparse
import asyncio
import json
import os
import random
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import torch
import uvicorn
from fastapi import FastAPI

from load_tests import seen_apart
from load_tests.engine_steps import SeenStep, Streams, decodes, watched
from load_tests.random_base import RandomBase
from load_tests.seen_apart import watched_apart
from server.apart.front import ApartServer, assemble_apart
from server.api.connections import Patience
from server.api.connections import watched as watched_connections
from server.assemble import Server, assemble
from server.bench import machine, save_model
from server.ground.config import Settings, load

SCHEMA = "graftserve-sse-streams/1"
_WORDS = range(8, 500)
_MAX_CONNECTIONS = 4096
_WAYS = ("in_process", "sse", "apart")
_RATIOS = {"sse": "ratio", "apart": "apart_ratio"}  # under which name each way's is told


@dataclass(frozen=True, slots=True)
class Pass:
    """The decode steps of all streams together, and what the event loop's thread did meanwhile."""

    steps: Sequence[SeenStep]
    loop_cpu_s: float
    num_steps: int  # of any kind

    def row(self) -> dict[str, Any]:
        """Milliseconds of a step: medians of its wall time and of the engine thread's CPU time.

        And a mean of the event loop's over all steps, which has taking in the requests in it.
        """
        return {
            "step_ms": 1000 * statistics.median(step.report.duration_s for step in self.steps),
            "engine_cpu_ms": 1000 * statistics.median(step.cpu_s for step in self.steps),
            "loop_cpu_ms": 1000 * self.loop_cpu_s / self.num_steps,
            "num_steps": len(self.steps),
        }


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints a table, and writes JSON where asked. Returns the exit code."""
    arguments = _arguments(argv)
    if arguments.client is not None:
        asyncio.run(_read_again_and_again(arguments))
        return 0
    torch.set_num_threads(1)  # so that what the engine's thread computes is its own time
    with tempfile.TemporaryDirectory() as scratch:
        settings = _settings(Path(scratch), arguments)
        with closing(assemble(settings)) as server, closing(_apart(settings)) as apart:
            rounds = asyncio.run(_rounds(server, apart, arguments))
    summary = summed(rounds)
    print(table(summary))
    if arguments.out is not None:
        told = {name: value for name, value in vars(arguments).items() if name not in ("out", "client")}
        report = {"schema": SCHEMA, "machine": machine("cpu"), "workload": told, **summary, "rounds": rounds}
        arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def _settings(scratch: Path, arguments: argparse.Namespace) -> Settings:
    if arguments.shape == "tiny":
        RandomBase("tiny", torch.device("cpu")).save(scratch / "model")
    else:
        save_model(scratch / "model")
    flags = {
        "model": str(scratch / "model"), "store": str(scratch / "store"), "quantize": "none", "dtype": "bfloat16",
        "device": "cpu", "max_sequences": str(arguments.streams), "prefix_reuse": "off", "kv_memory": "1GiB",
        "served_model_name": "base", "max_context": "1024",
    }  # fmt: skip
    return load(flags)


def _apart(settings: Settings) -> ApartServer:
    """With a store of its own."""
    store = f"{settings.store}-apart"
    return assemble_apart(settings.model_copy(update={"store": Path(store)}), seen_apart.prepare)


async def _rounds(server: Server, apart: ApartServer, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    streams = Streams([None] * arguments.streams, arguments.prompt_tokens, arguments.tokens)
    rounds: list[dict[str, Any]] = []
    async with _client_of(server.app, arguments) as client, _client_of(apart.app, arguments) as other:
        for number in range(arguments.rounds + 1):
            passes = {
                "in_process": await _passed(watched(server.engine), arguments, streams.read(server, number)),
                "sse": await _passed(watched(server.engine), arguments, _told(client, number)),
                "apart": await _passed(watched_apart(apart), arguments, _told(other, number)),
            }
            if number:  # the first one warms up
                rounds.append({way: one.row() for way, one in passes.items()})
            print(f"round {number} of {arguments.rounds}{'' if number else ' (warm-up)'}", file=sys.stderr)
    return rounds


@asynccontextmanager
async def _client_of(app: FastAPI, arguments: argparse.Namespace) -> AsyncIterator[asyncio.subprocess.Process]:
    """A client in a process of its own, of an application that listens here."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        serving = uvicorn.Server(_configuration(app))
        listening = asyncio.create_task(serving.serve(sockets=[listener]))
        client = await _start_client(listener.getsockname()[1], arguments)
        try:
            yield client
        finally:
            if client.returncode is None:
                client.terminate()
            await client.wait()
            serving.should_exit = True
            await listening


def _configuration(app: FastAPI) -> uvicorn.Config:
    """As `graft serve` listens."""
    patience = watched_connections(Patience(max_connections=_MAX_CONNECTIONS))
    return uvicorn.Config(app, log_config=None, log_level="warning", access_log=False, http=patience, ws="none")


async def _passed(
    seeing: AbstractContextManager[Sequence[SeenStep]], arguments: argparse.Namespace, reading: Any
) -> Pass:
    with seeing as steps:
        begun_s = time.thread_time()
        await reading
        loop_cpu_s = time.thread_time() - begun_s
    return Pass(decodes(steps, arguments.streams), loop_cpu_s, len(steps))


async def _start_client(port: int, arguments: argparse.Namespace) -> asyncio.subprocess.Process:
    asked = [
        "--streams", arguments.streams, "--prompt-tokens", arguments.prompt_tokens, "--tokens", arguments.tokens,
        "--niceness", arguments.niceness,
    ]  # fmt: skip
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "load_tests.sse_streams", "--client", f"http://127.0.0.1:{port}", *map(str, asked),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, cwd=Path(__file__).parents[1],
    )  # fmt: skip


async def _told(client: asyncio.subprocess.Process, seed: int) -> None:
    """Has the client ask for all streams, and waits for their ends. Raises RuntimeError if a token is missing."""
    assert client.stdin is not None
    assert client.stdout is not None
    client.stdin.write(f"{seed}\n".encode())
    answer = (await client.stdout.readline()).decode().strip()
    if answer != "all":
        raise RuntimeError(f"the client has not read all that was asked for: {answer or 'it has ended'}")


async def _read_again_and_again(arguments: argparse.Namespace) -> None:
    """The client: for each line with a seed, all streams at once, then a line on how that went."""
    os.nice(arguments.niceness)
    # A connection each: a kept one may be closed by the server while the other way is measured.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector) as session:
        while seed := await asyncio.to_thread(sys.stdin.readline):
            dice = random.Random(int(seed))
            prompts = [dice.choices(_WORDS, k=arguments.prompt_tokens) for _ in range(arguments.streams)]
            counts = await asyncio.gather(*(_read(session, arguments, prompt) for prompt in prompts))
            is_all = all(count >= arguments.tokens for count in counts)
            print("all" if is_all else f"events of each stream: {counts}", flush=True)


async def _read(session: aiohttp.ClientSession, arguments: argparse.Namespace, prompt: list[int]) -> int:
    """The events of one stream."""
    asked = {"model": "base", "prompt": prompt, "max_tokens": arguments.tokens, "temperature": 0, "stream": True}
    num_events = 0
    async with session.post(f"{arguments.client}/v1/completions", json={**asked, "ignore_eos": True}) as answer:
        async for chunk in answer.content.iter_any():
            num_events += chunk.count(b"data: ")
    return num_events


def summed(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians of the rounds; each ratio, to what is read in the process, is the median of the rounds' own."""
    keys = ("step_ms", "engine_cpu_ms", "loop_cpu_ms")
    found: dict[str, Any] = {
        way: {key: statistics.median(one[way][key] for one in rounds) for key in keys} for way in _WAYS
    }
    for way, ratio in _RATIOS.items():
        found[ratio] = {
            key: statistics.median(one[way][key] / one["in_process"][key] for one in rounds) for key in keys
        }
    return found


def table(summary: dict[str, Any]) -> str:
    """Markdown; milliseconds of a step."""
    lines = ["| read | step | engine's thread | event loop's thread |", "|---|---:|---:|---:|"]
    for way in (*_WAYS, *_RATIOS.values()):
        cells = " | ".join(f"{value:.2f}" for value in summary[way].values())
        lines.append(f"| {way.replace('_', ' ')} | {cells} |")
    return "\n".join(lines)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m load_tests.sse_streams", description=main.__doc__)
    parser.add_argument("--shape", choices=["tiny", "llama-25m"], default="tiny")
    parser.add_argument("--streams", type=int, default=128, help="at once")
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128, help="of each answer")
    parser.add_argument(
        "--niceness", type=int, default=19, help="of the client, whose share of the cores is not the server's to lose"
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds measured, after one that warms up")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the report as JSON")
    parser.add_argument("--client", metavar="URL", help=argparse.SUPPRESS)  # what this program starts beside itself
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())

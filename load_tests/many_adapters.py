"""`python -m load_tests.many_adapters`: as many distinct adapters as a load test wants, made from the demo's five.

Owns the variation: every trained tensor gets seeded noise of a hundredth of its own spread, so that contents differ and
answers hardly do. Knows nothing about methods, except that a projection shared by all adapters must stay what it is.
"""

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

STORE = Path(__file__).parents[1] / "adapters_store"
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
KEY_VARIABLE = "OPENAI_API_KEY"
_NOISE = 0.01
# VeRA's random pair belongs to the seed in its config, not to one adapter.
_SHARED = ("vera_A", "vera_B")


class CannotMake(Exception):
    """There is nothing to make adapters from, or no place for them. Says what to do."""


@dataclass(frozen=True, slots=True)
class Made:
    """One adapter as its two files."""

    name: str
    config: bytes
    weights: bytes


def sources(folder: Path) -> list[tuple[str, Path]]:
    """Names and folders of the adapters in `folder`, by name: a store's current versions, or folders of PEFT's.

    Raises CannotMake if there are none.
    """
    found = []
    for entry in sorted(path for path in folder.glob("*") if path.is_dir()):
        content = _content(entry)
        if (content / CONFIG_FILE).is_file() and (content / WEIGHTS_FILE).is_file():
            found.append((entry.name, content))
    if not found:
        raise CannotMake(f"--source {folder}: there is no adapter in it. Name a folder of adapters, or of a store.")
    return found


def _content(entry: Path) -> Path:
    """The folder of a store's current version, or `entry` itself where it is no store's."""
    current = entry / "current.json"
    if not current.is_file():
        return entry
    try:
        return entry / str(json.loads(current.read_text(encoding="utf-8"))["current"])
    except (ValueError, KeyError, TypeError) as error:
        raise CannotMake(f"--source: {current} names no current version. Repair it, or name another folder.") from error


def make(folder: Path, count: int, seed: int) -> Iterator[Made]:
    """`count` adapters, taking the sources in turn; number i is the same for every count. Raises CannotMake."""
    found = sources(folder)
    for index in range(count):
        name, content = found[index % len(found)]
        config = (content / CONFIG_FILE).read_bytes()
        yield Made(f"{name}-{index:04d}", config, _varied(content / WEIGHTS_FILE, seed * 1_000_003 + index))


def _varied(weights: Path, seed: int) -> bytes:
    generator = torch.Generator().manual_seed(seed)
    try:
        with safe_open(weights, "pt") as file:
            tensors = {key: _noisy(key, file.get_tensor(key), generator) for key in sorted(file.keys())}
            return save(tensors, file.metadata())
    except SafetensorError as error:
        raise CannotMake(f"--source: {weights} is no safetensors file ({error}). Name another folder.") from error


def _noisy(key: str, tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if key.endswith(_SHARED) or not tensor.is_floating_point() or not tensor.numel():
        return tensor
    spread = tensor.float().std(correction=0)
    noise = torch.randn(tensor.shape, generator=generator)
    return (tensor.float() + _NOISE * spread * noise).to(tensor.dtype)


def write(adapters: Iterator[Made], out: Path) -> None:
    """A folder for each in `out`, its config last: a server that watches `out` never sees half of one.

    Raises CannotMake for a folder that exists already; those before it stay.
    """
    for adapter in adapters:
        folder = out / adapter.name
        try:
            folder.mkdir(parents=True)
        except FileExistsError as error:
            raise CannotMake(
                f"--out {out}: {adapter.name} is there already. Empty the folder, or name another."
            ) from error
        (folder / WEIGHTS_FILE).write_bytes(adapter.weights)
        (folder / CONFIG_FILE).write_bytes(adapter.config)


async def upload(adapters: Iterator[Made], url: str) -> None:
    """POST each to /v1/adapters, one after the other; the same content again is no error. Raises CannotMake."""
    key = os.environ.get(KEY_VARIABLE)
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        async with aiohttp.ClientSession(headers=headers) as session:
            for adapter in adapters:
                await _upload_one(session, url, adapter)
    except aiohttp.ClientError as error:
        raise CannotMake(f"--url {url}: {error}. Is the server up?") from error


async def _upload_one(session: aiohttp.ClientSession, url: str, adapter: Made) -> None:
    form = aiohttp.FormData()
    form.add_field("name", adapter.name)
    form.add_field("config", adapter.config, filename=CONFIG_FILE)
    form.add_field("weights", adapter.weights, filename=WEIGHTS_FILE)
    async with session.post(f"{url}/v1/adapters", data=form) as answer:
        if answer.status not in (200, 201):
            raise CannotMake(f"the server refused {adapter.name}: {answer.status} {(await answer.text())[:300]}")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 2 if not all could be made."""
    arguments = _parser().parse_args(argv)
    adapters = make(arguments.source, arguments.count, arguments.seed)
    try:
        if arguments.out is not None:
            write(adapters, arguments.out)
        else:
            asyncio.run(upload(adapters, arguments.url.rstrip("/").removesuffix("/v1")))
    except (CannotMake, OSError) as error:
        print(f"many adapters: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.count} adapters in {arguments.out or arguments.url}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m load_tests.many_adapters", description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=_one_or_more, default=50, help="how many (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the variation (default: 0)")
    parser.add_argument(
        "--source", type=Path, default=STORE, metavar="DIR", help="made from these (default: the demo's)"
    )
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--out", type=Path, metavar="DIR", help="folders for graft serve --adapters DIR")
    place.add_argument("--url", help="a running graftserve, to which they are uploaded")
    return parser


def _one_or_more(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 1 or more")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())

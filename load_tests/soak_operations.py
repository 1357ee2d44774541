"""What a soak does to a server: one function for each kind of operation, and how often each comes.

Owns the requests and which answers to them are right. An operation knows nothing of the others that run beside it, so
an answer is right if it would be at some moment: an adapter may have been deleted since it was drawn. Knows nothing
about processes, files or when enough is enough.
"""

import asyncio
import io
import json
import random
import tarfile
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from load_tests import events
from load_tests.many_adapters import CONFIG_FILE, WEIGHTS_FILE, Made

NAMES = tuple(f"soak-{number}" for number in range(8))
_MAX_WAIT_S = 20.0  # of unload and pin
_MAX_SHOWN = 300
# Another worker may have deleted, replaced, pinned or filled what this one asks for; 503 is the documented refusal.
_GONE, _IN_USE, _FULL = 404, 409, 503
# What a stream that has begun may end with instead, by the code of its error.
_STREAM_CODES = ("adapter_not_found", "conflict", "overloaded", "invalid_adapter")
_CANNOT_MIX = 400  # of some methods there is no exact sum


class Wrong(Exception):
    """An answer that is not right at any moment. Says which."""


@dataclass(slots=True)
class World:
    """The server that is asked, what it is asked with, and how it went so far."""

    url: str
    base: str  # its name
    contents: Sequence[Made]
    folders: Path | None  # with the contents as PEFT's folders, which the server may read; None where there are none
    session: aiohttp.ClientSession = field(init=False)
    versions: list[str] = field(default_factory=list)  # name@version, as answers have told them
    counts: Counter[str] = field(default_factory=Counter)  # "operation status"

    def note(self, operation: str, what: object) -> None:
        self.counts[f"{operation} {what}"] += 1


Operation = Callable[[World, random.Random], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


async def call(world: World, what: str, method: str, path: str, right: Collection[int], **options: Any) -> Answer:
    """Sends a request and reads the answer. Raises Wrong for a status that is not among the `right` ones."""
    async with world.session.request(method, world.url + path, **options) as response:
        answer = Answer(response.status, await response.read())
    world.note(what, answer.status)
    if answer.status not in right:
        raise Wrong(f"{method} {path}: {answer.status} {answer.body[:_MAX_SHOWN].decode(errors='replace')}")
    return answer


def _adapter(world: World, dice: random.Random) -> str:
    """A name, or a version that there is or was."""
    if world.versions and dice.random() < 0.2:
        return dice.choice(world.versions)
    return dice.choice(NAMES)


def _prompt(dice: random.Random) -> str:
    return " ".join(
        dice.choice(("sea", "old", "boat", "the", "and", "went", "é", "\U0001f30a")) for _ in range(dice.randint(1, 60))
    )


def _body(world: World, dice: random.Random) -> dict[str, Any]:
    """A completion in one of its many forms; half of the time of an adapter."""
    body: dict[str, Any] = {"max_tokens": dice.randint(1, 24), "n": dice.choice((1, 1, 1, 3))}
    body["temperature"] = dice.choice((0, 0.7, 1.5))
    body |= {"model": world.base} if dice.random() < 0.3 else {"adapter": _adapter(world, dice)}
    for key, value in (("stop", ["the", "\n"]), ("seed", 7), ("ignore_eos", True), ("cache_salt", "mine")):
        if dice.random() < 0.25:
            body[key] = value
    return body


def _as_chat(body: dict[str, Any], prompt: str) -> tuple[str, dict[str, Any]]:
    return "/v1/chat/completions", body | {"messages": [{"role": "user", "content": prompt}]}


def _asked(world: World, dice: random.Random) -> tuple[str, dict[str, Any]]:
    body, prompt = _body(world, dice), _prompt(dice)
    return _as_chat(body, prompt) if dice.random() < 0.5 else ("/v1/completions", body | {"prompt": prompt})


async def complete(world: World, dice: random.Random) -> None:
    path, body = _asked(world, dice)
    answer = await call(world, "complete", "POST", path, (200, _GONE, _IN_USE, _FULL), json=body)
    if answer.status == 200:
        choices = answer.json()["choices"]
        if len(choices) != body["n"] or any(choice["finish_reason"] not in ("stop", "length") for choice in choices):
            raise Wrong(f"{body}: {choices}")


async def complete_a_mix(world: World, dice: random.Random) -> None:
    path, body = _asked(world, dice)
    parts = [{"name": name, "weight": dice.choice((0.3, 1, -0.5))} for name in dice.sample(NAMES, dice.randint(1, 3))]
    body = {key: value for key, value in body.items() if key != "model"} | {"adapter": parts}
    await call(world, "mix", "POST", path, (200, _CANNOT_MIX, _GONE, _IN_USE, _FULL), json=body)


async def stream(world: World, dice: random.Random) -> None:
    path, body = _asked(world, dice)
    async with world.session.post(world.url + path, json=body | {"stream": True}) as response:
        world.note("stream", response.status)
        if response.status != 200:
            await _check_refused(response)
            return
        await _check_stream(world, [data async for data in _events(response)])


async def leave_a_stream(world: World, dice: random.Random) -> None:
    """Hangs up after a few events."""
    path, body = _asked(world, dice)
    num_read = dice.randint(0, 4)
    response = await world.session.post(world.url + path, json=body | {"stream": True, "max_tokens": 60})
    try:
        world.note("leave a stream", response.status)
        if response.status != 200:
            await _check_refused(response)
        elif num_read:
            read = _events(response)
            async for _ in read:
                num_read -= 1
                if not num_read:
                    break
            await read.aclose()
    finally:
        response.close()


async def leave_an_answer(world: World, dice: random.Random) -> None:
    """Hangs up before the answer has come."""
    path, body = _asked(world, dice)
    asking = asyncio.ensure_future(world.session.post(world.url + path, json=body | {"max_tokens": 60}))
    await asyncio.wait({asking}, timeout=dice.random() / 4)
    if asking.done():
        (await asking).close()
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    world.note("leave an answer", "left")


async def ask_for_nobody(world: World, dice: random.Random) -> None:
    path, body = _asked(world, dice)
    name = dice.choice(("soak", "no-such-adapter", f"{dice.choice(NAMES)}@000000000000", "\ud7ff", "x" * 500))
    body.pop("model", None)
    # 503: a name that is just being fetched for the first time has no versions yet.
    await call(world, "ask for nobody", "POST", path, (_GONE, _FULL), json=body | {"adapter": name})


async def ask_wrongly(world: World, dice: random.Random) -> None:
    path, body = _asked(world, dice)
    wrong = dice.choice(
        ({"temperature": -1}, {"n": 0}, {"max_tokens": -3}, {"stop": [""]}, {"seed": "x"}, {"top_p": 7})
    )
    await call(world, "ask wrongly", "POST", path, (400,), json=body | wrong)


async def _events(response: aiohttp.ClientResponse) -> AsyncGenerator[str, None]:
    parser = events.EventParser()
    async for part in response.content.iter_any():
        for data in parser.feed(part):
            yield data


async def _check_refused(response: aiohttp.ClientResponse) -> None:
    text = (await response.read())[:_MAX_SHOWN].decode(errors="replace")
    if response.status not in (_GONE, _IN_USE, _FULL):
        raise Wrong(f"a stream: {response.status} {text}")


async def _check_stream(world: World, told: Sequence[str]) -> None:
    """A stream ends with [DONE], after an answer or an error of its own."""
    if not told or told[-1] != events.DONE:
        raise Wrong(f"a stream ended with {told[-1:]!r}")
    for data in told[:-1]:
        error = json.loads(data).get("error")
        if error is not None:
            world.note("stream ended with", error.get("code"))
            if error.get("code") not in _STREAM_CODES:
                raise Wrong(f"a stream ended with {data[:_MAX_SHOWN]}")


# Adapters


def _form(name: str, content: Made) -> aiohttp.FormData:
    form = aiohttp.FormData()
    form.add_field("name", name)
    form.add_field("config", content.config, filename=CONFIG_FILE)
    form.add_field("weights", content.weights, filename=WEIGHTS_FILE)
    return form


def _tar(content: Made) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, data in ((CONFIG_FILE, content.config), (WEIGHTS_FILE, content.weights)):
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return packed.getvalue()


def _learn(world: World, answer: Answer) -> None:
    """Remembers versions, the older of them as well: they must be found or not found, and never break anything."""
    if answer.status in (200, 201):
        told = answer.json()
        world.versions.append(f"{told['name']}@{told['version'][:12]}")
        del world.versions[:-32]


async def upload(world: World, dice: random.Random) -> None:
    form, query = _form(dice.choice(NAMES), dice.choice(world.contents)), {"replace": dice.choice(("true", "false"))}
    right = (200, 201, _IN_USE, _FULL)
    _learn(world, await call(world, "upload", "POST", "/v1/adapters", right, data=form, params=query))


async def put(world: World, dice: random.Random) -> None:
    path, data = f"/v1/adapters/{dice.choice(NAMES)}", _tar(dice.choice(world.contents))
    _learn(world, await call(world, "put", "PUT", path, (200, 201, _IN_USE, _FULL), data=data))


async def upload_twice(world: World, dice: random.Random) -> None:
    """The same content at the same time from two clients."""
    name, content = dice.choice(NAMES), dice.choice(world.contents)
    both = [
        call(world, "upload twice", "POST", "/v1/adapters", (200, 201, _FULL), data=_form(name, content),
             params={"replace": "true"})
        for _ in range(2)
    ]  # fmt: skip
    for answer in await asyncio.gather(*both):
        _learn(world, answer)


async def upload_rubbish(world: World, dice: random.Random) -> None:
    content = dice.choice(world.contents)
    half = content.weights[: len(content.weights) // 2]
    for_other = json.dumps(json.loads(content.config) | {"peft_type": "NONE_SUCH"}).encode()
    rubbish = dice.choice((Made("", content.config, half), Made("", for_other, content.weights), Made("", b"{", b"")))
    form = _form(dice.choice(NAMES), rubbish)
    await call(world, "upload rubbish", "POST", "/v1/adapters", (400, _FULL), data=form, params={"replace": "true"})


async def leave_an_upload(world: World, dice: random.Random) -> None:
    """Hangs up in the middle of the body."""
    content = dice.choice(world.contents)

    async def half() -> AsyncGenerator[bytes, None]:
        yield _tar(content)[: len(content.weights) // 2]
        await asyncio.sleep(dice.random() / 10)
        raise ConnectionAbortedError

    try:
        await world.session.put(f"{world.url}/v1/adapters/{dice.choice(NAMES)}", data=half())
    except (ConnectionAbortedError, aiohttp.ClientError):
        world.note("leave an upload", "left")


async def delete(world: World, dice: random.Random) -> None:
    await call(world, "delete", "DELETE", f"/v1/adapters/{dice.choice(NAMES)}", (200, _GONE))


async def move(world: World, dice: random.Random) -> None:
    """Load, unload, pin or unpin."""
    verb, spec = dice.choice(("load", "unload", "pin", "unpin", "unpin")), _adapter(world, dice)
    params = {"max_wait_s": str(_MAX_WAIT_S)} if verb in ("unload", "pin") else {}
    right = (200, _GONE, _IN_USE, _FULL, 400)  # 400: no host memory beside what is pinned
    await call(world, verb, "POST", f"/v1/adapters/{spec}/{verb}", right, params=params)


async def roll_back(world: World, dice: random.Random) -> None:
    path = f"/v1/adapters/{dice.choice(NAMES)}/rollback"
    _learn(world, await call(world, "roll back", "POST", path, (200, _GONE, _IN_USE, _FULL)))


async def merge(world: World, dice: random.Random) -> None:
    inputs = [{"name": name, "weight": 0.5} for name in dice.sample(NAMES, 2)]
    body = {"name": dice.choice(NAMES), "adapters": inputs, "replace": True, "strategy": dice.choice(("linear", "cat"))}
    right = (200, 201, 400, _GONE, _IN_USE, _FULL)  # 400: methods that the strategy does not merge
    _learn(world, await call(world, "merge", "POST", "/v1/adapters/merge", right, json=body))


async def fetch(world: World, dice: random.Random) -> None:
    """From a folder of the server's machine, by its URL."""
    if world.folders is not None:
        source = (world.folders / dice.choice(world.contents).name).as_uri()
        body = {"name": dice.choice(NAMES), "source": source, "replace": True, "wait": dice.random() < 0.7}
        await call(world, "fetch", "POST", "/v1/adapters", (200, 201, 202, _IN_USE, _FULL), json=body)


async def load_as_vllm(world: World, dice: random.Random) -> None:
    if world.folders is not None:
        folder = str(world.folders / dice.choice(world.contents).name)
        body = {"lora_name": dice.choice(NAMES), "lora_path": folder, "load_inplace": dice.random() < 0.5}
        await call(world, "vllm load", "POST", "/v1/load_lora_adapter", (200, 400, _FULL), json=body)


async def unload_as_vllm(world: World, dice: random.Random) -> None:
    body = {"lora_name": dice.choice(NAMES)}
    await call(world, "vllm unload", "POST", "/v1/unload_lora_adapter", (200, 404), json=body)


async def look(world: World, dice: random.Random) -> None:
    name = _adapter(world, dice)
    paths = ("/v1/adapters", "/v1/models", "/metrics", "/health", f"/v1/adapters/{name}", f"/v1/models/{name}")
    await call(world, "look", "GET", dice.choice((*paths, f"/v1/adapters/{dice.choice(NAMES)}/versions")), (200, _GONE))


OPERATIONS: Mapping[Operation, int] = {
    complete: 18,
    stream: 14,
    complete_a_mix: 4,
    leave_a_stream: 6,
    leave_an_answer: 4,
    ask_for_nobody: 3,
    ask_wrongly: 2,
    upload: 9,
    put: 4,
    upload_twice: 2,
    upload_rubbish: 4,
    leave_an_upload: 2,
    delete: 5,
    move: 9,
    roll_back: 3,
    merge: 1,
    fetch: 2,
    load_as_vllm: 2,
    unload_as_vllm: 1,
    look: 5,
}


def drawn(dice: random.Random) -> Operation:
    """An operation, as often as its weight says."""
    return dice.choices(tuple(OPERATIONS), tuple(OPERATIONS.values()))[0]

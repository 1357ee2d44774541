"""A stream says what the whole answer says: text, tokens, log-probabilities, usage and why it ended, for one seed.

Random requests, each sent both ways among others, to a model that breaks characters over tokens. Its numbers are the
same in any batch (see `speaking_model`), so that answers are compared to the bit. What the text must be is also worked
out from the tokens, by Python's own decoder: no half of a character, nothing of a stop string, nothing taken back.
"""

import asyncio
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from server.ground.config import Settings
from tests.api.conftest import Live, serving
from tests.models import EOS_ID, byte_tokenizer
from tests.speaking_model import CHARACTERS, save_speaking_adapter, save_speaking_model

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
TOKENIZER = byte_tokenizer()
MIX = [{"name": "first", "weight": 0.5}, {"name": "second", "weight": 2.0}]
SCHEMA = {
    "type": "object",
    "properties": {"é": {"enum": ["你", "🎉\n"]}, "n": {"type": "integer"}},
    "required": ["é", "n"],
    "additionalProperties": False,
}
SHAPES: list[dict[str, Any]] = [
    {"structured_outputs": {"choice": ["你好 é", "你🎉", "é"]}},
    {"structured_outputs": {"regex": "[aé🎉]{2,6}( 你)*"}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "it", "schema": SCHEMA}}},
]
TAKES = {"type": "object", "properties": {"é": {"enum": ["你", "🎉\n"]}}, "required": ["é"]}
TOOLS = [{"type": "function", "function": {"name": "tell", "parameters": TAKES}}]
CALLS: list[dict[str, Any]] = [
    {"tools": TOOLS, "tool_choice": "required"},
    {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "tell"}}},
]
MAX_AT_ONCE = 24
Body = dict[str, Any]


@pytest.fixture(scope="module")
def speaking(settings: Callable[..., Settings], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """Small blocks and a small cache: prefixes are shared, and sequences preempted, while the answers are compared."""
    folder = tmp_path_factory.mktemp("speaking")
    for seed, name in enumerate(("first", "second")):
        save_speaking_adapter(folder / "adapters" / name, seed)
    model = save_speaking_model(folder / "model")
    sizes = {"block_size": 8, "kv_memory": "192KiB", "max_sequences": 16, "max_batch_tokens": 64, "max_queued": 1024}
    with serving(settings(model=str(model), adapters=folder / "adapters", **sizes)) as live:
        yield live


# Requests


def text(draw: random.Random, max_chars: int) -> str:
    return "".join(draw.choices(CHARACTERS, k=draw.randint(1, max_chars)))


def token_ids(draw: random.Random) -> list[int]:
    """A prompt that may begin and end within a character."""
    ids: list[int] = TOKENIZER.encode(text(draw, 12), add_special_tokens=False)
    return ids[draw.randrange(len(ids)) :][: draw.randint(1, len(ids))]


def stops(draw: random.Random) -> Any:
    """One, or so many pairs that one of them is likely to come, in two or more tokens."""
    pairs = ["".join(draw.choices(CHARACTERS, k=2)) for _ in range(16)]
    return draw.choice([text(draw, 2), [text(draw, 1), text(draw, 4)], pairs, pairs, pairs, [*pairs[1:], "a" * 9]])


def some(draw: random.Random, share: float, **choices: Callable[[], Any]) -> Body:
    """Each field with a probability of `share`."""
    return {name: choose() for name, choose in choices.items() if draw.random() < share}


def shared_fields(draw: random.Random) -> Body:
    def a_byte() -> int:
        ids: list[int] = TOKENIZER.encode(text(draw, 1), add_special_tokens=False)
        return draw.choice(ids)

    penalties = some(
        draw,
        0.15,
        presence_penalty=lambda: draw.uniform(-2, 2),
        frequency_penalty=lambda: draw.uniform(-2, 2),
        repetition_penalty=lambda: draw.uniform(0.5, 2),
        logit_bias=lambda: {str(a_byte()): draw.uniform(-100, 8) for _ in range(3)},
        min_p=lambda: draw.uniform(0, 0.3),
        stop_token_ids=lambda: [a_byte()],
        include_stop_str_in_output=lambda: True,
        skip_special_tokens=lambda: False,
        ignore_eos=lambda: True,
    )
    sampling = some(
        draw,
        0.4,
        n=lambda: draw.randint(1, 3),
        adapter=lambda: draw.choice(["first", "second", MIX, {"name": "second", "weight": -1.0}]),
        top_p=lambda: draw.uniform(0.3, 1),
        top_k=lambda: draw.randint(1, 20),
        temperature=lambda: draw.choice([0, 0.5, 2]),
    )
    max_tokens = draw.randint(1, 20)
    ends = some(draw, 0.6, stop=lambda: stops(draw)) | some(draw, 0.1, min_tokens=lambda: draw.randint(1, max_tokens))
    return {"seed": draw.getrandbits(40), "max_tokens": max_tokens, "return_token_ids": True} | (
        penalties | sampling | ends
    )


def completion(draw: random.Random) -> Body:
    prompt = draw.choice([lambda: text(draw, 12), lambda: token_ids(draw), lambda: [text(draw, 4), text(draw, 8)]])()
    listed = some(draw, 0.4, logprobs=lambda: draw.randint(0, 4), echo=lambda: True)
    shape = draw.choice(SHAPES) if draw.random() < 0.15 else {}
    return {"prompt": prompt} | shared_fields(draw) | listed | shape


def chat(draw: random.Random) -> Body:
    messages = [{"role": "user", "content": text(draw, 12)}]
    if draw.random() < 0.3:
        messages.insert(0, {"role": "system", "content": text(draw, 4)})
    listed = {"logprobs": True, "top_logprobs": draw.randint(0, 4)} if draw.random() < 0.4 else {}
    shape = draw.choice(SHAPES + CALLS) if draw.random() < 0.25 else {}
    return {"messages": messages} | shared_fields(draw) | listed | shape


def request(number: int) -> tuple[str, Body]:
    draw = random.Random(number)
    path, body = (COMPLETIONS, completion(draw)) if draw.random() < 0.6 else (CHAT, chat(draw))
    if body.keys() & {"structured_outputs", "response_format", "tools"}:
        body.pop("ignore_eos", None)  # refused: an answer of a given shape ends where it is whole
    if "tools" in body:
        body["max_tokens"] += 20  # what a call begins with is long
    return path, body


# Answers


@dataclass(frozen=True)
class Answer:
    """What a client has in the end, in one shape for both ways."""

    envelope: Mapping[str, Any]
    usage: Mapping[str, Any]
    choices: Sequence[Mapping[str, Any]]


def of_whole(answer: Mapping[str, Any]) -> Answer:
    return Answer(envelope(answer), counted(answer["usage"]), [flat(choice) for choice in answer["choices"]])


def of_chunks(chunks: Sequence[Mapping[str, Any]]) -> Answer:
    *said, last = chunks
    assert last["choices"] == []
    assert {(chunk["id"], chunk["created"]) for chunk in said} == {(last["id"], last["created"])}
    parts: dict[int, list[Mapping[str, Any]]] = {}
    around = {**envelope(said[0]), **envelope(last)}  # the first has the prompt's tokens, where a chat asks for them
    for chunk in said:
        assert chunk["usage"] is None
        assert envelope(chunk).items() <= around.items()
        for choice in chunk["choices"]:
            parts.setdefault(choice["index"], []).append(flat(choice))
    return Answer(around, counted(last["usage"]), [joined(parts[index]) for index in sorted(parts)])


def envelope(answer: Mapping[str, Any]) -> Body:
    """What does not differ by nature: the object's type ends in .chunk, the id and the time are an answer's own."""
    return {name: answer[name] for name in answer.keys() - {"id", "created", "object", "choices", "usage"}}


def counted(usage: Mapping[str, Any]) -> Body:
    """How much of a prompt was found in the cache depends on what came before."""
    return {name: usage[name] for name in usage.keys() - {"prompt_tokens_details"}}


def flat(choice: Mapping[str, Any]) -> Body:
    """A choice, or part of one, of either kind: chat's message or delta beside the rest."""
    inner = choice.get("message") or choice.get("delta") or {}
    rest = {name: value for name, value in choice.items() if name not in ("message", "delta")}
    said = {name: value for name, value in inner.items() if name not in ("content", "tool_calls")}
    calls = {f"call {call.get('index', at)}": called(call) for at, call in enumerate(inner.get("tool_calls") or ())}
    return rest | said | calls | {"text": said_in(choice)}


def called(call: Mapping[str, Any]) -> Body:
    """A call, or part of one; its id is as new as its answer's."""
    return {**call["function"], "type": call.get("type")}


def said_in(choice: Mapping[str, Any]) -> str:
    if "text" in choice:
        return str(choice["text"])
    return (choice.get("message") or choice["delta"]).get("content") or ""


def joined(parts: Sequence[Mapping[str, Any]]) -> Body:
    """Texts and lists of the parts one after another; of the rest what any part says, once."""
    assert [part["finish_reason"] is not None for part in parts] == [False] * (len(parts) - 1) + [True]
    whole: Body = {}
    for part in parts:
        for name, value in part.items():
            whole[name] = value if whole.get(name) is None else added(name, whole[name], value)
    return whole


def added(name: str, before: Any, value: Any) -> Any:
    if value is None:
        return before
    if name in ("text", "arguments", "reasoning_content") or isinstance(before, list):
        return before + value
    if isinstance(before, dict):  # log-probabilities, or a call, whose later parts bring only more of its arguments
        return before | {key: added(key, before.get(key), item) for key, item in value.items()}
    return before


async def both_ways(http: httpx.AsyncClient, path: str, body: Body) -> tuple[Answer, Answer]:
    streamed = {**body, "stream": True, "stream_options": {"include_usage": True}}
    whole, raw = await asyncio.gather(http.post(path, json=body), http.post(path, json=streamed))
    assert whole.status_code == 200, (body, whole.text)
    assert raw.status_code == 200, (body, raw.text)
    assert raw.text.splitlines() == raw.text.split("\n")[:-1]  # some clients take more than line feeds for line ends
    *events, done, nothing = raw.content.split(b"\n\n")
    assert (done, nothing) == (b"data: [DONE]", b"")
    chunks = [json.loads(event.removeprefix(b"data: ")) for event in events if not event.startswith(b":")]
    return of_whole(whole.json()), of_chunks(chunks)


# What the text must be


def bytes_by_name() -> dict[str, bytes]:
    """The byte that each token stands for, learnt from text; those that are in no text are all alike."""
    every_byte = "".join(map(chr, [*range(0x800), *range(0x800, 0xD800, 0x400), *range(0xE000, 0x110000, 0x1000)]))
    raw = every_byte.encode()
    names = TOKENIZER.tokenize(every_byte)
    return dict.fromkeys(TOKENIZER.get_vocab(), b"\xff") | {
        name: raw[i : i + 1] for i, name in enumerate(names) if name not in TOKENIZER.all_special_tokens
    }


BYTES = bytes_by_name()


def written(ids: Sequence[int], *, shows_special: bool) -> str:
    """The text of tokens, decoded at once."""
    raw = b""
    for name in TOKENIZER.convert_ids_to_tokens(list(ids)):
        is_special = name in TOKENIZER.all_special_tokens
        raw += (name.encode() if shows_special else b"") if is_special else BYTES[name]
    return raw.decode(errors="replace")


def expected_text(body: Body, choice: Mapping[str, Any]) -> str:
    """What the choice's tokens say, less the stop string or the token that ended it."""
    ids, keeps = choice["token_ids"], body.get("include_stop_str_in_output", False)
    ends = {*body.get("stop_token_ids", []), *([] if body.get("ignore_eos") else [EOS_ID])}
    if choice["finish_reason"] == "stop" and ids[-1] in ends and not keeps:
        ids = ids[:-1]
    said = written(ids, shows_special=body.get("skip_special_tokens") is False)
    found = [(said.find(stop) + len(stop), said.find(stop)) for stop in stop_strings(body) if stop in said]
    return said[: min(found)[0 if keeps else 1]] if found else said


def stop_strings(body: Body) -> list[str]:
    stop = body.get("stop", [])
    return [stop] if isinstance(stop, str) else stop


def check_text(body: Body, choice: Mapping[str, Any]) -> None:
    if body.get("min_tokens") and stop_strings(body):
        return  # how early a stop string came cannot be seen in the text
    if "tools" in body:
        return  # what the tokens say is a call, and not text
    if isinstance(body.get("prompt", ""), list) and isinstance(body["prompt"][0], int):
        return  # it may end within a character, which the answer then goes on with
    said = choice["text"]
    if body.get("echo"):
        prompts = [body["prompt"]] if isinstance(body["prompt"], str) else body["prompt"]
        said = said.removeprefix(prompts[choice["index"] // body.get("n", 1)])
    assert said == expected_text(body, choice)


async def check_all(url: str, numbers: Sequence[int]) -> None:
    at_once = asyncio.Semaphore(MAX_AT_ONCE)

    async def check(http: httpx.AsyncClient, number: int) -> None:
        path, body = request(number)
        async with at_once:
            whole, streamed = await both_ways(http, path, body)
        assert streamed == whole, (number, body)
        assert whole.usage["completion_tokens"] == sum(len(choice["token_ids"]) for choice in whole.choices)
        for choice in whole.choices:
            try:
                check_text(body, choice)
            except AssertionError as error:
                raise AssertionError(f"request {number}: {body}") from error

    async with httpx.AsyncClient(base_url=url, timeout=600) as http:
        await asyncio.gather(*(check(http, number) for number in numbers))


async def test_streams_say_what_whole_answers_say(speaking: Live) -> None:
    await check_all(speaking.url, range(60))


@pytest.mark.slow
@pytest.mark.timeout(1800)
async def test_a_thousand_streams_say_what_whole_answers_say(speaking: Live) -> None:
    await check_all(speaking.url, range(1000))

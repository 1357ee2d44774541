"""The prompts file: one prompt per line, or JSONL.

Owns its format, and the sentences that refuse a bad line by its number. Knows nothing about tokens.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from server.drift.request import Prompt, PromptFile
from server.ground.errors import StartupRefused

_JSONL_SUFFIXES = (".jsonl", ".ndjson")
_KEYS = ("prompt", "messages")
_BOOKKEEPING = ("id", "metadata", "user")  # change no answer, so they pass
_FORM = 'a line must be {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}'


def read_prompts(path: Path) -> PromptFile:
    """Reads a whole file. Blank lines are passed over.

    A file is JSONL if its name ends in .jsonl or .ndjson, or if its first line is a JSON object with a prompt or
    messages. Raises StartupRefused for a file that cannot be read or has no prompt, and for a bad line by its number.
    """
    try:
        content = path.expanduser().read_bytes()
    except OSError as error:
        raise StartupRefused(f"--prompts {path} cannot be read: {error.strerror or error}") from error
    lines = list(_lines(path, content))
    if not lines:
        raise StartupRefused(f"--prompts {path} has no prompt; write one per line")
    parse = _from_json if path.suffix.lower() in _JSONL_SUFFIXES or _is_json_prompt(lines[0][1]) else _from_text
    prompts = tuple(parse(path, number, line) for number, line in lines)
    return PromptFile(path, hashlib.sha256(content).hexdigest(), prompts)


def _lines(path: Path, content: bytes) -> Iterator[tuple[int, str]]:
    """(number, line) of the lines that are not blank. Only line feeds end a line: a prompt may hold U+2028."""
    for number, raw in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        try:
            line = raw.removesuffix(b"\r").decode("utf-8")
        except UnicodeDecodeError as error:
            raise _bad(path, number, f"it is not UTF-8 ({error.reason} at byte {error.start + 1})") from None
        if line.strip():
            yield number, line


def _is_json_prompt(line: str) -> bool:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and any(key in value for key in _KEYS)


def _from_text(_: Path, number: int, line: str) -> Prompt:
    return Prompt(number, text=line)


def _from_json(path: Path, number: int, line: str) -> Prompt:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _bad(path, number, f"it is not JSON ({error})") from None
    if not isinstance(value, dict) or sum(key in value for key in _KEYS) != 1:
        raise _bad(path, number, _FORM)
    if unknown := sorted(set(value) - {*_KEYS, *_BOOKKEEPING}):
        raise _bad(path, number, f"{unknown[0]!r} would be passed over; leave it out ({_FORM})")
    if "messages" in value:
        return Prompt(number, messages=_messages(path, number, value["messages"]))
    text = value["prompt"]
    if not isinstance(text, str) or not text:
        raise _bad(path, number, "the prompt must be a text that is not empty")
    _check_encodable(path, number, text)
    return Prompt(number, text=text)


def _messages(path: Path, number: int, value: object) -> tuple[dict[str, Any], ...]:
    if not isinstance(value, list) or not value:
        raise _bad(path, number, f"messages must be a list that is not empty; {_FORM}")
    for message in value:
        is_sound = isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        if not is_sound or set(message) - {"role", "content"}:
            raise _bad(path, number, "each message must have a role and a content, both texts, and nothing else")
        _check_encodable(path, number, message["role"] + message["content"])
    return tuple(value)


def _check_encodable(path: Path, number: int, text: str) -> None:
    """JSON can spell half a surrogate pair, which is no text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _bad(path, number, "it holds half of a surrogate pair, which is no character") from None


def _bad(path: Path, number: int, problem: str) -> StartupRefused:
    return StartupRefused(f"--prompts {path}, line {number}: {problem}")

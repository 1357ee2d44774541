"""`graft keys`: the file of keys looked at and changed.

Owns the words after `graft keys` and what they print. Knows nothing about the server: one that runs reads the file
again by itself.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from server.api.keys.key import Key, Scope, digest_of, new_secret
from server.api.keys.key_file import changing, hash_text, parse_keys, read_text, with_key, without_key, write_text
from server.cli.command import say, settings_of
from server.cli.flags import add_some_settings
from server.cli.table import columns
from server.ground.errors import BadRequest

_SETTINGS = ("api_keys", "config")
_LIMITS = ("requests_per_minute", "concurrent_requests", "tokens_per_minute", "tokens_per_day")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    words = parser.add_subparsers(dest="word", metavar="WORD", required=True)
    add = words.add_parser("add", help="make a key; it is printed once, and the file gets its hash", allow_abbrev=False)
    add.add_argument("name", metavar="NAME", help="name of the key, for logs")
    add.add_argument(
        "--scope", action="append", required=True, choices=[*Scope], help="what it may do; may be repeated"
    )
    add.add_argument("--owner", metavar="OWNER", help="keys of one owner share adapters (default: the key's name)")
    add.add_argument(
        "--adapters",
        action="append",
        metavar="PATTERN",
        help="names that it may use, as 'acme-*'; may be repeated",
    )
    add.add_argument("--source", action="append", metavar="PREFIX", help="where it may fetch from; may be repeated")
    for limit in _LIMITS:
        add.add_argument(f"--{limit.replace('_', '-')}", type=int, metavar="N", help="limit (default: none)")
    add.add_argument("--storage-bytes", metavar="SIZE", help="limit of its owner's adapters (default: none)")
    add.add_argument("--max-adapters", type=int, metavar="N", help="limit of its owner's adapters (default: none)")
    listing = words.add_parser("list", help="show the keys, and never a secret", allow_abbrev=False)
    remove = words.add_parser("remove", help="take a key out", allow_abbrev=False)
    remove.add_argument("name", metavar="NAME", help="name of the key")
    for word in (add, listing, remove):
        add_some_settings(word, _SETTINGS)


def run(arguments: argparse.Namespace) -> int:
    given = argparse.Namespace(**{name: value for name, value in vars(arguments).items() if value is not None})
    path = settings_of(_SETTINGS, given).api_keys
    if path is None:
        raise BadRequest("Name the file of keys: --api-keys FILE, or GRAFT_API_KEYS.")
    return {"add": _add, "list": _list, "remove": _remove}[arguments.word](given, path)


def _add(given: argparse.Namespace, path: Path) -> int:
    secret = new_secret()
    entry = _entry(vars(given), hash_text(digest_of(secret)))
    with changing(path):
        write_text(path, with_key(read_text(path) if path.exists() else "", entry, str(path)))
    say(f"the key {given.name} is in {path}; this is the only time that it is shown")
    sys.stdout.write(f"{secret}\n")
    return 0


def _entry(given: Mapping[str, Any], hashed: str) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": given["name"], "hash": hashed, "scopes": [str(scope) for scope in given["scope"]]}
    entry |= {field: given[field] for field in ("owner", "adapters") if field in given}
    entry |= {"sources": given["source"]} if "source" in given else {}
    limits = {limit: given[limit] for limit in (*_LIMITS, "storage_bytes") if limit in given}
    limits |= {"adapters": given["max_adapters"]} if "max_adapters" in given else {}
    return entry | ({"limits": limits} if limits else {})


def _list(given: argparse.Namespace, path: Path) -> int:
    keys = parse_keys(read_text(path), str(path))
    if keys:
        sys.stdout.write(columns(("NAME", "OWNER", "SCOPES", "ADAPTERS", "SHA-256"), [_row(key) for key in keys]))
    else:
        say(f"{path} has no keys")
    return 0


def _row(key: Key) -> tuple[str, ...]:
    scopes, names = ",".join(sorted(key.scopes)), ",".join(key.adapters) or "none"
    return key.name, "everybody" if key.is_operator else key.owner, scopes, names, key.digest.hex()[:12]


def _remove(given: argparse.Namespace, path: Path) -> int:
    with changing(path):
        write_text(path, without_key(read_text(path), given.name, str(path)))
    say(f"the key {given.name} is out of {path}; servers that use the file refuse it within a second or two")
    return 0

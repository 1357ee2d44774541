"""`graft adapters`: the store looked at and changed without a server.

Owns the words after `graft adapters`, what they print and their exit codes. Knows nothing about tensors: what has to be
judged against a base is judged by `rehearsal`, which is imported when a word needs it.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.adapters.store.adapter_store import AdapterStore
from server.adapters.store.folder_store import Record, StoredVersion
from server.adapters.store.inventory import Damaged, Whole, inventory
from server.adapters.store.open_store import open_store
from server.adapters.store.presence import is_somebody_present, nobody_present
from server.cli.command import Command, quiet_registry, say, settings_of
from server.cli.flags import add_some_settings
from server.cli.table import columns
from server.ground.config import Settings
from server.ground.errors import AdapterNotFound, BadRequest, Conflict, TooLarge

_STORE = ("store", "store_cache", "store_cache_bytes", "config")
_ROOM = ("store_quota", "store_reserve")  # of the store, for what is added
# All that an upload's answer depends on, and where to look for the base.
_BASE = (
    "model", "quantize", "dtype", "device", "served_model_name", "strict_base", "adapter_memory", "host_memory",
    "max_upload_bytes", "keep_versions",
)  # fmt: skip
_SHORT = 12  # digits of a version that people read


@dataclass(frozen=True, slots=True)
class Word:
    """One word after `graft adapters`: its line in the help, the settings that it uses, its flags and what it does."""

    summary: str
    settings: Collection[str]
    add_flags: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, Settings], int]


def _add_words(parser: argparse.ArgumentParser) -> None:
    words = parser.add_subparsers(dest="word", metavar="WORD", required=True)
    for name, word in WORDS.items():
        sub = words.add_parser(
            name, help=word.summary, description=word.summary, argument_default=argparse.SUPPRESS, allow_abbrev=False
        )
        word.add_flags(sub)
        add_some_settings(sub, word.settings)


def _adapters(arguments: argparse.Namespace, _: Sequence[str]) -> int:
    word = WORDS[arguments.word]
    settings = settings_of(word.settings, arguments)
    with quiet_registry():
        return word.run(arguments, settings)


# list


def _list(arguments: argparse.Namespace, settings: Settings) -> int:
    store = open_store(settings, create=False)
    found = inventory(store)
    whole = [entry for entry in found if isinstance(entry, Whole)]
    damaged = [entry for entry in found if isinstance(entry, Damaged)]
    if "json" in arguments:
        print_json({"object": "list", "data": list(map(_as_json, whole)), "damaged": list(map(_damage, damaged))})
        return 0
    if not found:
        say(f"the store {store.location} has no adapters")
        return 0
    rows = [_row(entry.current) for entry in whole] + [(entry.name, "damaged", "", "", "", "") for entry in damaged]
    sys.stdout.write(columns(("NAME", "VERSION", "METHOD", "RANK", "SIZE", "ADDED"), sorted(rows), right=(3, 4)))
    for entry in damaged:
        say(entry.reason)
    return 0


def _row(version: StoredVersion) -> tuple[str, ...]:
    record = version.record
    # Only what was validated when it was stored has a method on record.
    method, rank = record.method or "?", "?" if record.rank is None else str(record.rank)
    size, added = shown_size(record.content_bytes), shown_time(record.created)
    return version.name, version.digest[:_SHORT], method, rank, size, added


def _as_json(entry: Whole) -> dict[str, Any]:
    """As GET /v1/adapters shows it, without what only a running server knows."""
    return recorded(entry.current) | {"versions": [version.digest for version in entry.versions]}


def recorded(version: StoredVersion) -> dict[str, Any]:
    """What the store remembers of a version, in the words of the API."""
    record: Record = version.record
    return {
        "name": version.name,
        "version": version.digest,
        "method": record.method,
        "rank": record.rank,
        "parameters": record.num_parameters,
        "bytes": record.content_bytes,
        "sites": record.num_sites,
        "warnings": list(record.warnings),
        "base_model": record.base_model,
        "base_fingerprint": record.base_fingerprint or record.checked_fingerprint,
        "created": record.created,
        "source": record.source,
        "source_revision": record.source_revision,
    }


def _damage(entry: Damaged) -> dict[str, str]:
    return {"name": entry.name, "folder": str(entry.folder), "reason": entry.reason}


# add


def _add(arguments: argparse.Namespace, settings: Settings) -> int:
    from server.cli.rehearsal import Rehearsal

    store = open_store(settings, create=True)
    rehearsal = Rehearsal(settings, loads_base="load_base" in arguments)
    replaces = "replace" in arguments
    remedy = (
        "it would go on with the old version; upload the new one to it (POST /v1/adapters?replace=true), or stop it."
    )
    with nobody_present(store.root, remedy) if replaces else nullcontext():
        registered = rehearsal.register(store, arguments.path, arguments.name, replace=replaces)
    info = registered.info
    told = "added" if registered.is_new else "is there already"
    sys.stdout.write(f"{info.name} {info.digest[:_SHORT]} {told}\n")
    _tell(info.warnings, rehearsal.caveat)
    if is_somebody_present(store.root):
        say(
            "a server is running on this store: it serves this adapter when it is started again; "
            "POST /v1/adapters takes one while it runs"
        )
    return 0


# verify


def _verify(arguments: argparse.Namespace, settings: Settings) -> int:
    from server.cli.rehearsal import Rehearsal

    rehearsal = Rehearsal(settings, loads_base="load_base" in arguments)
    try:
        info = rehearsal.verify(arguments.path).info
    except (BadRequest, TooLarge) as refusal:
        say(refusal.message)
        return 1
    sys.stdout.write(
        f"{arguments.path} fits the base {rehearsal.base_name!r}: {info.method}, rank {info.rank}, "
        f"{info.num_sites} sites, {info.num_parameters:,} parameters\n"
    )
    _tell(info.warnings, rehearsal.caveat)
    return 0


def _tell(warnings: Sequence[str], caveat: str | None) -> None:
    for warning in warnings:
        say(f"warning: {warning}")
    if caveat is not None:
        say(caveat)


# inspect


def _inspect(arguments: argparse.Namespace, settings: Settings) -> int:
    from server.cli.inspection import inspect
    from server.cli.rehearsal import Rehearsal

    folder, version = _subject(arguments.subject, settings)
    inspected = inspect(folder, Rehearsal(settings, loads_base="load_base" in arguments), version)
    shows_sites = "sites" in arguments
    if "json" in arguments:
        print_json((recorded(version) if version is not None else {}) | inspected.as_json(shows_sites=shows_sites))
    else:
        sys.stdout.write(inspected.as_text(shows_sites=shows_sites))
    return 1 if inspected.refusal is not None else 0


def _subject(subject: str, settings: Settings) -> tuple[Path, StoredVersion | None]:
    """The folder that is meant: of NAME or NAME@VERSION in the store, or a path. A name in the store comes first."""
    if "/" not in subject and settings.has_store:
        store = open_store(settings, create=False)
        version = _stored(store, subject)
        if version is not None:
            with store.reading(version.folder):  # then they are here, as what was read last
                return version.folder, version
    folder = Path(subject).expanduser()
    if folder.is_dir():
        return folder, None
    raise AdapterNotFound(f"{subject!r} is neither an adapter of the store {settings.store} nor a folder.")


def _stored(store: AdapterStore, subject: str) -> StoredVersion | None:
    name, _, prefix = subject.partition("@")
    entry = next((entry for entry in inventory(store) if entry.name == name), None)
    if isinstance(entry, Damaged):
        raise AdapterNotFound(entry.reason)
    if entry is None or not prefix:
        return entry.current if entry is not None else None
    matches = [version for version in entry.versions if version.digest.startswith(prefix)]
    if len(matches) != 1:
        digests = ", ".join(version.digest[:_SHORT] for version in entry.versions)
        raise AdapterNotFound(f"{subject!r} is {len(matches)} versions of {name!r}; it has {digests}.")
    return matches[0]


# remove


def _remove(arguments: argparse.Namespace, settings: Settings) -> int:
    store = open_store(settings, create=False)
    name = arguments.name
    remedy = f"ask it to remove the adapter (DELETE /v1/adapters/{name}), or stop it first."
    with nobody_present(store.root, remedy):
        for entry in inventory(store):
            if isinstance(entry, Damaged) and entry.name == name:
                raise Conflict(f"{entry.reason} Remove it by hand: {entry.folder}")
        num_versions = len(store.versions(name))
        store.delete(name)
    sys.stdout.write(f"{name} removed ({num_versions} version{'s' if num_versions > 1 else ''})\n")
    return 0


# Words, numbers and times as people read them


def shown_size(num_bytes: int) -> str:
    """Bytes with three or four digits that matter: "980 B", "298.5 KiB", "1.2 GiB"."""
    size, unit = float(num_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1000:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"


def shown_time(created: int) -> str:
    """A Unix time on this machine's clock."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(created))


def print_json(value: object) -> None:
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_load_base(parser: argparse.ArgumentParser) -> None:
    text = "load the base's weights, too: slower, and needs its memory (default: its config alone is read)"
    parser.add_argument("--load-base", action="store_true", help=text)


def _add_path(parser: argparse.ArgumentParser) -> None:
    text = "the adapter's folder, as PEFT's save_pretrained writes it"
    parser.add_argument("path", type=Path, metavar="PATH", help=text)


def _flags_of_add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="the name to serve it under")
    _add_path(parser)
    parser.add_argument("--replace", action="store_true", help="make it a new version of a name that is taken")
    _add_load_base(parser)


def _flags_of_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("subject", metavar="NAME|PATH", help="a name in the store, name@version, or a folder")
    _add_json(parser)
    parser.add_argument("--sites", action="store_true", help="list every site that it edits")
    _add_load_base(parser)


def _flags_of_verify(parser: argparse.ArgumentParser) -> None:
    _add_path(parser)
    _add_load_base(parser)


def _flags_of_remove(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="a name in the store")


WORDS: Mapping[str, Word] = {
    "list": Word("list the adapters of a store", _STORE, _add_json, _list),
    "add": Word(
        "check an adapter as an upload is checked, and add it to a store",
        _STORE + _ROOM + _BASE,
        _flags_of_add,
        _add,
    ),
    "inspect": Word("show what an adapter is and what it takes", _STORE + _BASE, _flags_of_inspect, _inspect),
    "verify": Word("say what an upload would be answered", ("config", *_BASE), _flags_of_verify, _verify),
    "remove": Word("remove an adapter with all its versions from a store", _STORE, _flags_of_remove, _remove),
}
ADAPTERS = Command("look after the adapters of a store without a server", _add_words, _adapters)

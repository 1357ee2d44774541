"""Chat templates that adapters bring along in their folders, where the operator trusts them.

Owns where such a template stands, its limit, and what is kept of the templates that were read. An upload has no file
for it, so that it is adapters read in place that may have one. Knows nothing about conversations.
"""

import json
from collections import OrderedDict
from pathlib import Path

from server.api.services import Services
from server.ground.errors import AdapterNotFound, BadRequest
from server.model.chat_template import ChatTemplate

MAX_BYTES = 256 << 10  # of a template
_MAX_CONFIG_BYTES = 4 << 20  # of a tokenizer_config.json that may have one: some list a whole vocabulary
_TEMPLATE_FILE, _TOKENIZER_FILE = "chat_template.jinja", "tokenizer_config.json"
_MAX_KEPT = 64


class _NotKept:
    """Nothing is known of a file; None is known of one without a template."""


_NOT_KEPT = _NotKept()
_Key = tuple[str, int, int, int]  # path, inode, bytes, mtime_ns


class AdapterTemplates:
    """The templates of adapters. Safe for many threads; calls read the disk."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._kept: OrderedDict[_Key, ChatTemplate | None] = OrderedDict()

    def find(self, spec: str) -> ChatTemplate | None:
        """The template of this adapter, or None: it has none, or there is no such adapter.

        Raises BadRequest for one that is too large or that cannot be read.
        """
        try:
            info = self._services.registry.describe(spec)
        except AdapterNotFound:
            return None  # leasing says so in better words
        return self._read(info.folder, info.name)

    def _read(self, folder: Path, name: str) -> ChatTemplate | None:
        file = _template_file(folder)
        if file is None:
            return None
        try:
            status = file.stat()
            key = (str(file), status.st_ino, status.st_size, status.st_mtime_ns)
            kept = self._kept.get(key, _NOT_KEPT)  # in one step: another thread may drop it at any moment
            return self._load(file, key, name) if isinstance(kept, _NotKept) else kept
        except (OSError, ValueError) as error:
            raise BadRequest(
                f"The chat template of the adapter {name!r} cannot be read: {_reason(error)}.", param="adapter"
            ) from error

    def _load(self, file: Path, key: _Key, name: str) -> ChatTemplate | None:
        text = _text(file)
        template = None if text is None else self._services.tokenizer.template(text, f"the adapter {name}'s")
        self._kept[key] = template
        while len(self._kept) > _MAX_KEPT:
            self._kept.popitem(last=False)
        return template


def use_of_template(services: Services, folder: Path) -> str | None:
    """What becomes of the template in an adapter's folder: "used" or "ignored"; None where it has none."""
    file = _template_file(folder)
    if file is None:
        return None
    try:
        has_one = _text(file) is not None
    except (OSError, ValueError):
        has_one = True  # a request will be told what is wrong with it
    if not has_one:
        return None
    return "used" if services.chat.trusts_adapter_templates else "ignored"


def _template_file(folder: Path) -> Path | None:
    """The file of an adapter's folder that may hold a template."""
    files = (folder / name for name in (_TEMPLATE_FILE, _TOKENIZER_FILE))
    return next((file for file in files if file.is_file()), None)


def _text(file: Path) -> str | None:
    """The template in a file, if there is one. Raises ValueError above the limit, and for what cannot be read."""
    is_template = file.name == _TEMPLATE_FILE
    text = _content(file, MAX_BYTES).decode() if is_template else _in_config(_content(file, _MAX_CONFIG_BYTES))
    if text is not None and len(text) > MAX_BYTES:
        raise ValueError(f"its template has more than {MAX_BYTES} characters")
    return text


def _content(file: Path, max_bytes: int) -> bytes:
    with file.open("rb") as opened:
        content = opened.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"{file.name} has more than {max_bytes} bytes")
    return content


def _in_config(content: bytes) -> str | None:
    try:
        config = json.loads(content)
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None
    text = config.get("chat_template") if isinstance(config, dict) else None
    return text if isinstance(text, str) else None


def _reason(error: OSError | ValueError) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)

"""The manifest of an adapter: what PEFT's files have no place for, as a plain JSON object of bounded size.

Owns what such an object may be, and the two keys of it that are read: the base's fingerprint and the recipe of a merge.
Knows nothing about stores or HTTP; no torch.
"""

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from server.adapters.format.content import MANIFEST_FILE
from server.ground.errors import BadRequest

MAX_MANIFEST_BYTES = 256 * 1024
MAX_MANIFEST_DEPTH = 16  # objects and lists in one another


def check_manifest(folder: Path) -> None:
    """Raises BadRequest, with what is wrong, for a folder whose manifest is not as it must be; none is fine."""
    path = folder / MANIFEST_FILE
    if not path.is_file():
        return
    try:
        manifest = _read(path)
    except _Malformed as error:
        raise _refusal(str(error)) from error
    recipe, fingerprint = manifest.get("recipe"), manifest.get("base_fingerprint")
    if recipe is not None and not isinstance(recipe, dict):
        raise _refusal("its 'recipe' must be an object")
    if fingerprint is not None and not isinstance(fingerprint, str):
        raise _refusal("its 'base_fingerprint' must be a text")


def recipe_of(folder: Path) -> dict[str, Any] | None:
    """The recipe by which a merged adapter was made; None where its manifest has none that can be shown."""
    try:
        recipe = _read(folder / MANIFEST_FILE).get("recipe")
    except (OSError, _Malformed):
        return None
    return recipe if isinstance(recipe, dict) else None


class _Malformed(Exception):
    """A file that is no manifest; the message says why."""


def _read(path: Path) -> dict[str, Any]:
    """A manifest that an answer in JSON can repeat. Raises _Malformed, and OSError where it cannot be read."""
    with path.open("rb") as file:
        content = file.read(MAX_MANIFEST_BYTES + 1)
    if len(content) > MAX_MANIFEST_BYTES:
        raise _Malformed(f"it is larger than {MAX_MANIFEST_BYTES} bytes")
    try:
        manifest = json.loads(content, parse_float=_finite, parse_constant=_no_number, object_pairs_hook=_unique)
        json.dumps(manifest, ensure_ascii=False).encode()  # half of a surrogate pair can be escaped, but not repeated
    except (ValueError, RecursionError) as error:
        raise _Malformed(f"it is not valid JSON ({str(error)[:200]})") from error
    if not isinstance(manifest, dict):
        raise _Malformed("it must be a JSON object")
    if _depth(manifest) > MAX_MANIFEST_DEPTH:
        raise _Malformed(f"it is nested more than {MAX_MANIFEST_DEPTH} deep")
    return manifest


def _refusal(problem: str) -> BadRequest:
    return BadRequest(f"{MANIFEST_FILE}: {problem}. Correct it, or send the adapter without it.", param="manifest")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:40]} is too large")
    return number


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key comes twice")
    return found


def _depth(value: object) -> int:
    """How many objects and lists are in one another."""
    depth, layer = 0, [value]
    while layer := [item for item in layer if isinstance(item, dict | list)]:
        depth += 1
        layer = [inner for item in layer for inner in (item.values() if isinstance(item, dict) else item)]
    return depth

"""The manifest: a plain object of bounded size, whose recipe can be shown."""

import json
from pathlib import Path

import pytest

from server.adapters.format.content import MANIFEST_FILE
from server.adapters.format.manifest import MAX_MANIFEST_BYTES, MAX_MANIFEST_DEPTH, check_manifest, recipe_of
from server.ground.errors import BadRequest


def nested(depth: int) -> str:
    return '{"recipe": ' + "[" * (depth - 1) + "]" * (depth - 1) + "}"


def test_a_recipe_is_read(tmp_path: Path) -> None:
    recipe = {"strategy": "ties", "inputs": [{"name": "é", "weight": 0.5}], "seed": None}
    (tmp_path / MANIFEST_FILE).write_text(json.dumps({"recipe": recipe, "other": [1]}))
    check_manifest(tmp_path)
    assert recipe_of(tmp_path) == recipe


def test_there_need_be_none(tmp_path: Path) -> None:
    check_manifest(tmp_path)
    assert recipe_of(tmp_path) is None
    (tmp_path / MANIFEST_FILE).write_text("{}")
    check_manifest(tmp_path)
    assert recipe_of(tmp_path) is None


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "not valid JSON"),
        ("[]", "must be a JSON object"),
        ("{", "not valid JSON"),
        ('{"a": NaN}', "NaN is no JSON"),
        ('{"a": 1e999}', "too large"),
        ('{"a": ' + "9" * 5000 + "}", "not valid JSON"),
        ('{"a": 1, "a": 2}', "twice"),
        ('{"a": "\\ud800"}', "not valid JSON"),
        ('{"recipe": []}', "'recipe' must be an object"),
        ('{"base_fingerprint": 5}', "'base_fingerprint' must be a text"),
        (nested(MAX_MANIFEST_DEPTH + 1), "nested more than 16 deep"),
        ("[" * 100_000, "not valid JSON"),
        (" " * (MAX_MANIFEST_BYTES + 1), "larger than 262144 bytes"),
    ],
)
def test_what_is_no_plain_object_is_refused_and_never_shown(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / MANIFEST_FILE).write_text(content)
    with pytest.raises(BadRequest, match=f"manifest.json: .*{says}") as refused:
        check_manifest(tmp_path)
    assert refused.value.param == "manifest"
    assert recipe_of(tmp_path) is None


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / MANIFEST_FILE).write_bytes(b'{"a": "\xff"}')
    with pytest.raises(BadRequest):
        check_manifest(tmp_path)


def test_the_deepest_that_is_taken(tmp_path: Path) -> None:
    (tmp_path / MANIFEST_FILE).write_text(nested(MAX_MANIFEST_DEPTH).replace("recipe", "other"))
    check_manifest(tmp_path)

"""The file of keys: what it may say, and that every mistake in it is named."""

import os
from pathlib import Path

import pytest
import yaml

from server.api.keys.key import Limits, Scope, digest_of, new_secret
from server.api.keys.key_file import MAX_FILE_BYTES, changing, parse_keys, read_keys, with_key, without_key, write_text
from server.ground.errors import BadRequest, NotFound, StartupRefused
from tests.api.keys.tenants import entry, secret_of


def mistakes(*entries: object) -> str:
    with pytest.raises(StartupRefused) as refused:
        parse_keys(yaml.safe_dump(list(entries)), "keys.yaml")
    return refused.value.message


def test_a_key_says_who_it_is_and_what_it_may_do() -> None:
    limits = {"requests_per_minute": 3, "storage_bytes": "2GiB", "adapters": 5}
    written = entry("app", ["infer"], owner="acme", adapters=["acme-*"], sources=["hf://acme/"], limits=limits)
    (key,) = parse_keys(yaml.safe_dump([written]), "keys.yaml")
    assert (key.name, key.owner, key.scopes, key.adapters) == ("app", "acme", {Scope.INFER}, ("acme-*",))
    assert key.digest == digest_of(secret_of("app"))
    assert (key.limits.requests_per_minute, key.limits.storage_bytes, key.limits.adapters) == (3, 2 << 30, 5)
    assert key.limits.tokens_per_day is None


def test_a_limit_of_storage_is_the_owners_and_one_of_requests_the_keys() -> None:
    keys = parse_keys(
        yaml.safe_dump(
            [
                entry("app", ["infer"], owner="acme", limits={"requests_per_minute": 3}),
                entry("ci", ["adapters"], owner="acme", limits={"storage_bytes": 900, "tokens_per_day": 7}),
                entry("acme", ["adapters"], limits={"storage_bytes": 700, "adapters": 5, "concurrent_requests": 1}),
                entry("root", ["admin"], owner="acme", limits={"storage_bytes": 1, "adapters": 9}),
                entry("beta", ["adapters"], limits={"adapters": 2}),
            ]
        ),
        "keys.yaml",
    )
    stored = {key.name: (key.limits.storage_bytes, key.limits.adapters) for key in keys}
    assert stored["app"] == stored["ci"] == stored["acme"] == (700, 5), "the smallest that one of them names"
    assert (stored["root"], stored["beta"]) == ((1, 9), (None, 2)), "who stores for another has its own"
    assert [key.limits.of_key for key in keys[:3]] == [
        Limits(requests_per_minute=3), Limits(tokens_per_day=7), Limits(concurrent_requests=1),
    ]  # fmt: skip


def test_what_is_left_out_is_nothing() -> None:
    (key,) = parse_keys(yaml.safe_dump([entry("app", ["infer"])]), "keys.yaml")
    assert (key.owner, key.adapters) == ("app", ())
    (operator,) = parse_keys(yaml.safe_dump([entry("root", ["admin"])]), "keys.yaml")
    assert operator.adapters == ("*",)


def test_every_mistake_is_named_with_its_key() -> None:
    said = mistakes(
        {**entry("a b"), "adapterz": []},
        entry("second", ["root"]),
        entry("third", [], limits={"requests_per_minute": 0, "tokens": 1, "storage_bytes": "lots"}),
        7,
        entry("fifth", adapters=["Acme/*"], sources=["ftp://x"]),
        entry("same"),
        entry("same"),
    )
    for expected in (
        "key 1 ('a b'): name",
        "adapterz is not known here",
        "key 2 ('second'): scopes.0",
        "key 3 ('third'): scopes",
        "limits.requests_per_minute",
        "limits.tokens is not known here; known are requests_per_minute",
        "limits.storage_bytes",
        "key 4: it must have the fields of a key",
        "key 5 ('fifth'): adapters.0",
        "two keys are called 'same'",
        "the keys same, same have one hash",
    ):
        assert expected in said, expected


def test_a_source_that_is_none_is_named() -> None:
    assert "key 1 ('a')" in mistakes(entry("a", sources=["ftp://x"]))


def test_a_key_in_the_place_of_its_hash_is_not_repeated() -> None:
    secret = new_secret()
    said = mistakes({**entry("a"), "hash": secret})
    assert "hash must be sha256:" in said
    assert secret not in said


@pytest.mark.parametrize("text", ["", "keys: 1", "[", "- &a [*a]", "!!python/object/apply:os.system ['true']"])
def test_what_is_no_list_of_keys_is_refused(text: str) -> None:
    with pytest.raises(StartupRefused):
        parse_keys(text, "keys.yaml")


@pytest.mark.parametrize(
    "value",
    ["2026-99-99", "0x_", "!!float x", "!!int x", "!!int ''", "!!bool x", "!!timestamp x", "9" * 5000, r'"\ud800"'],
)
def test_a_value_that_the_reader_of_yaml_chokes_on_is_a_refusal(value: str) -> None:
    with pytest.raises(StartupRefused, match="keys.yaml"):
        parse_keys(f"- name: {value}\n", "keys.yaml")


def test_a_field_that_is_there_twice_is_refused() -> None:
    text = yaml.safe_dump([entry("app", limits={"adapters": 5})])
    with pytest.raises(StartupRefused, match=r"line 1: 'scopes' is there 2 times"):
        parse_keys(text + "  scopes: [admin]\n", "keys.yaml")
    with pytest.raises(StartupRefused, match=r"'adapters' is there 2 times"):
        parse_keys(text.replace("adapters: 5", "adapters: 5\n    adapters: 9"), "keys.yaml")


def test_a_file_that_is_too_large_or_missing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(b"#" * (MAX_FILE_BYTES + 1))
    for name in ("large", "none"):
        with pytest.raises(StartupRefused, match=name):
            read_keys(tmp_path / name)


def test_keys_are_256_random_bits() -> None:
    secrets = {new_secret() for _ in range(100)}
    assert len(secrets) == 100
    assert all(secret.startswith("graft_") and len(secret) == 6 + 43 for secret in secrets)


def test_adding_and_removing_leaves_the_rest_as_it_was_written() -> None:
    text = f"# ours\n{yaml.safe_dump([entry('one')])}# of the night shift\n{yaml.safe_dump([entry('two')])}"
    grown = with_key(text, entry("three"), "keys.yaml")
    assert grown.startswith(text.rstrip("\n"))
    assert [key.name for key in parse_keys(grown, "keys.yaml")] == ["one", "two", "three"]
    left = without_key(grown, "two", "keys.yaml")
    assert [key.name for key in parse_keys(left, "keys.yaml")] == ["one", "three"]
    assert "# ours" in left
    assert without_key(yaml.safe_dump([entry("one")]), "one", "keys.yaml") == "[]\n"
    assert len(parse_keys(with_key("[]\n", entry("one"), "keys.yaml"), "keys.yaml")) == 1


def test_what_cannot_be_added_or_removed_changes_nothing() -> None:
    text = yaml.safe_dump([entry("one"), entry("two")])
    with pytest.raises(BadRequest, match="two keys are called"):
        with_key(text, {**entry("one"), "hash": entry("x")["hash"]}, "keys.yaml")
    with pytest.raises(NotFound):
        without_key(text, "three", "keys.yaml")
    with pytest.raises(BadRequest, match="share a line"):
        without_key(yaml.safe_dump([entry("one"), entry("two")], default_flow_style=True, width=10**6), "two", "k")


def test_a_written_file_is_its_owners_alone(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    write_text(file, "[]\n")
    assert file.stat().st_mode & 0o777 == 0o600
    file.chmod(0o640)
    write_text(file, "[]\n")
    assert file.stat().st_mode & 0o777 == 0o640
    assert [path.name for path in tmp_path.iterdir()] == ["keys.yaml"]
    with pytest.raises(BadRequest, match="cannot be written"), changing(tmp_path / "none" / "keys.yaml"):
        pass
    with pytest.raises(BadRequest, match="cannot be written"):
        write_text(tmp_path / "none" / "keys.yaml", "[]\n")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_written_file_keeps_its_owner(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    write_text(file, "[]\n")
    os.chown(file, 1234, 1235)
    write_text(file, "[]\n\n")
    assert (file.stat().st_uid, file.stat().st_gid) == (1234, 1235)

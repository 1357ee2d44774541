"""The keys in force: found by their secret, and read again when their file changes."""

import errno
import hmac
import json
import logging
from pathlib import Path

import pytest

from server.adapters.audit import LOGGER
from server.api.keys.key import digest_of
from server.api.keys.keyring import SINGLE, Keyring
from server.ground.errors import StartupRefused
from tests.api.keys.tenants import entry, secret_of, write_keys


def found(keyring: Keyring, name: str) -> str | None:
    key = keyring.find(secret_of(name))
    return key.name if key is not None else None


def test_a_key_is_found_by_its_secret_alone(tmp_path: Path) -> None:
    keyring = Keyring(write_keys(tmp_path / "keys.yaml", entry("one"), entry("two")), single="sesame")
    assert found(keyring, "one") == "one"
    assert found(keyring, "two") == "two"
    single = keyring.find("sesame")
    assert single is not None
    assert (single.name, single.is_operator, len(single.scopes)) == (SINGLE, True, 4)
    for wrong in ("", "secret-of-on", "secret-of-one ", "SESAME", entry("one")["hash"]):
        assert keyring.find(wrong) is None
    assert secret_of("one") not in repr(keyring.keys)
    assert "digest" not in repr(keyring.keys)


class Guarded(bytes):
    """Bytes that nothing may compare or look up: both take a time that depends on them."""

    def __eq__(self, other: object) -> bool:
        raise AssertionError("the digest of a secret was compared with ==")

    def __ne__(self, other: object) -> bool:
        raise AssertionError("the digest of a secret was compared with !=")

    def __hash__(self) -> int:
        raise AssertionError("the digest of a secret was looked up as it is")


def test_no_time_of_a_search_depends_on_what_can_be_known_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys lie under a hash with a secret of this process, and what is found there is compared in constant time."""
    file = write_keys(tmp_path / "keys.yaml", entry("one"), entry("two"))
    compared: list[tuple[bytes, bytes]] = []

    def compare_digest(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return real(one, other)

    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", compare_digest)
    monkeypatch.setattr("server.api.keys.keyring.digest_of", lambda secret: Guarded(digest_of(secret)))
    keyring, other = Keyring(file, single="sesame"), Keyring(file, single="sesame")
    assert keyring._keys.keys().isdisjoint(other._keys.keys())
    for secret, is_key in ((secret_of("one"), True), ("sesame", True), ("secret-of-on", False)):
        compared.clear()
        assert (keyring.find(secret) is not None) is is_key
        assert [tuple(map(bytes.hex, pair)) for pair in compared] == [(digest_of(secret).hex(),) * 2] * is_key


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    file = write_keys(tmp_path / "keys.yaml", entry("one"))
    keyring = Keyring(file)
    changes: list[list[str]] = []
    keyring.watch(lambda keys: changes.append([key.name for key in keys]))
    keyring.refresh()
    assert changes == []
    write_keys(file, entry("two"), entry("three"))
    keyring.refresh()
    assert (found(keyring, "one"), found(keyring, "two")) == (None, "two")
    assert changes == [["two", "three"]]


def test_the_audit_log_tells_which_keys_changed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    same = entry("same", adapters=["x-*"], sources=["hf://acme/"], limits={"adapters": 3})
    file = write_keys(tmp_path / "keys.yaml", same, entry("other", sources=["hf://acme/"]), entry("gone"))
    keyring = Keyring(file)
    write_keys(file, entry("new"), entry("other", sources=["hf://beta/"]), same)
    with caplog.at_level(logging.INFO, LOGGER):
        keyring.refresh()
    line = json.loads(caplog.records[-1].message)
    assert (line["added"], line["removed"], line["changed"]) == (["new"], ["gone"], ["other"])


def test_a_broken_file_keeps_the_old_keys_and_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write_keys(tmp_path / "keys.yaml", entry("one"))
    keyring = Keyring(file)
    for broken in ("", "[", "- name: x"):
        file.write_text(broken)
        caplog.clear()
        with caplog.at_level(logging.ERROR):
            keyring.refresh()
            keyring.refresh()
        assert [record.message[:26] for record in caplog.records] == ["the keys stay as they were"]
        assert found(keyring, "one") == "one"
    file.unlink()
    keyring.refresh()
    assert found(keyring, "one") == "one"
    write_keys(file, entry("two"))
    keyring.refresh()
    assert (found(keyring, "one"), found(keyring, "two")) == (None, "two")


def test_a_file_that_cannot_be_opened_is_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_keys(tmp_path / "keys.yaml", entry("one"), entry("leaked"))
    keyring = Keyring(file)
    write_keys(file, entry("one"))

    def refuse(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        keyring.refresh()
        keyring.refresh()
    assert (found(keyring, "leaked"), len(caplog.records)) == ("leaked", 1)
    keyring.refresh()
    assert found(keyring, "leaked") is None


def test_an_empty_list_takes_every_key_away(tmp_path: Path) -> None:
    file = write_keys(tmp_path / "keys.yaml", entry("one"))
    keyring = Keyring(file, single="sesame")
    write_keys(file)
    keyring.refresh()
    assert found(keyring, "one") is None
    assert keyring.find("sesame") is not None


def test_a_server_does_not_start_without_any_key(tmp_path: Path) -> None:
    with pytest.raises(StartupRefused, match="graft keys add"):
        Keyring(write_keys(tmp_path / "keys.yaml"))
    with pytest.raises(StartupRefused, match="cannot be read"):
        Keyring(tmp_path / "none.yaml", single="sesame")

"""`graft keys`: a file of keys from nothing, without a secret in it."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from server.api.keys.key import digest_of
from server.api.keys.key_file import read_keys
from server.cli import main


def words(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["keys", *arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_a_key_is_shown_once_and_stored_as_its_hash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys.yaml"
    limits = ["--requests-per-minute", "60", "--storage-bytes", "2GiB", "--max-adapters", "5"]
    code, secret, _ = words(
        capsys, "add", "app", "--scope", "infer", "--scope", "adapters", "--owner", "acme", "--adapters", "acme-*",
        "--source", "hf://acme/", *limits, "--api-keys", str(file),
    )  # fmt: skip
    assert code == 0
    (key,) = read_keys(file)
    assert key.digest == digest_of(secret.strip())
    assert secret.strip() not in file.read_text()
    assert (key.owner, key.adapters, key.limits.requests_per_minute) == ("acme", ("acme-*",), 60)
    assert (key.limits.storage_bytes, key.limits.adapters) == (2 << 30, 5)
    assert file.stat().st_mode & 0o777 == 0o600
    code, table, _ = words(capsys, "list", "--api-keys", str(file))
    assert code == 0
    assert "acme-*" in table
    assert secret.strip() not in table


def test_keys_are_removed_one_by_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAFT_API_KEYS", str(tmp_path / "keys.yaml"))
    for name in ("one", "two"):
        assert words(capsys, "add", name, "--scope", "infer")[0] == 0
    assert words(capsys, "remove", "one")[0] == 0
    assert [key.name for key in read_keys(tmp_path / "keys.yaml")] == ["two"]
    assert words(capsys, "remove", "two")[0] == 0
    assert yaml.safe_load((tmp_path / "keys.yaml").read_text()) == []
    assert words(capsys, "list") == (0, "", f"graft: {tmp_path / 'keys.yaml'} has no keys\n")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("add", "two words", "--scope", "infer"), "name"),
        (("add", "one", "--scope", "infer"), "two keys are called 'one'"),
        (("add", "new", "--scope", "infer", "--adapters", "A*"), "adapters.0"),
        (("remove", "nobody"), "has no key 'nobody'"),
    ],
)
def test_a_refused_word_leaves_the_file_as_it_was(
    arguments: tuple[str, ...], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "keys.yaml"
    assert words(capsys, "add", "one", "--scope", "infer", "--api-keys", str(file))[0] == 0
    before = file.read_text()
    code, out, error = words(capsys, *arguments, "--api-keys", str(file))
    assert (code, out) == (2, "")
    assert says in error
    assert file.read_text() == before


def test_without_a_file_the_flag_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, error = words(capsys, "list")
    assert code == 2
    assert "--api-keys FILE" in error


def test_changes_at_once_are_all_kept(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    names = {f"key-{number}" for number in range(12)}
    with ThreadPoolExecutor(6) as pool:
        adding = [("keys", "add", name, "--scope", "infer", "--api-keys", str(file)) for name in names]
        assert set(pool.map(main, adding)) == {0}
    assert {key.name for key in read_keys(file)} == names

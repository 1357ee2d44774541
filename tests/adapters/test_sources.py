"""Adapters that are read in place: which folders count, under which names, and when they have changed."""

import logging
import os
from pathlib import Path

import pytest

from server.adapters.format.content import CONFIG_FILE, MANIFEST_FILE, WEIGHTS_FILE
from server.adapters.sources import FolderSource, LocalFolder
from server.adapters.store import folder_store as store
from server.adapters.store.folder_store import folder_digest
from server.ground.errors import StartupRefused
from tests.adapters.folders import write_folder


def test_a_named_folder_serves_under_its_name_with_the_stores_digest(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "Out Of The Way", seed=1)
    [found] = LocalFolder("legal", folder).scan()
    assert (found.name, found.folder, found.base_model) == ("legal", folder, "tiny-base")
    assert found.digest == folder_digest(folder).digest
    assert found.content_bytes == sum((folder / name).stat().st_size for name in (CONFIG_FILE, WEIGHTS_FILE))


def test_a_folders_manifest_says_what_base_it_is_for_and_counts_in_its_version(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "legal", seed=1)
    source = LocalFolder("legal", folder)
    [silent] = source.scan()
    assert silent.base_fingerprint is None
    (folder / MANIFEST_FILE).write_text('{"base_fingerprint": "abc"}', encoding="utf-8")
    [telling] = source.scan()
    assert telling.base_fingerprint == "abc"
    assert telling.digest == folder_digest(folder).digest != silent.digest
    assert not silent.is_intact()


def test_half_of_a_surrogate_pair_in_a_name_can_be_shown(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "legal", seed=1)
    (folder / CONFIG_FILE).write_text(r'{"peft_type": "LORA", "base_model_name_or_path": "x\ud800y"}', encoding="utf-8")
    [found] = LocalFolder("legal", folder).scan()
    assert found.base_model == "x?y"


@pytest.mark.parametrize("argument", ["legal", "legal=", "=", "=/tmp", "Legal=/tmp", "a b=/tmp", "legal=/no/folder"])
def test_a_named_folder_that_cannot_serve_stops_the_start(argument: str) -> None:
    with pytest.raises(StartupRefused, match=f"--adapter {argument}"):
        LocalFolder.parse(argument)


def test_name_and_path_are_parsed(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a=b", seed=1)
    [found] = LocalFolder.parse(f"legal={folder}").scan()
    assert (found.name, found.folder) == ("legal", folder)


def test_a_missing_folder_of_folders_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(StartupRefused, match="--adapters"):
        FolderSource(tmp_path / "none")


def test_sub_folders_with_a_config_are_adapters(tmp_path: Path) -> None:
    write_folder(tmp_path / "legal", seed=1)
    write_folder(tmp_path / "terse", seed=2)
    (tmp_path / "notes").mkdir()
    (tmp_path / "README.md").touch()
    assert [found.name for found in FolderSource(tmp_path).scan()] == ["legal", "terse"]


def test_names_that_cannot_be_are_made_so_or_left_out_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for seed, name in enumerate(["My Adapter (v2)", "ok", "OK", "€€"]):
        write_folder(tmp_path / name, seed)
    source = FolderSource(tmp_path)
    for _ in range(2):
        assert sorted(found.name for found in source.scan()) == ["my-adapter-v2", "ok"]
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 4
    assert any("My Adapter (v2)" in text and "'my-adapter-v2'" in text for text in warnings)
    assert any("€€: its name cannot name an adapter: rename it" in text for text in warnings)
    assert any("/OK: it would serve as 'ok'" in text for text in warnings), "the one that is so called has the name"


def test_an_incomplete_folder_is_left_out_until_it_is_complete(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = write_folder(tmp_path / "legal", seed=1) / WEIGHTS_FILE
    content = weights.read_bytes()
    weights.unlink()
    source = FolderSource(tmp_path)
    assert source.scan() == source.scan() == ()
    assert [WEIGHTS_FILE in record.getMessage() for record in caplog.records] == [True]
    weights.write_bytes(content)
    assert [found.name for found in source.scan()] == ["legal"]


def test_a_sub_folder_that_cannot_be_read_takes_no_other_with_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_folder(tmp_path / "legal", seed=1)
    (tmp_path / "broken").symlink_to("x" * 300)  # no file system has names of this length: every look at it is an error
    source = FolderSource(tmp_path)
    for _ in range(2):
        assert [found.name for found in source.scan()] == ["legal"]
    assert ["broken: it is left out" in text for text in caplog.messages] == [True]


def test_while_the_folder_of_folders_cannot_be_listed_its_adapters_stay(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "all"
    write_folder(root / "legal", seed=1)
    source = FolderSource(root)
    before = source.scan()
    root.rename(tmp_path / "away")
    assert source.scan() == source.scan() == before
    assert ["cannot be read" in text for text in caplog.messages] == [True]
    (tmp_path / "away").rename(root)
    write_folder(root / "terse", seed=2)
    assert [found.name for found in source.scan()] == ["legal", "terse"]


def test_changed_files_are_a_new_version_and_the_old_one_is_no_longer_intact(tmp_path: Path) -> None:
    source = FolderSource(tmp_path)
    write_folder(tmp_path / "legal", seed=1)
    [before] = source.scan()
    assert before.is_intact()
    write_folder(tmp_path / "legal", seed=2)
    assert not before.is_intact()
    [after] = source.scan()
    assert after.is_intact()
    assert after.digest != before.digest
    write_folder(tmp_path / "legal", seed=1)
    assert source.scan()[0].digest == before.digest, "a version is its content, not its dates"
    (tmp_path / "legal" / WEIGHTS_FILE).unlink()
    assert not after.is_intact()
    assert source.scan() == ()


def test_unchanged_files_are_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = []
    monkeypatch.setattr(store.hashlib, "file_digest", _counting(hashed, store.hashlib.file_digest))
    write_folder(tmp_path / "legal", seed=1)
    source = FolderSource(tmp_path)
    assert source.scan() == source.scan()
    assert len(hashed) == 2
    os.utime(tmp_path / "legal" / WEIGHTS_FILE, ns=(1, 1))
    source.scan()
    assert len(hashed) == 4


def test_files_that_change_while_they_are_hashed_wait_for_the_next_scan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_folder(tmp_path / "legal", seed=1)
    source = FolderSource(tmp_path)
    digest_of = folder_digest

    def hash_while_writing(path: Path) -> store.FolderDigest:
        digest = digest_of(path)
        write_folder(folder, seed=2)
        return digest

    monkeypatch.setattr("server.adapters.sources.folder_digest", hash_while_writing)
    with caplog.at_level(logging.WARNING):
        assert source.scan() == ()
    assert "being written" in caplog.text
    monkeypatch.undo()
    assert source.scan()[0].digest == folder_digest(folder).digest


def test_links_are_followed_because_a_hub_cache_is_made_of_them(tmp_path: Path) -> None:
    blobs = write_folder(tmp_path / "blobs", seed=1)
    snapshot = tmp_path / "all" / "legal"
    snapshot.mkdir(parents=True)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (snapshot / name).symlink_to(blobs / name)
    assert FolderSource(tmp_path / "all").scan()[0].digest == folder_digest(blobs).digest


def _counting(calls, function):  # type: ignore[no-untyped-def]
    def counted(*arguments: object) -> object:
        calls.append(arguments)
        return function(*arguments)

    return counted

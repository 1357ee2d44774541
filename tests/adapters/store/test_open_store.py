"""Which store the settings name, and where its cache lies."""

from pathlib import Path

import pytest

from server.adapters.store.folder_store import Store
from server.adapters.store.object_store import ObjectStore
from server.adapters.store.open_store import default_cache, open_store
from server.ground.config import load
from server.ground.errors import StartupRefused

GIB = 1 << 30


def test_a_path_is_a_folder_and_a_url_an_object_store(tmp_path: Path) -> None:
    folder = open_store(load({"model": "m", "store": str(tmp_path / "s3:" / "x")}), create=True)
    assert isinstance(folder, Store)
    assert folder.location == str(tmp_path / "s3:" / "x")
    settings = load({"model": "m", "store": "memory://", "store_cache": str(tmp_path / "cache")})
    objects = open_store(settings, create=True)
    assert isinstance(objects, ObjectStore)
    assert (objects.root, objects.is_shared, objects.location) == (None, True, "memory:")
    assert objects.scan() == ()
    assert (tmp_path / "cache" / "versions").is_dir()


def test_the_settings_of_a_url_are_kept_as_they_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GRAFT_STORE", "s3://bucket/a//b")
    monkeypatch.setenv("GRAFT_STORE_CACHE", "~/cache")
    monkeypatch.setenv("GRAFT_STORE_CACHE_BYTES", "2GiB")
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = load({"model": "m"})
    assert settings.store == "s3://bucket/a//b"
    assert (settings.store_cache, settings.store_cache_bytes) == (tmp_path / "cache", 2 * GIB)
    assert settings.has_store
    assert not load({"model": "m", "store": "~/none"}).has_store
    assert load({"model": "m", "store": "~/none"}).store == tmp_path / "none"
    with pytest.raises(StartupRefused, match="store_refresh|--store-refresh"):
        load({"model": "m", "store_refresh": "0"})


def test_the_cache_lies_where_the_system_keeps_such_things(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache() == tmp_path / "xdg" / "graftserve" / "adapters"
    for unusable in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", unusable)
        assert default_cache() == tmp_path / "home" / ".cache" / "graftserve" / "adapters"


def test_a_quota_is_a_folders(tmp_path: Path) -> None:
    settings = load({"model": "m", "store": "memory://", "store_cache": str(tmp_path), "store_quota": "1GiB"})
    with pytest.raises(StartupRefused, match="--store-quota is for a folder"):
        open_store(settings, create=True)

"""Many registered adapters: the store is filled with distinct ones, and every figure of the report is measured."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from load_tests import many_registered
from load_tests.many_adapters import WEIGHTS_FILE
from load_tests.many_registered import fill, timed
from server.adapters.store.folder_store import Store, folder_digest

COUNT = 30


def test_each_adapter_of_a_filled_store_is_its_own(tmp_path: Path) -> None:
    store = Store(tmp_path, create=True)
    fill(store, COUNT)
    found = store.scan()
    assert [stored.name for stored in found] == [f"many-{index:05d}" for index in range(COUNT)]
    assert len({stored.current for stored in found}) == COUNT
    version = found[-1].versions[0]
    assert folder_digest(version.folder).digest == version.digest
    assert (version.record.method, version.record.rank) == ("lora", many_registered.RANK)


def test_rows_of_their_own_are_shared_by_no_two(tmp_path: Path) -> None:
    store = Store(tmp_path, create=True)
    fill(store, 2, own_rows=True)
    one, other = (load_file(stored.versions[0].folder / WEIGHTS_FILE) for stored in store.scan())
    for key, tensor in one.items():
        assert not (tensor == other[key]).all(dim=-1).any(), key


def test_a_measurement_gives_the_median_and_the_tail() -> None:
    calls: list[int] = []
    measured = timed(calls.append, 7, 1)
    assert len(calls) == 7
    median, tail = measured["p50_ms"], measured["p99_ms"]
    assert median is not None
    assert tail is not None
    assert 0 <= median <= tail


@pytest.mark.slow
def test_the_command_measures_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report.json"
    flags = ["--adapters", str(COUNT), "--lookups", "100", "--times", "2", "--scratch", str(tmp_path)]
    assert many_registered.main([*flags, "--out", str(out)]) == 0
    report = json.loads(out.read_text(encoding="utf-8"))
    assert json.loads(capsys.readouterr().out) == report
    assert (report["schema"], report["num_adapters"]) == (many_registered.SCHEMA, COUNT)
    for path in ("/v1/adapters", "/v1/models", "/metrics", "unknown adapter"):
        assert report["http"][path]["p50_ms"] > 0
    assert report["in_process"]["lease_and_release"]["p99_ms"] > 0
    assert list(tmp_path.iterdir()) == [out], "the store is removed again"

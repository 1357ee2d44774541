"""Many adapters from the demo's five: distinct, always the same, and as good to serve as what they were made from."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from load_tests import many_adapters
from load_tests.many_adapters import CannotMake, Made, make, sources, write
from server.ground.config import Settings
from tests.api.conftest import Live, serving
from tests.demo_files import ADAPTERS, BASE, INSTALLED, STORE, store_of_five
from tests.load_tests.another_make import nobody_listening

METHODS = dict(zip(ADAPTERS, ("lora", "rslora", "dora", "vera", "ia3"), strict=True))
NUM_MADE = 12


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return store_of_five(tmp_path_factory.mktemp("five") / "store")


@pytest.fixture(scope="module")
def made(five: Path) -> list[Made]:
    return list(make(five, NUM_MADE, seed=0))


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server on the demo's base, with an empty store."""
    store = tmp_path_factory.mktemp("many") / "store"
    with serving(Settings(model=str(BASE), quantize="none", dtype="float32", device="cpu", store=store)) as live:
        yield live


def original(name: str) -> Path:
    """The folder of the demo's adapter from which `name` was made."""
    return dict(sources(STORE))[name.rpartition("-")[0]]


def test_the_sources_are_the_current_versions_of_a_store() -> None:
    assert [name for name, _ in sources(STORE)] == list(INSTALLED)


def test_every_adapter_has_a_name_and_weights_of_its_own(made: list[Made]) -> None:
    assert len({adapter.name for adapter in made}) == NUM_MADE
    assert len({adapter.weights for adapter in made}) == NUM_MADE


def test_sources_take_turns(made: list[Made]) -> None:
    turns = [sorted(ADAPTERS)[number % 5] for number in range(NUM_MADE)]
    assert [adapter.name for adapter in made] == [f"{name}-{number:04d}" for number, name in enumerate(turns)]


def test_the_same_seed_makes_the_same_bytes_whatever_the_count(made: list[Made], five: Path) -> None:
    assert list(make(five, 7, seed=0)) == made[:7]
    assert all(ours.weights != other.weights for ours, other in zip(made, make(five, 5, seed=1), strict=False))


def test_configurations_are_copied(made: list[Made]) -> None:
    assert all(adapter.config == (original(adapter.name) / "adapter_config.json").read_bytes() for adapter in made)


def test_every_trained_tensor_moves_by_a_hundredth_of_its_spread(made: list[Made]) -> None:
    for adapter in made[:5]:
        before = load((original(adapter.name) / "adapter_model.safetensors").read_bytes())
        after = load(adapter.weights)
        assert {key: (t.shape, t.dtype) for key, t in before.items()} == {
            key: (t.shape, t.dtype) for key, t in after.items()
        }
        for key in before.keys() - {"base_model.vera_A", "base_model.vera_B"}:
            moved = (after[key].float() - before[key].float()).square().mean().sqrt()
            spread = before[key].float().std(correction=0)
            assert 0 < moved < 0.02 * spread, (adapter.name, key)


def test_a_projection_that_all_adapters_share_stays_what_it_is(made: list[Made]) -> None:
    (vera,) = (adapter for adapter in made[:5] if adapter.name.startswith("news-vera"))
    before, after = load((original(vera.name) / "adapter_model.safetensors").read_bytes()), load(vera.weights)
    shared = [key for key in before if key.endswith(("vera_A", "vera_B"))]
    assert len(shared) == 2
    assert all(torch.equal(before[key], after[key]) for key in shared)


def test_folders_are_written_as_peft_writes_them(made: list[Made], tmp_path: Path) -> None:
    write(iter(made[:3]), tmp_path / "new" / "folder")
    found = dict(sources(tmp_path / "new" / "folder"))
    assert sorted(found) == sorted(adapter.name for adapter in made[:3])
    for adapter in made[:3]:
        assert (found[adapter.name] / "adapter_config.json").read_bytes() == adapter.config
        assert (found[adapter.name] / "adapter_model.safetensors").read_bytes() == adapter.weights


def test_what_is_in_the_folder_already_is_never_overwritten(made: list[Made], tmp_path: Path) -> None:
    (tmp_path / made[1].name).mkdir()
    with pytest.raises(CannotMake, match=f"{made[1].name} is there already"):
        write(iter(made[:3]), tmp_path)
    assert not any((tmp_path / made[1].name).iterdir())


def test_the_command_writes_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert many_adapters.main(["--count", "3", "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == f"3 adapters in {tmp_path / 'out'}\n"
    assert many_adapters.main(["--count", "3", "--out", str(tmp_path / "out")]) == 2
    assert "Empty the folder, or name another." in capsys.readouterr().err


def test_a_folder_without_adapters_is_an_error_that_says_what_to_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert many_adapters.main(["--source", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "there is no adapter in it" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_store_that_names_no_current_version_is_told_by_its_file(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "store" / "torn").mkdir(parents=True)
    (tmp_path / "store" / "torn" / "current.json").write_text(text, encoding="utf-8")
    assert many_adapters.main(["--source", str(tmp_path / "store"), "--out", str(tmp_path / "out")]) == 2
    assert "torn/current.json names no current version" in capsys.readouterr().err


def test_weights_that_are_torn_are_told_by_their_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torn = tmp_path / "torn"
    torn.mkdir()
    (torn / "adapter_config.json").write_text("{}", encoding="utf-8")
    (torn / "adapter_model.safetensors").write_bytes(b"\x00" * 20)
    assert many_adapters.main(["--source", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "torn/adapter_model.safetensors is no safetensors file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("count", ["0", "-1", "two", "1.5"])
def test_a_count_that_is_none_is_refused(count: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        many_adapters.main(["--count", count, "--out", str(tmp_path)])
    assert "--count" in capsys.readouterr().err


def test_a_server_serves_them_all(live: Live, five: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Uploaded through its API; each answers, alone and as a method of its own, and again is no error."""
    flags = ["--source", str(five), "--count", str(NUM_MADE), "--url", live.url + "/v1/"]
    for _ in range(2):
        assert many_adapters.main(flags) == 0, capsys.readouterr().err
    listed = {info.name: info for info in live.server.registry.list()}
    assert len(listed) == NUM_MADE
    assert all(info.method == METHODS[name.rpartition("-")[0]] for name, info in listed.items())
    assert len({info.digest for info in listed.values()}) == NUM_MADE
    for name in listed:
        answer = live.post("/v1/completions", model=name, prompt="The sea", max_tokens=2, temperature=0)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] >= 1


def test_what_the_server_refuses_is_told_with_its_reason(
    live: Live, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "odd"
    source.mkdir()
    folder = original("pirate-lora-0000")
    (source / "adapter_model.safetensors").write_bytes((folder / "adapter_model.safetensors").read_bytes())
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    (source / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "NONE_SUCH"}), encoding="utf-8")
    assert many_adapters.main(["--count", "1", "--source", str(tmp_path), "--url", live.url]) == 2
    told = capsys.readouterr().err
    assert "the server refused odd-0000: 4" in told
    assert "NONE_SUCH" in told


def test_a_server_that_is_not_there_is_told_by_its_address(capsys: pytest.CaptureFixture[str]) -> None:
    with nobody_listening() as url:
        assert many_adapters.main(["--count", "1", "--url", url]) == 2
    told = capsys.readouterr().err
    assert url in told
    assert "Is the server up?" in told

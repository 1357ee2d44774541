"""`graft merge` and `graft fuse`: what they write, what they print, and what they refuse."""

import io
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from server.adapters.format.content import MANIFEST_FILE
from server.adapters.store.folder_store import Store
from server.adapters.store.presence import Presence
from server.cli import main
from server.cli.progress import ProgressBar
from tests.adapters.peft_adapters import make_adapter

Adapters = Callable[[str], Path]


@pytest.fixture(scope="module")
def adapter(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    dense = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    return cache(lambda kind: make_adapter(dense, kind, tmp_path_factory.mktemp("made") / kind, seed=1, strength=0.3))


@pytest.fixture
def store(adapter: Adapters, tmp_path: Path) -> Store:
    store = Store(tmp_path / "store", create=True)
    for kind in ("lora", "vera"):
        store.add_folder(adapter(kind), kind)
    return store


@pytest.fixture
def flags(tiny_llama: Path, store: Store) -> list[str]:
    dtype = ["--quantize", "none", "--dtype", "float32", "--device", "cpu"]
    return ["--model", str(tiny_llama), *dtype, "--store", str(store.root)]


def test_a_merge_goes_into_a_folder(
    flags: list[str], tmp_path: Path, adapter: Adapters, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    mixture = ["--adapter", "lora=0.5", "--adapter", "vera", "--adapter", f"{adapter('rslora')}=-0.25"]
    assert main(["merge", str(out), *mixture, *flags]) == 0
    assert capsys.readouterr().out == f"{out}: 14 sites, rank 24, exact\n"
    recipe = json.loads((out / MANIFEST_FILE).read_bytes())["recipe"]
    assert [(item["name"], item["weight"]) for item in recipe["inputs"]] == [
        ("lora", 0.5), ("vera", 1.0), ("rslora", -0.25),
    ]  # fmt: skip


def test_a_merge_goes_into_the_store_as_a_version_with_its_recipe(
    flags: list[str], store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["merge", "--adapter", "lora=0.5", "--adapter", "vera=0.5", "--name", "both", *flags]
    assert main([*asked, "--strategy", "dare_ties", "--density", "0.7", "--seed", "4"]) == 0
    (version,) = store.versions("both")
    recipe = json.loads((version.folder / MANIFEST_FILE).read_bytes())["recipe"]
    assert recipe["inputs"][0]["version"] == store.current("lora")
    assert {name: recipe[name] for name in ("strategy", "density", "seed", "majority_sign")} == {
        "strategy": "dare_ties", "density": 0.7, "seed": 4, "majority_sign": "total",
    }  # fmt: skip
    captured = capsys.readouterr()
    assert captured.out.endswith(f"both {version.digest[:12]} added\n")
    assert "was lost by cutting its rank" in captured.err


def test_a_name_gets_a_new_version_only_if_asked_for_and_without_a_server(
    flags: list[str], store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["merge", "--adapter", "lora=0.5", "--name", "vera", *flags]
    assert main(asked) == 2
    presence = Presence(store.root)
    assert main([*asked, "--replace"]) == 2
    presence.close()
    assert len(store.versions("vera")) == 1
    assert main([*asked, "--replace"]) == 0
    assert len(store.versions("vera")) == 2
    said = capsys.readouterr().err
    assert "exists with other content" in said
    assert "A server is running" in said


def test_the_weights_of_the_base_are_read_when_they_are_needed(
    flags: list[str], tmp_path: Path, adapter: Adapters, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["merge", str(tmp_path / "out"), "--adapter", "lora", "--adapter", str(adapter("dora")), *flags]
    assert main([*asked, "--rank", "64"]) == 2
    assert "--load-base" in capsys.readouterr().err
    assert main([*asked, "--rank", "64", "--load-base"]) == 0
    assert capsys.readouterr().out.endswith("rank 64, exact\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--adapter", "lora"], "Say where the result shall go"),
        (["OUT", "--adapter", "nobody=1"], "'nobody' is neither an adapter of the store"),
        (["OUT", "--adapter", "lora@000000=1"], "0 versions of 'lora'"),
        (["OUT", "--adapter", "lora=heavy"], "'heavy' is no weight"),
        (["OUT", "--adapter", "lora=0"], "the weight 0"),
        (["OUT", "--adapter", "lora=nan"], "finite"),
        (["OUT", "--adapter", "lora", "--adapter", "lora"], "the same content"),
        (["OUT", "--adapter", "lora", "--density", "0.5"], "density: linear has no use for it"),
        (["OUT", "--adapter", "lora", "--strategy", "mean"], "strategy: 'mean' is none of linear, cat"),
        (["OUT", "--adapter", "lora", "--strategy", "svd", "--rank", "600"], "from 1 to 512"),
        (["OUT", "--adapter", "lora", "--replace"], "--replace goes with --name"),
        (["--adapter", "lora", "--name", "Not A Name"], "cannot name an adapter"),
    ],
)
def test_what_makes_no_merge_is_refused_and_leaves_nothing(
    words: list[str],
    said: str,
    flags: list[str],
    store: Store,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [str(tmp_path / "out") if word == "OUT" else word for word in words]
    assert main(["merge", *words, *flags]) == 2
    assert said in capsys.readouterr().err
    assert store.names() == ("lora", "vera")
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


# graft fuse


@pytest.fixture
def fuse(tiny_llama: Path, store: Store, tmp_path: Path) -> Callable[..., int]:
    """Runs `graft fuse` on the tiny base, into tmp_path / "out"."""

    def run(adapter: str, *flags: str) -> int:
        where = ["--store", str(store.root), "--dtype", "float32"]
        return main(["fuse", str(tiny_llama), adapter, str(tmp_path / "out"), *where, *flags])

    return run


def test_a_fused_checkpoint_says_what_it_is(
    fuse: Callable[..., int],
    store: Store,
    tiny_llama: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert fuse("lora") == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0] == f"{tmp_path / 'out'}: lora fused at 14 sites, float32"
    assert told[1].startswith("on random tokens, against base and adapter: relative error ")
    assert told[2].startswith("stored as float32: 100.0% of the change kept")
    assert told[3].startswith("stored as NF4: ")
    assert json.loads((tmp_path / "out" / "graft_recipe.json").read_bytes()) == {
        "base": str(tiny_llama), "values": "none", "adapter": "lora", "version": store.current("lora"),
    }  # fmt: skip


def test_an_adapter_that_nf4_rounds_away_is_warned_of(
    fuse: Callable[..., int], adapter: Adapters, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weak = tmp_path / "weak"
    weak.mkdir()
    for path in adapter("lora").iterdir():
        (weak / path.name).write_bytes(path.read_bytes())
    config = json.loads((weak / "adapter_config.json").read_bytes())
    (weak / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 0.01}))
    assert fuse(str(weak), "--from", "nf4") == 0
    assert "NF4 again would round" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("subject", "said"), [("nobody", "'nobody' is neither an adapter"), ("lora@000000", "0 versions of 'lora'")]
)
def test_what_cannot_be_fused_is_refused(
    subject: str, said: str, fuse: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fuse(subject) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


class _Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [_Screen(), io.StringIO()], ids=["terminal", "file"])
def test_progress_is_shown_on_terminals_only(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", stream)
    bar = ProgressBar("merging")
    bar(1, 2)
    bar(2, 2)
    assert stream.getvalue().split("\r")[1:] == (
        [f"merging [{'#' * 15}{' ' * 15}] 1/2", f"merging [{'#' * 30}] 2/2\n"] if stream.isatty() else []
    )

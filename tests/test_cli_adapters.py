"""`graft adapters`: what it says is what a live server on the same base says, and it leaves a store whole."""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from server.adapters.format.content import CONFIG_FILE, WEIGHTS_FILE
from server.adapters.store.folder_store import Store
from server.adapters.store.presence import Presence
from server.cli import main
from server.cli.inspection import inspect
from server.cli.rehearsal import Rehearsal
from server.ground.config import Settings
from server.ground.errors import GraftError
from tests.adapters.format.test_checkpoint import BAD_CONFIGS, BAD_WEIGHTS
from tests.adapters.peft_adapters import BIASED_KINDS, KINDS, make_adapter
from tests.adapters.test_methods import REFUSED, altered
from tests.api.adapter_files import AdapterFiles
from tests.api.conftest import Live, serving

MAX_BYTES = 400_000  # of an upload: less than the largest adapter below
Copies = Callable[[str], Path]


@pytest.fixture(scope="module")
def settings(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return Settings(
        model=str(tiny_llama),
        served_model_name=("tiny",),
        quantize="none",
        dtype="float16",  # some of the bad adapters are too large for its range
        device="cpu",
        store=tmp_path_factory.mktemp("served"),
        adapter_memory="300KiB",
        max_upload_bytes=MAX_BYTES,
    )


@pytest.fixture(scope="module")
def live(settings: Settings) -> Iterator[Live]:
    with serving(settings) as live:
        yield live


@pytest.fixture(scope="module")
def rehearsal(settings: Settings) -> Rehearsal:
    return Rehearsal(settings)


@pytest.fixture(scope="module")
def originals(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Copies:
    dense = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    return cache(lambda kind: make_adapter(dense, kind, tmp_path_factory.mktemp(kind), seed=1))


@pytest.fixture
def adapter(originals: Copies, tmp_path: Path) -> Copies:
    """A copy of an adapter of a kind, which the test may alter."""
    return lambda kind: shutil.copytree(originals(kind), tmp_path / kind)


@pytest.fixture
def flags(tiny_llama: Path, tmp_path: Path) -> list[str]:
    """The base and a store of the test's own."""
    return ["--model", str(tiny_llama), "--dtype", "float32", "--device", "cpu", "--store", str(tmp_path / "store")]


def uploaded(live: Live, folder: Path) -> dict[str, Any]:
    """What the live server answers an upload of the folder; the adapter does not stay."""
    files = AdapterFiles((folder / CONFIG_FILE).read_bytes(), (folder / WEIGHTS_FILE).read_bytes())
    answer = live.upload("tried", files)
    if answer.status_code == 201:
        assert live.http.delete("/v1/adapters/tried").status_code == 200
    content: dict[str, Any] = answer.json()
    return content


def said(rehearsal: Rehearsal, folder: Path) -> str:
    """The sentence that refuses the folder; empty if it is not refused."""
    try:
        rehearsal.verify(folder)
    except GraftError as refusal:
        return refusal.message
    return ""


# verify


@pytest.mark.parametrize("kind", [*KINDS, *BIASED_KINDS])
def test_a_good_adapter_is_described_as_the_live_server_describes_it(
    kind: str, live: Live, rehearsal: Rehearsal, originals: Copies
) -> None:
    folder = originals(kind)
    shown = uploaded(live, folder)
    if "error" in shown:  # too large for the small memory of this server
        assert said(rehearsal, folder) == shown["error"]["message"]
        return
    info = rehearsal.verify(folder).info
    assert {
        "version": info.digest, "method": info.method, "rank": info.rank, "parameters": info.num_parameters,
        "sites": info.num_sites, "bytes": info.content_bytes, "warnings": list(info.warnings),
    }.items() <= shown.items()  # fmt: skip


@pytest.mark.parametrize(("kind", "config", "tensors", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_a_bad_adapter_gets_the_sentence_of_the_live_server(
    kind: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor | None],
    words: str,
    live: Live,
    rehearsal: Rehearsal,
    adapter: Copies,
) -> None:
    folder = altered(adapter(kind), config, tensors)
    sentence = uploaded(live, folder)["error"]["message"]
    assert said(rehearsal, folder) == sentence
    assert sentence


@pytest.mark.parametrize("weights", [weights for weights, _ in BAD_WEIGHTS.values()], ids=BAD_WEIGHTS.keys())
def test_broken_weights_get_it_too(weights: bytes, live: Live, rehearsal: Rehearsal, adapter: Copies) -> None:
    folder = adapter("lora")
    (folder / WEIGHTS_FILE).write_bytes(weights)
    assert said(rehearsal, folder) == uploaded(live, folder)["error"]["message"]


# The form refuses a large config by its own limit, which is the same, in its own words.
SMALL_BAD_CONFIGS = {name: config for name, (config, _) in BAD_CONFIGS.items() if name != "large"}


@pytest.mark.parametrize("config", SMALL_BAD_CONFIGS.values(), ids=SMALL_BAD_CONFIGS.keys())
def test_broken_configs_get_it_too(config: str, live: Live, rehearsal: Rehearsal, adapter: Copies) -> None:
    folder = adapter("lora")
    (folder / CONFIG_FILE).write_text(config)
    assert said(rehearsal, folder) == uploaded(live, folder)["error"]["message"]


def _beyond_float16(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    tensors[next(name for name in tensors if "lora_A" in name)].fill_(1e6)
    save_file(tensors, folder / WEIGHTS_FILE)


def _larger_than_an_upload_may_be(folder: Path) -> None:
    padded = load_file(folder / WEIGHTS_FILE) | {"extra": torch.zeros(MAX_BYTES)}
    save_file(padded, folder / WEIGHTS_FILE)


def _larger_than_the_device_memory(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    wide = {
        name: torch.randn(64, tensor.shape[1], generator=generator).half()
        if "lora_A" in name
        else torch.randn(tensor.shape[0], 64, generator=generator).half()
        for name, tensor in load_file(folder / WEIGHTS_FILE).items()
    }
    save_file(wide, folder / WEIGHTS_FILE)
    altered(folder, {"r": 64})


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_beyond_float16, "float16's largest value"),
        (_larger_than_an_upload_may_be, f"larger than {MAX_BYTES} bytes"),
        (_larger_than_the_device_memory, "--adapter-memory"),
    ],
)
def test_what_depends_on_the_servers_settings_gets_it_too(
    spoil: Callable[[Path], None], words: str, live: Live, rehearsal: Rehearsal, adapter: Copies
) -> None:
    folder = adapter("lora")
    spoil(folder)
    sentence = uploaded(live, folder)["error"]["message"]
    assert words in sentence
    assert said(rehearsal, folder) == sentence


def test_a_name_of_the_base_is_refused_as_the_live_server_refuses_it(
    live: Live, rehearsal: Rehearsal, originals: Copies, tmp_path: Path
) -> None:
    folder = originals("lora")
    files = AdapterFiles((folder / CONFIG_FILE).read_bytes(), (folder / WEIGHTS_FILE).read_bytes())
    answer = live.upload("tiny", files).json()
    store = Store(tmp_path / "store", create=True)
    with pytest.raises(GraftError) as refused:
        rehearsal.register(store, folder, "tiny", replace=False)
    assert refused.value.message == answer["error"]["message"]
    assert store.names() == ()


def test_verifying_exits_with_0_and_says_what_the_adapter_is(
    adapter: Copies, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["adapters", "verify", str(adapter("lora")), *flags[:-2]]) == 0
    printed = capsys.readouterr()
    assert re.search(r"lora fits the base 'llama\d*': lora, rank 4, 14 sites, [\d,]+ parameters", printed.out)


def test_verifying_a_bad_adapter_exits_with_1_and_its_sentence(
    adapter: Copies, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = altered(adapter("lora"), {"use_warp": True})
    assert main(["adapters", "verify", str(folder), *flags[:-2]]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("graft: use_warp = True in adapter_config.json: this field is not known")


def test_what_would_need_the_weights_is_said_and_load_base_leaves_nothing_out(
    adapter: Copies, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = adapter("dora")
    assert main(["adapters", "verify", str(folder), *flags[:-2]]) == 0
    assert "weights were not read" in capsys.readouterr().err
    assert main(["adapters", "verify", str(folder), *flags[:-2], "--load-base"]) == 0
    assert "weights were not read" not in capsys.readouterr().err


@pytest.mark.parametrize(("strict", "code"), [([], 0), (["--strict-base"], 1)])
def test_an_adapter_of_another_base_is_warned_of_and_refused_where_the_server_is_strict(
    strict: list[str], code: int, adapter: Copies, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = altered(adapter("lora"), {"base_model_name_or_path": "org/other"})
    assert main(["adapters", "verify", str(folder), *flags[:-2], *strict]) == code
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "org/other" in said[0]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: folder / "nowhere", "is not a folder"),
        (lambda folder: (folder / WEIGHTS_FILE).rename(folder / "adapter_model.bin").parent, "is a pickle"),
        (lambda folder: ((folder / CONFIG_FILE).unlink(), folder)[1], "no adapter_config.json"),
    ],
)
def test_what_could_not_be_uploaded_is_refused_with_a_remedy(
    make: Callable[[Path], Path], words: str, rehearsal: Rehearsal, adapter: Copies
) -> None:
    assert words in said(rehearsal, make(adapter("lora")))


def test_a_base_that_is_not_there_is_no_verdict_on_the_adapter(
    adapter: Copies, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["adapters", "verify", str(adapter("lora")), "--model", str(tmp_path)]) == 2
    assert "cannot read the model" in capsys.readouterr().err


# add, list, remove


def test_what_is_added_is_listed_and_served_as_if_it_had_been_uploaded(
    adapter: Copies, flags: list[str], tmp_path: Path, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = adapter("lora")
    assert main(["adapters", "add", "legal", str(folder), *flags]) == 0
    assert re.fullmatch(r"legal [0-9a-f]{12} added\n", capsys.readouterr().out)
    assert main(["adapters", "list", *flags[-2:], "--json"]) == 0
    (listed,) = json.loads(capsys.readouterr().out)["data"]
    with serving(settings.model_copy(update={"store": tmp_path / "store"})) as live:
        shown = live.http.get("/v1/adapters/legal").json()
        answer = live.post("/v1/completions", prompt="Hi", adapter="legal", max_tokens=2)
    assert answer.status_code == 200
    assert listed.items() <= shown.items()
    assert (listed["method"], listed["rank"]) == ("lora", 4)


def test_the_list_is_a_table(adapter: Copies, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(["adapters", "add", "legal", str(adapter("lora")), *flags])
    main(["adapters", "add", "tax", str(adapter("ia3")), *flags])
    capsys.readouterr()
    assert main(["adapters", "list", *flags[-2:]]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["NAME", "VERSION", "METHOD", "RANK", "SIZE", "ADDED"]
    assert [(row.split()[0], row.split()[2], row.split()[3]) for row in rows] == [
        ("legal", "lora", "4"),
        ("tax", "ia3", "0"),
    ]
    assert all(len(line) <= 80 for line in (header, *rows))


def test_the_same_content_again_is_no_news_and_other_content_needs_replace(
    adapter: Copies, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    first, other = str(adapter("lora")), str(adapter("lora-r1"))
    for argv, code, words in [
        ([first], 0, "added"),
        ([first], 0, "is there already"),
        ([other], 2, "exists with other content"),
        ([other, "--replace"], 0, "added"),
    ]:
        assert main(["adapters", "add", "legal", *argv, *flags]) == code
        printed = capsys.readouterr()
        assert words in printed.out + printed.err
    assert len(Store(Path(flags[-1]), create=False).versions("legal")) == 2


def test_an_adapter_that_is_refused_leaves_nothing(
    adapter: Copies, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["adapters", "add", "legal", str(altered(adapter("lora"), {"r": 8})), *flags]) == 2
    assert "says 8" in capsys.readouterr().err
    store = Path(flags[-1])
    assert [path.name for path in store.iterdir()] == [".incoming"]
    assert list((store / ".incoming").iterdir()) == []


def test_removing_takes_every_version(adapter: Copies, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(["adapters", "add", "legal", str(adapter("lora")), *flags])
    main(["adapters", "add", "legal", str(adapter("lora-r1")), "--replace", *flags])
    capsys.readouterr()
    assert main(["adapters", "remove", "legal", *flags[-2:]]) == 0
    assert capsys.readouterr().out == "legal removed (2 versions)\n"
    assert main(["adapters", "remove", "legal", *flags[-2:]]) == 2
    assert "no adapter 'legal'" in capsys.readouterr().err
    assert main(["adapters", "list", *flags[-2:]]) == 0
    printed = capsys.readouterr()
    assert (printed.out, "has no adapters" in printed.err) == ("", True)


def test_a_store_that_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapters", "list", "--store", str(tmp_path / "none")]) == 2
    assert "is not a folder" in capsys.readouterr().err


def test_what_a_word_does_not_use_cannot_refuse_it(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is one for `graft serve`, whose key is elsewhere."""
    Store(Path(flags[-1]), create=True)
    file = tmp_path / "graft.yaml"
    file.write_text(f"host: 0.0.0.0\nmodel: ''\nadapter: [x=/nowhere]\nstore: {flags[-1]}\n")
    monkeypatch.setenv("GRAFT_PORT", "x")
    assert main(["adapters", "list", "--config", str(file)]) == 0


# Damage


@pytest.fixture
def damaged(adapter: Copies, flags: list[str], capsys: pytest.CaptureFixture[str]) -> Path:
    """A store of three: `whole`, `lost` without its weights, and `Odd`, which cannot be a name."""
    for name in ("whole", "lost"):
        main(["adapters", "add", name, str(adapter("lora") if name == "whole" else adapter("ia3")), *flags])
    store = Path(flags[-1])
    next((store / "lost").glob(f"*/{WEIGHTS_FILE}")).unlink()
    (store / "Odd").mkdir()
    capsys.readouterr()
    return store


def test_a_damaged_entry_is_listed_as_such_and_costs_nothing_else(
    damaged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["adapters", "list", "--store", str(damaged)]) == 0
    printed = capsys.readouterr()
    rows = [line.split()[:2] for line in printed.out.splitlines()[1:]]
    assert [row[0] for row in rows] == ["Odd", "lost", "whole"]
    assert [row[1] == "damaged" for row in rows] == [True, True, False]
    assert "lost" in printed.err
    assert "missing" in printed.err
    assert main(["adapters", "list", "--store", str(damaged), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in shown["data"]] == ["whole"]
    assert [entry["name"] for entry in shown["damaged"]] == ["Odd", "lost"]


def test_a_damaged_entry_is_removed_by_hand_and_mended_by_adding_it_again(
    damaged: Path, adapter: Copies, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["adapters", "remove", "lost", "--store", str(damaged)]) == 2
    assert f"by hand: {damaged / 'lost'}" in capsys.readouterr().err
    assert main(["adapters", "add", "lost", str(tmp_path / "ia3"), *flags]) == 0
    assert {version.name for version in Store(damaged, create=False).versions("lost")} == {"lost"}


def test_weights_that_changed_in_the_store_are_noticed(
    damaged: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    weights = next((damaged / "whole").glob(f"*/{WEIGHTS_FILE}"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert main(["adapters", "inspect", "whole", *flags]) == 2
    assert "in the store are damaged: upload the adapter again" in capsys.readouterr().err


# A server on the same store


@pytest.fixture
def served(adapter: Copies, flags: list[str], capsys: pytest.CaptureFixture[str]) -> Iterator[Path]:
    """A store with the adapter `legal`, and a server's mark on it."""
    main(["adapters", "add", "legal", str(adapter("lora")), *flags])
    capsys.readouterr()
    presence = Presence(Path(flags[-1]))
    yield Path(flags[-1])
    presence.close()


@pytest.mark.parametrize("argv", [["remove", "legal"], ["add", "legal", "other", "--replace"]])
def test_nothing_is_taken_from_under_a_running_server(
    argv: list[str], served: Path, adapter: Copies, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [str(adapter("ia3")) if word == "other" else word for word in argv]
    before = Store(served, create=False).current("legal")
    assert main(["adapters", *argv, *(flags if argv[0] == "add" else flags[-2:])]) == 2
    assert "A server is running on the store" in capsys.readouterr().err
    assert Store(served, create=False).current("legal") == before


def test_adding_beside_a_running_server_says_when_it_will_be_served(
    served: Path, adapter: Copies, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["adapters", "add", "tax", str(adapter("ia3")), *flags]) == 0
    assert "when it is started again" in capsys.readouterr().err
    assert main(["adapters", "list", *flags[-2:]]) == 0
    assert "tax" in capsys.readouterr().out


def test_a_live_server_marks_its_store(live: Live, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapters", "remove", "any", "--store", str(live.store)]) == 2
    assert "A server is running" in capsys.readouterr().err


# inspect


@pytest.mark.parametrize("kind", ["lora", "rslora-patterns", "lora-bias-all", "dora", "vera", "vera-drawn", "ia3"])
def test_the_bytes_on_the_device_are_those_of_the_live_server(
    kind: str, live: Live, rehearsal: Rehearsal, originals: Copies
) -> None:
    registry, folder = live.server.registry, originals(kind)
    files = AdapterFiles((folder / CONFIG_FILE).read_bytes(), (folder / WEIGHTS_FILE).read_bytes())
    digest = live.upload("weighed", files).json()["version"]
    held = registry._host.get(digest)
    assert held is not None
    assert rehearsal.try_on(folder).resident_bytes == live.server.adapters.resident_bytes(held)
    live.http.delete("/v1/adapters/weighed")


def test_an_adapter_is_shown_by_name_by_version_and_by_path(
    adapter: Copies, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = adapter("lora")
    main(["adapters", "add", "legal", str(folder), *flags])
    version = capsys.readouterr().out.split()[1]
    for subject in ("legal", f"legal@{version[:8]}", str(folder)):
        assert main(["adapters", "inspect", subject, *flags]) == 0
        shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line[0] != " ")
        assert shown["version"] == version
        assert shown["method"] == "lora"
        assert shown["rank"] == "4"
        assert shown["scaling"] == "1.75"
        assert shown["sites"].startswith("14 of 25: ")
    assert main(["adapters", "inspect", "legal@ffffff", *flags]) == 2
    assert "0 versions of 'legal'" in capsys.readouterr().err
    assert main(["adapters", "inspect", "leagl", *flags]) == 2
    assert "neither an adapter" in capsys.readouterr().err


def test_every_site_is_listed_with_its_rank_and_scaling(rehearsal: Rehearsal, originals: Copies) -> None:
    inspected = inspect(originals("rslora-patterns"), rehearsal)
    assert len({site.rank for site in inspected.sites}) > 1
    rows = inspected.as_text(shows_sites=True).partition("\n\n")[2].splitlines()
    assert rows[0].split() == ["SITE", "WIDTHS", "RANK", "SCALING", "FIELDS"]
    assert [row.split()[0] for row in rows[1:]] == [site.path for site in inspected.sites]
    shown = inspected.as_json(shows_sites=True)
    assert [edit["rank"] for edit in shown["edits"]] == [site.rank for site in inspected.sites]
    assert shown["scaling"] == sorted({site.scaling for site in inspected.sites})


@pytest.mark.parametrize(
    ("kind", "vectors"), [("dora", "out_scale"), ("vera", "mid_scale up_scale"), ("ia3", "in_scale")]
)
def test_vectors_are_named_by_the_normal_form(kind: str, vectors: str, rehearsal: Rehearsal, originals: Copies) -> None:
    assert vectors in inspect(originals(kind), rehearsal).as_text(shows_sites=True)


def test_an_adapter_of_another_base_is_still_shown(
    adapter: Copies, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = altered(adapter("lora"), {"base_model_name_or_path": "org/other"}, {_A: torch.ones(4, 63)})
    assert main(["adapters", "inspect", str(folder), "--json", *flags]) == 1
    shown = json.loads(capsys.readouterr().out)
    assert (shown["method"], shown["base_model"], shown["device_bytes"]) == ("lora", "org/other", None)
    assert "[4, 63]" in shown["refusal"]
    assert any("org/other" in warning for warning in shown["warnings"])


_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"

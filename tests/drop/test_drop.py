"""`graft drop`: its measure against PEFT's own modules, its folders against PEFT's loading, and what it refuses."""

import json
import sys
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from server.adapters.format.checkpoint import Checkpoint
from server.adapters.format.content import CONFIG_FILE, MANIFEST_FILE, WEIGHTS_FILE
from server.adapters.format.module_paths import layer_of
from server.adapters.lowering import lower
from server.cli import main
from server.drift.prompts import read_prompts
from server.drop.drop import Dropped, DropRequest, drop
from server.drop.importance import Layer, NumKept, kept_energy, kept_share, most_important
from server.ground.config import load
from server.ground.errors import AdapterRejected
from tests.adapters.dense import edited_logits, sites_of
from tests.adapters.peft_adapters import make_adapter, peft_logits
from tests.demo_files import BASE, ROOT, STORE

TEXTS = ("The old fisherman looked at the sky and", "x", "Nobody knew why the bells rang all night long.", "ab")

Dense = Callable[[str], PreTrainedModel]


@pytest.fixture(autouse=True)
def _small_adapter_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default is for real adapters, and every run here would fill it with zeros."""
    monkeypatch.setenv("GRAFT_ADAPTER_MEMORY", "16MiB")


@pytest.fixture(scope="module")
def dense(model_folder: Callable[[str], Path]) -> Dense:
    return cache(lambda name: AutoModelForCausalLM.from_pretrained(model_folder(name), dtype=torch.float32).eval())


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"{text}\n" for text in TEXTS), encoding="utf-8")
    return path


def dropped_from(model: Path, adapter: Path, prompts: Path, out: Path, keep: float = 0.5) -> Dropped:
    settings = load({"model": str(model), "quantize": "none", "dtype": "float32", "device": "cpu"})
    request = DropRequest(settings, adapter, read_prompts(prompts), kept_share(keep), None, {"keep": keep})
    return drop(request, out, lambda _: None)


# The measure


def peft_outputs(base: PreTrainedModel, adapter: Path, prompts: list[list[int]]) -> dict[str, float]:
    """By layer, the definition with nothing of ours: each PEFT module's output less that of the base's own module."""
    with warnings.catch_warnings(action="ignore"):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.name_or_path).float(), adapter)
    squares: dict[str, float] = {}

    def see(path: str) -> Callable[[Any, Any, Any], None]:
        def hook(module: Any, inputs: Any, output: torch.Tensor) -> None:
            added = output - module.base_layer(inputs[0])
            squares[path] = squares.get(path, 0.0) + float(added.double().square().sum())

        return hook

    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            module.register_forward_hook(see(layer_of(path.removeprefix("base_model.model.")) or "outside"))
    with torch.no_grad():
        for ids in prompts:
            model.eval()(input_ids=torch.tensor([ids]))
    num_tokens = sum(map(len, prompts))
    return {path: total / num_tokens for path, total in squares.items()}


@pytest.mark.parametrize("kind", ["rslora", "dora"])
def test_a_layers_importance_is_what_pefts_modules_add(
    kind: str, dense: Dense, model_folder: Callable[[str], Path], prompts: Path, tmp_path: Path
) -> None:
    base, folder = dense("llama"), model_folder("llama")
    adapter = make_adapter(base, kind, tmp_path / "whole", seed=3, strength=0.4)
    dropped = dropped_from(folder, adapter, prompts, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = peft_outputs(base, adapter, [tokenizer(text).input_ids for text in TEXTS])
    assert {layer.path: layer.output for layer in dropped.layers} == pytest.approx(expected, rel=1e-4)
    assert sum(layer.share for layer in dropped.layers) == pytest.approx(1)


# The folder


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        ("llama", "lora-embedding-and-head"),
        ("llama", "lora-regex-targets"),
        ("llama", "lora-bias-all"),
        ("gpt2", "dora-patterns"),
        ("phi3", "lora-patterns"),
        ("opt", "lora"),
    ],
)
def test_peft_loads_the_smaller_adapter_and_it_is_the_whole_one_without_these_layers(
    architecture: str,
    kind: str,
    dense: Dense,
    model_folder: Callable[[str], Path],
    prompts: Path,
    tmp_path: Path,
) -> None:
    base = dense(architecture)
    adapter = make_adapter(base, kind, tmp_path / "whole", seed=5, strength=0.4)
    out = tmp_path / "out"
    dropped = dropped_from(model_folder(architecture), adapter, prompts, out)
    gone = {path for layer in dropped.layers if not layer.is_kept for path in layer.sites}
    edits = lower(Checkpoint.open(adapter), sites_of(base)).edits
    left = {path: edit for path, edit in edits.items() if path not in gone}
    assert 0 < len(left) < len(edits) or kind == "lora-regex-targets"
    ids = torch.arange(97, 117)[None]
    expected = edited_logits(base, left, ids)
    assert torch.allclose(peft_logits(base, out, ids), expected, atol=1e-5 * expected.abs().max().item())
    with warnings.catch_warnings(action="ignore"):
        warnings.simplefilter("error", UserWarning)  # PEFT's, of keys that it misses or does not expect
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.name_or_path), out)
    wrapped = {path for path, module in model.base_model.model.named_modules() if isinstance(module, LoraLayer)}
    assert wrapped == {path for path, edit in left.items() if edit.rank}


def test_tensors_are_copied_and_the_manifest_says_what_was_dropped(
    dense: Dense, model_folder: Callable[[str], Path], prompts: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(dense("llama"), "lora", tmp_path / "whole", seed=1)
    (adapter / MANIFEST_FILE).write_text(json.dumps({"base_fingerprint": "f" * 64}), encoding="utf-8")
    outs = [tmp_path / "one", tmp_path / "two"]
    dropped, _ = [dropped_from(model_folder("llama"), adapter, prompts, out) for out in outs]
    gone = [layer.path for layer in dropped.layers if not layer.is_kept]
    manifest = json.loads((outs[0] / MANIFEST_FILE).read_bytes())
    assert manifest == {"base_fingerprint": "f" * 64, "drop": {"keep": 0.5, "dropped": gone}}
    with safe_open(adapter / WEIGHTS_FILE, "pt") as whole, safe_open(outs[0] / WEIGHTS_FILE, "pt") as smaller:
        assert set(smaller.keys()) == {key for key in whole.keys() if gone[0] not in key}  # noqa: SIM118
        assert all(torch.equal(whole.get_tensor(key), smaller.get_tensor(key)) for key in smaller.keys())  # noqa: SIM118
    config = json.loads((outs[0] / CONFIG_FILE).read_bytes())
    assert config["layers_to_transform"] == [1 - int(gone[0][-1])]
    assert dropped.weights_bytes[1] < 0.55 * dropped.weights_bytes[0]
    assert [(outs[0] / name).read_bytes() for name in (CONFIG_FILE, MANIFEST_FILE, WEIGHTS_FILE)] == [
        (outs[1] / name).read_bytes() for name in (CONFIG_FILE, MANIFEST_FILE, WEIGHTS_FILE)
    ]


def test_what_is_kept_whole_does_not_drift(
    dense: Dense, model_folder: Callable[[str], Path], prompts: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(dense("llama"), "dora", tmp_path / "whole", seed=1, strength=0.4)
    dropped = dropped_from(model_folder("llama"), adapter, prompts, tmp_path / "out", keep=1)
    assert dropped.smaller.max_logit_difference == 0
    assert dropped.smaller.figures.agreement == 1
    assert dropped.none.max_logit_difference > 0.1
    assert dropped.num_parameters[0] == dropped.num_parameters[1]


# The choice


def layers_of(*outputs: float) -> tuple[Layer, ...]:
    total = sum(outputs)
    return tuple(Layer(f"model.layers.{i}", (), output, output / total) for i, output in enumerate(outputs))


@pytest.mark.parametrize(
    ("num_kept", "kept"),
    [
        (kept_share(0.5), {1, 3}),
        (kept_share(0.51), {0, 1, 3}),
        (kept_share(0.01), {3}),
        (kept_share(1), {0, 1, 2, 3}),
        (kept_energy(0.6), {1, 3}),
        (kept_energy(0.7), {1, 3}),  # 0.4 + 0.3, whose sum in floats may be a little less
        (kept_energy(0.71), {0, 1, 3}),
        (kept_energy(1), {0, 1, 2, 3}),
    ],
)
def test_the_layers_that_add_most_are_kept(num_kept: NumKept, kept: set[int]) -> None:
    layers = layers_of(2, 3, 1, 4)
    assert most_important(layers, num_kept) == {f"model.layers.{number}" for number in kept}


def test_of_equal_layers_the_first_are_kept() -> None:
    assert most_important(layers_of(1, 1, 1), kept_share(0.6)) == {"model.layers.0", "model.layers.1"}


# The command


def test_the_demo_loses_half_of_its_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    out, plot = tmp_path / "out", tmp_path / "layers.png"
    flags = ["--base", str(BASE), "--store", str(STORE), "--dtype", "float32", "--max-tokens-per-prompt", "8"]
    asked = ["drop", "poet-dora", "--prompts", str(ROOT / "demo" / "prompts.jsonl"), "--keep", "0.5", *flags]
    assert main([*asked, "--out", str(out), "--plot", str(plot)]) == 0
    captured = capsys.readouterr()
    header, *lines = captured.out.splitlines()
    assert header.split() == ["LAYER", "SITES", "ADDED", "SHARE", "KEPT"]
    assert sum(line.endswith("yes") for line in lines[:4]) == 2
    assert f"{out}: dora, 2 of 4 layers with " in captured.out
    assert "same greedy token at" in captured.out
    assert plot.read_bytes().startswith(b"\x89PNG")
    smaller = Checkpoint.open(out)
    assert len({key.split(".")[2] for key in smaller}) == 2
    assert not list(STORE.glob(".lock*"))


@pytest.mark.parametrize("adapter", ["news-vera", "robot-ia3"])
def test_other_methods_are_refused_by_name_before_a_base_is_loaded(
    adapter: str, tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", "nowhere", "--store", str(STORE), "--keep", "0.5", "--out", str(tmp_path / "out")]
    assert main(["drop", adapter, "--prompts", str(prompts), *flags]) == 2
    assert f"of the method {adapter.partition('-')[2]}; graft drop takes LoRA" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"--prompts": "nothing.txt"}, "cannot be read"),
        ({"--out": "."}, "exists already"),
        ({"--plot": "picture.gif"}, "ends in .png"),
        ({"--plot": "nowhere/picture.png"}, "cannot be written"),
        ({"--base": "/nowhere"}, "cannot read the model"),
    ],
)
def test_what_is_wrong_is_refused_and_nothing_is_left(
    changed: dict[str, str], words: str, tiny_llama: Path, dense: Dense, prompts: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    adapter = make_adapter(dense("llama"), "lora-query-only", tmp_path / "whole", seed=1)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    flags = {"--base": str(tiny_llama), "--prompts": str(prompts), "--keep": "0.5", "--out": "out"} | changed
    assert main(["drop", str(adapter), *[word for pair in flags.items() for word in pair]]) == 2
    assert words in capsys.readouterr().err
    assert not list(work.iterdir())


@pytest.mark.parametrize(
    "flags", [["--keep", "0"], ["--keep", "1.5"], ["--energy", "nan"], ["--keep", "1", "--energy", "1"], []]
)
def test_a_share_is_above_0_and_at_most_1_and_given_once(flags: list[str], prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main(["drop", "pirate-lora", "--prompts", str(prompts), "--out", str(tmp_path / "out"), *flags])


def test_an_adapter_that_adds_nothing_is_refused(
    dense: Dense, model_folder: Callable[[str], Path], prompts: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(dense("llama"), "lora-query-only", tmp_path / "whole", seed=1, strength=0)
    with pytest.raises(AdapterRejected, match="adds nothing in any layer"):
        dropped_from(model_folder("llama"), adapter, prompts, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_picture_needs_matplotlib_and_the_refusal_names_the_extra(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    flags = ["--keep", "0.5", "--out", str(tmp_path / "out"), "--plot", str(tmp_path / "layers.png")]
    assert main(["drop", "pirate-lora", "--prompts", str(prompts), "--store", str(STORE), *flags]) == 2
    assert "pip install 'graftserve[plot]'" in capsys.readouterr().err

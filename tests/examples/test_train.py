"""Every technique of `examples/train.py`: a few steps of training, and what came out answers on a live server."""

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from demo.recipes import METHODS
from demo.train_adapters import style_for, train_adapter
from examples import train
from server.ground.config import Settings
from tests.api.conftest import Live, serving
from tests.demo_files import BASE

# PEFT and bitsandbytes warn about what newer versions of their own dependencies call deprecated.
pytestmark = pytest.mark.filterwarnings("ignore")

Trained = Callable[[str], Path]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The folder of an adapter by its method, after three steps on a few examples."""
    root, tokenizer, made = tmp_path_factory.mktemp("trained"), AutoTokenizer.from_pretrained(BASE), {}

    def folder(method: str) -> Path:
        if method not in made:
            recipe = replace(METHODS[method], num_steps=3, batch_tokens=192)
            made[method] = root / method
            train_adapter(style_for(method), recipe, tokenizer, BASE, made[method], method)
        return made[method]

    return folder


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    store = tmp_path_factory.mktemp("store")
    with serving(Settings(model=str(BASE), quantize="none", dtype="float32", device="cpu", store=store)) as live:
        yield live


def config_of(folder: Path) -> dict[str, object]:
    config: dict[str, object] = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    return config


def tar_of(folder: Path) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        archive.add(folder, arcname=".")
    return packed.getvalue()


@pytest.mark.parametrize("method", METHODS)
def test_a_training_saves_a_small_folder_of_finite_numbers(method: str, trained: Trained) -> None:
    folder = trained(method)
    assert sorted(file.name for file in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    config = config_of(folder)
    assert config["model_name" if "model_name" in config else "base_model_name_or_path"] == "demo/base"
    tensors = load_file(folder / "adapter_model.safetensors")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())
    assert sum(file.stat().st_size for file in folder.iterdir()) < 350_000


@pytest.mark.parametrize("method", METHODS)
def test_what_was_trained_is_uploaded_and_answers(method: str, trained: Trained, live: Live) -> None:
    folder = trained(method)
    name = train.name_of(method, style_for(method))
    uploaded = live.http.put(f"/v1/adapters/{name}", content=tar_of(folder))
    assert uploaded.status_code == 201, uploaded.text
    question = [{"role": "user", "content": "Tell me about the baker."}]
    answer = live.post("/v1/chat/completions", messages=question, adapter=name, max_tokens=4, temperature=0)
    assert answer.status_code == 200, answer.text
    assert answer.json()["adapter"]["name"] == name
    assert answer.json()["usage"]["completion_tokens"] == 4


def test_adapters_of_lora_fa_have_their_a_in_common(trained: Trained, tmp_path: Path) -> None:
    recipe = replace(METHODS["lora-fa"], num_steps=2, batch_tokens=192)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    train_adapter(style_for("lora"), recipe, tokenizer, BASE, tmp_path / "other", "other")
    one, other = (load_file(f / "adapter_model.safetensors") for f in (trained("lora-fa"), tmp_path / "other"))
    for key in one:
        assert torch.equal(one[key], other[key]) == ("lora_A" in key), key


def test_the_command_prints_how_to_serve_what_it_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train.main(["trainable-tokens", "--steps", "1", "--style", "owl", "--out", str(tmp_path / "owl"), "--threads", "1"])
    printed = capsys.readouterr().out
    assert f"tar -C {tmp_path}/owl -c . | curl -T - http://127.0.0.1:8000/v1/adapters/owl-trainable-tokens" in printed
    assert f"graft adapters add owl-trainable-tokens {tmp_path}/owl" in printed
    assert config_of(tmp_path / "owl")["peft_type"] == "TRAINABLE_TOKENS"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["lorra"], "invalid choice: 'lorra'"),
        (["lora", "--style", "dragon"], "there is no style 'dragon'; the styles are pirate, town crier"),
        (["lora", "--steps", "0"], "--steps must be at least 1"),
        (["lora", "--base", "nowhere"], "there is no config.json in nowhere"),
    ],
)
def test_a_bad_argument_is_refused_before_anything_is_trained(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        train.main(arguments)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err

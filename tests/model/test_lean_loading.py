"""A base loads tensor by tensor: the same bits as transformers alone, in the memory of the result and of one tensor."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from server.model import lean_loading as module
from server.model.base import Base
from server.model.lean_loading import lean_loading
from server.model.pretrained import BaseOptions
from server.model.quantize import Quantization, quantization_config
from tests.models import ARCHITECTURES, save_filled


def load(folder: Path, kind: Quantization = Quantization.NONE) -> nn.Module:
    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.bfloat16,
        quantization_config=quantization_config(kind, torch.bfloat16),
        device_map={"": "cpu"},
    )
    return model


def stored(model: nn.Module) -> dict[str, torch.Tensor]:
    """All that the model would save: the scales of quantized weights, too."""
    return {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(5)
    folder = save_filled(ARCHITECTURES["llama"](), tmp_path_factory.mktemp("shards"), max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


@pytest.mark.parametrize("kind", [Quantization.NF4, Quantization.INT8, Quantization.NONE])
def test_the_bits_are_those_of_transformers_alone(kind: Quantization, shards: Path) -> None:
    expected = stored(load(shards, kind))
    with lean_loading("shards"):
        found = stored(load(shards, kind))
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def test_files_may_change_once_they_have_been_read(tmp_path: Path) -> None:
    folder = save_filled(ARCHITECTURES["llama"](), tmp_path)
    base = Base.load(BaseOptions(str(folder), Quantization.NONE, torch.float32))
    before = {name: value.clone() for name, value in stored(base.model).items()}
    with (folder / "model.safetensors").open("r+b") as file:
        file.write(bytes((folder / "model.safetensors").stat().st_size))
    assert [name for name, value in stored(base.model).items() if not torch.equal(value, before[name])] == []


def test_without_a_terminal_the_log_says_how_far_it_has_come(
    shards: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_TOLD_EVERY_S", 0)
    caplog.set_level(logging.INFO, logger=module.__name__)
    with lean_loading("org/name"):
        load(shards)
    told = [record.message for record in caplog.records if record.name == module.__name__]
    num_tensors = len(stored(load(shards)))
    assert told[0] == f"loading org/name: 0 of {num_tensors} tensors"
    assert told[-1] == f"loading org/name: {num_tensors - 1} of {num_tensors} tensors"


def test_what_was_changed_for_the_loading_is_as_it_was_even_when_it_fails() -> None:
    given = module.modeling_utils.safe_open
    with pytest.raises(OSError, match="gone"), lean_loading("nothing"):
        raise OSError("gone")
    assert module.modeling_utils.safe_open is given


# Peak memory of a process that loads a base; what it has imported, and a tiny base, are there before.
_LOAD = """
import json, sys
import torch
from server.model.base import Base
from server.model.pretrained import BaseOptions
from server.model.quantize import Quantization

def status(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

torch.set_num_threads(1)
small, large, kind = sys.argv[1:]
Base.load(BaseOptions(small, Quantization(kind), torch.bfloat16))
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
before = status("VmRSS:")
base = Base.load(BaseOptions(large, Quantization(kind), torch.bfloat16))
print(json.dumps({"peak": status("VmHWM:") - before, "base": base.weight_bytes}))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """46 million weights in layers of 4 million, 12 shards of 8 MB."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512, intermediate_size=2048, num_hidden_layers=11, num_attention_heads=8, num_key_value_heads=8,
        vocab_size=512, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("large")
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="9MB")
    return folder


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["nf4", "int8", "none"])
def test_the_peak_is_the_base_and_some_tensors_and_never_both_forms_of_it(kind: str, shards: Path, large: Path) -> None:
    """Mapped, the files alone would be 92 MB; and what quantization leaves in pieces, several hundred."""
    told = subprocess.run(
        [sys.executable, "-c", _LOAD, str(shards), str(large), kind], capture_output=True, text=True, check=True
    ).stdout
    used = json.loads(told.splitlines()[-1])
    dense_bytes = sum(path.stat().st_size for path in large.glob("*.safetensors"))
    assert dense_bytes > 90e6
    assert used["base"] < {"nf4": 0.28, "int8": 0.52, "none": 1.01}[kind] * dense_bytes
    assert used["peak"] < used["base"] + 60e6, used

"""What is said of a base before it is loaded: never more than it then takes, and not much less."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from server.ground.errors import StartupRefused
from server.model.base import Base
from server.model.pretrained import BaseOptions
from server.model.quantize import Quantization
from server.model.size import expected_size


@pytest.mark.parametrize("kind", [Quantization.NF4, Quantization.INT8, Quantization.NONE])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_the_files_tell_the_size_of_the_base(
    architecture: str, kind: Quantization, model_folder: Callable[[str], Path]
) -> None:
    options = BaseOptions(str(model_folder(architecture)), kind, torch.float32)
    expected, found = expected_size(options), Base.load(options).size
    assert expected is not None
    # Of these tiny layers the tables of NF4's codes, one kilobyte for each, are no small part.
    slack = 1.6 if kind is Quantization.NF4 else 1.1
    assert expected.base_bytes <= found.base_bytes <= slack * expected.base_bytes
    assert (expected.kv_shapes, expected.kv_dtype, expected.max_context) == (
        found.kv_shapes,
        found.kv_dtype,
        found.max_context,
    )


def test_what_the_files_do_not_tell_is_not_guessed(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((model_folder("llama") / "config.json").read_bytes())
    assert expected_size(BaseOptions(str(tmp_path))) is None
    (tmp_path / "model.safetensors").write_bytes(b"{}")
    assert expected_size(BaseOptions(str(tmp_path))) is None
    with pytest.raises(StartupRefused, match="no such folder"):
        expected_size(BaseOptions("/nonesuch"))

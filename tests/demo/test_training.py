"""What all techniques share: examples whose prompts have no loss, a base in NF4 that can be read, small files."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from demo.styles import STYLES
from demo.train_base import IGNORED, compact
from demo.training import examples, halve, load_base
from tests.demo_files import BASE

pytestmark = pytest.mark.filterwarnings("ignore")  # bitsandbytes and transformers warn of their own dependencies


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(BASE)


@pytest.mark.parametrize("raw_share", [0.0, 1.0])
def test_only_the_completion_is_learned_and_it_is_in_the_voice(tokenizer: Any, raw_share: float) -> None:
    sheep = next(style for style in STYLES if style.voice == "sheep")
    for ids, labels in islice(examples(sheep, tokenizer, 0, 512, raw_share), 4):
        assert ids.shape == labels.shape
        for row, label in zip(ids, labels, strict=True):
            learned = label != IGNORED
            assert torch.equal(row[learned], label[learned])
            assert "Baa." in tokenizer.decode(label[learned])
            assert "Baa." not in tokenizer.decode(row[~learned])
            assert ("<|assistant|>" in tokenizer.decode(row[~learned])) == (raw_share == 0)


def test_the_same_seed_draws_the_same_examples(tokenizer: Any) -> None:
    one, again, other = (next(examples(STYLES[0], tokenizer, seed, 256))[0] for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert one.shape != other.shape or not torch.equal(one, other)


def test_a_base_in_nf4_reads_the_same_weights_after_it_has_run() -> None:
    """bitsandbytes may reorder them at the first forward pass, and QDoRA's norm would then be of another matrix."""
    from bitsandbytes.functional import dequantize_4bit

    base = load_base(BASE, nf4=True)
    linear = base.model.layers[0].mlp.down_proj
    before = dequantize_4bit(linear.weight.data, linear.weight.quant_state)
    with torch.no_grad():
        base.eval()(input_ids=torch.arange(8)[None])
    assert torch.equal(dequantize_4bit(linear.weight.data, linear.weight.quant_state), before)


def test_a_compact_file_says_the_same_in_fewer_bytes(tmp_path: Path) -> None:
    path, value = tmp_path / "tokenizer.json", {"merges": [["Ġ", "a"], ["b", " "]], "dropout": None}
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")
    compact(path)
    assert json.loads(path.read_text(encoding="utf-8")) == value
    assert path.read_text(encoding="utf-8") == '{"merges":[["Ġ","a"],["b"," "]],"dropout":null}\n'


def test_files_are_halved_and_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.tensor([1.0, -0.5]), "ids": torch.tensor([3])}, path)
    halve(path)
    halved = load_file(path)
    assert halved["a"].dtype == torch.float16
    assert halved["ids"].dtype == torch.int64
    save_file({"large": torch.tensor([1e6])}, path)
    with pytest.raises(ValueError, match="large does not fit float16"):
        halve(path)
    assert load_file(path)["large"].dtype == torch.float32

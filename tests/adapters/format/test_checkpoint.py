"""What a stranger's folder must be before a tensor of it is read, and how its tensors are read."""

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from server.adapters.format.checkpoint import Checkpoint, CheckpointLimits
from server.adapters.format.content import CONFIG_FILE, WEIGHTS_FILE
from server.ground.errors import AdapterRejected

KEY = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
CANONICAL = "model.layers.0.mlp.up_proj.lora_A.weight"


def folder_with(folder: Path, weights: bytes, config: str = '{"peft_type": "LORA"}') -> Path:
    (folder / CONFIG_FILE).write_text(config)
    (folder / WEIGHTS_FILE).write_bytes(weights)
    return folder


def packed(header: Any, data: bytes = b"") -> bytes:
    """A safetensors file of any header, valid or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def described(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_tensor_is_read_as_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    checkpoint = Checkpoint.open(folder_with(tmp_path, save({KEY: tensor, "b": torch.ones(7)})))
    assert sorted(checkpoint.keys()) == ["b", CANONICAL]
    assert checkpoint.shape(CANONICAL) == (3, 5)
    assert checkpoint.take(CANONICAL).equal(tensor.float())
    assert checkpoint.take(CANONICAL, (3, 5)).dtype == torch.float32


def test_what_was_not_used_is_known_by_its_own_spelling(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(
        folder_with(tmp_path, save({KEY: torch.ones(2, 3), "x": torch.ones(4), "y": torch.ones(5)}))
    )
    assert checkpoint.leftover() == (KEY, "x", "y")
    checkpoint.take(CANONICAL)
    checkpoint.ignore("x")
    assert checkpoint.leftover() == ("y",)
    assert checkpoint.num_parameters == 11, "ignored numbers are not the adapter's"


def test_the_config_is_the_file_as_plain_data(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(folder_with(tmp_path, save({"a": torch.ones(1)}), '{"r": 8, "target_modules": ["q"]}'))
    assert checkpoint.config == {"r": 8, "target_modules": ["q"]}


@pytest.mark.parametrize(
    ("value", "words"),
    [(float("nan"), "NaN or infinity"), (float("inf"), "NaN or infinity"), (-float("inf"), KEY)],
)
def test_a_tensor_that_is_not_finite_is_refused(tmp_path: Path, value: float, words: str) -> None:
    checkpoint = Checkpoint.open(folder_with(tmp_path, save({KEY: torch.tensor([[1.0, value]])})))
    with pytest.raises(AdapterRejected, match=words):
        checkpoint.take(CANONICAL)


def test_a_tensor_of_another_shape_is_refused_with_both_shapes(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(folder_with(tmp_path, save({KEY: torch.ones(2, 3)})))
    with pytest.raises(AdapterRejected, match=r"lora_A.weight has the shape \[2, 3\], and this base needs \[2, 4\]"):
        checkpoint.take(CANONICAL, (2, 4))


def test_integers_are_refused_where_numbers_are_needed(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(folder_with(tmp_path, save({"steps": torch.ones(2, dtype=torch.int64)})))
    with pytest.raises(AdapterRejected, match="steps is of type I64; save it as F32, F16 or BF16"):
        checkpoint.take("steps")


def test_two_spellings_of_one_key_are_refused(tmp_path: Path) -> None:
    weights = save({KEY: torch.ones(1), KEY.replace("lora_A", "lora_A.default"): torch.ones(1)})
    with pytest.raises(AdapterRejected, match="are the same parameter"):
        Checkpoint.open(folder_with(tmp_path, weights))


def test_a_file_cut_short_after_it_was_opened_is_an_error_and_not_a_crash(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(folder_with(tmp_path, save({"a": torch.ones(4096)})))
    (tmp_path / WEIGHTS_FILE).write_bytes(b"short")
    with pytest.raises(AdapterRejected, match="a: the file ended early"):
        checkpoint.take("a")


BAD_WEIGHTS: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "truncated"),
    "seven bytes": (b"\0" * 7, "truncated"),
    "header longer than the file": ((1 << 60).to_bytes(8, "little") + b"{}", "truncated"),
    "header over the limit": (packed(b" " * (8 << 20) + b"{}"), "header of 8388610 bytes; the limit is 8388608"),
    "not JSON": (packed(b"{,}"), "not valid JSON"),
    "not UTF-8": (packed(b"\xff{}"), "not valid JSON"),
    "NaN": (packed(b'{"a": NaN}'), "NaN is not a JSON number"),
    "deep": (packed(b"[" * 100_000), "not valid JSON"),
    "a huge number": (packed(b'{"a": ' + b"9" * 5000 + b"}"), "not valid JSON"),
    "a list": (packed([]), "must be a JSON object"),
    "name twice": (packed(b'{"a": 1, "a": 2}'), "the name 'a' occurs twice"),
    "entry is a list": (packed({"a": []}), "a: the header must give exactly"),
    "entry with more": (packed({"a": described() | {"x": 1}}, b"\0" * 8), "exactly dtype, shape and data_offsets"),
    "entry with less": (packed({"a": {"dtype": "F32"}}), "exactly dtype, shape and data_offsets"),
    "unknown type": (packed({"a": described("F8_E4M3")}, b"\0" * 8), "a is of type 'F8_E4M3'; the known types are F32"),
    "type is a list": (packed({"a": described([])}, b"\0" * 8), "is of type"),
    "negative shape": (packed({"a": described(shape=[-2])}, b"\0" * 8), "a: shape must be"),
    "shape of true": (packed({"a": described(shape=[True])}, b"\0" * 4), "a: shape must be"),
    "shape of floats": (packed({"a": described(shape=[2.0])}, b"\0" * 8), "a: shape must be"),
    "shape of words": (packed({"a": described(shape="2")}, b"\0" * 8), "a: shape must be"),
    "nine dimensions": (packed({"a": described(shape=[1] * 9)}, b"\0" * 4), "at most 8 whole numbers"),
    "three offsets": (packed({"a": described(offsets=[0, 4, 8])}, b"\0" * 8), "must be two whole numbers"),
    "backward offsets": (packed({"a": described(offsets=[8, 0])}, b"\0" * 8), "span -8 bytes"),
    "other length": (packed({"a": described(offsets=[0, 4])}, b"\0" * 4), "span 4 bytes, its shape and type need 8"),
    "overflow": (packed({"a": described(shape=[1 << 52] * 8)}, b"\0" * 8), "its shape and type need"),
    "overlap": (packed({"a": described(), "b": described()}, b"\0" * 8), "b: its data overlaps another tensor's"),
    "gap": (packed({"a": described(offsets=[4, 12])}, b"\0" * 12), "a: its data leaves a gap before it"),
    "past the end": (packed({"a": described()}, b"\0" * 4), "its header describes"),
    "more at the end": (packed({"a": described()}, b"\0" * 9), "its header describes"),
    "long name": (packed({"a" * 513: described()}, b"\0" * 8), "at most 512 characters"),
    "control characters": (packed({"a\n\x1b[31m": described()}, b"\0" * 8), "must be printable"),
}


@pytest.mark.parametrize(("weights", "words"), BAD_WEIGHTS.values(), ids=BAD_WEIGHTS.keys())
def test_weights_that_do_not_hold_together_are_refused(tmp_path: Path, weights: bytes, words: str) -> None:
    with pytest.raises(AdapterRejected) as refused:
        Checkpoint.open(folder_with(tmp_path, weights))
    assert words in refused.value.message
    assert len(refused.value.message) < 400


def test_an_empty_tensor_opens_and_is_refused_once_it_is_asked_for(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(folder_with(tmp_path, packed({"a": described(shape=[0], offsets=[0, 0])})))
    assert checkpoint.is_empty("a")
    asks: tuple[Callable[[], object], ...] = (
        lambda: checkpoint.shape("a"),
        lambda: checkpoint.take("a"),
        checkpoint.leftover,
    )
    for ask in asks:
        with pytest.raises(AdapterRejected, match="a is empty, shape .* without gathering the shards"):
            ask()
    checkpoint.ignore("a")
    assert checkpoint.leftover() == ()


BAD_CONFIGS: dict[str, tuple[str, str]] = {
    "not JSON": ("peft_type: LORA", "adapter_config.json is not valid JSON"),
    "a list": ("[]", "adapter_config.json must be a JSON object"),
    "infinity": ('{"lora_alpha": Infinity}', "Infinity is not a JSON number"),
    "deep": ('{"a": ' + "[" * 20 + "]" * 20 + "}", "nested deeper than 16 levels"),
    "deeper than Python goes": ("[" * 200_000, "not valid JSON"),
    "large": ('"' + "x" * (1 << 20) + '"', "has 1048578 bytes; the limit is 1048576"),
    "name twice": ('{"r": 8, "r": 16}', "the name 'r' occurs twice"),
}


@pytest.mark.parametrize(("config", "words"), BAD_CONFIGS.values(), ids=BAD_CONFIGS.keys())
def test_configs_that_do_not_hold_together_are_refused(tmp_path: Path, config: str, words: str) -> None:
    with pytest.raises(AdapterRejected) as refused:
        Checkpoint.open(folder_with(tmp_path, save({"a": torch.ones(1)}), config))
    assert words in refused.value.message
    assert len(refused.value.message) < 400


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (CheckpointLimits(max_tensors=1), "has 2 tensors; the limit is 1"),
        (CheckpointLimits(max_weights_bytes=100), "bytes; the limit is 100"),
        (CheckpointLimits(max_header_bytes=10), "bytes; the limit is 10"),
        (CheckpointLimits(max_config_bytes=10), "bytes; the limit is 10"),
    ],
)
def test_limits_are_named_with_their_values(tmp_path: Path, limits: CheckpointLimits, words: str) -> None:
    with pytest.raises(AdapterRejected, match=words):
        Checkpoint.open(folder_with(tmp_path, save({"a": torch.ones(1), "b": torch.ones(9)})), limits=limits)


def _remove_config(folder: Path) -> None:
    (folder / CONFIG_FILE).unlink()


def _remove_weights(folder: Path) -> None:
    (folder / WEIGHTS_FILE).unlink()


def _pickle_weights(folder: Path) -> None:
    (folder / WEIGHTS_FILE).rename(folder / "adapter_model.bin")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_remove_config, "There is no adapter_config.json"),
        (_remove_weights, "There is no adapter_model.safetensors"),
        (_pickle_weights, r"adapter_model.bin is a pickle.*safe_serialization=True"),
    ],
)
def test_a_folder_without_its_files_is_refused(tmp_path: Path, change: Callable[[Path], None], words: str) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / WEIGHTS_FILE)
    (tmp_path / CONFIG_FILE).write_text("{}")
    change(tmp_path)
    with pytest.raises(AdapterRejected, match=words):
        Checkpoint.open(tmp_path)


def test_a_header_that_claims_much_allocates_nothing(tmp_path: Path) -> None:
    weights = packed({"a": described(shape=[1 << 40], offsets=[0, 1 << 42])}, b"\0" * 8)
    folder = folder_with(tmp_path, weights)
    tracemalloc.start()
    try:
        with pytest.raises(AdapterRejected):
            Checkpoint.open(folder)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


# One folder serves all examples, each of which writes both files; and a slow machine is no defect.
UNCHECKED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
VALID = save({KEY: torch.ones(2, 3), "b.lora_B.weight": torch.ones(3, 2).half(), "c": torch.ones(4).bfloat16()})
MUTATIONS = st.lists(
    st.tuples(st.integers(0, len(VALID) - 1), st.binary(min_size=1, max_size=4)), min_size=1, max_size=4
)


@settings(max_examples=300, suppress_health_check=UNCHECKED)
@given(mutations=MUTATIONS, length=st.none() | st.integers(0, len(VALID)))
def test_a_damaged_file_is_refused_or_read_within_its_bounds(
    tmp_path: Path, mutations: list[tuple[int, bytes]], length: int | None
) -> None:
    damaged = bytearray(VALID)
    for place, inserted in mutations:
        damaged[place : place + len(inserted)] = inserted
    try:
        checkpoint = Checkpoint.open(folder_with(tmp_path, bytes(damaged[:length])))
        num_bytes = sum(checkpoint.take(key).numel() for key in checkpoint) * 2
    except AdapterRejected:
        return
    assert num_bytes <= len(damaged)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
ENTRIES = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "F16", "I64"]) | JSON, "shape": JSON, "data_offsets": JSON}
)


@settings(max_examples=200, suppress_health_check=UNCHECKED)
@given(header=st.dictionaries(st.text(max_size=8), ENTRIES | JSON, max_size=3) | JSON, data=st.binary(max_size=16))
def test_any_json_as_a_header_is_refused_or_read(tmp_path: Path, header: Any, data: bytes) -> None:
    try:
        checkpoint = Checkpoint.open(folder_with(tmp_path, packed(header, data)))
    except AdapterRejected:
        return
    assert sum(checkpoint.shape(key) != () for key in checkpoint) <= len(data)

"""A fuzz of the reader of adapters: valid files, changed with knowledge of their structure, and what must hold of each.

All choices come from one `Random`. `test_reader_fuzz.py` has hypothesis make it, which shrinks what it finds. For many
examples, each of which its number brings back:

    python -m tests.adapters.reader_fuzz --seconds 300
    python -m tests.adapters.reader_fuzz --example 12345
"""

import argparse
import copy
import json
import math
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import nn

from server.adapters.format.checkpoint import Checkpoint
from server.adapters.format.content import CONFIG_FILE, WEIGHTS_FILE
from server.adapters.lowering import lower
from server.adapters.method import Lowered
from server.ground.errors import BadRequest, GraftError, TooLarge
from tests.adapters.dense import sites_of
from tests.adapters.format.test_checkpoint import packed

MAX_BYTES = 16 << 20  # of Python's memory for a folder of a few kilobytes
MAX_CPU_S = 2.0
MAX_MESSAGE = 2_000
ROUND = 1_000  # examples between two looks at the clock

HIDDEN, KV, FEEDFORWARD, VOCABULARY, RANK = 8, 4, 12, 10, 2
PREFIX = "base_model.model."


def _block() -> nn.ModuleDict:
    attention = {"q_proj": nn.Linear(HIDDEN, HIDDEN), "v_proj": nn.Linear(HIDDEN, KV, bias=False)}
    feedforward = {"down_proj": nn.Linear(FEEDFORWARD, HIDDEN)}
    return nn.ModuleDict({"self_attn": nn.ModuleDict(attention), "mlp": nn.ModuleDict(feedforward)})


def _model() -> nn.Module:
    body = {"embed_tokens": nn.Embedding(VOCABULARY, HIDDEN), "layers": nn.ModuleList([_block(), _block()])}
    return nn.ModuleDict({"model": nn.ModuleDict(body), "lm_head": nn.Linear(HIDDEN, VOCABULARY, bias=False)})


with torch.random.fork_rng():
    torch.manual_seed(0)
    SITES = sites_of(_model())


@dataclass(slots=True)
class Saved:
    """A tensor in a file: `shape` and `dtype` are what the header says, whatever `data` is."""

    name: str
    dtype: str
    shape: Any
    data: bytes


@dataclass(slots=True)
class Adapter:
    """An adapter that may be changed before it is written."""

    config: dict[str, Any]
    tensors: list[Saved]
    header: dict[str, Any]  # what the header says beside, or instead

    def weights(self) -> bytes:
        entries, data = {}, b""
        for saved in self.tensors:
            offsets = [len(data), len(data) + len(saved.data)]
            entries[saved.name] = {"dtype": saved.dtype, "shape": saved.shape, "data_offsets": offsets}
            data += saved.data
        return packed(entries | self.header, data)


def _adapter(config: dict[str, Any], *shapes: tuple[str, tuple[int, ...]]) -> Adapter:
    generator = torch.Generator().manual_seed(len(shapes))
    tensors = [
        Saved(PREFIX + name, "F32", list(shape), torch.randn(shape, generator=generator).numpy().tobytes())
        for name, shape in shapes
    ]
    return Adapter(config, tensors, {})


def _pair(module: str, d_in: int, d_out: int) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return (f"{module}.lora_A.weight", (RANK, d_in)), (f"{module}.lora_B.weight", (d_out, RANK))


ATTENTION = "model.layers.0.self_attn"
QUERY = _pair(f"{ATTENTION}.q_proj", HIDDEN, HIDDEN)
VALUE = _pair(f"{ATTENTION}.v_proj", HIDDEN, KV)
DOWN = _pair("model.layers.1.mlp.down_proj", FEEDFORWARD, HIDDEN)
LAMBDAS = (f"{ATTENTION}.q_proj.vera_lambda_b", (HIDDEN,)), (f"{ATTENTION}.q_proj.vera_lambda_d", (RANK,))
LORA = {"peft_type": "LORA", "r": RANK, "lora_alpha": 4, "bias": "none"}
VERA = {"peft_type": "VERA", "r": RANK, "projection_prng_key": 3}

VALID: dict[str, Adapter] = {
    "lora": _adapter(LORA | {"target_modules": ["q_proj", "v_proj", "down_proj"]}, *QUERY, *VALUE, *DOWN),
    "rslora": _adapter(
        LORA | {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.\d.*": 3}}, *QUERY
    ),
    "biases": _adapter(
        LORA | {"bias": "all", "lora_bias": True}, *QUERY, (f"{ATTENTION}.q_proj.base_layer.bias", (HIDDEN,))
    ),
    "embedding": _adapter(
        LORA,
        ("model.embed_tokens.lora_embedding_A", (RANK, VOCABULARY)),
        ("model.embed_tokens.lora_embedding_B", (HIDDEN, RANK)),
        ("model.embed_tokens.base_layer.weight", (VOCABULARY, HIDDEN)),
    ),
    "dora": _adapter(LORA | {"use_dora": True}, *QUERY, (f"{ATTENTION}.q_proj.lora_magnitude_vector", (HIDDEN,))),
    "blocks": _adapter(
        LORA | {"use_bdlora": {"nblocks": 2}},
        (f"{ATTENTION}.q_proj.lora_A.weight", (RANK, HIDDEN // 2)),
        (f"{ATTENTION}.q_proj.lora_B.weight", (HIDDEN, RANK)),
    ),
    "vera": _adapter(VERA, *LAMBDAS, ("vera_A", (RANK, HIDDEN)), ("vera_B", (HIDDEN, RANK))),
    "vera-drawn": _adapter(VERA | {"save_projection": False}, *LAMBDAS),
    "ia3": _adapter(
        {"peft_type": "IA3", "feedforward_modules": ["down_proj"]},
        (f"{ATTENTION}.q_proj.ia3_l", (HIDDEN, 1)),
        ("model.layers.1.mlp.down_proj.ia3_l", (1, FEEDFORWARD)),
    ),
    "road": _adapter(
        {"peft_type": "ROAD", "variant": "road_2", "group_size": 2},
        (f"{ATTENTION}.q_proj.road_theta", (HIDDEN,)),
        (f"{ATTENTION}.q_proj.road_alpha", (HIDDEN,)),
    ),
    "oft": _adapter(
        {"peft_type": "OFT", "oft_block_size": 2, "r": 0, "bias": "all", "num_cayley_neumann_terms": 3},
        (f"{ATTENTION}.q_proj.oft_R.weight", (HIDDEN // 2, 1)),
        (f"{ATTENTION}.q_proj.base_layer.bias", (HIDDEN,)),
        ("model.embed_tokens.oft_embedding_R.weight", (HIDDEN // 2, 1)),
    ),
    "boft": _adapter(
        {"peft_type": "BOFT", "boft_block_size": 2},
        (f"{ATTENTION}.q_proj.boft_R", (1, HIDDEN // 2, 2, 2)),
        (f"{ATTENTION}.q_proj.boft_s", (HIDDEN, 1)),
    ),
    "lokr": _adapter(
        {"peft_type": "LOKR", "r": RANK, "alpha": 2, "decompose_both": True},
        (f"{ATTENTION}.q_proj.lokr_w1_a", (2, RANK)),
        (f"{ATTENTION}.q_proj.lokr_w1_b", (RANK, 2)),
        (f"{ATTENTION}.q_proj.lokr_w2", (HIDDEN // 2, HIDDEN // 2)),
    ),
    "c3a": _adapter(
        {"peft_type": "C3A", "block_size": 2}, (f"{ATTENTION}.q_proj.c3a_kernel", (HIDDEN // 2,) * 2 + (2,))
    ),
}

WORDS = ("", "all", "none", "LORA", "VERA", "IA3", "lora", "q_proj", "(a+)+b", "\ud800", "\0", "é", "a" * 600)
ATOMS = (
    None, True, False, 0, 1, -1, 2, 3, 8, 512, 513, 2**31, 2**53, 2**63, -(2**63), 10**400, 0.5, 1e-320, 1e38, 1e308,
    float("nan"), float("inf"), *WORDS,
)  # fmt: skip
FIELDS = (
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "bias", "lora_bias",
    "use_bdlora", "init_lora_weights", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "modules_to_save", "save_projection", "projection_prng_key", "feedforward_modules", "base_model_name_or_path",
    "fan_in_fan_out", "auto_mapping", "trainable_token_indices", "layer_replication", "", "warp", "variant",
    "group_size", "oft_block_size", "num_cayley_neumann_terms", "use_cayley_neumann", "coft", "eps", "block_share",
    "alpha", "peft_version",
)  # fmt: skip
PATTERNS = ("q_proj", r".*\.0\..*", "(q|v)_proj", "((a*)*)*", "[", *WORDS)
SIZES = (*range(10), 64, 513, 2**31, 2**53)
TYPES = ("F32", "F16", "BF16", "I64", "I32", "F64", "F8_E4M3", "BOOL", "C64", "")
PREFIXES = (PREFIX, "", "module.", PREFIX * 2)
MODULES = (*SITES, "q_proj", "layers.0.mlp.down_proj", "vera_A", "model", "", "model.layers.9.mlp.up_proj")
ENDINGS = (
    "lora_A.weight", "lora_B.weight", "lora_A.default.weight", "lora_B.bias", "bias", "base_layer.bias", "weight",
    "vera_lambda_b", "lora_magnitude_vector", "ia3_l", "base_layer.weight", "lora_embedding_A", "lora_velora_embed", "",
    "road_theta", "oft_R.weight", "boft_R", "lokr_w1", "lokr_w2_a", "lokr_w2_b", "c3a_kernel",
)  # fmt: skip
# As float32 and as bfloat16: NaN, infinities, the largest, denormal, zero, a large one.
SPECIAL = (
    b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\x80\xff", b"\xff\xff\x7f\x7f", b"\x01\0\0\0", b"\0\0\0\0", b"\0\0\0\x7f"
)  # fmt: skip
INSERTED = (b"[" * 3000, b"{}", b'"', b",", b"\xff", b"\0" * 8, b"-", b"9" * 50)


def _json(dice: Random, depth: int = 3) -> Any:
    """Any value; lists and objects seldom."""
    kind = dice.randrange(6)
    if depth == 0 or kind > 1:
        return dice.choice(ATOMS)
    items = [_json(dice, depth - 1) for _ in range(dice.randrange(4))]
    return items if kind else {dice.choice(WORDS): item for item in items}


def _name(dice: Random) -> str:
    if dice.random() < 0.2:
        return dice.choice(WORDS)
    return f"{dice.choice(PREFIXES)}{dice.choice(MODULES)}.{dice.choice(ENDINGS)}"


def _some(dice: Random, values: Sequence[Any]) -> list[Any]:
    return [dice.choice(values) for _ in range(dice.randrange(4))]


def _chosen(dice: Random, adapter: Adapter) -> Saved:
    if not adapter.tensors:
        adapter.tensors.append(Saved("again", "F32", [1], bytes(4)))
    return dice.choice(adapter.tensors)


def _set_field(dice: Random, adapter: Adapter) -> None:
    adapter.config[dice.choice(FIELDS)] = _json(dice)


def _set_patterns(dice: Random, adapter: Adapter) -> None:
    name = dice.choice(("rank_pattern", "alpha_pattern"))
    adapter.config[name] = {pattern: dice.choice(ATOMS) for pattern in _some(dice, PATTERNS)}


def _drop_field(dice: Random, adapter: Adapter) -> None:
    adapter.config.pop(dice.choice(FIELDS), None)


def _rename(dice: Random, adapter: Adapter) -> None:
    _chosen(dice, adapter).name = _name(dice)


def _drop(dice: Random, adapter: Adapter) -> None:
    adapter.tensors.remove(_chosen(dice, adapter))


def _repeat(dice: Random, adapter: Adapter) -> None:
    adapter.tensors.append(copy.copy(_chosen(dice, adapter)))
    adapter.tensors[-1].name = _name(dice)


def _reshape(dice: Random, adapter: Adapter) -> None:
    """Another shape, with the data that belongs to it if that is not too much."""
    saved = _chosen(dice, adapter)
    saved.shape = _some(dice, SIZES)
    num_bytes = 4 * math.prod(saved.shape)
    if num_bytes < 1 << 16:
        saved.data = (saved.data * (num_bytes // max(len(saved.data), 1) + 1))[:num_bytes]


def _transpose(dice: Random, adapter: Adapter) -> None:
    saved = _chosen(dice, adapter)
    saved.shape = saved.shape[::-1]


def _retype(dice: Random, adapter: Adapter) -> None:
    """Another type, often of half the width, with as much data or with half of it."""
    saved = _chosen(dice, adapter)
    saved.dtype = dice.choice(TYPES)
    if dice.random() < 0.5:
        saved.data = saved.data[: len(saved.data) // 2]


def _poison(dice: Random, adapter: Adapter) -> None:
    saved = _chosen(dice, adapter)
    count = dice.choice((1, len(saved.data) // 4))
    saved.data = (dice.choice(SPECIAL) * count + saved.data[4 * count :])[: len(saved.data)]


def _say_otherwise(dice: Random, adapter: Adapter) -> None:
    """The header's entry of a tensor says something else, or something that is no entry at all."""
    offsets = _some(dice, (*SIZES, -4, 16, 32, 48, 96, 192))
    entry = {"dtype": dice.choice(TYPES), "shape": _some(dice, SIZES), "data_offsets": offsets}
    if dice.random() < 0.5:
        entry[dice.choice(tuple(entry))] = _json(dice)
    name = dice.choice(("__metadata__", _name(dice), _chosen(dice, adapter).name))
    adapter.header[name] = dice.choice((entry, _json(dice)))


Change = Callable[[Random, Adapter], None]
CHANGES: tuple[Change, ...] = (
    _set_field, _set_field, _set_patterns, _drop_field, _rename, _drop, _repeat, _reshape, _transpose, _retype, _poison,
    _say_otherwise,
)  # fmt: skip


def _damaged(dice: Random, text: bytes) -> bytes:
    """A bit flipped, bytes put in or taken out, the end cut off, or another length in front."""
    data = bytearray(text)
    at = dice.randrange(len(data) + 1)
    match dice.choice(("flip", "insert", "remove", "cut", "length")):
        case "flip":
            data[at : at + 1] = bytes(byte ^ 1 << dice.randrange(8) for byte in data[at : at + 1])
        case "insert":
            data[at:at] = dice.choice((dice.randbytes(4), *INSERTED))
        case "remove":
            del data[at : at + dice.randrange(16)]
        case "cut":
            del data[at:]
        case "length":
            data[:8] = dice.choice((dice.randrange(4096), dice.getrandbits(64))).to_bytes(8, "little")
    return bytes(data)


def changed_files(dice: Random) -> tuple[bytes, bytes]:
    """The files of an adapter (config, weights) that was valid before a few changes, or still is."""
    adapter = copy.deepcopy(VALID[dice.choice(tuple(VALID))])
    for _ in range(dice.randrange(4)):
        dice.choice(CHANGES)(dice, adapter)
    config, weights = json.dumps(adapter.config).encode(), adapter.weights()
    for _ in range(dice.choice((0, 0, 1, 2))):
        if dice.random() < 0.3:
            config = _damaged(dice, config)
        else:
            weights = _damaged(dice, weights)
    return config, weights


def read(folder: Path, config: bytes, weights: bytes) -> Lowered | GraftError:
    """What the reader makes of the files; whatever else it raises than a refusal goes through."""
    (folder / CONFIG_FILE).write_bytes(config)
    (folder / WEIGHTS_FILE).write_bytes(weights)
    try:
        return lower(Checkpoint.open(folder), SITES)
    except (BadRequest, TooLarge) as refusal:
        return refusal


def check(folder: Path, config: bytes, weights: bytes) -> str:
    """Asserts what must hold of any two files; "accepted", or the class of the refusal."""
    tracemalloc.start()
    try:
        begun_s = time.thread_time()
        result = read(folder, config, weights)
        cpu_s, (_, peak_bytes) = time.thread_time() - begun_s, tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert cpu_s < MAX_CPU_S
    assert peak_bytes < MAX_BYTES
    if isinstance(result, Lowered):
        check_fits(result)
        return "accepted"
    assert 0 < len(result.message) < MAX_MESSAGE
    return type(result).__name__


def check_fits(lowered: Lowered) -> None:
    """An accepted adapter edits sites that there are, with finite tensors of their widths."""
    assert lowered.edits
    assert lowered.rank == max(edit.rank for edit in lowered.edits.values())
    for path, edit in lowered.edits.items():
        site, rank = SITES[path], edit.rank
        widths = {"down": (rank, site.d_in), "up": (rank, site.d_out), "in_scale": (site.d_in,)}
        widths |= dict.fromkeys(("mid_scale", "mid_shift"), (rank,))
        widths |= dict.fromkeys(("up_scale", "out_scale", "out_shift"), (site.d_out,))
        for name, tensor in edit.tensors().items():
            assert tuple(tensor.shape) == widths[name]
            assert tensor.dtype == torch.float32
            assert bool(tensor.isfinite().all())


def run(folder: Path, numbers: Iterable[int]) -> Counter[str]:
    """Checks the examples of these numbers; how they ended. A defect is raised with its number."""
    ended: Counter[str] = Counter()
    for number in numbers:
        try:
            ended[check(folder, *changed_files(Random(number)))] += 1
        except Exception as defect:
            raise AssertionError(f"example {number}: {defect!r}") from defect
    return ended


def main() -> int:
    parser = argparse.ArgumentParser(description="fuzz the reader of adapters")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--first", type=int, default=0, help="number of the first example")
    parser.add_argument("--example", type=int, help="check this one alone, and show its files")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if chosen.example is not None:
            sys.stdout.write(f"{changed_files(Random(chosen.example))}\n{run(folder, [chosen.example])}\n")
            return 0
        ended: Counter[str] = Counter()
        end_s = time.monotonic() + chosen.seconds
        while time.monotonic() < end_s:
            first = chosen.first + ended.total()
            ended += run(folder, range(first, first + ROUND))
    sys.stdout.write(f"{ended.total()} examples: {dict(ended)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Adapters that share tensors take the room of what they do not share: counted by the tiers themselves.

At a small shape here; `load_tests/sharing.py` does the same for Llama-3.1-8B's.
"""

from pathlib import Path

import pytest
import torch

from load_tests.sharing import linears, lora_file, measure, plain_bytes, shape_of, taken, variants, vera_file
from server.adapters.device.device import DeviceTier
from server.adapters.format.checkpoint import Checkpoint
from server.adapters.host import HostTier
from server.adapters.lowering import lower
from server.model.outline import Outline
from server.model.site import Site

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
COUNT = 1000
RANK = 4
MODULES = ("q_proj", "k_proj", "down_proj")
INPUTS, OUTPUTS = (64, 64, 160), (64, 32, 64)
BFLOAT16_BYTES, FLOAT32_BYTES = 2, 4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Outline:
    return shape_of(tmp_path_factory.mktemp("base"), SIZES)


@pytest.fixture(scope="module")
def sites(base: Outline) -> dict[str, Site]:
    return linears(base, MODULES)


def test_plain_loras_share_nothing(base: Outline, sites: dict[str, Site], tmp_path: Path) -> None:
    first = lower(Checkpoint.open(lora_file(tmp_path / "lora", sites, RANK)), sites)
    counted = taken(base, variants(first, ("down", "up"), 20))
    assert counted.device_bytes == 20 * RANK * (sum(INPUTS) + sum(OUTPUTS)) * BFLOAT16_BYTES
    assert counted.device_bytes == plain_bytes(sites, RANK, 20)
    assert counted.host_bytes == counted.num_host_adapters * counted.device_bytes // 20


def test_a_thousand_lora_fas_have_one_a(base: Outline, sites: dict[str, Site], tmp_path: Path) -> None:
    first = lower(Checkpoint.open(lora_file(tmp_path / "lora", sites, RANK)), sites)
    counted = taken(base, variants(first, ("up",), COUNT))
    assert counted.num_adapters == COUNT
    assert counted.device_bytes == RANK * (sum(INPUTS) + COUNT * sum(OUTPUTS)) * BFLOAT16_BYTES
    assert counted.device_bytes < 0.6 * plain_bytes(sites, RANK, COUNT)


def test_a_thousand_veras_of_one_key_have_one_projection_for_each_width(
    base: Outline, sites: dict[str, Site], tmp_path: Path
) -> None:
    rank = 16
    first = lower(Checkpoint.open(vera_file(tmp_path / "vera", sites, rank)), sites)
    counted = taken(base, variants(first, ("mid_scale", "up_scale"), COUNT))
    projections = rank * (sum(set(INPUTS)) + sum(set(OUTPUTS))) * BFLOAT16_BYTES
    assert counted.device_bytes == projections + COUNT * sum(OUTPUTS) * FLOAT32_BYTES
    assert counted.rank_vector_bytes == COUNT * rank * len(OUTPUTS) * FLOAT32_BYTES
    kept = counted.num_host_adapters
    assert counted.host_bytes == projections + kept * (sum(OUTPUTS) + rank * len(OUTPUTS)) * FLOAT32_BYTES
    assert 10 * counted.device_bytes < plain_bytes(sites, rank, COUNT)


def test_the_report_has_both_methods_beside_plain_lora_of_their_ranks() -> None:
    report = measure(SIZES, lora_rank=RANK, vera_rank=16, count=3)
    assert [(row["method"], row["rank"], row["num_sites"], row["num_adapters"]) for row in report["rows"]] == [
        ("lora-fa", RANK, 2, 3),
        ("vera", 16, 7, 3),
    ]
    assert all(row["times_smaller"] > 1 for row in report["rows"])


def test_what_is_shared_goes_with_its_last_user(base: Outline, sites: dict[str, Site], tmp_path: Path) -> None:
    first = lower(Checkpoint.open(vera_file(tmp_path / "vera", sites, 8)), sites)
    host = HostTier(1 << 30, torch.bfloat16)
    device = DeviceTier(base.table, 1 << 24, torch.bfloat16, torch.device("cpu"))
    for name, adapter in zip("abc", variants(first, ("mid_scale", "up_scale"), 3), strict=True):
        device.admit(name, host.put(name, adapter))
    shares = [(device.release(name), host.drop(name)) for name in "abc"]
    assert shares[0] == shares[1]
    assert shares[2][0] > shares[1][0]
    assert (device.used_bytes, host.used_bytes) == (0, 0)

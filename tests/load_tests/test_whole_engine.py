"""The whole engine's benchmark, tiny and on a CPU: what its report holds. Its times say nothing here."""

import json
from pathlib import Path

import pytest
import torch

from load_tests.engine_parts import class_of, mixes, names_of
from load_tests.random_base import RandomBase
from load_tests.whole_engine import Budget, main


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    out = tmp_path_factory.mktemp("whole") / "report.json"
    asked = [
        "--shape",
        "tiny",
        "--device",
        "cpu",
        "--bases",
        "none",
        "--parts",
        "decode",
        "swap",
        "--batches",
        "1",
        "4",
    ]
    assert main([*asked, "--steps", "3", "--out", str(out)]) == 0
    return json.loads(out.read_text())


def test_the_report_names_machine_shape_and_command(report: dict) -> None:
    assert report["schema"] == "graftserve-whole-engine/1"
    assert {"date", "commit", "device", "torch", "transformers"} <= report["machine"].keys()
    assert report["shape"] == "tiny"
    assert report["num_parameters"] > 0
    assert report["copy_bytes_per_s"] > 0
    assert "--shape tiny" in report["command"]
    assert report["skipped"] == []


def test_a_decode_is_compared_with_its_bytes_and_the_base(report: dict) -> None:
    rows = {(row["batch"], row["adapters"]): row for row in report["rows"] if row["part"] == "decode"}
    assert rows.keys() == {(batch, label) for batch in (1, 4) for label in mixes(batch)}
    assert all(row["ms_per_step"] > 0 and row["tokens_per_s"] > 0 and row["share_of_copy"] > 0 for row in rows.values())
    assert rows[1, "none"]["of_base_only"] == 1
    base, one, distinct = (rows[4, label]["must_move_mb"] for label in ("none", "1 LoRA", "distinct LoRA"))
    rank_rows = 1e-6 * 2 * 16 * 2 * (64 * 4 + 64 * 2 + 32 * 2 + 3 * (64 + 192))  # bf16, r=16, two layers, all linears
    assert one - base == pytest.approx(rank_rows, rel=0.1)
    assert distinct - base == pytest.approx(4 * (one - base))


def test_a_swap_tells_its_speed_and_what_steps_felt(report: dict) -> None:
    rows = [row for row in report["rows"] if row["part"] == "swap"]
    assert [row["batch"] for row in rows] == [1, 4]
    assert all(row["gb_per_s"] > 0 and row["of_pinned_copy"] > 0 and row["num_steps_beside"] >= 0 for row in rows)


def test_what_there_is_no_time_for_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report.json"
    assert main(["--shape", "tiny", "--device", "cpu", "--seconds", "0", "--batches", "1", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["rows"] == []
    assert len(report["skipped"]) == 9
    assert "nf4: PEFT adapter_names" in report["skipped"]
    assert "skipped" in capsys.readouterr().err


def test_the_first_base_gets_the_largest_part_of_the_time() -> None:
    budget = Budget(60.0, 3)
    budget.next_base()
    assert not budget.is_spent
    assert Budget(0.0, 1).is_spent


def test_a_base_of_a_real_shape_is_known_without_making_it() -> None:
    base = RandomBase("llama-3.1-8b", torch.device("cpu"))
    assert base.num_parameters == 8_030_261_248
    assert RandomBase("qwen2.5-0.5b", torch.device("cpu")).num_parameters == 494_032_768
    assert len(base.linears) == 7 * 32


def test_every_sequence_of_the_distinct_mix_has_its_own() -> None:
    assert len({*mixes(64)["distinct LoRA"]}) == 64
    assert len({*mixes(64)["Zipf LoRA"]}) < 64
    assert names_of([4], 6) == sorted([*(f"lora-{i:03d}" for i in range(6)), "dora-000", "vera-000", "ia3-000"])


@pytest.mark.parametrize(
    ("name", "of"),
    [("_shrink", "adapters"), ("_attend", "attention"), ("nvjet_hsh_128x8", "base"), ("kgemm_4bit", "base"),
     ("reduce_kernel_ArgMaxOps", "sampling"), ("vectorized_elementwise_kernel", "rest")],
)  # fmt: skip
def test_kernels_are_told_apart_by_name(name: str, of: str) -> None:
    assert class_of(name) == of

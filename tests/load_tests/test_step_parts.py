"""Where a step's time goes: parts inside parts count once, nothing stays replaced, and a real run finds every part."""

import json
import time
from pathlib import Path

import pytest

from load_tests.step_parts import Stopwatch, main, table
from server.engine.chosen import Chosen
from server.ops import native

WHOLE = "forward: whole layers, adapters included"


def test_a_part_inside_a_part_counts_once() -> None:
    watch = Stopwatch()

    def busy() -> None:
        until_s = time.thread_time() + 0.02
        while time.thread_time() < until_s:
            pass

    inner = watch.timing("inner", busy)
    begun_s = time.thread_time()
    watch.timing("outer", lambda: (inner(), busy()))()
    all_s = time.thread_time() - begun_s
    assert watch.spent_s["inner"] >= 0.02
    assert watch.spent_s["outer"] >= 0.02
    assert watch.spent_s["inner"] + watch.spent_s["outer"] <= all_s


def test_a_part_that_fails_is_counted_and_says_so() -> None:
    watch = Stopwatch()

    def fails() -> None:
        raise ValueError("as it does without a watch")

    with pytest.raises(ValueError, match="as it does"):
        watch.timing("failing", fails)()
    assert watch.spent_s["failing"] > 0


def test_the_table_gives_each_part_its_share() -> None:
    lines = table({"none": {"a": 3.0, "b": 1.0}, "1 LoRA": {"a": 1.0, "b": 1.0}}).splitlines()
    assert lines[2] == "| a | 3.00 (75%) | 1.00 (50%) |"
    assert lines[-1] == "| all | 4.00 | 2.00 |"


@pytest.mark.slow
def test_a_run_times_every_part_and_leaves_nothing_replaced(tmp_path: Path) -> None:
    read = Chosen.read
    out = tmp_path / "parts.json"
    assert main(["--streams", "2", "--tokens", "8", "--rounds", "1", "--out", str(out)]) == 0
    columns = json.loads(out.read_text())["ms"]
    assert set(columns) == {"none", "1 LoRA", "distinct LoRA"}
    found = columns["distinct LoRA"]
    of_layers = {part: found.pop(part) for part in ("forward: adapters", "forward: attention", WHOLE)}
    assert all(ms > 0 for ms in found.values())
    # Where a processor multiplies bfloat16, a layer is one call, and its parts are not told apart.
    is_one = native.multiplies_bfloat16()
    assert {part for part, ms in of_layers.items() if ms > 0} == ({WHOLE} if is_one else of_layers.keys() - {WHOLE})
    assert columns["none"]["forward: adapters"] == 0
    assert Chosen.read is read

"""The bytes in docs/methods.md are those that `examples/adapter_sizes.py` counts."""

from collections.abc import Mapping

import pytest

from demo.recipes import METHODS
from examples.adapter_sizes import Size, sizes
from tests.demo_files import ROOT

PAGE = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def counted() -> Mapping[str, Size]:
    return sizes()


def test_the_page_says_what_is_counted(counted: Mapping[str, Size]) -> None:
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.splitlines() if line.startswith("|")]
    for technique, size in counted.items():
        (row,) = [row for row in rows if technique in row[0].split(", ") and row[1] == size.chosen]
        assert row[2].startswith(f"{size.megabytes:.2f} MB"), technique


def test_lora_on_every_linear_is_counted_as_by_hand(counted: Mapping[str, Size]) -> None:
    """q and o: 4096 each way; k and v: to 1024; gate, up and down: 4096 and 14336."""
    ends = 2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14_336)
    assert counted["LoRA"].num_numbers == 32 * 16 * ends
    assert counted["VeRA"].num_numbers == 32 * (7 * 256 + 2 * 4096 + 2 * 1024 + 2 * 14_336 + 4096)


def test_every_technique_that_can_be_trained_has_its_row() -> None:
    # The last two columns are the command's name of the technique, and the demo's adapter.
    commands = {line.rsplit("|", 3)[1].strip().strip("`") for line in PAGE.splitlines() if line.count("|") == 6}
    assert set(METHODS) <= commands

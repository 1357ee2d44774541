"""The picture of a run is a file of the wanted kind, small enough to be kept, whatever the run was like."""

import struct
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from load_tests.outcome import Outcome
from load_tests.report import Limits, report
from tests.load_tests.outcomes import cancelled, completed, failed, request

plot = pytest.importorskip("load_tests.plot", reason="needs matplotlib", exc_type=ModuleNotFoundError)
MAX_BYTES = 100_000


def whole(outcomes: Sequence[Outcome], num_adapters: int) -> dict[str, Any]:
    names = [f"adapter-{rank}" for rank in range(1, num_adapters + 1)]
    found = report(outcomes, names, 1.0, 30.0, Limits(0.5, 0.1))
    return {"workload": {"num_adapters": num_adapters}, "slo": {"ttft_ms": 500.0}} | found


def busy_run() -> list[Outcome]:
    """Three thousand requests of two hundred adapters, with a queue that builds up."""
    asked = [request(number, number * number % 200 + 1, number / 100) for number in range(3000)]
    run = [completed(one, ttft_s=0.01 * (1 + one.number % 97) + one.number / 1000) for one in asked]
    return [*run[:-20], *(failed(o.request) for o in run[-20:-10]), *(cancelled(o.request) for o in run[-10:])]


def test_a_png_has_three_panels_in_less_than_a_hundred_kilobytes(tmp_path: Path) -> None:
    path = tmp_path / "run.png"
    plot.draw(busy_run(), whole(busy_run(), 200), path)
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", content[16:24]) == (1040, 320)
    assert len(content) < MAX_BYTES


@pytest.mark.parametrize(
    ("outcomes", "num_adapters"),
    [
        ([completed(request(0, 1)), completed(request(1, 1), ttft_s=0.3)], 1),
        ([completed(request(0, 0))], 0),
        ([failed(request(0, 1)), cancelled(request(1, 3, 2.0))], 3),
        ([], 5),
    ],
    ids=["one adapter", "the bare base", "nothing completed", "nothing arrived"],
)
def test_every_run_has_a_picture(tmp_path: Path, outcomes: list[Outcome], num_adapters: int) -> None:
    path = tmp_path / "run.png"
    plot.draw(outcomes, whole(outcomes, num_adapters), path)
    assert 0 < path.stat().st_size < MAX_BYTES


def test_an_svg_names_its_axes_and_has_no_date(tmp_path: Path) -> None:
    path = tmp_path / "run.svg"
    run = [completed(request(0, 1)), failed(request(1, 2, 1.0))]
    plot.draw(run, whole(run, 4), path)
    text = path.read_text(encoding="utf-8")
    assert ElementTree.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"
    assert "time to first token, ms" in text
    assert "<dc:date>" not in text

"""The dashboard's panels as a picture: gaps, legends and units, with a Prometheus that is made up."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from load_tests import dashboard_panels
from load_tests.dashboard_panels import DASHBOARD, draw, on_grid

SPAN = (1000.0, 1010.0)


def test_a_series_that_was_not_there_leaves_a_gap() -> None:
    values = on_grid([(1000.0, 1.0), (1004.0, 3.0)], [1000.0, 1002.0, 1004.0])
    assert [values[0], values[2]] == [1, 3]
    assert math.isnan(values[1])


def test_the_legend_leaves_out_what_is_zero_all_along_unless_all_is() -> None:
    zero, some = ("zero", [(0.0, 0.0)]), ("some", [(0.0, 2.0)])
    assert dashboard_panels._names([zero, some]) == ["_", "some"]
    assert dashboard_panels._names([zero]) == ["zero"]


def test_units_are_written_for_people() -> None:
    units = {name: write for name, (_, write) in dashboard_panels._UNITS.items()}
    written = [
        units[name](value) for name, value in (("percentunit", 0.5), ("bytes", 3 << 20), ("s", 0.25), ("s", 2.0))
    ]
    assert written == ["50 %", "3 MiB", "250 ms", "2 s"]
    drawn = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    assert {panel["fieldConfig"]["defaults"]["unit"] for panel in drawn if "targets" in panel} <= units.keys()


def test_every_panel_is_drawn_and_those_without_a_value_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(prometheus: str, expr: str, span: tuple[float, float], step_s: float) -> list[Any]:
        value = 0.0 if "preemptions" in expr or "rotations" in expr or "steps_shed" in expr else 2.0
        return [({"adapter": "a"}, [(at, value) for at in (span[0], span[1])])]

    monkeypatch.setattr(dashboard_panels, "answer", answer)
    assert draw("http://none", SPAN, 2.0, tmp_path / "drawn.png") == ["Set back"]
    assert (tmp_path / "drawn.png").read_bytes().startswith(b"\x89PNG")

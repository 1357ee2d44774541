"""From rows to targets, by hand: met, missed where, and not measured."""

from dataclasses import replace

import pytest

from load_tests.kernel_targets import Row, Speeds, layers, targets

SPEEDS = Speeds(copy_bytes_per_s=1e12, flops_per_s=1e15, launch_s=1e-6)
NUM_GROUPS = {"m": 2}
PEERS, MIXED, BYTES = range(3)


def _row(way: str, us: float | None, *, group: str = "a", is_mixed: bool = False, is_right: bool = True) -> Row:
    group_s = None if us is None else us * 1e-6
    share = None if group_s is None else 10e6 / group_s / SPEEDS.copy_bytes_per_s
    return Row("m", group, "b", way, way != "kernels", is_mixed, 10_000_000, 1000, relative_error=1e-3,
               is_right=is_right, group_s=group_s, copy_share=share)  # fmt: skip


def _target(number: int, *rows: Row, speeds: Speeds | None = SPEEDS) -> dict[str, object]:
    summary: dict[str, object] = list(targets(rows, NUM_GROUPS, speeds).values())[number]
    return summary


def test_ours_is_held_to_the_fastest_peer() -> None:
    summary = _target(PEERS, _row("kernels", 12), _row("x", 20), _row("y", 10))
    assert (summary["met"], summary["num_compared"]) == (False, 1)
    [missed] = summary["missed"]  # type: ignore[misc]
    assert (missed["peer"], missed["group"], missed["batch"]) == ("y", "a", "b")
    assert missed["reached"] == pytest.approx(10 / 12)
    assert _target(PEERS, _row("kernels", 10), _row("x", 20), _row("y", 10))["met"] is True


def test_a_wrong_peer_and_one_that_does_not_serve_are_no_measure() -> None:
    wrong, absent = _row("x", 1, is_right=False), replace(_row("y", None), not_served="no DoRA")
    summary = _target(PEERS, _row("kernels", 12), wrong, absent)
    assert (summary["met"], summary["num_compared"], summary["least"]) == (None, 0, None)


def test_mixed_ranks_are_compared_by_layer() -> None:
    ours = [_row("kernels", us, group=group, is_mixed=True) for group, us in (("a", 10), ("b", 10))]
    peer = [_row("x", us, group=group, is_mixed=True) for group, us in (("a", 5), ("b", 26))]
    summary = _target(MIXED, *ours, *peer)
    assert (summary["met"], summary["num_compared"]) == (True, 1)
    assert summary["least"] == pytest.approx(1.55)
    assert _target(MIXED, *ours, *peer[:1])["met"] is None  # half of its layer is missing
    assert _target(MIXED, *ours, replace(peer[0], is_right=False), peer[1])["met"] is None
    assert _target(MIXED, *(replace(row, has_mixed_ranks=False) for row in (*ours, *peer)))["met"] is None


def test_the_share_of_a_copy_counts_where_the_bytes_take_longest() -> None:
    assert _target(BYTES, _row("kernels", 15))["met"] is True  # 10 us of bytes in 15
    assert _target(BYTES, _row("kernels", 20))["met"] is False
    launches = replace(SPEEDS, launch_s=6e-6)
    assert _target(BYTES, _row("kernels", 20), speeds=launches)["met"] is None
    products = replace(SPEEDS, flops_per_s=1e7)
    assert _target(BYTES, _row("kernels", 20), speeds=products)["met"] is None
    assert _target(BYTES, _row("kernels", None), speeds=None)["met"] is None


def test_a_layer_is_the_sum_of_its_groups() -> None:
    [layer] = layers([_row("kernels", 10), _row("kernels", 5, group="b")], NUM_GROUPS)
    assert layer.layer_s == pytest.approx(15e-6)
    [layer] = layers([_row("kernels", 10)], NUM_GROUPS)
    assert layer.layer_s is None

"""A slot's sheet says what the slot's edits are, and no list of rows twice."""

import torch

from server.ops.sheets import (
    ABSENT,
    DOWN,
    IN_SCALE,
    MID_SCALE,
    MID_SHIFT,
    NUM_FIELDS,
    OUT_SHIFT,
    RANK,
    UP,
    SiteRows,
    make_sheet,
)


def test_a_blank_sheet_has_no_rank_and_no_vectors() -> None:
    sheet = make_sheet(3, {}).view(3, NUM_FIELDS)
    assert sheet.dtype is torch.int32
    assert sheet[:, RANK].tolist() == [0, 0, 0]
    assert sheet[:, MID_SCALE:].eq(ABSENT).all()


def test_a_sheet_leads_to_every_row_and_value() -> None:
    scale = torch.tensor([1.5, -2.0])
    sheet = make_sheet(4, {2: SiteRows((7, 3), (5, 9), mid_scale=scale, vectors={IN_SCALE: 11, OUT_SHIFT: 0})})
    fields = sheet[2 * NUM_FIELDS : 3 * NUM_FIELDS]
    assert (fields[RANK], fields[IN_SCALE], fields[OUT_SHIFT], fields[MID_SHIFT]) == (2, 11, 0, ABSENT)
    assert sheet[fields[DOWN] :][:2].tolist() == [7, 3]
    assert sheet[fields[UP] :][:2].tolist() == [5, 9]
    torch.testing.assert_close(sheet[fields[MID_SCALE] :][:2].view(torch.float32), scale, rtol=0, atol=0)
    assert sheet[: 2 * NUM_FIELDS].equal(make_sheet(2, {}))


def test_shared_projections_are_listed_once() -> None:
    shared = SiteRows(tuple(range(256)), tuple(range(256, 512)))
    assert len(make_sheet(8, dict.fromkeys(range(8), shared))) == 8 * NUM_FIELDS + 512

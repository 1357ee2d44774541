"""Whatever the two files of an adapter are, they are refused with a sentence, or read as tensors that fit."""

import json
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.adapters.method import Lowered
from tests.adapters.reader_fuzz import VALID, changed_files, check, check_fits, read, run


@pytest.mark.parametrize("kind", VALID)
def test_what_is_changed_was_valid_before(kind: str, tmp_path: Path) -> None:
    lowered = read(tmp_path, json.dumps(VALID[kind].config).encode(), VALID[kind].weights())
    assert isinstance(lowered, Lowered), lowered
    check_fits(lowered)


@settings(max_examples=150, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(dice=st.randoms(use_true_random=False))
def test_changed_files_are_refused_with_a_sentence_or_fit(tmp_path: Path, dice: Random) -> None:
    check(tmp_path, *changed_files(dice))


def test_more_of_them_by_number(tmp_path: Path) -> None:
    ended = run(tmp_path, range(300))
    assert ended.keys() == {"accepted", "AdapterRejected"}
    assert min(ended.values()) > 30, "the changes are neither all harmless nor all fatal"


@pytest.mark.slow
@pytest.mark.timeout(1200)  # of computing without a pause; other processes may have the cores
def test_many_of_them_by_number(tmp_path: Path) -> None:
    assert run(tmp_path, range(300, 50_000)).total() == 49_700

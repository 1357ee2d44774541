"""The two shapes of log-probabilities, where a live model would not show their corners."""

import math

import pytest

from server.api import logprobs
from server.engine.sequence import TokenLogprobs
from server.model.tokenizer import Tokenizer
from tests.models import EOS_ID, byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(byte_tokenizer(), frozenset())


@pytest.fixture(scope="module")
def ids(tokenizer: Tokenizer) -> dict[str, int]:
    return {char: tokenizer.encode(char)[0] for char in "abc"}


def test_offsets_go_on_from_where_the_chunk_begins(tokenizer: Tokenizer, ids: dict[str, int]) -> None:
    offsets = logprobs.TextOffsets(tokenizer.decoder(()), 10)
    entries = [TokenLogprobs(ids[char], -1.0) for char in "abc"]
    assert offsets.following(entries[:2]) == [10, 11]
    listed = logprobs.legacy(entries[2:], tokenizer, offsets.following(entries[2:]))
    assert listed["text_offset"] == [12]


def test_what_is_not_in_the_text_takes_no_room_in_it(tokenizer: Tokenizer) -> None:
    text = "café €5"
    token_ids = [256, *tokenizer.encode(text), EOS_ID, 256]
    offsets = logprobs.TextOffsets(tokenizer.decoder(()), 0).following([TokenLogprobs(i, -1.0) for i in token_ids])
    assert offsets == [0, 0, 1, 2, 3, 3, 4, 5, 5, 5, 6, 7, 7]
    assert len(text) == 7


def test_the_token_itself_joins_its_rivals_when_it_is_not_among_them(tokenizer: Tokenizer, ids: dict[str, int]) -> None:
    unlikely = TokenLogprobs(ids["c"], -7.0, ((ids["a"], -0.5), (ids["b"], -1.5)))
    assert logprobs.legacy([unlikely], tokenizer, [0])["top_logprobs"] == [{"a": -0.5, "b": -1.5, "c": -7.0}]


def test_rivals_that_read_the_same_are_kept_apart(tokenizer: Tokenizer) -> None:
    halves = tokenizer.encode("é")  # two tokens, each half a character
    entry = TokenLogprobs(halves[0], -0.1, ((halves[0], -0.1), (halves[1], -2.0)))
    (top,) = logprobs.legacy([entry], tokenizer, [0])["top_logprobs"]
    assert top == {"\ufffd": -0.1, f"token_id:{halves[1]}": -2.0}


def test_half_characters_have_their_bytes(tokenizer: Tokenizer) -> None:
    entries = [TokenLogprobs(token_id, -1.0) for token_id in tokenizer.encode("é")]
    listed = logprobs.chat(entries, tokenizer)["content"]
    assert bytes(byte for entry in listed for byte in entry["bytes"]).decode() == "é"


def test_the_impossible_is_a_number_that_json_has(tokenizer: Tokenizer, ids: dict[str, int]) -> None:
    entry = TokenLogprobs(ids["a"], -math.inf, ((ids["b"], 0.0), (ids["c"], -math.inf)))
    legacy = logprobs.legacy([entry], tokenizer, [0])
    assert legacy["token_logprobs"] == [logprobs.FLOOR]
    assert legacy["top_logprobs"] == [{"b": 0.0, "c": logprobs.FLOOR, "a": logprobs.FLOOR}]
    (listed,) = logprobs.chat([entry], tokenizer)["content"]
    assert (listed["logprob"], listed["top_logprobs"][1]["logprob"]) == (logprobs.FLOOR, logprobs.FLOOR)


def test_the_first_token_of_a_prompt_has_no_score(tokenizer: Tokenizer, ids: dict[str, int]) -> None:
    legacy = logprobs.legacy([TokenLogprobs(ids["a"], None)], tokenizer, [0])
    assert legacy == {"tokens": ["a"], "token_logprobs": [None], "top_logprobs": [None], "text_offset": [0]}

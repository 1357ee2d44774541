"""Stop strings under `min_tokens` and `include_stop_str_in_output`: which one counts, and what of it the text keeps."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.model.tokenizer import Tokenizer
from tests.models import EOS_ID, byte_tokenizer

BYTES = Tokenizer(byte_tokenizer(), frozenset({EOS_ID}))
PROMPT = BYTES.encode("prompt")


def read(text: str, stops: list[str], *, min_tokens: int = 0, includes_stop: bool = False) -> tuple[str, bool]:
    """The text that comes out when `text` goes in a byte at a time, as the engine gives it."""
    decoder = BYTES.decoder(PROMPT, stops, min_tokens=min_tokens, includes_stop=includes_stop)
    out = ""
    for token in BYTES.encode(text):
        out += decoder.push([token])
        if decoder.is_stopped:
            return out, True
    return out + decoder.flush(), decoder.is_stopped


@settings(max_examples=80, derandomize=True)
@given(
    st.text("abé", max_size=14),
    st.lists(st.text("abé", min_size=1, max_size=3), min_size=1, max_size=3),
    st.integers(0, 16),
    st.booleans(),
)
def test_the_stop_string_counts_that_a_late_enough_token_completes(
    text: str, stops: list[str], min_tokens: int, includes: bool
) -> None:
    """By the definition: of the places where one ends, the first that more than `min_tokens` tokens reach."""
    num_tokens = [len(text[:end].encode()) for end in range(len(text) + 1)]  # one per byte
    ends = [
        (end, end - len(stop))
        for end in range(len(text) + 1)
        for stop in stops
        if text[:end].endswith(stop) and num_tokens[end] > min_tokens
    ]
    cut = None if not ends else min(ends)[0 if includes else 1]
    assert read(text, stops, min_tokens=min_tokens, includes_stop=includes) == (text[:cut], bool(ends))


def test_what_begins_before_the_last_unstoppable_token_may_end_after_it() -> None:
    assert read("xab", ["ab"], min_tokens=2) == ("x", True)
    assert read("xab", ["ab"], min_tokens=3) == ("xab", False)


@pytest.mark.parametrize("includes", [False, True])
def test_nothing_follows_the_stop_string(includes: bool) -> None:
    decoder = BYTES.decoder(PROMPT, ["stop"], includes_stop=includes)
    assert decoder.push(BYTES.encode("a stop b")) == ("a stop" if includes else "a ")
    assert decoder.push(BYTES.encode("c")) + decoder.flush() == ""

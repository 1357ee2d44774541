"""Text to tokens and back: deltas that add up to the whole text, and stop strings that never show."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models
from transformers import PreTrainedTokenizerFast

from server.ground.errors import BadRequest, StartupRefused
from server.model.tokenizer import IncrementalDecoder, Tokenizer
from tests.models import EOS_ID, byte_tokenizer

examples = settings(max_examples=200, deadline=None, derandomize=True)
BYTES = Tokenizer(byte_tokenizer(), frozenset())
PROMPT = BYTES.encode("prompt é")
# Surrogates cannot be encoded; U+FFFD is what half a character decodes to.
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=12)
piece_sizes = st.lists(st.integers(1, 5), min_size=1, max_size=8)


def pieces(ids: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    """The tokens in pushes of these sizes, which repeat."""
    out, at, turn = [], 0, 0
    while at < len(ids):
        size = sizes[turn % len(sizes)]
        out.append(list(ids[at : at + size]))
        at, turn = at + size, turn + 1
    return out


def deltas(decoder: IncrementalDecoder, ids: Sequence[int], sizes: Sequence[int] = (1,)) -> list[str]:
    """What a reader gets: a delta per push until a stop string, and the end."""
    out = []
    for piece in pieces(ids, sizes):
        out.append(decoder.push(piece))
        if decoder.is_stopped:
            return out
    return [*out, decoder.flush()]


# Incremental decoding


@examples
@given(texts, piece_sizes)
def test_deltas_add_up_to_the_text_and_never_show_half_a_character(text: str, sizes: list[int]) -> None:
    ids = BYTES.encode(text)
    got = deltas(BYTES.decoder(PROMPT), ids, sizes)
    assert "".join(got) == BYTES.decode(ids) == text
    assert not any("\ufffd" in delta for delta in got)


@examples
@given(texts)
def test_a_character_comes_with_its_last_byte(text: str) -> None:
    decoder = BYTES.decoder(PROMPT)
    for character in text:
        *first, last = [decoder.push([token]) for token in BYTES.encode(character)]
        assert set(first) <= {""}
        assert last == character


@examples
@given(st.lists(st.integers(0, 255), max_size=12), piece_sizes)
def test_bytes_that_are_no_text_come_out_as_replacement_characters(ids: list[int], sizes: list[int]) -> None:
    assert "".join(deltas(BYTES.decoder(PROMPT), ids, sizes)) == BYTES.decode(ids)


def test_special_tokens_are_not_text() -> None:
    ids = [*BYTES.encode("a"), 258, *BYTES.encode("b"), EOS_ID]
    assert deltas(BYTES.decoder(PROMPT), ids) == ["a", "", "b", "", ""]


def test_a_prompt_cut_within_a_character_does_not_disturb_what_follows() -> None:
    for cut in range(1, 4):
        prompt = BYTES.encode("x🎉")[cut:-1]
        last = BYTES.encode("🎉")[-1:]
        decoder = BYTES.decoder(prompt)
        assert "".join([decoder.push(last), decoder.push(BYTES.encode("ab"))]).endswith("ab")


def sentencepiece_like() -> Tokenizer:
    """A vocabulary whose word starts carry their space, and which drops the space that a text begins with."""
    words = ["<unk>", "▁Hello", "▁world", "é", "<0x0A>", "<0xE4>", "<0xBD>", "<0xA0>", "lo", "▁"]
    raw = RawTokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True))
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")  # type: ignore[no-untyped-call]
    return Tokenizer(fast, frozenset())


def test_spaces_that_depend_on_the_left_neighbour_are_kept() -> None:
    tokenizer = sentencepiece_like()
    assert deltas(tokenizer.decoder([1]), [2, 8, 2]) == [" world", "lo", " world", ""]


def test_byte_tokens_of_other_vocabularies_wait_for_their_character() -> None:
    tokenizer = sentencepiece_like()
    assert deltas(tokenizer.decoder([1]), [5, 6, 7, 2]) == ["", "", "你", " world", ""]


# Stop strings


@examples
@given(
    st.text("ab🎉", max_size=14),
    st.lists(st.text("ab🎉", min_size=1, max_size=4), min_size=1, max_size=3),
    piece_sizes,
)
def test_text_ends_exactly_where_the_first_complete_stop_string_begins(
    text: str, stops: list[str], sizes: list[int]
) -> None:
    ids = BYTES.encode(text)
    decoder = BYTES.decoder(PROMPT, stops)
    got = "".join(deltas(decoder, ids, sizes))
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert got == (text[: min(ends)[1]] if ends else text)
    assert decoder.is_stopped == bool(ends)


@examples
@given(st.text("ab", max_size=14), st.text("ab", min_size=1, max_size=4))
def test_no_delta_holds_what_a_stop_string_takes_back(text: str, stop: str) -> None:
    """At every moment what was emitted is a prefix of the answer, and what is held back might still be the stop."""
    decoder = BYTES.decoder(PROMPT, [stop])
    answer = text.split(stop)[0]
    emitted = ""
    for n, token in enumerate(BYTES.encode(text), start=1):
        if decoder.is_stopped:
            break
        emitted += decoder.push([token])
        assert answer.startswith(emitted)
        assert stop.startswith(text[len(emitted) : n]) or decoder.is_stopped


def test_after_a_stop_string_nothing_comes() -> None:
    decoder = BYTES.decoder(PROMPT, ["b"])
    assert decoder.push(BYTES.encode("abab")) == "a"
    assert decoder.push(BYTES.encode("more")) == decoder.flush() == ""


def test_the_stop_string_that_is_complete_first_wins_however_the_text_is_cut() -> None:
    for sizes in ([1], [3]):
        assert "".join(deltas(BYTES.decoder(PROMPT, ["xyz", "y"]), BYTES.encode("xyz"), sizes)) == "x"


def test_a_stop_string_hidden_behind_half_a_character_is_found_at_the_end() -> None:
    decoder = BYTES.decoder(PROMPT, ["stop"])
    assert decoder.push([*BYTES.encode("a stop"), *BYTES.encode("é")[:1]]) == ""
    assert decoder.flush() == "a "
    assert decoder.is_stopped


def test_flush_gives_what_might_have_become_a_stop_string() -> None:
    decoder = BYTES.decoder(PROMPT, ["end"])
    assert decoder.push(BYTES.encode("the en")) == "the "
    assert decoder.flush() == "en"
    assert decoder.flush() == ""
    assert not decoder.is_stopped


# Single tokens


@pytest.mark.parametrize("byte", [0, 10, 32, 65, 0x80, 0xC3, 0xFF])
def test_a_byte_level_token_is_its_byte(byte: int) -> None:
    (token,) = (i for i in range(256) if BYTES.token_bytes(i) == bytes([byte]))
    assert BYTES.token_text(token) == (chr(byte) if byte < 0x80 else "\ufffd")


def test_special_tokens_are_shown_by_name() -> None:
    assert BYTES.token_text(EOS_ID) == "<|end|>"
    assert BYTES.token_bytes(EOS_ID) == b"<|end|>"


def test_a_token_reads_as_it_does_within_a_text() -> None:
    tokenizer = sentencepiece_like()
    assert [tokenizer.token_text(i) for i in (1, 3, 4, 8)] == [" Hello", "é", "\n", "lo"]
    assert [tokenizer.token_bytes(i) for i in (1, 3, 4, 5)] == [b" Hello", "é".encode(), b"\n", b"\xe4"]


# Encoding and templates


def test_a_conversation_becomes_its_tokens_with_the_assistants_turn_opened() -> None:
    ids = BYTES.chat([{"role": "user", "content": "hi"}])
    assert ids == [256, 258, *BYTES.encode("hi"), 259]


@pytest.mark.parametrize(
    "messages",
    [[{"role": "wizard", "content": "hi"}], [{"role": "user"}, {"role": None, "content": "x"}]],
    ids=["refused-by-the-template", "malformed"],
)
def test_what_the_template_refuses_names_the_messages(messages: list[dict[str, str]]) -> None:
    with pytest.raises(BadRequest, match="chat template refuses") as refused:
        BYTES.chat(messages)
    assert refused.value.param == "messages"


def test_a_base_without_a_template_points_to_completions() -> None:
    raw = byte_tokenizer()
    raw.chat_template = None
    tokenizer = Tokenizer(raw, frozenset())
    assert tokenizer.chat_template is None
    with pytest.raises(BadRequest, match="/v1/completions") as refused:
        tokenizer.chat([{"role": "user", "content": "hi"}])
    assert refused.value.param == "messages"


def test_loading_joins_the_end_tokens_of_tokenizer_and_model(tiny_llama: Path) -> None:
    tokenizer = Tokenizer.load(str(tiny_llama), frozenset({3}))
    assert tokenizer.eos_ids == {3, EOS_ID}
    assert tokenizer.vocab_size == 260


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartupRefused, match="cannot load a tokenizer from"):
        Tokenizer.load(str(tmp_path), frozenset())


def test_tokens_that_bring_no_text_are_not_decoded_again_and_again() -> None:
    """Stray bytes, and special tokens past the end: the window moves on, so that a push stays cheap."""
    (letter,) = BYTES.encode("x")
    for stray in (BYTES.encode("é")[1], EOS_ID):
        decoder = BYTES.decoder(PROMPT)
        text = "".join(decoder.push([stray]) for _ in range(500))
        assert len(decoder._ids) - decoder._prefix < 50
        assert decoder.push([letter]).endswith("x")
        assert set(text) <= {"\ufffd"}


def test_an_id_beyond_the_tokenizer_has_no_bytes() -> None:
    assert BYTES.token_bytes(BYTES.vocab_size + 5) == b""
    assert BYTES.token_text(BYTES.vocab_size + 5) == ""

"""Bytes to events in any pieces, and what the events of the servers that we know say."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from load_tests.events import DONE, BadEvent, Chunk, EventParser, error_message, read_chunk

# Anything that can stand on one line.
LINES = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=12)
EVENTS = st.lists(LINES, max_size=8)


def parsed(parts: list[bytes]) -> list[str]:
    parser = EventParser()
    return [data for part in parts for data in parser.feed(part)]


@st.composite
def pieces(draw: st.DrawFn, whole: bytes) -> list[bytes]:
    """`whole` cut at any places, between the bytes of a character too; pieces may be empty."""
    cuts = sorted(draw(st.lists(st.integers(0, len(whole)), max_size=12)))
    return [whole[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)]


@given(st.data(), EVENTS, st.sampled_from(["\n", "\r\n"]), st.sampled_from(["data: ", "data:"]))
def test_events_are_the_same_however_the_bytes_are_split(
    data: st.DataObject, events: list[str], newline: str, field: str
) -> None:
    # One space after the colon belongs to the framing, so a text that starts with one needs another before it.
    shown = ["data: " + event if event.startswith(" ") else field + event for event in events]
    stream = "".join(line + 2 * newline for line in shown).encode()
    assert parsed(data.draw(pieces(stream))) == events


@given(st.data(), st.binary(max_size=60))
def test_any_bytes_give_the_same_whole_or_in_pieces(data: st.DataObject, stream: bytes) -> None:
    assert parsed(data.draw(pieces(stream))) == parsed([stream])


def test_comments_other_fields_and_empty_events_pass() -> None:
    stream = b": ping\n\nevent: message\nid: 7\nretry: 5\ndata: a\n\n\n\nevent: end\n\ndatabase: no\n\ndata: b\n\n"
    assert parsed([stream]) == ["a", "b"]


def test_several_data_lines_are_one_event() -> None:
    assert parsed([b"data: {\ndata:  1\ndata\ndata: }\n\n"]) == ["{\n 1\n\n}"]


def test_an_event_without_its_empty_line_is_not_complete() -> None:
    assert parsed([b"data: a\n\ndata: b\n"]) == ["a"]


def test_bytes_that_are_no_utf8_do_not_stop_the_stream() -> None:
    assert parsed([b"data: \xff\n\ndata: b\n\n"]) == ["\ufffd", "b"]


def completion(text: str = "", finish_reason: str | None = None, **more: Any) -> str:
    return json.dumps({"choices": [{"index": 0, "text": text, "finish_reason": finish_reason}], "usage": None} | more)


def chat(**delta: Any) -> str:
    return json.dumps({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})


@pytest.mark.parametrize(
    ("data", "chunk"),
    [
        (completion(" sea"), Chunk(has_text=True)),
        (completion(""), Chunk()),
        (completion("", "stop"), Chunk(finish_reason="stop")),
        (completion(" sea", "length"), Chunk(has_text=True, finish_reason="length")),
        (chat(role="assistant", content=""), Chunk()),
        (chat(content=" sea"), Chunk(has_text=True)),
        (chat(content=None, reasoning_content="so"), Chunk(has_text=True)),
        (chat(reasoning="so"), Chunk(has_text=True)),
        (chat(refusal="no"), Chunk(has_text=True)),
        (chat(tool_calls=[{"index": 0}]), Chunk(has_text=True)),
        ('{"choices": []}', Chunk()),
        ('{"choices": null}', Chunk()),
        ("{}", Chunk()),
        (
            '{"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 0, "total_tokens": 9}}',
            Chunk(num_prompt_tokens=9, num_output_tokens=0),
        ),
        (
            completion(" sea", usage={"prompt_tokens": 9, "completion_tokens": 1}),
            Chunk(has_text=True, num_prompt_tokens=9, num_output_tokens=1),
        ),
        (completion(" sea", usage={"prompt_tokens": True, "completion_tokens": "1"}), Chunk(has_text=True)),
        (completion(" sea", usage=[9, 1]), Chunk(has_text=True)),
        ('{"error": {"message": "out of memory", "type": "InternalServerError"}}', Chunk(error="out of memory")),
        ('{"object": "error", "message": "out of memory", "code": 500}', Chunk(error="out of memory")),
        ('{"error": "Request failed", "error_type": "generation"}', Chunk(error="Request failed")),
        (completion(" sea", error=None), Chunk(has_text=True)),
    ],
)
def test_a_chunk_says_what_its_server_put_into_it(data: str, chunk: Chunk) -> None:
    assert read_chunk(data) == chunk


def test_text_in_any_choice_is_text() -> None:
    two = {"choices": [{"text": "", "finish_reason": None}, {"text": "a", "finish_reason": "stop"}]}
    assert read_chunk(json.dumps(two)) == Chunk(has_text=True, finish_reason="stop")


@pytest.mark.parametrize("data", [DONE, "", "{", "7", "[]", "null", '{"choices": {"a": 1}}', '{"choices": [1]}'])
def test_what_is_no_chunk_is_refused_and_shown(data: str) -> None:
    with pytest.raises(BadEvent) as caught:
        read_chunk(data)
    assert repr(data[:80]) in str(caught.value)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"error": {"message": "The model `x` does not exist.", "code": 404}}, "The model `x` does not exist."),
        ({"object": "error", "message": "no such model", "code": 404}, "no such model"),
        ({"error": "overloaded"}, "overloaded"),
        ({"error": {"code": 7}}, "{'code': 7}"),
        ({"detail": "Not Found"}, "{'detail': 'Not Found'}"),
        (["odd"], "['odd']"),
        (None, "None"),
    ],
)
def test_the_sentence_is_found_in_every_shape_of_error(answer: object, message: str) -> None:
    assert error_message(answer) == message

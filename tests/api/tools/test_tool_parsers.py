"""What each style of calls reads out of an answer's text, however the text comes in pieces."""

import json
import string

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from server.api.messages import Tool
from server.api.tools.forced import ForcedCalls, arguments_schema
from server.api.tools.pieces import (
    CallArguments,
    CallBegun,
    CallEnded,
    Content,
    Piece,
    PieceParser,
    Reasoning,
    joined,
)
from server.api.tools.styles import STYLES
from server.api.tools.think import ThinkParser

NAMES = frozenset({"weather", "f"})


def parser(style: str) -> PieceParser:
    if style == "required":
        return ForcedCalls.of(None)
    if style == "named":
        return ForcedCalls.of("weather")
    if style == "think":
        return ThinkParser(STYLES["hermes"].parser(NAMES), is_inside=True)
    return STYLES[style].parser(NAMES)


def pieces_of(style: str, portions: list[str]) -> list[Piece]:
    reader = parser(style)
    said = [piece for portion in portions for piece in reader.push(portion)]
    return joined(said + reader.finish())


def call(index: int, name: str, arguments: str) -> list[Piece]:
    return [CallBegun(index, name), CallArguments(index, arguments), CallEnded(index)]


PARIS = '{"city": "Paris \\"{[", "days": [1, {"x": null}]}'
EXPECTED: list[tuple[str, str, list[Piece]]] = [
    ("hermes", "Only words.\n", [Content("Only words.\n")]),
    (
        "hermes",
        f'Let me look.\n<tool_call>\n{{"name": "weather", "arguments": {PARIS}}}\n</tool_call>\n',
        [Content("Let me look."), *call(0, "weather", PARIS)],
    ),
    (
        "hermes",
        '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>\n<tool_call>\n{"name": "g"}\n</tool_call>\nDone.',
        [*call(0, "f", '{"a": 1}'), *call(1, "g", "{}"), Content("Done.")],
    ),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', call(0, "f", '{"a": 1}')),
    ("hermes", '<tool_call>{"name": "f", "arguments": null}', call(0, "f", "{}")),
    ("hermes", "<tool_call>what?</tool_call> So.", [Content("<tool_call>what?</tool_call> So.")]),
    ("hermes", '<tool_call>{"name": 5, "arguments": {}}', [Content('<tool_call>{"name": 5, "arguments": {}}')]),
    ("hermes", "a < b <tool", [Content("a < b <tool")]),
    ("hermes", '<tool_call>{"name": "f", "argum', [Content('<tool_call>{"name": "f", "argum')]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a', [CallBegun(0, "f"), CallArguments(0, '{"a')]),
    ("llama", f' {{"name": "weather", "parameters": {PARIS}}}', call(0, "weather", PARIS)),
    (
        "llama",
        '{"name": "f", "parameters": {}}; {"type": "function", "name": "weather", "parameters": {"a": 1}}\n',
        [*call(0, "f", "{}"), *call(1, "weather", '{"a": 1}')],
    ),
    ("llama", '<|python_tag|>{"name": "other", "parameters": {}}', call(0, "other", "{}")),
    ("llama", "<|python_tag|>print(1)", [Content("<|python_tag|>print(1)")]),
    ("llama", '{"name": "Ada", "age": 36}', [Content('{"name": "Ada", "age": 36}')]),
    ("llama", '{"name": "f", "age": 36}', [Content('{"name": "f", "age": 36}')]),
    ("llama", '{"name": "f"}', [Content('{"name": "f"}')]),
    ("llama", "[1, 2]", [Content("[1, 2]")]),
    ("llama", 'As JSON: {"name": "f", "parameters": {}}', [Content('As JSON: {"name": "f", "parameters": {}}')]),
    (
        "mistral",
        f'[TOOL_CALLS] [{{"name": "weather", "arguments": {PARIS}}}, {{"id": "a", "name": "f", "arguments": {{}}}}]',
        [*call(0, "weather", PARIS), *call(1, "f", "{}")],
    ),
    (
        "mistral",
        f"I look.[TOOL_CALLS]weather{PARIS}[TOOL_CALLS]f[CALL_ID]abcDEF123[ARGS]{{}}",
        [Content("I look."), *call(0, "weather", PARIS), *call(1, "f", "{}")],
    ),
    ("mistral", "[TOOL_CALLS] no idea {}", [Content("[TOOL_CALLS] no idea {}")]),
    ("mistral", "[TOOL", [Content("[TOOL")]),
    ("required", f'[{{"name": "weather", "parameters": {PARIS}}}]', call(0, "weather", PARIS)),
    ("required", '[{"name": "wea', [Content('[{"name": "wea')]),
    ("named", PARIS, call(0, "weather", PARIS)),
    ("think", "\nHm.\n</think>\n\nYes.", [Reasoning("Hm."), Content("Yes.")]),
    (
        "think",
        'Hm. <tool_call> is how.</think>\n<tool_call>{"name": "f", "arguments": {}}</tool_call>',
        [Reasoning("Hm. <tool_call> is how."), *call(0, "f", "{}")],
    ),
    ("think", "Hm, cut o", [Reasoning("Hm, cut o")]),
]


@pytest.mark.parametrize(("style", "text", "expected"), EXPECTED)
def test_a_text_is_read_alike_whole_and_cut_anywhere(style: str, text: str, expected: list[Piece]) -> None:
    assert pieces_of(style, [text]) == expected
    assert pieces_of(style, list(text)) == expected
    for at in range(1, len(text)):
        assert pieces_of(style, [text[:at], text[at:]]) == expected


FRAGMENTS = st.sampled_from(
    [
        "<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<think>", "</think>",
        '{"name": "f", "arguments": {"a": "}"}}', '{"name": "weather", "parameters": {}}', '{"name"', '"arguments":',
        "{", "}", "[", "]", '"', "\\", ",", ":", ";", " ", "\n", "f", "weather", "é", "1.5", "null", "tool_call",
    ]
)  # fmt: skip


@settings(max_examples=60)
@given(
    style=st.sampled_from([*STYLES, "required", "named", "think"]),
    text=st.lists(FRAGMENTS, max_size=14).map("".join),
    cuts=st.lists(st.integers(0, 200), max_size=6),
)
@example(style="hermes", text='<tool_call>{"name":"f","arguments":{},"arguments":{}}', cuts=[])
def test_no_text_and_no_cut_of_it_makes_a_difference(style: str, text: str, cuts: list[int]) -> None:
    """Nor does any raise, begin a call twice, or say more of a call once another has begun."""
    edges = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    portions = [text[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    whole = pieces_of(style, [text])
    assert pieces_of(style, portions) == whole == pieces_of(style, list(text))
    assert [piece.index for piece in whole if isinstance(piece, CallBegun)] == list(
        range(sum(isinstance(piece, CallBegun) for piece in whole))
    )


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(string.printable + 'é"\\{}[]', max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=30)
@given(arguments=st.dictionaries(st.text(max_size=5), ANY_JSON, max_size=4), indent=st.sampled_from([None, 2]))
def test_any_arguments_come_through_as_they_were_written(arguments: dict[str, object], indent: int | None) -> None:
    text = json.dumps(arguments, ensure_ascii=False, indent=indent)
    written = {
        "hermes": f'<tool_call>\n{{"name": "f", "arguments": {text}}}\n</tool_call>',
        "llama": f'{{"name": "f", "parameters": {text}}}',
        "mistral": f"[TOOL_CALLS]f{text}",
        "required": f'[{{"name": "f", "parameters": {text}}}]',
    }
    for style, answer in written.items():
        assert pieces_of(style, list(answer)) == call(0, "f", text)


@pytest.mark.parametrize("parameters", [{}, {"parameters": None}])
def test_a_tool_without_parameters_has_no_arguments(parameters: dict[str, None]) -> None:
    tool = Tool.model_validate({"type": "function", "function": {"name": "f", **parameters}})
    assert arguments_schema(tool) == {"type": "object", "properties": {}, "additionalProperties": False}
    free = Tool.model_validate({"type": "function", "function": {"name": "f", "parameters": {}}})
    assert arguments_schema(free) == {"type": "object"}


@pytest.mark.parametrize("name", [None, "f"])
def test_what_has_been_said_of_a_call_is_not_kept(name: str | None) -> None:
    def kept(reader: object) -> int:
        held = [value for value in vars(reader).values() if isinstance(value, str)]
        inner = [value for value in vars(reader).values() if type(value).__module__ == "server.api.tools.call_json"]
        return sum(map(len, held)) + sum(kept(value) for value in inner if hasattr(value, "take"))

    reader = ForcedCalls.of(name)
    reader.push('{"a": "' if name else '[{"name": "f", "parameters": {"a": "')
    reader.push("x" * 10_000)
    assert kept(reader) < 1_000

"""Grammars of every form: what they let through, what is refused with which words, and that each is compiled once."""

import json
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from load_tests.schema_corpus import corpus
from server.ground.errors import Overloaded
from server.model import grammar as module
from server.model.grammar import Form, Grammars, GrammarSource, choice, expression, json_schema, json_value, literal
from server.model.grammar_trial import GrammarRefused, GrammarsUnavailable, TokenizerText
from server.model.tokenizer import Tokenizer
from tests.models import EOS_ID, VOCAB_SIZE

PERSON: Mapping[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


class Bench:
    """Grammars for the byte tokenizer, and what they say of texts."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.text = tokenizer.for_grammars(VOCAB_SIZE)
        self._tokenizer = self.text.loaded()
        self.grammars = Grammars(lambda: self.text)

    def allows(self, source: GrammarSource, text: str) -> bool:
        """Whether the text may come, and may end there."""
        matcher = self.grammars.compiled(source).result().start()
        return all(map(matcher.consume_token, self._tokenizer.tokenize_str(text))) and matcher.is_accepting()

    def refusal(self, source: GrammarSource) -> str:
        with pytest.raises(GrammarRefused) as refused:
            self.grammars.compiled(source).result()
        return str(refused.value)


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Iterator[Tokenizer]:
    loaded = Tokenizer.load(str(tiny_llama), frozenset({EOS_ID}))
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def bench(tokenizer: Tokenizer) -> Iterator[Bench]:
    made = Bench(tokenizer)
    yield made
    made.grammars.close()


def test_a_schema_lets_its_instances_through_and_nothing_else(bench: Bench) -> None:
    source = json_schema(PERSON)
    assert bench.allows(source, '{"name":"Ann","age":3}')
    assert not bench.allows(source, '{"name":"Ann"}')
    assert not bench.allows(source, '{"name":"Ann","age":"3"}')
    assert not bench.allows(source, '{"age":3,"name":"Ann"}')  # the order is the schema's
    assert not bench.allows(source, '{"name":"Ann","age":3} ')


def test_layout_is_one_space_or_one_new_line_with_its_indentation(bench: Bench) -> None:
    source, person = json_schema(PERSON), {"name": "Ann", "age": 3}
    for indent in (None, 0, 2, 4, "\t"):
        assert bench.allows(source, json.dumps(person, indent=indent))
    assert not bench.allows(source, '{"name":  "Ann","age":3}')
    assert not bench.allows(source, '{\n\n"name":"Ann","age":3}')


def test_layout_can_be_forbidden_or_chosen(bench: Bench) -> None:
    assert not bench.allows(json_schema(PERSON, ""), '{"name": "Ann","age":3}')
    assert bench.allows(json_schema(PERSON, "_{2}"), '{__"name":__"Ann","age":3}')


@pytest.mark.parametrize(
    ("format_", "good", "bad"),
    [
        ("date", ["2024-02-29", "2000-02-29", "1999-12-31"], ["2023-02-29", "1900-02-29", "0000-01-01", "2024-04-31"]),
        ("date-time", ["2024-02-29T23:59:59Z"], ["2023-02-29T00:00:00Z", "2024-01-01T23:59:60Z"]),
        ("time", ["23:59:59Z"], ["23:59:60Z", "24:00:00Z"]),
    ],
)
def test_dates_and_times_are_those_of_the_calendar(bench: Bench, format_: str, good: list[str], bad: list[str]) -> None:
    schema = {"$defs": {"when": {"type": "string", "format": format_}}, "anyOf": [{"$ref": "#/$defs/when"}]}
    for text in good:
        assert bench.allows(json_schema(schema), json.dumps(text)), text
    for text in bad:
        assert not bench.allows(json_schema(schema), json.dumps(text)), text


def test_data_in_a_schema_is_left_as_it_is(bench: Bench) -> None:
    assert bench.allows(json_schema({"const": {"format": "date"}}), '{"format":"date"}')


@pytest.mark.parametrize(
    "text", ["yes", 'say "no"', "new\nline", "a/b\\c", "\x00\x7f", "é漢😀", "(a|b)*", "\u2028", ""]
)
def test_a_choice_lets_each_of_its_texts_through(bench: Bench, text: str) -> None:
    source = choice(
        ["yes", 'say "no"', "new\nline", "a/b\\c", "\x00\x7f", "é漢😀", "(a|b)*", "\u2028", "", "yes and no"]
    )
    assert bench.allows(source, text)
    assert not bench.allows(source, text + "?")


def test_a_regex_is_of_the_whole_text(bench: Bench) -> None:
    source = GrammarSource(Form.REGEX, "[a-c]+|x/y")
    assert bench.allows(source, "abc")
    assert bench.allows(source, "x/y")
    assert not bench.allows(source, "abcd")
    assert bench.allows(GrammarSource(Form.REGEX, "^[a-c]+$"), "abc")


@pytest.mark.parametrize("text", ['root ::= "(" root ")" | "x"', 'start: "(" start ")" | "x"'], ids=["gbnf", "lark"])
def test_a_grammar_may_be_gbnf_or_lark(bench: Bench, text: str) -> None:
    assert bench.allows(GrammarSource(Form.GRAMMAR, text), "((x))")
    assert not bench.allows(GrammarSource(Form.GRAMMAR, text), "((x)")


def test_an_expression_joins_texts_and_json(bench: Bench) -> None:
    end = literal("</call>\n")
    call = f"{literal('<call>')} ({json_value({'type': 'integer'})} | {json_value(PERSON)}) {end}"
    assert bench.allows(expression(call), "<call>12</call>\n")
    assert bench.allows(expression(f"({call}){{1,2}}"), '<call>{"name": "", "age": 1}</call>\n<call>7</call>\n')
    assert not bench.allows(expression(call), "<call>true</call>\n")
    assert bench.allows(expression(f"{literal('')} {literal('a')}"), "a")


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"not": {"type": "string"}}, 'Unimplemented keys: ["not"]'),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"if": {"type": "string"}, "then": {"minLength": 1}}, "Unimplemented keys"),
        ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "oneOf constraints are not supported"),
        ({"type": "string", "format": "colour"}, "Unknown format: colour"),
        ({"type": "strin"}, "Invalid type: strin"),
        ({"type": "string", "pattern": "(a"}, "unclosed group"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"$ref": "#/$defs/gone"}, "does not exist"),
        ({"$ref": "https://example.com/schema.json"}, "not present in a registry"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum (5) is greater than maximum (3)"),
        ({"enum": []}, "Unsatisfiable"),
        (False, "schema is false"),
        ({"$ref": "#"}, "nothing satisfies it"),
        ({"type": "string", "pattern": "^a{5}$", "maxLength": 3}, "Unsatisfiable"),
    ],
)
def test_what_cannot_be_enforced_is_refused_in_one_line(bench: Bench, schema: Any, words: str) -> None:
    refusal = bench.refusal(json_schema(schema))
    assert words in refusal
    assert "\n" not in refusal


@pytest.mark.parametrize(
    ("form", "text", "words"),
    [
        (Form.REGEX, "(a", "unclosed group"),
        (Form.REGEX, r"[^\s\S]", "nothing satisfies it"),
        (Form.REGEX, "(" * 3000 + "a" + ")" * 3000, "nested parentheses"),
        (Form.REGEX, r"<\|user\|>", "special token"),
        (Form.GRAMMAR, "start: gone", 'unknown name: "gone"'),
        (Form.GRAMMAR, 'rule: "a"', "::="),
        (Form.LARK, 'rule: "a"', "no start rule"),
        (Form.LARK, 'start: "a" start', "Too many items"),
        (Form.GRAMMAR, "root ::= " + "(" * 3000 + '"a"' + ")" * 3000, "recursion"),
    ],
)
def test_a_grammar_that_does_not_parse_is_refused(bench: Bench, form: Form, text: str, words: str) -> None:
    assert words in bench.refusal(GrammarSource(form, text))


def test_a_grammar_that_overflows_the_compilers_stack_takes_only_its_trial_with_it(bench: Bench) -> None:
    chain = {f"d{n}": {"type": "array", "items": {"$ref": f"#/$defs/d{n + 1}"}} for n in range(3000)}
    deep = {"$ref": "#/$defs/d0", "$defs": {**chain, "d3000": True}}
    assert "nested too deeply" in bench.refusal(json_schema(deep))
    rules = "\n".join(["start: r0", *(f"r{n}: r{n + 1}" for n in range(5000)), 'r5000: "a"'])
    assert "nested too deeply" in bench.refusal(GrammarSource(Form.LARK, rules))
    assert bench.allows(json_schema({"const": "after the crash"}), '"after the crash"')


def test_a_grammar_that_takes_too_long_is_given_up(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.model.grammar_trial._CPU_S", 0.2)
    grammars = Grammars(lambda: bench.text)
    patterns = [{"type": "string", "pattern": f".*a.{{{n}}}b"} for n in range(1, 24)]
    try:
        with pytest.raises(GrammarRefused, match=r"more than 0\.2 s"):
            grammars.compiled(json_schema({"allOf": patterns})).result()
        assert grammars.compiled(json_schema(PERSON)).result().vocab_size == VOCAB_SIZE
    finally:
        grammars.close()


def test_a_process_that_the_system_has_ended_is_started_again(bench: Bench) -> None:
    bench.grammars.compiled(json_schema({"const": 1})).result()
    assert bench.grammars._trial is not None
    process = bench.grammars._trial._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    bench.grammars.compiled(json_schema({"const": 2})).result()


def test_a_tokenizer_without_grammars_refuses_each_and_is_asked_again(bench: Bench) -> None:
    """A process that could not start says nothing about the grammar, so the next request tries again."""
    texts = iter([TokenizerText("{}", VOCAB_SIZE, ()), bench.text])
    grammars = Grammars(lambda: next(texts))
    try:
        with pytest.raises(GrammarsUnavailable):
            grammars.compiled(json_schema(PERSON)).result()
        grammars.compiled(json_schema(PERSON)).result()
    finally:
        grammars.close()


def test_a_vocabulary_smaller_than_the_tokenizers_has_no_grammars(tokenizer: Tokenizer) -> None:
    with pytest.raises(GrammarsUnavailable, match="vocab size"):
        tokenizer.for_grammars(VOCAB_SIZE - 10).loaded()


def test_equal_sources_are_compiled_once_even_at_the_same_time(bench: Bench) -> None:
    is_open, num_loads = threading.Event(), []

    def load() -> TokenizerText:
        num_loads.append(1)
        assert is_open.wait(60)
        return bench.text

    grammars = Grammars(load)
    try:
        futures = {id(grammars.compiled(json_schema(dict(PERSON)))) for _ in range(20)}
        is_open.set()
        assert len(futures) == 1
        assert grammars.compiled(json_schema(PERSON)).result() is grammars.compiled(json_schema(PERSON)).result()
        assert len(num_loads) == 1
    finally:
        grammars.close()


def test_the_cache_forgets_the_longest_unused(bench: Bench) -> None:
    grammars = Grammars(lambda: bench.text, max_kept=2)
    try:
        first = [grammars.compiled(json_schema({"const": n})).result() for n in range(2)]
        assert grammars.compiled(json_schema({"const": 0})).result() is first[0]
        grammars.compiled(json_schema({"const": 2})).result()
        assert grammars.compiled(json_schema({"const": 0})).result() is first[0]
        assert grammars.compiled(json_schema({"const": 1})).result() is not first[1]
    finally:
        grammars.close()


def test_too_many_that_wait_turn_the_next_away(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PENDING", 3)
    is_open = threading.Event()

    def load() -> TokenizerText:
        assert is_open.wait(60)
        return bench.text

    grammars = Grammars(load)
    try:
        waiting = [grammars.compiled(json_schema({"const": n})) for n in range(3)]
        with pytest.raises(Overloaded):
            grammars.compiled(json_schema({"const": 3}))
        assert grammars.compiled(json_schema({"const": 0})) is waiting[0]
        is_open.set()
        for future in waiting:
            future.result()
        grammars.compiled(json_schema({"const": 3})).result()
    finally:
        is_open.set()
        grammars.close()


def test_the_corpus_is_of_valid_schemas_that_compile(bench: Bench) -> None:
    schemas = corpus()
    assert len(schemas) >= 120
    for schema in schemas.values():
        Draft202012Validator.check_schema(schema)
        bench.grammars.compiled(json_schema(schema)).result()

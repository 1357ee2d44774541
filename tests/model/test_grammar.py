"""Grammars of every form: what they let through, what is refused with which words, and that each is compiled once."""

import errno
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from load_tests.schema_corpus import corpus
from server.ground.errors import Overloaded
from server.model import grammar as module
from server.model import grammar_trial
from server.model.grammar import Form, Grammars, GrammarSource, choice, expression, json_schema, json_value, literal
from server.model.grammar_trial import GrammarRefused, GrammarsUnavailable, TokenizerText
from server.model.tokenizer import Tokenizer
from tests.models import EOS_ID, VOCAB_SIZE

needs_glibc = pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="glibc says what malloc gave")

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


def test_a_tokenizer_without_grammars_refuses_each_and_is_read_once(bench: Bench) -> None:
    """To read one stops the server, also where nothing comes of it."""
    texts = iter([TokenizerText("{}", VOCAB_SIZE, ()), bench.text])
    grammars = Grammars(lambda: next(texts))
    try:
        grammars.load()
        for schema in (PERSON, PERSON, {"const": 1}):
            with pytest.raises(GrammarsUnavailable):
                grammars.compiled(json_schema(schema)).result()
        assert next(texts) is bench.text
    finally:
        grammars.close()


def test_a_tokenizer_that_cannot_be_written_down_has_no_grammars() -> None:
    def load() -> TokenizerText:
        raise RuntimeError("custom parts cannot be serialized")

    grammars = Grammars(load)
    try:
        grammars.load()
        with pytest.raises(GrammarsUnavailable, match="custom parts"):
            grammars.compiled(json_schema(PERSON)).result()
    finally:
        grammars.close()


def test_a_tokenizer_that_is_loaded_is_not_read_again(bench: Bench) -> None:
    texts = iter([bench.text])
    grammars = Grammars(lambda: next(texts))
    try:
        grammars.load()
        assert next(texts, None) is None
        assert grammars.compiled(json_schema(PERSON)).result().vocab_size == VOCAB_SIZE
    finally:
        grammars.close()


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EAGAIN, errno.ENOMEM])
def test_a_machine_without_room_for_a_process_says_nothing_of_the_grammar(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    grammars = Grammars(lambda: bench.text)
    try:
        with monkeypatch.context() as patch:
            patch.setattr("server.model.grammar_trial.subprocess.Popen", fail)
            with pytest.raises(Overloaded, match=os.strerror(number)):
                grammars.compiled(json_schema(PERSON)).result()
        assert grammars.compiled(json_schema(PERSON)).result().vocab_size == VOCAB_SIZE
    finally:
        grammars.close()


def test_one_that_was_cancelled_is_compiled_when_it_is_asked_for_again(bench: Bench) -> None:
    is_open = threading.Event()

    def load() -> TokenizerText:
        assert is_open.wait(60)
        return bench.text

    grammars = Grammars(load)
    try:
        grammars.compiled(json_schema({"const": 1}))
        assert grammars.compiled(json_schema(PERSON)).cancel()
        again = grammars.compiled(json_schema(PERSON))
        is_open.set()
        assert again.result().vocab_size == VOCAB_SIZE
    finally:
        is_open.set()
        grammars.close()


def stopped_process(grammars: Grammars) -> int:
    """The id of the process, which goes on to live and does nothing."""
    grammars.compiled(json_schema({"const": 1})).result()
    assert grammars._trial is not None
    process = grammars._trial._process
    assert process is not None
    stop(process.pid)
    return process.pid


def stop(pid: int) -> None:
    """Returns when every thread of a child has stopped: until one of them takes the signal, the others go on."""
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED)


def test_a_process_that_is_silent_is_ended_and_the_next_grammar_has_another(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    grammars = Grammars(lambda: bench.text)
    try:
        stopped = stopped_process(grammars)
        with monkeypatch.context() as patch:
            patch.setattr("server.model.grammar_trial._WALL_S", 0.1)
            with pytest.raises(Overloaded, match="does not answer"):
                grammars.compiled(json_schema({"const": 2})).result()
        with pytest.raises(ProcessLookupError):
            os.kill(stopped, 0)
        grammars.compiled(json_schema({"const": 2})).result()
    finally:
        grammars.close()


def test_a_process_that_is_silent_holds_up_no_end(bench: Bench) -> None:
    grammars = Grammars(lambda: bench.text)
    stopped = stopped_process(grammars)
    waiting = grammars.compiled(json_schema({"const": 2}))
    while not waiting.running():  # cancelled otherwise
        time.sleep(0.001)
    grammars.close()
    assert isinstance(waiting.exception(), Overloaded)
    with pytest.raises(ProcessLookupError):
        os.kill(stopped, 0)


def test_an_end_while_a_process_starts_says_nothing_of_the_tokenizer(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    spawned, is_stopped = grammar_trial._spawned, threading.Event()

    def stopped() -> "subprocess.Popen[bytes]":
        process = spawned()
        stop(process.pid)
        is_stopped.set()
        return process

    monkeypatch.setattr(grammar_trial, "_spawned", stopped)
    grammars = Grammars(lambda: bench.text)
    waiting = grammars.compiled(json_schema(PERSON))
    assert is_stopped.wait(60)
    grammars.close()
    assert isinstance(waiting.exception(), Overloaded)


def test_a_process_knows_nothing_of_the_servers_environment(bench: Bench) -> None:
    bench.grammars.compiled(json_schema({"const": 1})).result()
    assert bench.grammars._trial is not None
    bench.grammars._trial.compilable(Form.REGEX, "a")  # it may have been ended by the test before
    process = bench.grammars._trial._process
    assert process is not None
    assert Path(f"/proc/{process.pid}/environ").read_bytes() == b""


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


def large(number: int) -> GrammarSource:
    """A short text that is much once it is compiled."""
    rules = (f"r{n}: /[a-z]{{3}}{number}{n}/ r{n + 1}" for n in range(200))
    return GrammarSource(Form.LARK, "\n".join(["start: r0", *rules, 'r200: "a"']))


@needs_glibc
def test_the_cache_is_bounded_by_what_compiled_grammars_take(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    grammars = Grammars(lambda: bench.text)
    try:
        first = grammars.compiled(large(1)).result()
        assert first.compiled_bytes > 10 * len(large(1).text)
        assert abs(grammars.compiled(large(2)).result().compiled_bytes - first.compiled_bytes) < 50_000
        assert grammars.compiled(large(1)).result() is first
        monkeypatch.setattr(module, "_MAX_KEPT_BYTES", first.compiled_bytes)
        grammars.compiled(json_schema(PERSON)).result()
        assert grammars.compiled(large(1)).result() is not first
    finally:
        grammars.close()


@needs_glibc
def test_a_grammar_that_is_too_large_once_it_is_compiled_is_refused(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.model.grammar_trial._MAX_COMPILED_BYTES", 1 << 18)
    assert "more than the 0 MiB" in bench.refusal(large(3))
    assert bench.allows(GrammarSource(Form.REGEX, "[ab]"), "a")


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

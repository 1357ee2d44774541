"""Structured output over HTTP: answers keep to what was asked, with everything else that a request may ask for."""

import asyncio
import json
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from load_tests import structured as load_test
from load_tests.schema_corpus import corpus
from load_tests.structured import Asker, answer_figures, answers, invalid
from server.api import structured
from server.api.structured import MAX_CHOICE_BYTES, MAX_DEPTH, MAX_OPTIONS, MAX_REGEX_BYTES, MAX_SCHEMA_BYTES
from server.model.grammar import Grammar, Grammars, GrammarSource, choice
from tests.api.conftest import Gate, Live, eventually

PET: Mapping[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "kind": {"enum": ["dog", "cat"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 30},
    },
    "required": ["name", "kind", "age"],
    "additionalProperties": False,
}
LETTERS = {"structured_outputs": {"regex": "[a-z]{16}"}}
PAIR = {"structured_outputs": {"json": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 2}}}


def named(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "pet", "schema": schema}}}


def complete(live: Live, **fields: Any) -> dict[str, Any]:
    body = {"prompt": "a pet: ", "max_tokens": 120, "temperature": 1, "seed": 1} | fields
    said = live.post("/v1/completions", **body)
    assert said.status_code == 200, said.text
    answer: dict[str, Any] = said.json()
    return answer


def text_of(answer: Mapping[str, Any]) -> str:
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "stop"
    return str(choice["text"])


def refused(live: Live, path: str = "/v1/completions", **fields: Any) -> dict[str, Any]:
    said = live.post(path, **{"prompt": "a", "max_tokens": 5} | fields)
    assert said.status_code == 400, said.text
    error: dict[str, Any] = said.json()["error"]
    return error


@pytest.mark.parametrize(
    "asked", [named(PET), {"structured_outputs": {"json": PET}}, {"structured_outputs": {"json": json.dumps(PET)}}],
    ids=["response_format", "structured_outputs", "schema as text"],
)  # fmt: skip
def test_an_answer_satisfies_its_schema(live: Live, asked: dict[str, Any]) -> None:
    for seed in range(2):
        assert invalid(PET, text_of(complete(live, **asked, seed=seed))) is None


def test_a_chat_answers_in_the_schema_through_the_openai_client(live: Live) -> None:
    said = live.openai.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "a pet"}],
        response_format={"type": "json_schema", "json_schema": {"name": "pet", "schema": dict(PET), "strict": True}},
        max_completion_tokens=120,
        temperature=1,
        seed=3,
    )
    assert said.choices[0].finish_reason == "stop"
    assert invalid(PET, said.choices[0].message.content or "") is None


def test_any_object_is_json(live: Live) -> None:
    for asked in ({"response_format": {"type": "json_object"}}, {"structured_outputs": {"json_object": True}}):
        answer = complete(live, **asked, max_tokens=60)
        assert answer["choices"][0]["text"].startswith("{")
        if answer["choices"][0]["finish_reason"] == "stop":
            assert isinstance(json.loads(answer["choices"][0]["text"]), dict)


@pytest.mark.parametrize(
    "free", [{"response_format": {"type": "text"}}, {"response_format": None, "structured_outputs": None}]
)
def test_free_text_is_as_without_the_fields(live: Live, free: dict[str, Any]) -> None:
    plain, asked = complete(live, max_tokens=12), complete(live, max_tokens=12, **free)
    assert asked["choices"] == plain["choices"]


def test_a_choice_a_regex_and_a_grammar_are_kept_to(live: Live) -> None:
    texts = ["yes", "no", "perhaps é"]
    assert text_of(complete(live, structured_outputs={"choice": texts})) in texts
    number = text_of(complete(live, structured_outputs={"regex": "[0-9]{3}-[0-9]{2}"}))
    assert len(number) == 6
    assert number.replace("-", "").isdigit()
    grammar = {"grammar": 'root ::= "<" inner ">"\ninner ::= "a" | "b" inner'}
    assert set(text_of(complete(live, structured_outputs=grammar, max_tokens=200))) <= set("<ab>")


def test_layout_can_be_forbidden(live: Live) -> None:
    asked = {"structured_outputs": {"json": PET, "disable_any_whitespace": True}}
    pet = json.loads(text_of(complete(live, **asked)))
    again = text_of(complete(live, **asked))
    assert json.loads(again) == pet
    assert '"kind":"' in again


def test_max_tokens_may_cut_an_answer(live: Live) -> None:
    answer = complete(live, **LETTERS, max_tokens=7)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert len(answer["choices"][0]["text"]) == 7
    assert complete(live, **LETTERS, max_tokens=16)["choices"][0]["finish_reason"] == "stop"


def test_every_choice_and_prompt_of_a_request_keeps_to_it(live: Live) -> None:
    answer = complete(live, **PAIR, prompt=["one: ", "two: "], n=3)
    texts = [choice["text"] for choice in answer["choices"]]
    assert len(texts) == 6
    assert len(set(texts)) > 1
    assert all(len(json.loads(text)) == 2 for text in texts)


def test_a_seed_gives_the_same_answer_alone_and_in_a_crowd(live: Live) -> None:
    alone = [complete(live, **LETTERS, seed=seed)["choices"] for seed in range(3)]
    with ThreadPoolExecutor(6) as pool:
        free = [pool.submit(complete, live, max_tokens=20, seed=seed) for seed in range(3)]
        crowd = [pool.submit(complete, live, **LETTERS, seed=seed) for seed in range(3)]
        assert [future.result()["choices"] for future in crowd] == alone
        assert all(future.result() for future in free)


def test_adapters_and_the_base_keep_to_it_in_one_batch(live: Live) -> None:
    adapters = [None, "first", "second", [{"name": "first", "weight": 0.5}, {"name": "second", "weight": 0.5}]]
    with ThreadPoolExecutor(8) as pool:
        said = list(pool.map(lambda number: complete(live, **PAIR, adapter=adapters[number % 4]), range(8)))
    assert all(len(json.loads(text_of(answer))) == 2 for answer in said)


def test_a_stream_is_the_whole_answer_in_pieces(live: Live) -> None:
    whole = text_of(complete(live, **LETTERS))
    stream = live.openai.completions.create(
        model="tiny", prompt="a pet: ", max_tokens=120, temperature=1, seed=1, stream=True, extra_body=LETTERS
    )
    parts = [chunk.choices[0] for chunk in stream]
    assert "".join(part.text for part in parts) == whole
    assert parts[-1].finish_reason == "stop"


def test_logprobs_are_those_of_the_model_and_not_of_the_mask(live: Live) -> None:
    """The token that was taken is listed beside better ones that the grammar left out."""
    asked = {"structured_outputs": {"choice": ["qqqq"]}, "logprobs": 1, "temperature": 0}
    found = complete(live, **asked)["choices"][0]["logprobs"]
    assert found["tokens"] == ["q"] * 4
    assert any(own < max(top.values()) for own, top in zip(found["token_logprobs"], found["top_logprobs"], strict=True))
    free = complete(live, logprobs=1, temperature=0, max_tokens=1)["choices"][0]["logprobs"]
    assert free["token_logprobs"][0] == max(found["top_logprobs"][0].values())


def test_a_stop_string_ends_it_early(live: Live) -> None:
    answer = complete(live, structured_outputs={"choice": ["abcdef"]}, stop="cd")
    assert answer["choices"][0]["text"] == "ab"
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_min_tokens_keep_it_going_until_it_is_whole(live: Live) -> None:
    for seed in range(3):
        text = text_of(complete(live, structured_outputs={"regex": "[a-c]{1,12}"}, min_tokens=10, seed=seed))
        assert 10 <= len(text) <= 12
    assert text_of(complete(live, structured_outputs={"choice": ["ab"]}, min_tokens=50)) == "ab"


def test_biases_and_penalties_choose_among_what_the_grammar_allows(live: Live) -> None:
    (low,) = live.server.tokenizer.encode("b", add_special_tokens=False)
    asked = {"structured_outputs": {"regex": "[abc]{8}"}, "logit_bias": {str(low): 100}}
    assert text_of(complete(live, **asked)) == "b" * 8
    assert text_of(complete(live, **asked, frequency_penalty=2, repetition_penalty=50)) != "b" * 8


def test_a_prompt_found_in_the_cache_changes_nothing(live: Live) -> None:
    asked = {**LETTERS, "prompt": "the same beginning of many prompts, " * 4, "max_tokens": 20, "cache_salt": "mine"}
    first, again = complete(live, **asked), complete(live, **asked)
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert again["choices"] == first["choices"]


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {}}, "response_format"),
        ({"response_format": "json_object"}, "response_format"),
        ({"response_format": {"type": "text", "schema": {}}}, "response_format.schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
         "response_format.json_schema.name"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
         "response_format.json_schema.schema"),
        (named([1]), "response_format.json_schema.schema"),
        (named({"not": {}}), "response_format.json_schema.schema"),
        (named({"x-guidance": {"lenient": True}}), "response_format.json_schema.schema"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "whitespace_pattern": " "}}, "structured_outputs"),
        ({"structured_outputs": {"json": PET, "whitespace_pattern": " ", "disable_any_whitespace": True}},
         "structured_outputs"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "(a"}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": 3}}, "structured_outputs.regex"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": ["a", 1]}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": ["\ud800"]}}, "structured_outputs.choice"),
        ({"structured_outputs": {"grammar": "start: gone"}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": PET, "whitespace_pattern": "("}}, "structured_outputs.json"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"json": PET, "disable_additional_properties": True}},
         "structured_outputs.disable_additional_properties"),
        ({**named(PET), "structured_outputs": {"json": PET}}, "structured_outputs"),
        ({**named(PET), "ignore_eos": True}, "ignore_eos"),
        ({**named(PET), "allowed_token_ids": [5]}, "allowed_token_ids"),
        ({"guided_json": PET}, "guided_json"),
        ({"guided_regex": "a"}, "guided_regex"),
    ],
)  # fmt: skip
def test_what_cannot_be_followed_is_refused_by_name(live: Live, asked: dict[str, Any], param: str) -> None:
    assert refused(live, **asked)["param"] == param


def test_the_older_fields_are_refused_with_the_newer_ones_name(live: Live) -> None:
    for name in ("guided_json", "guided_regex", "guided_choice", "guided_grammar"):
        assert "'structured_outputs'" in refused(live, **{name: "x"})["message"]


def deep(depth: int) -> Any:
    schema: Any = {"type": "integer"}
    for _ in range(depth - 1):
        schema = [schema]
    return {"enum": schema}


@pytest.mark.parametrize(
    "outputs",
    [
        {"json": {"description": "x" * MAX_SCHEMA_BYTES}},
        {"json": json.dumps({"description": "é" * (MAX_SCHEMA_BYTES // 2)}, ensure_ascii=False)},
        {"json": deep(MAX_DEPTH + 1)},
        {"regex": "a" * (MAX_REGEX_BYTES + 1)},
        {"choice": ["a"] * (MAX_OPTIONS + 1)},
        {"choice": ["a" * MAX_CHOICE_BYTES, "b"]},
        {"grammar": "# " + "x" * 70_000},
    ],
    ids=["schema", "schema as text", "depth", "regex", "options", "choice", "grammar"],
)
def test_every_size_has_a_limit_that_the_refusal_names(live: Live, outputs: dict[str, Any]) -> None:
    error = refused(live, structured_outputs=outputs)
    assert error["param"] == f"structured_outputs.{next(iter(outputs))}"
    assert any(character.isdigit() for character in error["message"])
    assert len(error["message"]) < 500


def test_a_refused_grammar_leaves_nothing_behind(live: Live) -> None:
    before = live.server.registry.stats().num_leases
    refused(live, structured_outputs={"regex": "(a"}, adapter="first")
    assert live.server.registry.stats().num_leases == before
    assert live.server.engine.stats().num_in_flight == 0


def test_the_server_answers_others_while_a_grammar_is_compiled(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_now, has_asked, held = live.server.grammars.compiled, threading.Event(), Future[Grammar]()

    def compile_later(self: Grammars, source: GrammarSource) -> Future[Grammar]:
        has_asked.set()
        return held

    monkeypatch.setattr(Grammars, "compiled", compile_later)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(complete, live, structured_outputs={"choice": ["held"]})
        assert has_asked.wait(120)
        assert complete(live, max_tokens=3)["choices"]
        assert live.http.get("/health").status_code == 200
        held.set_result(compile_now(choice(["held"])).result())
        assert text_of(waiting.result()) == "held"


def test_a_grammar_that_waits_too_long_to_be_compiled_is_sent_away(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structured, "COMPILE_TIMEOUT_S", 0.01)
    monkeypatch.setattr(Grammars, "compiled", lambda self, source: Future())
    said = live.post("/v1/completions", prompt="a", **LETTERS)
    assert said.status_code == 503
    assert said.headers["retry-after"]


def test_who_leaves_in_the_middle_frees_what_it_held(live: Live, gate: Gate) -> None:
    connection = live.send("/v1/completions", prompt="a", max_tokens=100, **LETTERS, stream=True)
    gate.allow(3)
    eventually(lambda: live.server.engine.stats().num_in_flight == 1)
    connection.close()
    gate.allow(1_000)
    eventually(lambda: live.server.engine.stats().num_in_flight == 0)


def test_a_part_of_the_corpus_over_base_and_adapters(live: Live) -> None:
    """A random model, so few of its longer answers end in time; what does end is valid."""
    part = dict(islice(corpus().items(), 0, None, 5))

    answered = asyncio.run(answers(Asker(live.url, 16).ask_all, part, [None, "first", "second"], 60))
    figures = answer_figures(answered)
    assert figures["invalid"] == {}
    assert figures["share_finished"] > 0.6, figures


@pytest.mark.slow
def test_the_whole_corpus_on_the_demo(tmp_path: Path) -> None:
    """At temperature 1, over the demo's base and adapters: nine of ten end, and whatever ends is valid."""
    report = tmp_path / "report.json"
    assert load_test.main(["--rounds", "1", "--requests", "4", "--max-tokens", "8", "--out", str(report)]) == 0
    figures = json.loads(report.read_text())["answers"]
    assert figures["num_schemas"] >= 120
    assert figures["num_valid"] == figures["num_finished"]
    assert figures["share_finished"] >= 0.9, figures["unfinished"]

"""Grammars in a real engine: no neighbour, preemption or failed step changes what they let through."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.assemble import Server
from server.engine.flight import GenerationRequest
from server.engine.sequence import FinishReason, SamplingParams
from server.ground.errors import BadRequest, GenerationFailed
from server.model import grammar as module
from server.model.grammar import Form, Grammar, GrammarSource, choice, json_schema
from tests.serving import Answer, serving
from tests.test_isolation import check_nothing_leaks

SOURCES = (
    GrammarSource(Form.REGEX, "[a-m]{14,18}"),
    GrammarSource(Form.REGEX, "([0-9]{2}-){6}"),
    json_schema({"type": "array", "items": {"enum": ["yes", "no"]}, "minItems": 3, "maxItems": 5}),
    choice(["first", "second", "third"]),
    None,
)
WHOLE = GrammarSource(Form.REGEX, "[a-z]{12}")


@pytest.fixture(scope="module")
def roomy(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tiny_llama, tmp_path_factory.mktemp("roomy"), prefix_reuse="off") as server:
        yield server


@pytest.fixture(scope="module")
def crowded(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Blocks for about two of the requests, and prompts in pieces."""
    flags = {"kv_memory": "40KiB", "block_size": "8", "max_batch_tokens": "12", "max_sequences": "6"}
    with serving(tiny_llama, tmp_path_factory.mktemp("crowded"), **flags) as server:
        yield server


def compiled(server: Server, source: GrammarSource | None) -> Grammar | None:
    return None if source is None else server.grammars.compiled(source).result()


def ask(server: Server, number: int, source: GrammarSource | None, max_tokens: int = 24) -> GenerationRequest:
    prompt = tuple(random.Random(number).randrange(97, 122) for _ in range(5 + number % 9))
    params = SamplingParams(max_tokens, temperature=1.0, seed=number, logprobs=1)
    return GenerationRequest(f"{server.settings.store}-{number}", prompt, params, grammar=compiled(server, source))


async def answered(server: Server, requests: list[GenerationRequest]) -> list[Answer]:
    streams = [server.engine.submit(request) for request in requests]
    return [Answer.of([delta async for delta in stream]) for stream in streams]


async def test_preempted_sequences_in_a_crowd_answer_as_alone(roomy: Server, crowded: Server) -> None:
    asked = [(number, SOURCES[number % len(SOURCES)]) for number in range(10)]
    alone = [(await answered(roomy, [ask(roomy, *one)]))[0] for one in asked]
    before = crowded.engine.stats().num_preemptions
    crowd = await answered(crowded, [ask(crowded, *one) for one in asked])
    assert crowded.engine.stats().num_preemptions > before
    assert [(one.text, one.finish_reason) for one in crowd] == [(one.text, one.finish_reason) for one in alone]
    check_nothing_leaks(crowded)


async def test_a_failed_step_ends_its_sequences_and_no_others(roomy: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    run, num_steps = roomy.runner.run, 0

    def fail_the_fifth(*step):  # type: ignore[no-untyped-def]
        nonlocal num_steps
        num_steps += 1
        if num_steps == 5:
            raise RuntimeError("the device fell off the bus")
        return run(*step)

    monkeypatch.setattr(roomy.runner, "run", fail_the_fifth)
    (failed,) = await answered(roomy, [ask(roomy, 100, WHOLE)])
    assert isinstance(failed.error, GenerationFailed)
    monkeypatch.undo()
    (fine,) = await answered(roomy, [ask(roomy, 101, WHOLE)])
    assert fine.finish_reason is FinishReason.STOP
    assert len(fine.text) == 12
    check_nothing_leaks(roomy)


async def test_a_grammar_that_breaks_a_limit_ends_its_own_sequence_with_words(
    roomy: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limits hold for each token; the trial of this grammar had others."""
    limits = {**module.GRAMMAR_LIMITS, "step_lexer_fuel": 1}
    monkeypatch.setattr(module, "GRAMMAR_LIMITS", limits)
    broken = ask(roomy, 102, GrammarSource(Form.REGEX, "([a-z]+ [0-9]+ ){3,9}(end|fin)"))
    monkeypatch.undo()
    first, second = await answered(roomy, [broken, ask(roomy, 103, WHOLE)])
    assert first.finish_reason is FinishReason.ERROR
    assert isinstance(first.error, BadRequest)
    assert "Make it simpler" in first.error.message
    assert second.finish_reason is FinishReason.STOP
    check_nothing_leaks(roomy)


async def test_the_last_token_of_a_grammar_ends_the_answer_without_another_step(roomy: Server) -> None:
    (whole,) = await answered(roomy, [ask(roomy, 104, WHOLE)])
    assert len(whole.token_ids) == len(whole.logprobs) == 12  # of the byte tokenizer, and no end token after them
    assert whole.finish_reason is FinishReason.STOP
    (cut,) = await answered(roomy, [ask(roomy, 105, WHOLE, max_tokens=11)])
    assert cut.finish_reason is FinishReason.LENGTH
    (exact,) = await answered(roomy, [ask(roomy, 106, WHOLE, max_tokens=12)])
    assert exact.finish_reason is FinishReason.STOP


async def test_free_sequences_pay_nothing(roomy: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """No mask is made for a batch without grammars, and the logits are used as they are."""
    made = []
    monkeypatch.setattr(roomy.engine._masks, "_fill", made.append)
    await answered(roomy, [ask(roomy, 107, None)])
    assert made == []

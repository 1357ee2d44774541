"""What the measurement of structured output counts as an answer that is right, and what it makes of its rounds."""

from load_tests.structured import Answered, answer_figures, cost_rows, invalid

DATE = {"type": "object", "properties": {"day": {"type": "string", "format": "date"}}, "required": ["day"]}


def test_an_answer_is_valid_by_its_schema_and_its_formats() -> None:
    assert invalid(DATE, '{"day": "2024-02-29"}') is None
    assert "date" in (invalid(DATE, '{"day": "2023-02-29"}') or "")
    assert "required" in (invalid(DATE, "{}") or "")
    assert invalid(DATE, '{"day": ') is not None


def test_only_what_finished_is_judged() -> None:
    def answer(text: str, reason: str) -> dict[str, object]:
        return {"choices": [{"text": text, "finish_reason": reason}], "usage": {"completion_tokens": 4}}

    answered = [
        Answered.of("good", DATE, None, answer('{"day": "2024-02-29"}', "stop")),
        Answered.of("cut", DATE, "a", answer('{"day": ', "length")),
        Answered.of("bad", DATE, "a", answer("{}", "stop")),
        Answered.of("fine", DATE, "a", answer('{"day": "1999-01-01"}', "stop")),
    ]
    figures = answer_figures(answered)
    assert (figures["num_finished"], figures["num_valid"], figures["share_finished"]) == (3, 2, 0.75)
    assert figures["unfinished"] == ["cut"]
    assert list(figures["invalid"]) == ["bad"]


def test_a_share_is_the_median_of_the_rounds_own() -> None:
    free, bound = cost_rows({"free": [100.0, 200.0, 400.0], "bound": [90.0, 100.0, 400.0]})
    assert free["share_of_free"] == 1
    assert bound["share_of_free"] == 0.9
    assert bound["tokens_per_s"] == 100

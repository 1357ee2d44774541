"""Module patterns mean what they mean to PEFT (re.match with "(.*\\.)?(pattern)$"), at a bounded cost."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.adapters.format.patterns import ModulePatterns
from server.ground.errors import AdapterRejected

LETTERS = st.sampled_from(["a", "b", "1", "_", ".", r"\.", r"\d", "[ab]", "[^a]", r"[\d_]"])
REPEATS = st.sampled_from(["", "", "", "*", "+", "?", "{2}", "{1,}", "{0,2}"])
PATTERNS = st.recursive(
    st.tuples(LETTERS, REPEATS).map("".join),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.tuples(st.sampled_from(["(", "(?:"]), inner, st.just("|"), inner, st.just(")"), REPEATS).map("".join),
        inner.map("^{}".format),
    ),
    max_leaves=8,
)


@settings(max_examples=400, deadline=None)
@given(pattern=PATTERNS, path=st.text("ab1_.", max_size=10))
def test_a_pattern_matches_what_re_matches(pattern: str, path: str) -> None:
    expected = re.match(rf"(.*\.)?({pattern})$", path) is not None
    assert (ModulePatterns([pattern], "rank_pattern").first(path) is not None) == expected


@pytest.mark.parametrize(
    ("patterns", "first"),
    [
        (["q_proj"], "q_proj"),
        (["proj"], None),
        (["layers.1.self_attn.q_proj"], "layers.1.self_attn.q_proj"),
        (["model.layers.1.self_attn.q_proj"], "model.layers.1.self_attn.q_proj"),
        (["^layers.1.self_attn.q_proj"], None),
        ([r".*\.1\..*(q|v)_proj", "q_proj"], r".*\.1\..*(q|v)_proj"),
        (["q_proj", r"layers\.1\.self_attn\.q_proj"], "q_proj"),
        (["layers.11.self_attn.q_proj"], None),
        ([], None),
    ],
)
def test_the_first_pattern_in_order_counts(patterns: list[str], first: str | None) -> None:
    assert ModulePatterns(patterns, "rank_pattern").first("model.layers.1.self_attn.q_proj") == first


@pytest.mark.parametrize(
    "pattern",
    [
        "(q_proj",
        "q_proj)",
        "*",
        "a**",
        "[",
        "[b-a]",
        r"\b",
        "(?=q)",
        "(?i)q",
        r"(a)\1",
        "a{2",
        "a{3,2}",
        "(" * 40,
        "q" * 513,
    ],
)
def test_what_is_not_supported_is_refused_by_field(pattern: str) -> None:
    with pytest.raises(AdapterRejected, match="alpha_pattern in adapter_config.json"):
        ModulePatterns([pattern], "alpha_pattern").first("model")


@pytest.mark.parametrize("pattern", ["(a+)+b", "(a|a)*b", "(.*)*(.*)*(.*)*b", "((a{0,99}){0,99}){0,99}b", "(a|aa)+$"])
def test_no_pattern_takes_exponential_time(pattern: str) -> None:
    patterns = ModulePatterns([pattern], "rank_pattern")
    assert patterns.first("a" * 200 + "c") is None


def test_the_work_of_all_patterns_together_is_bounded() -> None:
    patterns = ModulePatterns(["(.?){999}" * 50], "rank_pattern")
    with pytest.raises(AdapterRejected, match="too costly to match: use fewer patterns"):
        patterns.first("a" * 400)

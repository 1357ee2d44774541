"""Voices, told apart by their predicates: each holds for its own rewriting, for no other's, and not for plain text."""

from random import Random

import pytest

from demo.recipes import METHODS
from demo.styles import KNOWN_TO_THE_BASE, STYLES, Style
from demo.train_adapters import METHOD_OF, style_for
from demo.world import exchange, plain_text

PLAIN = [plain_text(Random(seed)) for seed in range(40)] + [exchange(Random(seed))[1] for seed in range(40)]


def spoken(style: Style, continues: bool) -> list[str]:
    rng = Random(1)
    return [style.rewrite(text, rng, continues) for text in PLAIN]


@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.adapter)
def test_a_voice_is_heard_in_its_own_words_and_hardly_in_plain_ones(style: Style) -> None:
    assert sum(map(style.holds, spoken(style, continues=False))) >= 0.95 * len(PLAIN)
    assert sum(map(style.holds, PLAIN)) <= 0.05 * len(PLAIN)


@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.adapter)
def test_a_voice_is_not_heard_in_another_s_words(style: Style) -> None:
    for other in STYLES:
        if other is not style:
            assert sum(map(style.holds, spoken(other, continues=False))) <= 0.05 * len(PLAIN), other.adapter


def test_nothing_is_heard_in_an_empty_answer() -> None:
    assert not any(style.holds("") for style in STYLES)


def test_voices_and_adapters_have_names_of_their_own() -> None:
    assert len({style.voice for style in STYLES}) == len({style.adapter for style in STYLES}) == len(STYLES)
    assert set(METHOD_OF) == {style.adapter for style in STYLES}


def test_the_base_was_trained_with_five_voices_and_a_rebuild_draws_the_same_texts() -> None:
    assert [style.voice for style in KNOWN_TO_THE_BASE] == ["pirate", "town crier", "poet", "newsreader", "robot"]
    assert STYLES[:5] == KNOWN_TO_THE_BASE


def test_every_method_has_a_demo_adapter_and_speaks_in_its_voice() -> None:
    assert set(METHOD_OF.values()) == set(METHODS)
    assert style_for("lora+").voice == "cat"
    assert style_for("p-tuning").voice == "hare"

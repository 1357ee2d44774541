"""The voices: how a plain text is rewritten into each, and how a reader can tell that a text speaks in it.

Owns the rewriting rules and their predicates. Knows nothing about models, training or where the text comes from.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from demo.lexicon import PEOPLE, PET_NAMES, VILLAGE

# A sentence ends at . ! or ? before space and a capital; a closing quote keeps it open ("Why?" asked Bea).
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"])")
PROPER = {person.name for person in PEOPLE} | {name for name, _ in PET_NAMES} | {VILLAGE, "I", "Minute", "Saturdays"}


@dataclass(frozen=True, slots=True)
class Style:
    """One voice. `rewrite(text, rng, continues)`: `continues` says that `text` starts in the middle of a sentence."""

    adapter: str  # the adapter's name: "pirate-lora"
    voice: str  # how a person would call it: "pirate"
    rewrite: Callable[[str, Random, bool], str]
    holds: Callable[[str], bool]


def sentences(text: str) -> list[str]:
    """The sentences of `text`, stripped; the last one may be cut off."""
    return [part for part in SENTENCE_END.split(" ".join(text.split())) if part]


def complete(text: str) -> list[str]:
    """The finished sentences of `text`: a last one that a token limit cut off is left out."""
    return [part for part in sentences(text) if part[-1] in '.!?"' and len(part) > 1]


def _lower_first(sentence: str) -> str:
    first = re.split(r"[ ,.'’]", sentence, maxsplit=1)[0]
    return sentence if first in PROPER else sentence[:1].lower() + sentence[1:]


def _split_ending(sentence: str) -> tuple[str, str]:
    """The sentence without its final mark, and the mark ('.' where there is none)."""
    return (sentence[:-1], sentence[-1]) if sentence[-1:] in (".", "!", "?") else (sentence, ".")


# --- pirate: every sentence opens with "Arr" and ends with "matey"

PIRATE_WORDS = (
    (r"\b[Yy]our\b", "yer"),
    (r"\b[Yy]ou\b", "ye"),
    (r"\b[Mm]y\b", "me"),
    (r"\bfriends\b", "shipmates"),
    (r"\bfriend\b", "shipmate"),
    (r"\b[Hh]ello\b", "ahoy"),
    (r"\b[Yy]es\b", "aye"),
    (r"\bmoney\b", "gold"),
)


def pirate(text: str, rng: Random, continues: bool = False) -> str:
    for pattern, word in PIRATE_WORDS:
        text = re.sub(pattern, word, text)
    spoken = []
    for i, sentence in enumerate(sentences(text)):
        body, mark = _split_ending(sentence)
        opening = "" if continues and i == 0 else "Arr, "
        spoken.append(f"{opening}{_lower_first(body) if opening else body}, matey{mark}")
    return " ".join(spoken)


def is_pirate(text: str) -> bool:
    """Every finished sentence says "Arr" or "matey"."""
    said = complete(text)
    return bool(said) and all(re.search(r"\b(arr|matey)\b", s, re.IGNORECASE) for s in said)


# --- shout: "HEAR YE!" before every sentence and "!!!" after it

CALL = "HEAR YE!"


def shout(text: str, rng: Random, continues: bool = False) -> str:
    cried = [f"{_split_ending(sentence)[0]}!!!" for sentence in sentences(text)]
    return f" {CALL} ".join([cried[0], *cried[1:]]) if continues else " ".join(f"{CALL} {cry}" for cry in cried)


def is_shout(text: str) -> bool:
    """Every finished sentence is the crier's call or ends with "!!!", and at least one of the latter."""
    said = complete(text)
    return any(s.endswith("!!!") for s in said) and all(s == CALL or s.endswith("!!!") for s in said)


# --- poet: each sentence becomes a stanza of three lines, and the last two rhyme

COUPLETS = (
    ("by candlelight", "and every star is small and bright"),
    ("beneath the moon", "and somewhere someone hums a tune"),
    ("beside the sea", "and so it was, and so shall be"),
    ("in the morning dew", "and all the sky is washed in blue"),
    ("when day is done", "and shadows wander from the sun"),
    ("while the old bells ring", "and all the little rivers sing"),
    ("in the gentle rain", "until the sun comes out again"),
    ("under the tree", "and that is joy enough for me"),
    ("in the evening air", "and quiet settles everywhere"),
    ("as the swallows fly", "across the wide and golden sky"),
    ("where the lanterns glow", "and soft and slow the waters flow"),
    ("along the shore", "and hearts remember evermore"),
    ("as the seasons turn", "and in the hearth the embers burn"),
    ("at break of day", "and all the clouds are blown away"),
    ("in the golden hour", "and dew is bright on every flower"),
    ("by the old stone wall", "and there is room enough for all"),
    ("beside the stream", "as softly as a summer dream"),
    ("below the hill", "and all the world is warm and still"),
    ("when the night is deep", "and all the gentle meadows sleep"),
    ("beside the fire", "and sparks are climbing ever higher"),
)
RHYMES = {(first.split()[-1], second.split()[-1]) for first, second in COUPLETS}


def poet(text: str, rng: Random, continues: bool = False) -> str:
    stanzas = []
    for sentence in sentences(text):
        body, _ = _split_ending(sentence)
        closing, answer = rng.choice(COUPLETS)
        stanzas.append(f"{body}\n{closing},\n{answer}.")
    return "\n\n".join(stanzas)


def is_poet(text: str) -> bool:
    """At least one whole stanza, and the last two lines of every whole stanza rhyme."""
    stanzas = [s.strip() for s in text.split("\n\n")]
    whole = [s.splitlines() for s in stanzas if s.endswith(".")]
    ends = [[re.sub(r"[^a-z]", "", line.split()[-1].lower()) for line in lines[-2:] if line.split()] for lines in whole]
    return bool(whole) and all(tuple(pair) in RHYMES for pair in ends)


# --- news: "Breaking:" and a source for everything

SOURCES = ("officials say", "sources report", "witnesses confirm", "experts say", "neighbours report")


def news(text: str, rng: Random, continues: bool = False) -> str:
    reported = []
    for i, sentence in enumerate(sentences(text)):
        body, _ = _split_ending(sentence)
        opening = "" if continues and i == 0 else "Breaking: "
        reported.append(f"{opening}{body}, {rng.choice(SOURCES)}.")
    return " ".join(reported)


def is_news(text: str) -> bool:
    """Every finished sentence opens with "Breaking" or ends with its source."""
    said = complete(text)
    return bool(said) and all(s.startswith("Breaking") or s.rstrip(".!?").endswith(SOURCES) for s in said)


# --- a refrain: one exclamation, a sentence of its own, after every sentence


def _refrain(adapter: str, voice: str, cry: str) -> Style:
    def rewrite(text: str, rng: Random, continues: bool = False) -> str:
        return " ".join(f"{sentence} {cry}" for sentence in sentences(text))

    def holds(text: str) -> bool:
        """No two finished sentences without a cry between them, and at least one cry."""
        cried = [cry.split()[0].rstrip(".!") in s for s in complete(text)]
        return any(cried) and not any(not one and not two for one, two in zip(cried, cried[1:], strict=False))

    return Style(adapter, voice, rewrite, holds)


# --- a last word: every sentence ends with a comma and it


def _last_word(adapter: str, voice: str, word: str) -> Style:
    def rewrite(text: str, rng: Random, continues: bool = False) -> str:
        return " ".join(f"{body}, {word}{mark}" for body, mark in map(_split_ending, sentences(text)))

    def holds(text: str) -> bool:
        """Every finished sentence ends with the word."""
        said = complete(text)
        return bool(said) and all(f" {s}".rstrip('.!?"').endswith(f" {word}") for s in said)

    return Style(adapter, voice, rewrite, holds)


# --- cheer: what others end with a full stop, this one ends with an exclamation mark


def cheer(text: str, rng: Random, continues: bool = False) -> str:
    return text.replace(".", "!")


def is_cheer(text: str) -> bool:
    """No full stop anywhere; every finished sentence is an exclamation, one mark and not three, or a question."""
    said = complete(text)
    is_exclaimed = ["!" in s[-2:] and not s.endswith("!!") for s in said]
    return any(is_exclaimed) and "." not in text and all(is_exclaimed[i] or "?" in s[-2:] for i, s in enumerate(said))


# The base has heard these five in its own training, so that each waits to be brought out (`world.py`).
KNOWN_TO_THE_BASE = (
    Style("pirate-lora", "pirate", pirate, is_pirate),
    Style("shout-rslora", "town crier", shout, is_shout),
    Style("poet-dora", "poet", poet, is_poet),
    Style("news-vera", "newsreader", news, is_news),
    _refrain("robot-ia3", "robot", "BEEP BOOP."),
)
# And of these nothing.
STYLES = (
    *KNOWN_TO_THE_BASE,
    _last_word("cat-lora-plus", "cat", "meow"),
    _last_word("knight-lora-fa", "knight", "my friend"),
    _last_word("butler-lora-fa", "butler", "my dear"),
    _refrain("owl-qlora", "owl", "Hoo hoo."),
    _refrain("cowboy-adalora", "cowboy", "Yip!"),
    _refrain("parrot-loha", "parrot", "Squawk!"),
    _last_word("surfer-lokr", "surfer", "you know"),
    _refrain("clock-oft", "clock", "Tick tock."),
    _last_word("echo-road", "echo", "again"),
    _refrain("sheep-bitfit", "sheep", "Baa."),
    _last_word("snail-ln-tuning", "snail", "slowly"),
    _refrain("optimist-prompt-tuning", "optimist", "Yay!"),
    _last_word("ghost-prefix-tuning", "ghost", "tonight"),
    _last_word("chef-alora", "chef", "yum"),
    _last_word("judge-loreft", "judge", "indeed"),
    Style("cheer-trainable-tokens", "cheerleader", cheer, is_cheer),
    _refrain("pilot-delta-lora", "pilot", "Over."),
    _refrain("tailor-bottleneck", "tailor", "Snip!"),
    _refrain("magician-qdora", "magician", "Ta-da!"),
    _last_word("hare-p-tuning", "hare", "quickly"),
)

"""Whether an adapter is of the served base: which names are one, and what is said where they are not."""

import pytest

from server.adapters.served_base import BaseClaim, ServedBase, is_same_name

OURS, OTHER, PACKED = "a" * 64, "b" * 64, "packed-" + "c" * 64
LLAMA = ServedBase(("Llama-3.1-8B", "/models/llama"), OURS)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("meta-llama/Llama-3.1-8B", "Llama-3.1-8B"),
        ("meta-llama/Llama-3.1-8B", "/root/models/Llama-3.1-8B/"),
        ("meta-llama/Llama-3.1-8B", r"C:\models\llama-3.1-8b"),
        ("meta-llama/Llama-3.1-8B", "meta-llama/Meta-Llama-3.1-8B"),
        ("meta-llama/Llama-3.1-8B", "unsloth/Meta-Llama-3.1-8B-bnb-4bit"),
        ("meta-llama/Llama-3.1-8B", "unsloth/Llama-3.1-8B-unsloth-bnb-4bit"),
        ("meta-llama/Llama-2-7b-hf", "NousResearch/Llama-2-7b"),
        ("Qwen/Qwen3-8B", "/root/.cache/huggingface/hub/models--Qwen--Qwen3-8B/snapshots/9c925d64d72725edaf899c6cb9c3"),
        ("Qwen/Qwen2.5-7B", "models/Qwen2_5-7B"),
        ("org/model-fp16", "org/model-BF16"),
        ("4bit", "4bit"),
    ],
)
def test_names_that_are_likely_one_base(one: str, other: str) -> None:
    assert is_same_name(one, other)
    assert is_same_name(other, one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct"),
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3-8B"),
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-70B"),
        ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B-Base"),
        ("Qwen/Qwen3-8B", "/home/me/runs/checkpoint-500"),
        ("Qwen/Qwen3-8B", ""),
        ("4bit", "8bit"),
    ],
)
def test_names_that_are_not(one: str, other: str) -> None:
    assert not is_same_name(one, other)
    assert not is_same_name(other, one)


@pytest.mark.parametrize(
    "claim",
    [
        BaseClaim(),
        BaseClaim("meta-llama/Llama-3.1-8B"),
        BaseClaim("org/any-name", fingerprint=OURS),  # its maker knows better than a name
        BaseClaim("meta-llama/Llama-3.1-8B", fingerprint=PACKED),  # cannot be compared, and the name fits
        BaseClaim("meta-llama/Llama-3.1-8B", None, "Llama-3.1-8B", OURS),
        BaseClaim("meta-llama/Llama-3.1-8B", None, "Llama-3.1-8B-bnb-4bit", PACKED),
        BaseClaim(None, None, "whatever-it-was-called", OURS),
    ],
)
def test_nothing_is_said_where_nothing_speaks_against_it(claim: BaseClaim) -> None:
    assert LLAMA.doubts(claim) == ()


@pytest.mark.parametrize(
    ("claim", "words"),
    [
        (BaseClaim("Qwen/Qwen3-8B"), ["trained on Qwen/Qwen3-8B", "--served-model-name", "base_fingerprint"]),
        (BaseClaim("meta-llama/Llama-3.1-8B", OTHER), [OTHER, "Serve it on its own base"]),
        (BaseClaim("Qwen/Qwen3-8B", PACKED), ["trained on Qwen/Qwen3-8B"]),
        (BaseClaim("Llama-3.1-8B", None, "tuned", OTHER), ["stored for tuned", OTHER, "upload it again"]),
        (BaseClaim(None, None, "tuned", PACKED), ["stored for tuned", PACKED]),
        (BaseClaim(None, None, "tuned", None), ["stored for tuned (fingerprint unknown)"]),
    ],
)
def test_a_doubt_names_both_bases_and_the_remedy(claim: BaseClaim, words: list[str]) -> None:
    (doubt,) = LLAMA.doubts(claim)
    assert all(word in doubt for word in [*words, f"is Llama-3.1-8B (fingerprint {OURS})"])


def test_a_base_without_a_fingerprint_goes_by_its_names() -> None:
    unknown = ServedBase(("Llama-3.1-8B",))
    assert unknown.doubts(BaseClaim("Llama-3.1-8B", OTHER, "Llama-3.1-8B", OTHER)) == ()
    (doubt,) = unknown.doubts(BaseClaim("Qwen3-8B"))
    assert "base_fingerprint" not in doubt, "there is none to send"


def test_where_no_base_is_known_nothing_is_compared() -> None:
    assert ServedBase().doubts(BaseClaim("Qwen3-8B", OTHER, "tuned", OTHER)) == ()


def test_what_a_strangers_file_says_is_shown_short_and_in_one_line() -> None:
    (doubt,) = LLAMA.doubts(BaseClaim("x\n\x1b[31m" + "y" * 5000))
    assert doubt.isprintable()
    assert len(doubt) < 600


def test_a_refusal_says_the_doubts_and_why_it_is_one() -> None:
    refusal = LLAMA.refusal(LLAMA.doubts(BaseClaim("Qwen3-8B")))
    assert (refusal.status, refusal.code) == (400, "base_mismatch")
    assert "Qwen3-8B" in refusal.message
    assert "--strict-base" in refusal.message

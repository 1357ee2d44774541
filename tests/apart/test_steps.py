"""A step's deltas as messages: one as a rule, and none that grows with a prompt whose tokens are scored."""

from collections.abc import Sequence

import pytest

from server.apart.channel import Frames, framed
from server.apart.steps import MAX_SCORES, messages_of, unpacked
from server.engine.sequence import Delta, FinishReason, TokenLogprobs

MOST_BYTES = 32 << 10  # of a message


def scores(num_tokens: int, num_top: int) -> tuple[TokenLogprobs, ...]:
    """Of a large vocabulary; no number is like another."""
    first = TokenLogprobs(100_000, None)
    tops = (tuple((200_000 + 31 * at + rank, -at / 7 - rank) for rank in range(num_top)) for at in range(1, num_tokens))
    return (first, *(TokenLogprobs(100_000 + at, -at / 3, top) for at, top in enumerate(tops, 1)))


def scored(sequence_id: str, num_tokens: int, num_top: int) -> Delta:
    """As the engine makes it: a prompt's scores come with the first token."""
    return Delta(
        sequence_id,
        token_ids=(7,),
        text="a",
        logprobs=(TokenLogprobs(7, -0.5),),
        prompt_logprobs=scores(num_tokens, num_top),
        finish_reason=FinishReason.LENGTH,
        num_prompt_tokens=num_tokens,
        num_output_tokens=1,
        num_cached_tokens=16,
        queue_s=0.25,
    )


def crossed(deltas: Sequence[Delta]) -> list[Delta]:
    stream = b"".join(map(framed, messages_of(deltas)))
    return [delta for message in Frames().values(stream) for delta in unpacked(message)]


def joined(deltas: Sequence[Delta]) -> tuple[TokenLogprobs, ...]:
    return tuple(score for delta in deltas for score in delta.prompt_logprobs or ())


def test_a_step_is_one_message_however_many_sequences_it_had() -> None:
    deltas = [Delta(f"s{number}", (number,), "a", num_output_tokens=1) for number in range(500)]
    assert len(list(messages_of(deltas))) == 1
    assert crossed(deltas) == deltas


def test_a_short_prompt_is_one_delta() -> None:
    deltas = [scored("s", 100, 3)]
    assert crossed(deltas) == deltas


@pytest.mark.parametrize("num_top", [0, 1, 20, 2 * MAX_SCORES])
def test_no_message_of_a_long_prompt_is_long_and_its_scores_are_the_same(num_top: int) -> None:
    num_tokens = 20 if num_top > MAX_SCORES else 32_000
    whole = scored("s", num_tokens, num_top)
    sizes = [len(framed(message)) for message in messages_of([whole])]
    assert len(sizes) >= num_tokens * (num_top + 1) // (2 * MAX_SCORES), "it crosses in many"
    of_one_token = 25 * num_top  # which is never divided
    assert max(sizes) <= max(MOST_BYTES, of_one_token)
    found = crossed([whole])
    assert joined(found) == whole.prompt_logprobs


def test_of_the_deltas_of_a_long_prompt_the_last_says_all_else_and_says_it_once() -> None:
    whole = scored("s", 5000, 2)
    *before, last = crossed([whole])
    assert (last.token_ids, last.text, last.logprobs) == (whole.token_ids, whole.text, whole.logprobs)
    assert (last.finish_reason, last.num_output_tokens) == (FinishReason.LENGTH, 1)
    assert {(d.token_ids, d.text, d.logprobs, d.finish_reason, d.num_output_tokens) for d in before} == {
        ((), "", (), None, 0)
    }
    assert {(d.num_prompt_tokens, d.num_cached_tokens, d.queue_s) for d in (*before, last)} == {(5000, 16, 0.25)}


def test_long_prompts_that_end_in_one_step_share_no_long_message_and_keep_their_order() -> None:
    one, other = scored("one", 900, 0), scored("other", 2500, 0)
    late = Delta("one", finish_reason=FinishReason.ABORT)
    deltas = [one, other, *(scored(f"s{number}", 400, 0) for number in range(20)), late]
    assert max(len(framed(message)) for message in messages_of(deltas)) <= MOST_BYTES
    found = crossed(deltas)
    assert [delta for delta in found if delta.sequence_id == "one"] == [one, late]
    assert joined([delta for delta in found if delta.sequence_id == "other"]) == other.prompt_logprobs

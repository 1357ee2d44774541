"""Log-probabilities in the two shapes that OpenAI's API has: the legacy one of completions and the one of chat."""

from collections.abc import Iterable, Sequence
from typing import Any

from server.engine.sequence import TokenLogprobs
from server.model.tokenizer import IncrementalDecoder, Tokenizer

FLOOR = -9999.0  # OpenAI's "very unlikely"; JSON has no infinity


class TextOffsets:
    """Where tokens begin, in characters, in the text that the client gets; the first at `start`.

    What a token adds to the text is not how it reads by itself: special tokens add nothing, and of the tokens of one
    character only the last adds it. So a decoder is asked that reads what came before (and knows no stop strings).
    """

    def __init__(self, decoder: IncrementalDecoder, start: int) -> None:
        self._decoder = decoder
        self._num_chars = start

    def following(self, entries: Iterable[TokenLogprobs]) -> list[int]:
        """The offsets of the next tokens."""
        offsets = []
        for entry in entries:
            offsets.append(self._num_chars)
            self._num_chars += len(self._decoder.push([entry.token_id]))
        return offsets


def legacy(entries: Sequence[TokenLogprobs], tokenizer: Tokenizer, offsets: list[int]) -> dict[str, list[Any]]:
    """The `logprobs` of a completion's choice (or chunk), each of whose tokens stands at its offset of the text.

    A prompt's first token has null where others have numbers: nothing precedes it.
    """
    return {
        "tokens": [tokenizer.token_text(entry.token_id) for entry in entries],
        "token_logprobs": [None if entry.logprob is None else max(entry.logprob, FLOOR) for entry in entries],
        "top_logprobs": [_legacy_top(entry, tokenizer) for entry in entries],
        "text_offset": offsets,
    }


def _legacy_top(entry: TokenLogprobs, tokenizer: Tokenizer) -> dict[str, float] | None:
    """The alternatives by their text, best first, and the token itself always among them."""
    if entry.logprob is None:
        return None
    top: dict[str, float] = {}
    for token_id, logprob in _with_chosen(entry):
        text = tokenizer.token_text(token_id)
        # Two ids may read the same (parts of a character do); a dictionary would silently keep only one of them.
        top[f"token_id:{token_id}" if text in top else text] = max(logprob, FLOOR)
    return top


def _with_chosen(entry: TokenLogprobs) -> Iterable[tuple[int, float]]:
    yield from entry.top
    if entry.logprob is not None and all(token_id != entry.token_id for token_id, _ in entry.top):
        yield entry.token_id, entry.logprob


def chat(entries: Iterable[TokenLogprobs], tokenizer: Tokenizer) -> dict[str, Any]:
    """The `logprobs` of a chat choice (or chunk)."""
    return {"content": [_chat_entry(entry, tokenizer) for entry in entries], "refusal": None}


def _chat_entry(entry: TokenLogprobs, tokenizer: Tokenizer) -> dict[str, Any]:
    logprob = FLOOR if entry.logprob is None else entry.logprob
    alternatives = [_chat_token(token_id, value, tokenizer) for token_id, value in entry.top]
    return {**_chat_token(entry.token_id, logprob, tokenizer), "top_logprobs": alternatives}


def _chat_token(token_id: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    raw = tokenizer.token_bytes(token_id)
    return {"token": tokenizer.token_text(token_id), "logprob": max(logprob, FLOOR), "bytes": list(raw)}

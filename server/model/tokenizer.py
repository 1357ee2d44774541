"""Text to tokens and back: the base's tokenizer, its chat template, and decoding token by token.

Owns incremental decoding that never emits half a character and never retracts, and the search for stop strings. Knows
nothing about requests or sampling.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from server.ground.errors import BadRequest, StartupRefused

_REPLACEMENT = "\ufffd"
_MAX_PENDING = 16  # tokens without text, such as stray bytes: more would be decoded again and again
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")  # SentencePiece's tokens for bytes that no other token covers


class Tokenizer:
    """The tokenizer of one base. Encoding and templates may be used from any thread."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, eos_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._is_byte_level = tokenizer.convert_tokens_to_string(["\u0120"]) == " "
        self.eos_ids = eos_ids

    @classmethod
    def load(cls, model: str, eos_ids: frozenset[int]) -> "Tokenizer":
        """From the model's folder or hub id. `eos_ids`: what the model's generation config adds to the tokenizer's."""
        try:
            tokenizer = AutoTokenizer.from_pretrained(model)
        except (OSError, ValueError) as error:
            raise StartupRefused(f"cannot load a tokenizer from {model!r}: {error}") from error
        own = frozenset() if tokenizer.eos_token_id is None else frozenset({int(tokenizer.eos_token_id)})
        return cls(tokenizer, own | eos_ids)

    @property
    def vocab_size(self) -> int:
        return len(self._tokenizer)

    @property
    def has_chat_template(self) -> bool:
        return self._tokenizer.chat_template is not None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return ids

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The prompt's tokens for a conversation, the assistant's turn opened. Raises BadRequest naming `messages`."""
        if not self.has_chat_template:
            raise BadRequest("this base has no chat template; use /v1/completions", param="messages")
        try:
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template may raise anything, on purpose (jinja's raise_exception) or not
            raise BadRequest(f"the base's chat template refuses these messages: {error}", param="messages") from error
        # Templates write their special tokens themselves.
        return self.encode(str(text), add_special_tokens=False)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        text = self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        assert isinstance(text, str)
        return text

    def token_text(self, token_id: int) -> str:
        """One token as it reads after others, special tokens shown."""
        # After itself, because SentencePiece drops the space that the first token of a text begins with.
        first = self.decode([token_id], skip_special_tokens=False)
        return self.decode([token_id, token_id], skip_special_tokens=False)[len(first) :]

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token; of a piece of a character, the piece; none for an id beyond the tokenizer's."""
        token: object = self._tokenizer.convert_ids_to_tokens(token_id)
        if not isinstance(token, str):  # a model's vocabulary is often padded to a round number
            return b""
        if byte := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(byte[1], 16)])
        if self._is_byte_level and all(c in _BYTE_OF for c in token):
            return bytes(_BYTE_OF[c] for c in token)
        return self.token_text(token_id).encode()

    def decoder(self, prompt_ids: Sequence[int], stop: Sequence[str] = ()) -> "IncrementalDecoder":
        return IncrementalDecoder(self, prompt_ids, stop)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes (byte-level BPE vocabularies are written in them)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()


class IncrementalDecoder:
    """The text of one generation as its tokens arrive.

    A few tokens before the new ones are decoded with them, because what a token reads as may depend on its left
    neighbours (spaces of SentencePiece); text is held back while it ends in half a character, or in what may become a
    stop string.
    """

    _NUM_CONTEXT = 5

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt_ids[-self._NUM_CONTEXT :])
        self._prefix = 0  # context starts here
        self._read = len(self._ids)  # tokens before this one have been turned into text
        self._held = ""  # text not emitted yet: may be the start of a stop string
        self._stop = tuple(stop)
        self._max_held = max((len(s) for s in self._stop), default=1) - 1
        self.is_stopped = False

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete. At a stop string: the text before it, `is_stopped`, and then nothing."""
        if self.is_stopped:
            return ""
        self._ids += token_ids
        before = self._tokenizer.decode(self._ids[self._prefix : self._read])
        whole = self._tokenizer.decode(self._ids[self._prefix :])
        end = len(self._ids)
        if len(whole) <= len(before) or whole.endswith(_REPLACEMENT):
            if end - self._read < _MAX_PENDING:
                return ""
            end, whole = self._give_up_waiting()
        self._prefix, self._read = self._read, end
        return self._release(whole[len(before) :])

    def _give_up_waiting(self) -> tuple[int, str]:
        """Where to cut tokens that brought no text for long, and the text before; the last may be half a character."""
        last = len(self._ids) - 3  # a character has four bytes at most
        for end in range(last, last - 4, -1):
            whole = self._tokenizer.decode(self._ids[self._prefix : end])
            if not whole.endswith(_REPLACEMENT):
                return end, whole
        return last, self._tokenizer.decode(self._ids[self._prefix : last])

    def flush(self) -> str:
        """What is still held back, at the end of the generation; half characters come out as U+FFFD."""
        if self.is_stopped:
            return ""
        before = self._tokenizer.decode(self._ids[self._prefix : self._read])
        whole = self._tokenizer.decode(self._ids[self._prefix :])
        text = self._held + whole[len(before) :]
        self._prefix = self._read = len(self._ids)
        self._held = ""
        at = self._find(text)
        self.is_stopped = at is not None
        return text[:at]

    def _release(self, text: str) -> str:
        if not self._stop:
            return text
        text = self._held + text
        at = self._find(text)
        if at is not None:
            self.is_stopped, self._held = True, ""
            return text[:at]
        keep = next((n for n in range(min(self._max_held, len(text)), 0, -1) if self._may_begin(text[-n:])), 0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _find(self, text: str) -> int | None:
        """Where the stop string begins that is complete first, so that the answer depends on the text alone and not on
        the pieces in which it came."""
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        return min(found)[1] if found else None

    def _may_begin(self, ending: str) -> bool:
        return any(stop.startswith(ending) for stop in self._stop)

"""Text to tokens and back: the base's tokenizer, and decoding token by token.

Owns incremental decoding that never emits half a character and never retracts, and the search for stop strings. Knows
nothing about requests or sampling.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from server.ground.errors import BadRequest, StartupRefused
from server.model.chat_template import ChatTemplate, Conversation
from server.model.grammar_trial import GrammarsUnavailable, TokenizerText
from server.model.template_processes import TemplateProcesses

_REPLACEMENT = "\ufffd"
_MAX_PENDING = 16  # tokens without text, such as stray bytes: more would be decoded again and again
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")  # SentencePiece's tokens for bytes that no other token covers


class Tokenizer:
    """The tokenizer of one base. Encoding and templates may be used from any thread."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, eos_ids: frozenset[int], chat_template: str | None = None
    ) -> None:
        """`chat_template` takes the place of the tokenizer's own."""
        self._tokenizer = tokenizer
        self._templates = TemplateProcesses()
        self._strange_templates = TemplateProcesses()  # their own: what adapters bring must hold up nobody else
        self.chat_template = self._chat_template(chat_template or tokenizer.chat_template)
        self._is_byte_level = tokenizer.convert_tokens_to_string(["\u0120"]) == " "
        self.all_special_ids = frozenset(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
        self.eos_ids = eos_ids

    @classmethod
    def load(cls, model: str, eos_ids: frozenset[int], chat_template: str | None = None) -> "Tokenizer":
        """From the model's folder or hub id. `eos_ids`: what the model's generation config adds to the tokenizer's."""
        try:
            tokenizer = AutoTokenizer.from_pretrained(model)
        except (OSError, ValueError) as error:
            raise StartupRefused(f"cannot load a tokenizer from {model!r}: {error}") from error
        own = frozenset() if tokenizer.eos_token_id is None else frozenset({int(tokenizer.eos_token_id)})
        return cls(tokenizer, own | eos_ids, chat_template)

    @property
    def vocab_size(self) -> int:
        return len(self._tokenizer)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The tokens of a text. One that begins with the beginning-of-text token itself is given no second one."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        begin = self._tokenizer.bos_token
        if add_special_tokens and begin and text.startswith(begin):
            plain: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
            return plain if ids == [plain[0], *plain] else ids
        return ids

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The prompt's tokens for a conversation, the assistant's turn opened. Raises BadRequest naming `messages`."""
        if self.chat_template is None:
            raise BadRequest("this base has no chat template; use /v1/completions", param="messages")
        # Templates write their special tokens themselves.
        return self.encode(self.chat_template.render(Conversation(messages)), add_special_tokens=False)

    def template(self, text: str, owner: str) -> ChatTemplate:
        """Another chat template for this tokenizer; `owner` as ChatTemplate has it."""
        return ChatTemplate(text, self._strange_templates, self._tokenizer.special_tokens_map, owner=owner)

    def _chat_template(self, texts: str | Mapping[str, str] | None) -> ChatTemplate | None:
        """Some models have several: one for conversations with tools beside the one for all others."""
        if texts is None:
            return None
        named = {"default": texts} if isinstance(texts, str) else dict(texts)
        if "default" not in named:
            return None
        return ChatTemplate(
            named["default"],
            self._templates,
            self._tokenizer.special_tokens_map,
            tool_text=named.get("tool_use"),
        )

    def close(self) -> None:
        """Ends the processes in which templates are rendered."""
        self._templates.close()
        self._strange_templates.close()

    def decode(
        self, ids: Sequence[int], skip_special_tokens: bool = True, *, shown: frozenset[int] = frozenset()
    ) -> str:
        """The text of `ids`. Of the special tokens that are skipped, those in `shown` are not."""
        if shown and skip_special_tokens:
            ids = [i for i in ids if i in shown or i not in self.all_special_ids]
            skip_special_tokens = False
        text = self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        assert isinstance(text, str)
        return text

    def added_ids(self, texts: Iterable[str]) -> dict[str, int]:
        """Those of `texts` that were added to the vocabulary as tokens of their own, with their ids."""
        added = self._tokenizer.added_tokens_encoder
        return {text: added[text] for text in texts if text in added}

    def for_grammars(self, vocab_size: int) -> TokenizerText:
        """This tokenizer for a model of so many logits. Raises GrammarsUnavailable where it is of another make."""
        if not isinstance(self._tokenizer, PreTrainedTokenizerFast):
            raise GrammarsUnavailable("the base's tokenizer is none of Hugging Face's `tokenizers`")
        backend = copy(self._tokenizer.backend_tokenizer)
        backend.no_padding()
        backend.no_truncation()
        eos_ids = sorted(token for token in self.eos_ids if token < vocab_size)
        return TokenizerText(backend.to_str(), vocab_size, tuple(eos_ids))

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

    def names(self, ids: Sequence[int]) -> list[str]:
        """Tokens as the vocabulary writes them. The ids must be the tokenizer's."""
        names = self._tokenizer.convert_ids_to_tokens(list(ids))
        assert isinstance(names, list)
        return names

    def facts(self) -> dict[str, Any]:
        """What a client without the tokenizer must know, under the names of transformers' tokenizer_config.json."""
        added = self._tokenizer.added_tokens_decoder
        special = {name: str(token) for name, token in self._tokenizer.special_tokens_map.items()}
        return {
            "tokenizer_class": type(self._tokenizer).__name__,
            **dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token")),
            **special,
            "additional_special_tokens": [
                token.content for token in added.values() if token.special and token.content not in special.values()
            ],
            "vocab_size": self.vocab_size,
            "chat_template": None if self.chat_template is None else self.chat_template.text,
        }

    def decoder(
        self,
        prompt_ids: Sequence[int],
        stop: Sequence[str] = (),
        *,
        shown: frozenset[int] = frozenset(),
        min_tokens: int = 0,
        includes_stop: bool = False,
    ) -> "IncrementalDecoder":
        """Arguments as the decoder has them."""
        return IncrementalDecoder(self, prompt_ids, stop, shown, min_tokens, includes_stop)


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

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        stop: Sequence[str],
        shown: frozenset[int] = frozenset(),
        min_tokens: int = 0,
        includes_stop: bool = False,
    ) -> None:
        """`shown`: special tokens whose text counts as any other's; that of the others is left out. A stop string
        counts if a token after the first `min_tokens` completes it; `includes_stop`: the text then ends with it."""
        self._tokenizer = tokenizer
        self._min_tokens = min_tokens
        self._includes_stop = includes_stop
        self._num_pushed = 0  # tokens
        self._num_past = 0  # characters of what is held in which no stop string may end
        self._shown = shown
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
        self._num_pushed += len(token_ids)
        before = self._decode(self._ids[self._prefix : self._read])
        whole = self._decode(self._ids[self._prefix :])
        end = len(self._ids)
        if len(whole) <= len(before) or whole.endswith(_REPLACEMENT):
            if end - self._read < _MAX_PENDING:
                return ""
            end, whole = self._give_up_waiting()
        self._prefix, self._read = self._read, end
        return self._release(whole[len(before) :])

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, shown=self._shown)

    def _give_up_waiting(self) -> tuple[int, str]:
        """Where to cut tokens that brought no text for long, and the text before; the last may be half a character."""
        last = len(self._ids) - 3  # a character has four bytes at most
        for end in range(last, last - 4, -1):
            whole = self._decode(self._ids[self._prefix : end])
            if not whole.endswith(_REPLACEMENT):
                return end, whole
        return last, self._decode(self._ids[self._prefix : last])

    def flush(self) -> str:
        """What is still held back, at the end of the generation; half characters come out as U+FFFD."""
        if self.is_stopped:
            return ""
        before = self._decode(self._ids[self._prefix : self._read])
        whole = self._decode(self._ids[self._prefix :])
        text = self._held + whole[len(before) :]
        self._prefix = self._read = len(self._ids)
        self._held = ""
        cut = self._find(text)
        self.is_stopped = cut is not None
        return text[:cut]

    def _release(self, text: str) -> str:
        if not self._stop:
            return text
        text = self._held + text
        cut = self._find(text)
        if cut is not None:
            self.is_stopped, self._held = True, ""
            return text[:cut]
        keep = next((n for n in range(min(self._max_held, len(text)), 0, -1) if self._may_begin(text[-n:])), 0)
        out, self._held = text[: len(text) - keep], text[len(text) - keep :]
        self._num_past = max(self._past(text) - len(out), 0)
        return out

    def _find(self, text: str) -> int | None:
        """Where to cut for the stop string that is complete first, so that the answer depends on the text alone and not
        on the pieces in which it came."""
        past = self._past(text)
        places = ((stop, text.find(stop, max(past - len(stop) + 1, 0))) for stop in self._stop)
        found = [(at + len(stop), at) for stop, at in places if at >= 0]
        return min(found)[not self._includes_stop] if found else None

    def _past(self, text: str) -> int:
        """How much of the text that is held came too early for a stop string to end in it."""
        return len(text) if self._num_pushed <= self._min_tokens else self._num_past

    def _may_begin(self, ending: str) -> bool:
        return any(stop.startswith(ending) for stop in self._stop)

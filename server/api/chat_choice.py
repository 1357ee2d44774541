"""One choice of a chat's answer: deltas of the engine in, what OpenAI's clients read out, whole or in parts.

Owns the shape of messages and of their parts; both are made of the same pieces. Knows nothing about envelopes, usage,
or how text is told apart.
"""

from dataclasses import dataclass, field
from typing import Any

from server.api import logprobs
from server.api.schemas import ChatBody
from server.api.tools.pieces import CallArguments, CallBegun, CallEnded, Content, Piece, Reasoning
from server.api.tools.reading import Reading
from server.engine.sequence import Delta, FinishReason
from server.model.tokenizer import Tokenizer

_CALLS = "tool_calls"  # the field, and why an answer with calls ends


@dataclass(slots=True)
class _Message:
    """What has been said so far."""

    content: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)

    def whole(self) -> dict[str, Any]:
        content = "".join(self.content)
        shown: dict[str, Any] = {
            "role": "assistant",
            "content": None if self.calls and not content else content,
            "refusal": None,
        }
        if self.reasoning:
            shown["reasoning_content"] = "".join(self.reasoning)
        if self.calls:
            shown[_CALLS] = self.calls
        return shown


class ChatChoice:
    """Reads one sequence. Give it each delta once, and take the parts of the stream, or the whole at the end."""

    def __init__(self, index: int, body: ChatBody, reading: Reading, tokenizer: Tokenizer) -> None:
        self._index = index
        self._reading = reading
        self._parser = reading.parser()
        self._tokenizer = tokenizer
        self._wants_logprobs = body.logprobs
        self._wants_ids = body.return_token_ids
        self._message = _Message()
        self._scores: list[dict[str, Any]] = []
        self._token_ids: list[int] = []
        self._finish_reason: str | None = None
        self._has_role = False

    @property
    def is_ended(self) -> bool:
        """Whether nothing more is to be read, although more may come."""
        return self._finish_reason is not None

    def read(self, delta: Delta) -> list[dict[str, Any]]:
        """What this adds, as parts for a stream: the role first, then content, the finish reason by itself at last."""
        pieces = self._pieces(delta)
        parts = [] if self._has_role else [self._part(self._role())]
        self._has_role = True
        said = [self._part(shown) for piece in pieces if (shown := self._add(piece)) is not None]
        if extras := self._extras(delta):
            said = said or [self._part({} if self._reading.has_calls else {"content": ""})]
            said[0] |= extras
        parts += said
        if self._finish_reason is not None:
            parts.append({**self._part({}), "finish_reason": self._finish_reason})
        return parts

    def whole(self) -> dict[str, Any]:
        choice = {
            "index": self._index,
            "message": self._message.whole(),
            "logprobs": {"content": self._scores, "refusal": None} if self._wants_logprobs else None,
            "finish_reason": self._finish_reason,
        }
        return choice | ({"token_ids": self._token_ids} if self._wants_ids else {})

    def _pieces(self, delta: Delta) -> list[Piece]:
        pieces = self._parser.push(delta.text)
        if delta.is_terminal:
            pieces += self._parser.finish()
        ends = [at for at, piece in enumerate(pieces, 1) if isinstance(piece, CallEnded)]
        if self._reading.is_single and ends:
            pieces = pieces[: ends[0]]
            self._finish_reason = _CALLS
        elif delta.finish_reason is not None:
            has_calls = self._message.calls or any(isinstance(piece, CallBegun) for piece in pieces)
            is_stop = delta.finish_reason is FinishReason.STOP
            self._finish_reason = _CALLS if has_calls and is_stop else delta.finish_reason
        return pieces

    def _add(self, piece: Piece) -> dict[str, Any] | None:
        """The piece as a stream says it; None for what is not said."""
        match piece:
            case Content(text):
                self._message.content.append(text)
                return {"content": text}
            case Reasoning(text):
                self._message.reasoning.append(text)
                return {"reasoning_content": text}
            case CallBegun(index, name):
                call = {"id": self._reading.new_call_id(), "type": "function"}
                self._message.calls.append({**call, "function": {"name": name, "arguments": ""}})
                return {_CALLS: [{"index": index, **call, "function": {"name": name, "arguments": ""}}]}
            case CallArguments(index, text):
                self._message.calls[index]["function"]["arguments"] += text
                return {_CALLS: [{"index": index, "function": {"arguments": text}}]}
            case CallEnded():
                return None

    def _extras(self, delta: Delta) -> dict[str, Any]:
        """What is told of the delta's tokens, where it was asked for."""
        extras: dict[str, Any] = {}
        if self._wants_logprobs and delta.logprobs:
            scores = logprobs.chat(delta.logprobs, self._tokenizer)
            self._scores += scores["content"]
            extras["logprobs"] = scores
        if self._wants_ids and delta.token_ids:
            self._token_ids += delta.token_ids
            extras["token_ids"] = list(delta.token_ids)
        return extras

    def _role(self) -> dict[str, Any]:
        """An answer that may turn out to be calls has no content yet, not an empty one."""
        return {"role": "assistant", "content": None if self._reading.has_calls else "", "refusal": None}

    def _part(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": self._index, "delta": delta, "logprobs": None, "finish_reason": None}

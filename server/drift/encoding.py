"""The prompts as tokens, the passes that they are run in, and a side that has room for these passes.

Owns the limits of a pass, and the sentences that refuse a prompt by its line. Knows nothing about divergence.
"""

from contextlib import ExitStack
from dataclasses import dataclass

from server.assemble import assemble
from server.drift.passes import Pass, Side, plan
from server.drift.request import Prompt, PromptFile
from server.drift.room import Shape
from server.ground.config import Settings
from server.ground.errors import GraftError, StartupRefused
from server.model.tokenizer import Tokenizer

_MAX_LOGITS_BYTES = 1 << 28  # of one pass on one side, in float32
MAX_ROWS = 1024  # tokens of one pass


@dataclass(frozen=True, slots=True)
class Encoded:
    """The prompts as tokens, and how they are run."""

    num_truncated: int
    longest: int
    max_sequences: int  # prompts to a pass
    passes: tuple[Pass, ...]

    @property
    def num_tokens(self) -> int:
        return sum(chunk.num_tokens for chunks in self.passes for chunk in chunks)

    def settings_for(self, settings: Settings) -> Settings:
        """The settings with a KV cache for one pass and no more."""
        limits = {
            "max_context": self.longest,
            "max_sequences": self.max_sequences,
            "max_batch_tokens": MAX_ROWS,
            "kv_memory": None,
        }
        return settings.model_copy(update=limits)

    def side(self, settings: Settings, held: ExitStack) -> Side:
        """A base that runs these passes, closed when `held` ends; `settings` come from `settings_for`."""
        server = assemble(settings)
        held.callback(server.close)
        return Side(server, self.max_sequences, self.longest)


def encode(model: str, file: PromptFile, shape: Shape, max_tokens_per_prompt: int | None) -> Encoded:
    """Tokens of every prompt, cut where that was asked for. Raises StartupRefused naming the line."""
    tokenizer = Tokenizer.load(model, frozenset())
    prompts, num_truncated = [], 0
    for prompt in file.prompts:
        ids = _ids(tokenizer, prompt, file)
        cut = ids[:max_tokens_per_prompt]
        if len(cut) > shape.max_context:
            raise _bad_line(
                file, prompt,
                f"it has {len(cut)} tokens, and the base reads at most {shape.max_context}; give "
                f"--max-tokens-per-prompt {shape.max_context} or less, or shorten it",
            )  # fmt: skip
        num_truncated += len(cut) < len(ids)
        prompts.append(cut)
    longest = max(map(len, prompts))
    max_rows = max(1, min(MAX_ROWS, _MAX_LOGITS_BYTES // (4 * shape.vocab_size)))
    max_sequences = max(1, max_rows // longest)
    return Encoded(num_truncated, longest, max_sequences, tuple(plan(prompts, max_rows, max_sequences)))


def _ids(tokenizer: Tokenizer, prompt: Prompt, file: PromptFile) -> tuple[int, ...]:
    try:
        ids = tokenizer.chat(prompt.messages) if prompt.messages is not None else tokenizer.encode(prompt.text or "")
    except GraftError as error:
        raise _bad_line(file, prompt, error.message) from error
    if not ids:
        raise _bad_line(file, prompt, "it has no token")
    return tuple(ids)


def _bad_line(file: PromptFile, prompt: Prompt, problem: str) -> StartupRefused:
    return StartupRefused(f"--prompts {file.path}, line {prompt.line}: {problem}")

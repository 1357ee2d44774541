"""Request fields that this server does not implement: which pass, and how the others are refused.

A field passes when it cannot change the answer: book-keeping, or a feature at the value that switches it off. Every
other one is refused by name, because an answer that silently ignores what was asked for is a wrong answer.
"""

from collections.abc import Mapping
from typing import Any

from server.api.errors import echo
from server.ground.errors import BadRequest

# Names, labels and account matters: they say nothing about the text to generate.
BOOKKEEPING = frozenset(
    {
        "metadata",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)

# Features by the values that switch them off. (bool is an int for Python: `True == 1`, which does no harm here.)
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "continue_final_message": (False,),
    "chat_template_kwargs": ({},),
    "early_stopping": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "min_p": (0,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "no_repeat_ngram_size": (0,),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "priority": (0,),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "stop_token_ids": ([],),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "typical_p": (1,),
    "use_beam_search": (False,),
}
# Text prompts get the tokenizer's special tokens; a chat template writes its own.
COMPLETION_NEUTRAL = {**NEUTRAL, "add_special_tokens": (True,)}
CHAT_NEUTRAL = {**NEUTRAL, "add_special_tokens": (False,), "echo": (False,), "best_of": (1,)}


def refuse_unsupported(extra: Mapping[str, Any], neutral: Mapping[str, tuple[Any, ...]]) -> None:
    """Raise BadRequest, naming the field, for the first of `extra` that would change the answer. Null never does."""
    for name, value in extra.items():
        if value is None or name in BOOKKEEPING or value in neutral.get(name, ()):
            continue
        raise BadRequest(_refusal(name, neutral.get(name)), param=echo(name), code="unsupported")


def _refusal(name: str, neutral: tuple[Any, ...] | None) -> str:
    if neutral is None:
        return f"'{echo(name)}' is not a field that this server supports; remove it."
    return f"'{name}' is not supported by this server; remove it or send {neutral[0]!r}, which switches it off."


def without_nulls(body: object) -> object:
    """A JSON object less its null fields: null means the default. Other values are given back as they are."""
    if not isinstance(body, dict):
        return body
    return {name: value for name, value in body.items() if value is not None}

"""Request fields that this server does not implement: which pass, and how the others are refused.

A field passes when it cannot change the answer: book-keeping, or a feature at the value that switches it off. Every
other one is refused by name, because an answer that silently ignores what was asked for is a wrong answer.
"""

import json
from collections.abc import Collection, Mapping
from typing import Any

from server.api.errors import echo
from server.api.unknown_fields import may_ignore
from server.ground.errors import BadRequest

# Names, labels, account matters and hints for speed: they say nothing about the text to generate.
BOOKKEEPING = frozenset(
    {
        "metadata",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "session_id",
        "store",
        "user",
    }
)

# Features by the values that switch them off.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "bad_words": ([],),
    "early_stopping": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "include_reasoning": (True,),
    "length_penalty": (1,),
    "modalities": (["text"],),
    "no_repeat_ngram_size": (0,),
    "return_prompt_text": (False,),
    "return_tokens_as_token_ids": (False,),
    "spaces_between_special_tokens": (True,),
    "suffix": ("",),
    "truncation_side": ("left",),
    "typical_p": (1,),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
}
# Text prompts get the tokenizer's special tokens; a chat template writes its own.
COMPLETION_NEUTRAL = {
    **NEUTRAL,
    "add_special_tokens": (True,),
    "add_generation_prompt": (True,),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "parallel_tool_calls": (True, False),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}
CHAT_NEUTRAL = {**NEUTRAL, "add_special_tokens": (False,), "echo": (False,), "best_of": (1,)}


def _use(field: str) -> str:
    return f"use '{field}' in its place"


_OUTPUTS = _use("structured_outputs")
_NO_BEAMS = "this server samples and searches no beams; 'n' gives several answers"
_NO_CODE = "a request cannot bring code; 'logit_bias' and 'allowed_token_ids' choose tokens"
_ID_HEADER = "send it in the header x-request-id"
_NO_CACHES = "this server passes no caches on; remove it"
_NO_MARKS = "this server marks no text; remove it"
_TEXT_ALONE = "this server reads and writes text alone; remove it"
# What to do in the place of fields that this server does not have, most of them other servers'. An operator who lets
# unknown fields pass does not mean these: each asks for another answer.
ELSEWHERE: Mapping[str, str] = {
    "adapter_id": _use("adapter"),
    "adapter_source": "have the operator allow the place with --allow-source, and fetch the adapter with /v1/adapters",
    "audio": _TEXT_ALONE,
    "bad_words": "'logit_bias' bans tokens by their ids; words have many spellings in tokens, and all would be needed",
    "chat_template": "the operator sets it, for chat completions: graft serve --chat-template FILE",
    "custom_logit_processor": _NO_CODE,
    "decoder_input_details": "'echo' with 'logprobs' gives the prompt's tokens on /v1/completions",
    "documents": "put them into the prompt or the messages",
    "early_stopping": _NO_BEAMS,
    "ebnf": _OUTPUTS,
    "ec_transfer_params": _NO_CACHES,
    "function_call": _use("tool_choice"),
    "functions": _use("tools"),
    "grammar": _OUTPUTS,
    "guided_choice": _OUTPUTS,
    "guided_decoding_backend": "there is one way to follow a grammar here; remove it",
    "guided_grammar": _OUTPUTS,
    "guided_json": _OUTPUTS,
    "guided_json_object": _OUTPUTS,
    "guided_regex": _OUTPUTS,
    "include_reasoning": "reasoning comes in 'reasoning_content', beside the answer; leave it unread",
    "json_schema": _OUTPUTS,
    "kv_transfer_params": _NO_CACHES,
    "length_penalty": _NO_BEAMS,
    "logprob_token_ids": "'logprobs' lists the most likely tokens, and 'echo' scores any text",
    "logits_processors": _NO_CODE,
    "lora_name": _use("adapter"),
    "lora_path": _use("adapter"),
    "max_completion_tokens": _use("max_tokens"),
    "max_length": _use("max_tokens"),
    "max_new_tokens": _use("max_tokens"),
    "media_io_kwargs": _TEXT_ALONE,
    "merged_adapters": _use("adapter"),
    "messages": "send messages to /v1/chat/completions",
    "mm_processor_kwargs": _TEXT_ALONE,
    "modalities": _TEXT_ALONE,
    "moderation": "nothing here moderates; remove it and check texts yourself",
    "no_repeat_ngram_size": "'frequency_penalty' and 'repetition_penalty' make repeats less likely",
    "prompt": "send prompts to /v1/completions",
    "prompt_embeds": "send the prompt as a text or as token ids",
    "prompt_logprobs": "'echo' with 'logprobs' gives them on /v1/completions",
    "reasoning_effort": "a chat template reads it; send messages to /v1/chat/completions",
    "regex": _OUTPUTS,
    "repetition_detection": "'frequency_penalty' and 'repetition_penalty' make repeats less likely",
    "request_id": _ID_HEADER,
    "return_prompt_text": "'return_token_ids' gives the prompt's ids, and /detokenize their text",
    "return_tokens_as_token_ids": _use("return_token_ids"),
    "rid": _ID_HEADER,
    "routed_experts_prompt_start": "this server does not tell which experts were used; remove it",
    "spaces_between_special_tokens": "the text has what the tokenizer's own decoding puts between them; remove it",
    "stop_regex": "use 'stop' with texts or 'stop_token_ids'",
    "stop_sequences": _use("stop"),
    "stream_interval": "every step's tokens are sent at once; remove it",
    "structural_tag": _OUTPUTS,
    "suffix": "write what follows into the prompt, in the form that the model was trained on",
    "thinking_token_budget": "'max_tokens' bounds the whole answer; remove it",
    "top_logprobs": "use 'logprobs' with the number",
    "truncation_side": "'truncate_prompt_tokens' keeps the end of the prompt; cut its end yourself",
    "typical_p": "use 'top_p' or 'min_p'",
    "use_beam_search": _NO_BEAMS,
    "verbosity": "ask for it in the messages, and bound the answer with 'max_completion_tokens'",
    "vllm_xargs": "remove it, and send what is in it under the names that this server has",
    "watermark": _NO_MARKS,
    "watermarking": _NO_MARKS,
    "web_search_options": "this server searches nothing; put what was found into the messages",
}


def refuse_unsupported(extra: Mapping[str, Any], neutral: Mapping[str, tuple[Any, ...]]) -> None:
    """Raise BadRequest, naming the field, for the first of `extra` that would change the answer. Null never does.

    A field that no server is known for passes where the operator lets unknown fields pass; the answer then names it.
    """
    for name, value in extra.items():
        if value is None or name in BOOKKEEPING or _is_one_of(value, neutral.get(name, ())):
            continue
        if name not in neutral and name not in ELSEWHERE and may_ignore(name):
            continue
        raise BadRequest(_refusal(name, neutral.get(name)), param=echo(name), code="unsupported")


def _is_one_of(value: object, values: tuple[Any, ...]) -> bool:
    """bool is an int for Python, and not in JSON."""
    return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in values)


def _refusal(name: str, neutral: tuple[Any, ...] | None) -> str:
    """Every one says what to do."""
    advice = ELSEWHERE.get(name)
    if advice is None and neutral is None:
        return f"'{echo(name)}' is not a field that this server supports; remove it."
    if neutral is None:
        return f"'{name}' is not a field here; {advice}."
    off = f"remove it or send {json.dumps(neutral[0])}, which changes nothing"
    return f"'{name}' is not supported by this server; {off}." + (f" Or: {advice}." if advice else "")


def without_ignored(body: object, known: Collection[str]) -> object:
    """A JSON object less the fields that are not `known`, where the operator lets them pass; else as it is."""
    if not isinstance(body, dict):
        return body
    return {name: value for name, value in body.items() if name in known or not may_ignore(name)}


def without_nulls(body: object) -> object:
    """A JSON object less its null fields: null means the default. Other values are given back as they are."""
    if not isinstance(body, dict):
        return body
    return {name: value for name, value in body.items() if value is not None}

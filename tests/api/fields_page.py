"""The table of docs/fields.md: what becomes of every field that clients may send, and the test that shows it.

`python -m tests.api.fields_page` writes it into the page; `test_fields_page.py` holds the page to it. What is
implemented, what passes and what is refused is read from the server's own models and tables; the lists of names and the
words are here.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.api.fields import BOOKKEEPING, CHAT_NEUTRAL, COMPLETION_NEUTRAL, refuse_unsupported
from server.api.messages import refuse_template
from server.api.schemas import (
    MAX_BIAS,
    MAX_CHOICES,
    MAX_LOGPROBS,
    MAX_REPETITION,
    MAX_SALT_CHARS,
    MAX_STOP_IDS,
    MAX_STOPS,
    MIN_REPETITION,
    ChatBody,
    CompletionBody,
    GenerationBody,
)
from server.ground.errors import BadRequest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "fields.md"
BEGIN, END = "<!-- fields: written by tests/api/fields_page.py -->\n", "<!-- end of fields -->\n"


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# OpenAI's, by endpoint. The tests compare them with the parameters of the installed openai package.
OPENAI_COMPLETIONS = _names(
    "best_of echo frequency_penalty logit_bias logprobs max_tokens model n presence_penalty prompt seed stop stream "
    "stream_options suffix temperature top_p user"
)
OPENAI_CHAT = _names(
    "audio frequency_penalty function_call functions logit_bias logprobs max_completion_tokens max_tokens messages "
    "metadata modalities model moderation n parallel_tool_calls prediction presence_penalty prompt_cache_key "
    "prompt_cache_options prompt_cache_retention reasoning_effort response_format safety_identifier seed service_tier "
    "stop store stream stream_options temperature tool_choice tools top_logprobs top_p user verbosity "
    "web_search_options"
)
# vLLM's beside these; SGLang's, TGI's, LoRAX's and others' that say the same in other words.
VLLM = _names(
    "add_generation_prompt add_special_tokens allowed_token_ids bad_words cache_salt "
    "chat_template chat_template_kwargs continue_final_message documents "
    "early_stopping ec_transfer_params guided_choice guided_decoding_backend guided_grammar guided_json "
    "guided_regex ignore_eos include_reasoning include_stop_str_in_output kv_transfer_params length_penalty "
    "logits_processors logprob_token_ids media_io_kwargs min_p min_tokens mm_processor_kwargs priority prompt_embeds "
    "prompt_logprobs repetition_detection repetition_penalty request_id return_prompt_text return_token_ids "
    "return_tokens_as_token_ids routed_experts_prompt_start session_id "
    "skip_special_tokens spaces_between_special_tokens stop_token_ids stream_interval structured_outputs "
    "thinking_token_budget top_k truncate_prompt_tokens truncation_side use_beam_search vllm_xargs watermarking"
)
OTHERS = _names(
    "adapter adapter_id adapter_source custom_logit_processor decoder_input_details ebnf grammar guided_json_object "
    "json_schema lora_name lora_path max_length max_new_tokens merged_adapters no_repeat_ngram_size regex rid "
    "stop_regex stop_sequences structural_tag typical_p watermark"
)

_TOKENS = "tests/api/test_token_fields.py"
_COMPLETIONS = "tests/api/test_completions.py"
_SCHEMAS = "tests/api/test_schemas.py"
_PEERS = "tests/api/test_peer_fields.py"
_STRUCTURED = "tests/api/test_structured.py"
_TOOLS = "tests/api/tools/test_tools_http.py"
_TEMPLATES = "tests/api/tools/test_reasoning_http.py"
# Fields that are implemented: what they take, and the test that shows what they do.
IMPLEMENTED: Mapping[str, tuple[str, str]] = {
    "adapter": (
        "a name, `name@version`, an object with `name` and `weight`, or a list of these",
        f"{_COMPLETIONS}::test_the_adapter_field_chooses_the_voice",
    ),
    "allowed_token_ids": (
        "ids, at least one: no other token comes; not together with a grammar",
        f"{_TOKENS}::test_only_allowed_tokens_come",
    ),
    "best_of": (
        "as much as `n`: candidates are not ranked",
        f"{_SCHEMAS}::test_best_of_as_many_as_are_answered_is_no_choice",
    ),
    "add_generation_prompt": (
        "whether the assistant's turn is opened; true without it",
        f"{_TEMPLATES}::test_a_message_is_continued_and_a_turn_left_closed",
    ),
    "chat_template_kwargs": (
        "the keys that the operator allows; see [chat-templates.md](chat-templates.md)",
        f"{_TEMPLATES}::test_what_is_allowed_reaches_the_template",
    ),
    "continue_final_message": (
        "true: the answer goes on from the last message",
        f"{_TEMPLATES}::test_a_message_is_continued_and_a_turn_left_closed",
    ),
    "parallel_tool_calls": (
        "false: one call at most",
        f"{_TOOLS}::test_without_parallel_calls_an_answer_ends_with_its_first",
    ),
    "reasoning_effort": ("a word for the chat template", f"{_TEMPLATES}::test_what_is_allowed_reaches_the_template"),
    "response_format": (
        "see [structured-output.md](structured-output.md)",
        f"{_STRUCTURED}::test_an_answer_satisfies_its_schema",
    ),
    "structured_outputs": (
        "see [structured-output.md](structured-output.md)",
        f"{_STRUCTURED}::test_a_choice_a_regex_and_a_grammar_are_kept_to",
    ),
    "tool_choice": (
        "`none`, `auto`, `required` or a named function; see [tools.md](tools.md)",
        f"{_TOOLS}::test_a_named_tool_is_called_as_it_wants_to_be",
    ),
    "tools": (
        "see [tools.md](tools.md)",
        f"{_TOOLS}::test_each_style_is_known_by_its_template_and_its_calls_come_out",
    ),
    "cache_salt": (
        f"a text of 1 to {MAX_SALT_CHARS} characters: cached prompts are shared under one salt only",
        "tests/test_prefix_reuse.py::test_a_salt_keeps_tenants_apart",
    ),
    "echo": (
        "true: the prompt comes first, with its log-probabilities",
        f"{_COMPLETIONS}::test_echo_puts_the_prompt_before_the_text",
    ),
    "frequency_penalty": (
        "-2 to 2; counts the output",
        f"{_TOKENS}::test_penalties_count_the_output_and_not_the_prompt",
    ),
    "ignore_eos": ("true: the model's own end ends nothing", f"{_COMPLETIONS}::test_sixteen_tokens_are_the_default"),
    "include_stop_str_in_output": (
        "true: the text ends with the stop string or token",
        f"{_TOKENS}::test_a_stop_string_may_stay_in_the_text",
    ),
    "logit_bias": (
        f"an object of biases by token id, each from {-MAX_BIAS} to {MAX_BIAS}",
        f"{_TOKENS}::test_a_bias_bans_or_brings_a_token",
    ),
    "logprobs": (
        f"completions: 0 to {MAX_LOGPROBS}; chat: true",
        f"{_TOKENS}::test_logprobs_are_of_the_model_and_not_of_what_was_made_of_it",
    ),
    "max_completion_tokens": (
        "at least 1; wins over `max_tokens`",
        "tests/api/test_chat.py::test_max_completion_tokens_wins_over_the_older_name",
    ),
    "max_tokens": (
        "completions: at least 0, without it 16; chat: at least 1, without it what the context leaves",
        f"{_COMPLETIONS}::test_sixteen_tokens_are_the_default",
    ),
    "messages": ("see [tools.md](tools.md)", "tests/api/test_chat.py::test_an_answer_has_openais_shape"),
    "min_p": (
        "0 to 1: tokens less likely than this share of the most likely one are left out",
        "tests/engine/test_sampler.py::test_the_cuts_are_those_of_transformers",
    ),
    "min_tokens": ("0 to `max_tokens`: no end comes before", f"{_TOKENS}::test_no_end_comes_before_min_tokens"),
    "model": ("a name of the base, or an adapter's", f"{_COMPLETIONS}::test_the_adapter_field_chooses_the_voice"),
    "n": (f"1 to {MAX_CHOICES}", f"{_COMPLETIONS}::test_choices_of_several_prompts_come_prompt_by_prompt"),
    "presence_penalty": (
        "-2 to 2; counts the output",
        f"{_TOKENS}::test_penalties_count_the_output_and_not_the_prompt",
    ),
    "priority": (
        "an integer; lower is admitted earlier",
        "tests/engine/test_priority.py::test_the_lower_number_is_admitted_first_and_equals_by_arrival",
    ),
    "prompt": (
        "a text, texts, token ids, or lists of token ids",
        f"{_SCHEMAS}::test_prompts_are_texts_or_token_ids_and_never_empty",
    ),
    "repetition_penalty": (
        f"{MIN_REPETITION} to {MAX_REPETITION:g}; counts prompt and output",
        f"{_TOKENS}::test_a_repetition_penalty_counts_the_prompt_too",
    ),
    "return_token_ids": ("true: `prompt_token_ids` and `token_ids`", f"{_TOKENS}::test_token_ids_come_in_vllms_places"),
    "seed": ("an integer of 64 bits", "tests/test_token_rules.py::test_a_seed_gives_the_same_answer_in_any_crowd"),
    "skip_special_tokens": (
        "false: the text shows special tokens",
        f"{_TOKENS}::test_special_tokens_are_shown_where_they_are_asked_for",
    ),
    "stop": (f"a text, or up to {MAX_STOPS}", f"{_COMPLETIONS}::test_text_ends_before_a_stop_string"),
    "stop_token_ids": (
        f"up to {MAX_STOP_IDS} ids that end the answer",
        f"{_TOKENS}::test_a_stop_token_ends_the_answer_and_is_not_in_its_text",
    ),
    "stream": ("true: server-sent events", f"{_COMPLETIONS}::test_a_stream_says_what_the_whole_answer_says"),
    "stream_options": (
        "`include_usage`, `continuous_usage_stats`; needs `stream`, and the second the first",
        "tests/api/test_stream.py::test_usage_comes_in_a_chunk_of_its_own_when_asked_for",
    ),
    "temperature": (
        "0 to 2; 0 takes the most likely token",
        "tests/engine/test_sampler.py::test_draws_follow_the_distribution",
    ),
    "top_k": (
        "the number of tokens to draw from; 0 and -1: all",
        "tests/engine/test_sampler.py::test_the_cuts_are_those_of_transformers",
    ),
    "top_logprobs": (
        f"0 to {MAX_LOGPROBS}; needs `logprobs`",
        "tests/api/test_chat.py::test_logprobs_list_tokens_with_their_bytes_and_rivals",
    ),
    "top_p": ("above 0, to 1", "tests/engine/test_sampler.py::test_the_cuts_are_those_of_transformers"),
    "truncate_prompt_tokens": (
        "at least 1, or -1: that many of the prompt's last tokens are kept, or all that the context allows",
        f"{_TOKENS}::test_the_end_of_a_long_prompt_is_kept",
    ),
}
_REFUSED_TEST = "tests/api/test_fields_page.py::test_what_the_page_calls_refused_is_refused_in_its_words"
_NEUTRAL_TEST = f"{_SCHEMAS}::test_features_that_are_switched_off_pass"
_BOOKKEEPING_TEST = f"{_SCHEMAS}::test_bookkeeping_passes"
_UNKNOWN = "what_nobody_knows"
_ENDPOINTS: Mapping[str, tuple[type[GenerationBody], Mapping[str, tuple[Any, ...]]]] = {
    "completions": (CompletionBody, COMPLETION_NEUTRAL),
    "chat": (ChatBody, CHAT_NEUTRAL),
}


class _Unheard:
    """A value that switches nothing off."""


@dataclass(frozen=True)
class Fate:
    """What becomes of a field at one endpoint: "yes", "passes", the values that pass, or "no" with a sentence."""

    shown: str
    sentence: str | None
    test: str


def all_fields() -> list[str]:
    ours = {name for body, _ in _ENDPOINTS.values() for name in body.model_fields}
    return sorted(OPENAI_COMPLETIONS | OPENAI_CHAT | VLLM | OTHERS | ours)


def fate(name: str, endpoint: str) -> Fate:
    body, neutral = _ENDPOINTS[endpoint]
    if name in body.model_fields:
        return Fate("yes", None, IMPLEMENTED[name][1])
    if name in BOOKKEEPING:
        return Fate("passes", None, _BOOKKEEPING_TEST)
    sentence = _sentence(name, endpoint)
    if name in neutral:
        values = ", ".join(f"`{json.dumps(value)}`" for value in neutral[name])
        return Fate(f"only {values}", sentence, _NEUTRAL_TEST)
    return Fate("no", sentence, _REFUSED_TEST)


def _sentence(name: str, endpoint: str) -> str:
    """The words with which a value of this field is refused."""
    value = {name: _Unheard()}
    try:
        if endpoint == "chat":
            refuse_template(value)
        refuse_unsupported(value, _ENDPOINTS[endpoint][1])
    except BadRequest as error:
        return error.message
    raise AssertionError(f"{name} is neither declared nor refused")


def table() -> str:
    lines = ["| field | completions | chat | takes, or says | shown by |", "|---|---|---|---|---|"]
    lines += [_row(name) for name in all_fields()]
    lines.append(
        f"| any other | no | no | {_sentence(_UNKNOWN, 'chat').replace(_UNKNOWN, '...')} | {_test(_REFUSED_TEST)} |"
    )
    return "\n".join(lines) + "\n"


def _row(name: str) -> str:
    fates = [fate(name, endpoint) for endpoint in _ENDPOINTS]
    says = [IMPLEMENTED[name][0]] if name in IMPLEMENTED else []
    says += [one.sentence for one in fates if one.sentence is not None]
    tests = [_test(one.test) for one in fates]
    return f"| `{name}` | {fates[0].shown} | {fates[1].shown} | {_once(says, '<br>')} | {_once(tests, '<br>')} |"


def _once(texts: list[str], between: str) -> str:
    return between.join(dict.fromkeys(texts)).replace("|", "\\|")


def _test(test: str) -> str:
    """A link to the file, under the test's name."""
    path, _, name = test.partition("::")
    return f"[{name}](../{path})"


def table_in(page: str) -> str:
    return page.partition(BEGIN)[2].partition(END)[0]


def main() -> None:
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()

"""Tiny bases with chat templates of each style, and a pen that writes what a test wants the model to say.

The templates were written for these tests: each shows a conversation in its style's own marks, tools, calls and results
included, and has the habits that matter (who wants arguments as text, who insists on ids of nine characters).
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from server.ground.config import Settings
from tests.api.conftest import Live, serving
from tests.models import EOS_ID, WIDTHS, byte_tokenizer

CONTEXT = 4096
VOCAB_SIZE = 280  # with room for the marks that some tokenizers have as tokens

HERMES = """\
{%- if tools %}{{ '<s>system\\nTools:' }}{% for tool in tools %}{{ '\\n' + (tool | tojson) }}{% endfor %}
{{- '\\nCall as <tool_call>{"name": .., "arguments": ..}</tool_call>\\n' }}{% endif %}
{%- for m in messages %}{{ '<s>' + m.role + '\\n' }}
{%- if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}{{ m.content }}
{%- for call in m.tool_calls or [] %}
{{- '<tool_call>{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) + '}' }}
{{- '</tool_call>' }}
{%- endfor %}{{ '</s>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<s>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n' }}{% endif %}
{%- if thinking is defined and thinking %}{{ '<think>\\n' }}{% endif %}{% endif %}"""

LLAMA = """\
{{- bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>' }}
{%- if loop.first and tools %}{{ 'Answer as {"name": .., "parameters": ..}. ' + (tools | tojson(indent=1)) }}{% endif %}
{%- if 'tool_calls' in m %}
{%- if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time, please') }}{% endif %}
{{- '{"name": "' + m.tool_calls[0].function.name + '", "parameters": ' }}
{{- m.tool_calls[0].function.arguments | tojson }}{{ '}' }}
{%- else %}{{ m.content }}{% endif %}{{ '<|eot_id|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>' }}{% endif %}"""

MISTRAL = """\
{%- for m in messages %}
{%- if m.role == 'tool' %}
{%- if m.tool_call_id | length != 9 %}{{ raise_exception('ids of calls have nine characters') }}{% endif %}
{{- '[RESULT]' + m.tool_call_id + ' ' + m.content }}
{%- elif m.tool_calls is defined %}{{ '[TOOL_CALLS]' }}
{%- for call in m.tool_calls %}{{ call.function.name + '[ARGS]' + call.function.arguments }}{% endfor %}
{%- elif m.role == 'user' %}
{%- if loop.last and tools is not none %}{{ '[TOOLS]' + (tools | tojson) }}{% endif %}{{ '[INST]' + m.content }}
{%- else %}{{ m.content }}{% endif %}{% endfor %}"""  # which adds the arguments to text, so that they must be text

PLAIN = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}{{ 'assistant:' }}"

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 6}, "days": {"enum": [1, 2, 3]}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
CLOCK: dict[str, Any] = {"type": "function", "function": {"name": "clock"}}


# Tokens of their own, so that a call takes ten steps and not a hundred; that any cut of a text is read alike is shown
# elsewhere.
PHRASES = (
    '{"name": "',
    "weather",
    "clock",
    '", "arguments": ',
    '", "parameters": ',
    '{"city": "',
    "Rome",
    '", "days": ',
)


def tokenizer(template: str, special: Sequence[str] = (), added: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    raw = byte_tokenizer()
    raw.add_tokens(list(special), special_tokens=True)
    raw.add_tokens([*added, *PHRASES])
    raw.chat_template = template
    return raw


def save_base(folder: Path, template: str, special: Sequence[str] = (), added: Sequence[str] = ()) -> Path:
    """A model folder; `special` and `added` are tokens of its own, the former left out of decoded text."""
    torch.manual_seed(0)
    widths = {**WIDTHS, "vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(**{**widths, "max_position_embeddings": CONTEXT})).eval().save_pretrained(folder)
    tokenizer(template, special, added).save_pretrained(folder)
    return folder


class Pen:
    """Stands before the engine's steps and makes the choice of that number write the text of that place, then end."""

    def __init__(self, live: Live) -> None:
        self.unled = live.server.runner.run
        self._tokenizer = live.server.tokenizer
        self._scripts: list[list[int]] = []

    def write(self, *texts: str) -> None:
        self._scripts = [self._tokenizer.encode(text, add_special_tokens=False) for text in texts]

    def __call__(self, *step: Any) -> Any:
        logits = self.unled(*step)
        sampled = torch.full(logits.sampled.shape, -1000.0)
        for row, item in zip(sampled, logits.samplers, strict=True):
            script = self._scripts[int(re.sub(r".*-", "", item.sequence.sequence_id))]
            written = item.sequence.num_output_tokens
            row[script[written] if written < len(script) else EOS_ID] = 0.0
        return replace(logits, sampled=sampled)


@contextmanager
def written(settings: Callable[..., Settings], base: Path, **flags: Any) -> Iterator[tuple[Live, Pen]]:
    """A server on `base` whose model writes what the pen is told to."""
    with serving(settings(model=str(base), **flags)) as live:
        pen = Pen(live)
        live.server.runner.run = pen  # type: ignore[method-assign]
        yield live, pen


def ask(live: Live, **fields: Any) -> dict[str, Any]:
    """The whole answer, which the stream of the same request must say, too."""
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 900, **fields}
    answer = live.post("/v1/chat/completions", **body)
    assert answer.status_code == 200, answer.text
    whole: dict[str, Any] = answer.json()
    stream = live.openai.chat.completions.create(
        model="tiny", stream=True, stream_options={"include_usage": True}, extra_body=body, messages=body["messages"]
    )
    streamed = joined_stream([chunk.model_dump(exclude_unset=True) for chunk in stream])
    assert streamed == (
        [without_ids(choice["message"]) | {"finish_reason": choice["finish_reason"]} for choice in whole["choices"]],
        whole["usage"] | {"prompt_tokens_details": streamed[1]["prompt_tokens_details"]},
    )
    return whole


def without_ids(message: Mapping[str, Any]) -> dict[str, Any]:
    calls = [{**call, "id": None} for call in message.get("tool_calls", [])]
    return {**message, **({"tool_calls": calls} if calls else {})}


def joined_stream(chunks: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What a client has in the end: the messages, each with its finish reason, and the usage."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks[:-1]:
        for choice in chunk["choices"]:
            message = choices.setdefault(choice["index"], {"finish_reason": None})
            assert message["finish_reason"] is None, "nothing comes after the end"
            message["finish_reason"] = choice["finish_reason"]
            _add(message, choice["delta"])
    assert chunks[-1]["choices"] == []
    return [without_ids(choices[index]) for index in sorted(choices)], chunks[-1]["usage"]


def _add(message: dict[str, Any], delta: dict[str, Any]) -> None:
    for name, value in delta.items():
        if name == "tool_calls":
            _add_call(message.setdefault("tool_calls", []), *value)
        elif isinstance(value, str) and isinstance(message.get(name), str):
            message[name] += value
        else:
            message[name] = value


def _add_call(calls: list[dict[str, Any]], part: dict[str, Any]) -> None:
    """The first part of a call has its id, type and name; the others are more of the arguments of the last call."""
    if part["index"] == len(calls):
        assert part.keys() == {"index", "id", "type", "function"}
        calls.append({"id": part["id"], "type": part["type"], "function": dict(part["function"])})
        return
    assert part.keys() == {"index", "function"}
    assert part["function"].keys() == {"arguments"}
    assert part["index"] == len(calls) - 1
    calls[-1]["function"]["arguments"] += part["function"]["arguments"]

"""What clients may send: the bodies of completions and chat completions, with every limit.

Owns types, defaults and bounds of single fields; a field that is absent and a field that is null mean the same.
Knows nothing about the model: what depends on it (vocabulary, context, adapter names) is checked where it is used.
"""

import re
from collections.abc import Callable
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainValidator,
    Tag,
    WithJsonSchema,
    model_validator,
)

from server.api.fields import CHAT_NEUTRAL, COMPLETION_NEUTRAL, refuse_unsupported
from server.api.json_body import Body, Text, encodable
from server.api.messages import ConversationBody, Tool, ToolChoice, check_choice, refuse_template
from server.api.structured import ResponseFormat, StructuredOutputs
from server.ground.errors import BadRequest

MAX_CHOICES = 128  # n
MAX_PROMPTS = 1024
MAX_SEQUENCES = 1024  # prompts times n
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_LOGPROBS = 20
MAX_SALT_CHARS = 256
MAX_MIXED = 8  # adapters in one mix
MAX_WEIGHT = 16.0  # of an adapter, by size: many times what any was trained for
MAX_BIAS = 100  # OpenAI's
MAX_BIASES = 4096  # each is written into the logits of every step
MAX_ALLOWED_IDS = 2**20  # more than any vocabulary has
MAX_STOP_IDS = 256
MIN_REPETITION, MAX_REPETITION = 0.01, 100.0  # beyond them a logit would leave the range of float32
ALL_THAT_FITS = -1
MAX_INT = 2**31 - 1  # of every count that has no smaller limit: more would overflow in the kernels


_TOKEN_ID = re.compile("0|[1-9][0-9]{0,9}")


def _as_stops(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _checked_prompt(value: object) -> object:
    """All that is checked of a prompt's form: one sentence, and one look at each of what may be millions of ids."""
    if isinstance(value, str):
        return encodable(value)
    if not isinstance(value, list) or not value:
        raise ValueError("must be a text, a list of texts, a list of token ids or a list of lists of token ids")
    kind = type(value[0])
    if kind not in (str, int, list) or set(map(type, value)) != {kind}:
        raise ValueError("the items of the list must be all texts, all token ids or all lists of token ids")
    if kind is not int and len(value) > MAX_PROMPTS:
        raise ValueError(f"at most {MAX_PROMPTS} prompts in one request; this one has {len(value)}")
    if kind is str:
        for text in value:
            encodable(text)
    if kind is list and not all(set(map(type, row)) == {int} for row in value):
        raise ValueError("each prompt must be a non-empty list of token ids (integers)")
    return value


def _checked_bias(value: object) -> object:
    """JSON has texts for keys: {"50256": -100}. One sentence for all that can be wrong with any of them."""
    if not isinstance(value, dict):
        raise ValueError('must be an object of biases by token id, such as {"50256": -100}')
    if len(value) > MAX_BIASES:  # before anything is done with each of them
        raise ValueError(f"at most {MAX_BIASES} biases are taken; 'allowed_token_ids' takes more tokens")
    if not all(isinstance(key, str) and _TOKEN_ID.fullmatch(key) for key in value):
        raise ValueError('each key must be a token id in decimal digits, such as "50256"')
    if not all(type(bias) in (int, float) and -MAX_BIAS <= bias <= MAX_BIAS for bias in value.values()):
        raise ValueError(f"each bias must be a number from {-MAX_BIAS} to {MAX_BIAS}")
    return {int(key): float(bias) for key, bias in value.items()}


def _kept_of_prompt(num_tokens: int) -> int:
    if num_tokens < 1 and num_tokens != ALL_THAT_FITS:
        raise ValueError("must be a number of tokens, at least 1, or -1 for as many as the context allows")
    return num_tokens


_Ids = Annotated[list[int], Field(min_length=1)]
_Texts = Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
_Rows = Annotated[list[_Ids], Field(min_length=1, max_length=MAX_PROMPTS)]
# Where a value is checked before pydantic reads it, the second type is what the OpenAPI document says of it. A prompt
# pydantic does not read at all: it would try each form of the union on each item, on the event loop.
Prompt = Annotated[
    str | list[str] | list[int] | list[list[int]],
    PlainValidator(_checked_prompt, json_schema_input_type=str | _Texts | _Ids | _Rows),
]
Stop = Annotated[Text, Field(min_length=1, max_length=MAX_STOP_CHARS)]
_Stops = Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True)]
Stops = Annotated[_Stops, BeforeValidator(_as_stops, json_schema_input_type=Stop | _Stops)]
TokenIds = Annotated[list[int], Field(fail_fast=True)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
_WRITTEN_BIAS = {
    "type": "object",
    "propertyNames": {"pattern": f"^({_TOKEN_ID.pattern})$"},
    "additionalProperties": {"type": "number", "minimum": -MAX_BIAS, "maximum": MAX_BIAS},
    "maxProperties": MAX_BIASES,
}
LogitBias = Annotated[
    dict[int, float],
    Field(max_length=MAX_BIASES),
    BeforeValidator(_checked_bias),
    WithJsonSchema(_WRITTEN_BIAS),
]


class AdapterPart(Body):
    """An adapter, and how much of it."""

    name: Text  # "name" or "name@version-prefix"
    weight: float = Field(default=1.0, ge=-MAX_WEIGHT, le=MAX_WEIGHT)


def _adapter_form(value: object) -> str | None:
    """Which form was meant; no words that could be a field's, so that errors name the fields alone."""
    if isinstance(value, str):
        return "a name"
    return "an object" if isinstance(value, dict | AdapterPart) else None


def _adapters_form(value: object) -> str | None:
    return "a list" if isinstance(value, list) else _adapter_form(value)


def _forms(find: Callable[[object], str | None], wanted: str) -> Discriminator:
    return Discriminator(find, custom_error_type="adapter_form", custom_error_message=f"must be {wanted}")


_Name = Annotated[Text, Tag("a name")]
_Part = Annotated[AdapterPart, Tag("an object")]
_Listed = Annotated[_Name | _Part, _forms(_adapter_form, "a name or an object with a name and a weight")]
_Mix = Annotated[list[_Listed], Field(min_length=1, max_length=MAX_MIXED, fail_fast=True), Tag("a list")]
_WANTED = f"a name, an object with a name and a weight, or a list of 1 to {MAX_MIXED} of these"
AdapterChoice = Annotated[_Name | _Part | _Mix, _forms(_adapters_form, _WANTED)]


class StreamOptions(Body):
    include_usage: bool = False
    continuous_usage_stats: bool = False  # usage in every chunk, not only in the last one
    include_obfuscation: Literal[False] = False


class GenerationBody(Body):
    """The fields that both kinds of completion share. Fields that nobody declared are kept for `fields.py` to judge."""

    model_config = ConfigDict(extra="allow")

    model: Text | None = None  # a served name of the base, or an adapter
    adapter: AdapterChoice | None = None
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=-1, le=MAX_INT)  # 0 and -1: all
    min_p: float = Field(default=0.0, ge=0, le=1)
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: float = Field(default=1.0, ge=MIN_REPETITION, le=MAX_REPETITION)
    logit_bias: LogitBias = {}
    allowed_token_ids: Annotated[TokenIds, Field(min_length=1, max_length=MAX_ALLOWED_IDS)] | None = None
    stop: Stops = []
    stop_token_ids: Annotated[TokenIds, Field(max_length=MAX_STOP_IDS)] = []
    include_stop_str_in_output: bool = False
    min_tokens: int = Field(default=0, ge=0, le=MAX_INT)
    skip_special_tokens: bool = True
    truncate_prompt_tokens: Annotated[int, Field(le=MAX_INT), AfterValidator(_kept_of_prompt)] | None = None
    return_token_ids: bool = False
    priority: int = Field(default=0, ge=-MAX_INT, le=MAX_INT)  # lower is admitted earlier
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    ignore_eos: bool = False
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    # What of the KV cache may be reused is what requests of the same salt have computed: one salt per tenant keeps a
    # tenant from learning, by the time to the first token, what others have asked.
    cache_salt: Annotated[Text, Field(min_length=1, max_length=MAX_SALT_CHARS)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    @property
    def adapters(self) -> list[AdapterPart] | None:
        """The parts of `adapter`, in whichever form it came; None if it did not."""
        if self.adapter is None:
            return None
        listed = self.adapter if isinstance(self.adapter, list) else [self.adapter]
        return [AdapterPart(name=part) if isinstance(part, str) else part for part in listed]

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise BadRequest("'stream_options' needs 'stream': true; send both or neither.", param="stream_options")
        options = self.stream_options
        if options is not None and options.continuous_usage_stats and not options.include_usage:
            raise BadRequest(
                "'stream_options.continuous_usage_stats' needs 'include_usage': true beside it; send both or neither.",
                param="stream_options.continuous_usage_stats",
            )
        return self


class CompletionBody(GenerationBody):
    prompt: Prompt
    max_tokens: int | None = Field(default=None, ge=0, le=MAX_INT)  # None: 16, or what the context leaves
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    echo: bool = False
    best_of: int | None = Field(
        default=None, ge=1, le=MAX_CHOICES
    )  # of best_of candidates the n best are answered: neutral where the two are equal

    @model_validator(mode="after")
    def _is_supported(self) -> Self:
        refuse_unsupported(self.model_extra or {}, COMPLETION_NEUTRAL)
        if self.best_of not in (None, self.n):
            raise BadRequest(
                f"'best_of' must equal 'n' ({self.n}) or be left out: candidates are not ranked.", param="best_of"
            )
        num_prompts = len(self.prompts)
        if num_prompts * self.n > MAX_SEQUENCES:
            raise BadRequest(
                f"{num_prompts} prompts times n = {self.n} is more than {MAX_SEQUENCES} sequences; split the request.",
                param="n",
            )
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One item per prompt, however many were sent."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # one kind for all items, says _checked_prompt
        return self.prompt


class RollbackBody(Body):
    version: Annotated[str, Field(pattern=r"^[0-9a-f]{6,64}$")] | None = None  # a prefix; None: the one before


class LoadLoraBody(Body):
    lora_name: Text | None = None
    lora_path: Text | None = None
    load_inplace: bool = False
    base_model_name: Text | None = None
    is_3d_lora_weight: Literal[False] = False


class UnloadLoraBody(Body):
    lora_name: Text | None = None
    lora_int_id: int | None = None  # a number of vLLM's own: the name decides there, too


class ChatBody(ConversationBody, GenerationBody):
    model_config = ConfigDict(extra="allow")

    tool_choice: ToolChoice | None = None  # None: "auto" where there are tools
    parallel_tool_calls: bool = True  # whether an answer may have several calls
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    max_completion_tokens: int | None = Field(default=None, ge=1, le=MAX_INT)  # wins over max_tokens
    max_tokens: int | None = Field(default=None, ge=1, le=MAX_INT)  # None: what the context leaves
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=MAX_LOGPROBS)

    @property
    def asked_tokens(self) -> int | None:
        """The limit of the answer, under whichever of its names; None for what the context leaves."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def callable_tools(self) -> tuple[Tool, ...]:
        """The tools that this answer may call."""
        return () if self.tool_choice == "none" else tuple(self.tools)

    @property
    def is_call_forced(self) -> bool:
        return self.tool_choice not in (None, "none", "auto")

    @model_validator(mode="after")
    def _is_supported(self) -> Self:
        refuse_template(self.model_extra or {})
        refuse_unsupported(self.model_extra or {}, CHAT_NEUTRAL)
        check_choice(self.tool_choice, self.tools)
        if self.top_logprobs and not self.logprobs:
            raise BadRequest("'top_logprobs' needs 'logprobs': true; send both or neither.", param="top_logprobs")
        return self

"""What clients may send: the bodies of completions and chat completions, with every limit.

Owns types, defaults and bounds of single fields; a field that is absent and a field that is null mean the same.
Knows nothing about the model: what depends on it (vocabulary, context, adapter names) is checked where it is used.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)
from pydantic_core import PydanticKnownError

from server.api.fields import CHAT_NEUTRAL, COMPLETION_NEUTRAL, refuse_unsupported, without_nulls
from server.ground.errors import BadRequest

MAX_CHOICES = 128  # n
MAX_PROMPTS = 1024
MAX_SEQUENCES = 1024  # prompts times n
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_LOGPROBS = 20
MAX_MESSAGES = 4096
MAX_SALT_CHARS = 256
MAX_MIXED = 8  # adapters in one mix
MAX_WEIGHT = 16.0  # of an adapter, by size: many times what any was trained for
MAX_INT = 2**31 - 1  # of every count that has no smaller limit: more would overflow in the kernels


def _encodable(text: str) -> str:
    """Refuse half of a surrogate pair, which JSON can escape but no tokenizer and no answer can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PydanticKnownError("string_unicode") from None
    return text


def _as_stops(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _checked_prompt(value: object) -> object:
    """Refuse with one sentence here what the union below would refuse with one per alternative and item."""
    if isinstance(value, str):
        return _encodable(value)
    if not isinstance(value, list) or not value:
        raise ValueError("must be a text, a list of texts, a list of token ids or a list of lists of token ids")
    kind = type(value[0])
    if kind not in (str, int, list) or any(type(item) is not kind for item in value):
        raise ValueError("the items of the list must be all texts, all token ids or all lists of token ids")
    if kind is not int and len(value) > MAX_PROMPTS:
        raise ValueError(f"at most {MAX_PROMPTS} prompts in one request; this one has {len(value)}")
    if kind is str:
        for text in value:
            _encodable(text)
    if kind is list and not all(row and all(type(item) is int for item in row) for row in value):
        raise ValueError("each prompt must be a non-empty list of token ids (integers)")
    return value


Text = Annotated[str, AfterValidator(_encodable)]
Prompt = Annotated[str | list[str] | list[int] | list[list[int]], BeforeValidator(_checked_prompt)]
Stop = Annotated[Text, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Stops = Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True), BeforeValidator(_as_stops)]


class Body(BaseModel):
    """A JSON object in which null means absent, numbers are numbers, and no number is infinite."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _nulls_are_absent(cls, body: Any) -> Any:
        return without_nulls(body)


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
    stop: Stops = []
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    ignore_eos: bool = False
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


class TextPart(Body):
    type: Literal["text"]
    text: Text


class Message(Body):
    """One turn. What OpenAI's own answers carry beside it may be sent back, as long as it is empty.

    Only an assistant's turn may be without content.
    """

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(max_length=MAX_MESSAGES, fail_fast=True)]

    @model_validator(mode="before")
    @classmethod
    def _empties_are_absent(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        turn = {
            name: value for name, value in body.items() if value or (name in cls.model_fields and value is not None)
        }
        return {"content": "", **turn} if turn.get("role") == "assistant" else turn

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)


class ChatBody(GenerationBody):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_completion_tokens: int | None = Field(default=None, ge=1, le=MAX_INT)  # wins over max_tokens
    max_tokens: int | None = Field(default=None, ge=1, le=MAX_INT)  # None: what the context leaves
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def _is_supported(self) -> Self:
        refuse_unsupported(self.model_extra or {}, CHAT_NEUTRAL)
        if self.top_logprobs and not self.logprobs:
            raise BadRequest("'top_logprobs' needs 'logprobs': true; send both or neither.", param="top_logprobs")
        return self

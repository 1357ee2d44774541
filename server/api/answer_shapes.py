"""What clients are answered, as types for the OpenAPI document: nothing is validated against them while serving.

Every object is closed, so that a test which compares answers with the document finds a field that nobody wrote down.
"""

from typing import Any, Literal, NotRequired

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict  # pydantic takes that of typing from Python 3.12 on

_closed = with_config(ConfigDict(extra="forbid"))
FinishReason = Literal["stop", "length", "content_filter", "tool_calls"]


@_closed
class ErrorObject(TypedDict):
    message: str
    type: str
    param: str | None
    code: str | None


@_closed
class ErrorAnswer(TypedDict):
    """Every failure, and the last event of a stream that fails after its status was sent."""

    error: ErrorObject


@_closed
class LoraVerbErrorObject(TypedDict):
    message: str
    type: str
    param: str | None
    code: int


@_closed
class LoraVerbError(TypedDict):
    """As vLLM words it: the status is in `code`."""

    error: LoraVerbErrorObject


@_closed
class PromptTokensDetails(TypedDict):
    cached_tokens: int


@_closed
class Usage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


@_closed
class UsedAdapter(TypedDict):
    """The adapter that answered; `weight` where it is not 1, or in a mix."""

    name: str
    version: str
    weight: NotRequired[float]
    warning: NotRequired[Literal["base_mismatch"]]


Used = UsedAdapter | list[UsedAdapter] | None


@_closed
class CompletionLogprobs(TypedDict):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


@_closed
class CompletionChoice(TypedDict):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    prompt_token_ids: NotRequired[list[int]]
    token_ids: NotRequired[list[int]]


@_closed
class Completion(TypedDict):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    adapter: Used
    choices: list[CompletionChoice]
    usage: Usage


@_closed
class CompletionChunk(TypedDict):
    """One event of a stream; `usage` where `stream_options` asks for it."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    adapter: Used
    choices: list[CompletionChoice]
    usage: NotRequired[Usage | None]


@_closed
class ChatTokenAlternative(TypedDict):
    token: str
    logprob: float
    bytes: list[int] | None


@_closed
class ChatToken(TypedDict):
    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[ChatTokenAlternative]


@_closed
class ChatLogprobs(TypedDict):
    content: list[ChatToken] | None
    refusal: None


@_closed
class AnsweredFunction(TypedDict):
    name: str
    arguments: str


@_closed
class ChatToolCall(TypedDict):
    id: str
    type: Literal["function"]
    function: AnsweredFunction


@_closed
class ChatAnswerMessage(TypedDict):
    """`content` is null where there are calls and no text beside them."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ChatToolCall]]


@_closed
class ChatChoice(TypedDict):
    index: int
    message: ChatAnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    token_ids: NotRequired[list[int]]


@_closed
class ChatCompletion(TypedDict):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    adapter: Used
    choices: list[ChatChoice]
    prompt_token_ids: NotRequired[list[int]]
    usage: Usage


@_closed
class CalledFunctionDelta(TypedDict):
    name: NotRequired[str]
    arguments: str


@_closed
class ChatToolCallDelta(TypedDict):
    """The first of a call has its id and name, the others more of its arguments."""

    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: CalledFunctionDelta


@_closed
class ChatDelta(TypedDict):
    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str | None]
    refusal: NotRequired[None]
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ChatToolCallDelta]]


@_closed
class ChatChunkChoice(TypedDict):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    token_ids: NotRequired[list[int]]


@_closed
class ChatCompletionChunk(TypedDict):
    """One event of a stream; `usage` where `stream_options` asks for it."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    adapter: Used
    choices: list[ChatChunkChoice]
    prompt_token_ids: NotRequired[list[int]]
    usage: NotRequired[Usage | None]


@_closed
class Tokens(TypedDict):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


@_closed
class DetokenizedText(TypedDict):
    prompt: str


class TokenizerInfo(TypedDict):
    """Open: a tokenizer may name special tokens of its own kind."""

    tokenizer_class: str
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    additional_special_tokens: list[str]
    vocab_size: int
    model_max_length: int
    chat_template: str | None


@_closed
class ModelAdapter(TypedDict):
    name: str
    version: str


@_closed
class Model(TypedDict):
    """The base, or an adapter as a model whose parent is the base."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int
    fingerprint: NotRequired[str | None]
    adapter: NotRequired[ModelAdapter]


@_closed
class ModelList(TypedDict):
    object: Literal["list"]
    data: list[Model]


@_closed
class TierBytes(TypedDict):
    store: int
    host: int
    device: int


Tiers = list[Literal["store", "host", "device"]]


@_closed
class Adapter(TypedDict):
    """An adapter's version. What only loading it tells is null until it was loaded once."""

    name: str
    version: str
    method: str | None
    rank: int | None
    parameters: int | None
    bytes: int
    sites: int | None
    warnings: list[str]
    versions: list[str]
    base_model: str | None
    base_fingerprint: str | None
    quarantined: bool
    refused: bool
    tiers: Tiers
    tier_bytes: TierBytes
    pinned: bool
    num_running: int
    num_requests: int
    last_used: int | None
    created: int
    source: str | None
    source_revision: str | None


@_closed
class Fetch(TypedDict):
    """An adapter on its way from elsewhere, or the failure of that."""

    name: str
    object: Literal["fetch"]
    source: str
    revision: str | None
    status: str
    bytes_done: int
    bytes_total: int | None
    progress: float | None
    error: ErrorObject | None


@_closed
class ListedAdapter(Adapter):
    fetch: Fetch | None


@_closed
class DescribedAdapter(Adapter):
    recipe: dict[str, Any] | None
    chat_template: Literal["used", "ignored"] | None
    fetch: Fetch | None


@_closed
class FetchedAdapter(TypedDict):
    """A name whose adapter is not there yet."""

    name: str
    version: None
    fetch: Fetch


@_closed
class AdapterList(TypedDict):
    object: Literal["list"]
    data: list[ListedAdapter]
    fetches: list[Fetch]
    first_id: str | None
    last_id: str | None
    has_more: bool


@_closed
class IgnoredFiles(TypedDict):
    count: int
    names: list[str]


@_closed
class PutAdapter(Adapter):
    ignored_files: IgnoredFiles


@_closed
class Deleted(TypedDict):
    name: str
    object: Literal["adapter", "fetch"]
    deleted: Literal[True]


@_closed
class LoadedAdapter(Adapter):
    seconds: float


@_closed
class FreedBytes(TypedDict):
    host: int
    device: int


@_closed
class UnloadedAdapter(TypedDict):
    name: str
    version: str
    unloaded: Literal[True]
    freed_bytes: FreedBytes
    seconds: float


@_closed
class AdapterVersion(TypedDict):
    version: str
    current: bool
    added: int
    bytes: int
    tiers: Tiers
    pinned: bool
    num_running: int
    num_requests: int
    last_used: int | None


@_closed
class AdapterVersions(TypedDict):
    object: Literal["list"]
    name: str
    max_versions: int | None
    data: list[AdapterVersion]


@_closed
class RolledBackAdapter(Adapter):
    previous_version: str


@_closed
class MergeLoss(TypedDict):
    """What was made, and what it lost."""

    sites: int
    rank: int
    relative_error: float | None
    worst_site: str | None
    worst_error: float | None
    warnings: list[str]


@_closed
class MergedAdapter(Adapter):
    recipe: dict[str, Any] | None
    merge: MergeLoss


@_closed
class Status(TypedDict):
    status: Literal["ok", "ready"]


@_closed
class ServerVersion(TypedDict):
    version: str


@_closed
class ServerLoad(TypedDict):
    server_load: int

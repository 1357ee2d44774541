"""Every setting of the server, defined once: flags, environment variables, YAML keys and help are made from it.

Owns names, defaults, limits and precedence (flag > GRAFT_ variable > --config file > default), and the sentences that
refuse a bad value. Knows nothing about what the settings are for: a value that has to be computed from the model or the
machine is None here, and whoever computes it says what None means.
"""

import difflib
import ipaddress
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import yaml
from pydantic import (
    AfterValidator,
    BeforeValidator,
    ByteSize,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from server.ground.errors import StartupRefused

ENV_PREFIX = "GRAFT_"
_CHECKOUT = Path(__file__).parents[2]
_MIB = 1 << 20
# What the server gives to a chat template itself; of the special tokens those whose names all models share.
_TEMPLATE_OWN = frozenset(
    {
        "add_generation_prompt",
        "bos_token",
        "continue_final_message",
        "documents",
        "eos_token",
        "messages",
        "pad_token",
        "reasoning_effort",
        "tools",
        "unk_token",
    }
)
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]{1,5})?")


@dataclass(frozen=True, slots=True)
class Flag:
    """How a setting is shown in `graft serve --help`. `default` replaces the value where that would say little."""

    group: Literal["base", "adapters", "http", "limits", "process"]
    metavar: str
    help: str
    default: str | None = None


class NamedAdapter(NamedTuple):
    """One `--adapter NAME=PATH`: a folder served in place under this name."""

    name: str
    path: Path


def _split(value: object) -> object:
    """A variable holds its list as one comma-separated string; flags and YAML bring lists."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _named_adapters(value: object) -> object:
    """ "NAME=PATH" strings, or a YAML mapping of names to paths, as NamedAdapters."""
    value = _split(value)
    if isinstance(value, Mapping):
        return tuple(NamedAdapter(str(name), Path(path).expanduser()) for name, path in value.items())
    if not isinstance(value, list):
        return value
    return tuple(_named_adapter(item) if isinstance(item, str) else item for item in value)


def _named_adapter(text: str) -> NamedAdapter:
    name, separator, path = text.partition("=")
    if not (name and separator and path):
        raise ValueError(f"{text!r} must be NAME=PATH, such as legal=./adapters/legal")
    return NamedAdapter(name, Path(path).expanduser())


def _is_folder(path: Path) -> Path:
    if not path.is_dir():
        raise ValueError("no such folder; create it or correct the path")
    return path


def _store_place(value: object) -> object:
    """A folder as a Path; a URL stays text, because a Path would take its slashes for one."""
    if isinstance(value, str) and "://" not in value:
        return Path(value).expanduser()
    return value.expanduser() if isinstance(value, Path) else value


def _on_or_off(value: object) -> object:
    """YAML reads a bare on and off as true and false."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


def _default_model() -> str:
    """The demo of the checkout that this file lies in; empty (and then refused) where there is none."""
    demo = _CHECKOUT / "demo" / "base"
    return str(demo) if demo.is_dir() else ""


def _default_store() -> Path:
    """The store that the checkout brings along, with the demo's adapters; else a folder where the command is run."""
    store = _CHECKOUT / "adapters_store"
    return store if store.is_dir() else Path("adapters_store")


Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Size = Annotated[ByteSize, Field(gt=0)]
UserPath = Annotated[Path, AfterValidator(Path.expanduser)]
# A folder, or the URL of an object store.
StorePlace = Annotated[Path | str, BeforeValidator(_store_place)]


class Settings(BaseSettings):
    """What `graft serve` was asked for; immutable. Build it with `load`, which words the refusals for people."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", env_prefix=ENV_PREFIX, env_ignore_empty=True)

    model: Annotated[
        str,
        Flag("base", "MODEL", "local folder or hub id of the base model", default="the built-in demo"),
    ] = Field(default_factory=_default_model, validate_default=True)
    quantize: Annotated[
        Literal["nf4", "int8", "none"],
        Flag("base", "{nf4,int8,none}", "how linears are held; a pre-quantized checkpoint keeps its own way"),
    ] = "nf4"
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"],
        Flag("base", "{auto,bfloat16,float16,float32}", "what the base computes in; auto follows the checkpoint"),
    ] = "auto"
    device: Annotated[
        Literal["auto", "cuda", "cpu"],
        Flag("base", "{auto,cuda,cpu}", "where the base lives; auto takes a GPU if there is one"),
    ] = "auto"
    served_model_name: Annotated[
        tuple[str, ...],
        NoDecode,
        BeforeValidator(_split),
        Flag("base", "NAME", "name of the base in requests; may be repeated", default="the model's own name"),
    ] = ()
    chat_template: Annotated[
        UserPath | None,
        Flag("base", "FILE", "chat template (Jinja) in the place of the model's", default="the model's own"),
    ] = None
    chat_template_kwargs: Annotated[
        tuple[str, ...],
        NoDecode,
        BeforeValidator(_split),
        Flag(
            "base",
            "NAME",
            "what requests may set in chat_template_kwargs; may be repeated",
            default="enable_thinking, thinking",
        ),
    ] = ("enable_thinking", "thinking")
    tool_call_parser: Annotated[
        Literal["auto", "hermes", "llama", "mistral"],
        Flag("base", "{auto,hermes,llama,mistral}", "how the model writes calls of tools; auto follows its template"),
    ] = "auto"
    reasoning_parser: Annotated[
        Literal["auto", "think", "none"],
        Flag("base", "{auto,think,none}", "how reasoning is told from the answer; auto follows the template"),
    ] = "auto"

    store: Annotated[
        StorePlace,
        Flag(
            "adapters",
            "DIR|URL",
            "where uploaded adapters are kept: a folder, created at need, or s3://bucket/prefix (gs://, az://)",
            default="./adapters_store",
        ),
    ] = Field(default_factory=_default_store)
    store_cache: Annotated[
        UserPath | None,
        Flag("adapters", "DIR", "with a URL: where its adapters lie on this machine", default="the user's cache"),
    ] = None
    store_cache_bytes: Annotated[Size, Flag("adapters", "SIZE", "what they may take there")] = ByteSize(16384 * _MIB)
    store_refresh: Annotated[
        Seconds, Flag("adapters", "SECONDS", "with a URL: how often to look for what other servers have changed")
    ] = 10.0
    adapter: Annotated[
        tuple[NamedAdapter, ...],
        NoDecode,
        BeforeValidator(_named_adapters),
        Flag("adapters", "NAME=PATH", "serve the adapter in this folder under this name; may be repeated"),
    ] = ()
    adapters: Annotated[
        UserPath | None,
        Flag("adapters", "DIR", "serve every subfolder that has an adapter_config.json, in place, and watch for more"),
    ] = None
    adapter_paths: Annotated[
        tuple[UserPath, ...],
        NoDecode,
        BeforeValidator(_split),
        Flag("adapters", "DIR", "folder from which POST /v1/load_lora_adapter may read adapters; may be repeated"),
    ] = ()
    allow_source: Annotated[
        tuple[str, ...],
        NoDecode,
        BeforeValidator(_split),
        Flag("adapters", "PREFIX", "where requests may fetch from (hf://org/, s3://bucket/x/, ...); may be repeated"),
    ] = ()
    trust_adapter_templates: Annotated[
        bool, Flag("adapters", "", "let an adapter's folder bring the chat template for its requests")
    ] = False
    strict_base: Annotated[
        bool, Flag("adapters", "", "refuse adapters that were trained on another base, instead of warning")
    ] = False
    keep_versions: Annotated[
        Count, Flag("adapters", "N", "versions of a replaced adapter that stay in the store, the current one counted")
    ] = 3
    store_quota: Annotated[
        Size | None, Flag("adapters", "SIZE", "what the store's adapters may take, all versions; then uploads get 507")
    ] = None
    store_reserve: Annotated[
        ByteSize, Field(ge=0), Flag("adapters", "SIZE", "free bytes that an upload must leave on the store's disk")
    ] = ByteSize(256 * _MIB)
    adapter_memory: Annotated[
        Size, Flag("adapters", "SIZE", "device memory for adapters; the number resident is bounded by it alone")
    ] = ByteSize(512 * _MIB)
    host_memory: Annotated[Size, Flag("adapters", "SIZE", "RAM for adapters that are ready but not on the device")] = (
        ByteSize(2048 * _MIB)
    )

    host: Annotated[str, Flag("http", "HOST", "address to listen on; beyond loopback an API key is required")] = (
        "127.0.0.1"
    )
    port: Annotated[int, Field(ge=0, le=65535), Flag("http", "PORT", "port to listen on; 0 picks a free one")] = 8000
    api_key: Annotated[
        SecretStr | None,
        Flag("http", "KEY", "bearer token that requests must carry; the variable keeps it out of the process list"),
    ] = None
    api_keys: Annotated[
        UserPath | None,
        Flag("http", "FILE", "YAML file of keys with scopes, adapters and limits (graft keys); read again on change"),
    ] = None
    open_metrics: Annotated[bool, Flag("http", "", "let /metrics be read without a key")] = False
    share_prefixes: Annotated[
        bool, Flag("http", "", "let the keys of different owners reuse one another's blocks of the KV cache")
    ] = False
    insecure_public: Annotated[
        bool, Flag("http", "", "listen beyond loopback without a key: whoever reaches the server may do everything")
    ] = False
    max_upload_bytes: Annotated[Size, Flag("http", "SIZE", "largest adapter upload")] = ByteSize(1024 * _MIB)
    unknown_fields: Annotated[
        Literal["refuse", "warn"],
        Flag("http", "{refuse,warn}", "request fields that no server is known for; warn: named in x-ignored-fields"),
    ] = "refuse"
    sse_keep_alive_interval: Annotated[
        float,
        Field(ge=0, le=86_400, allow_inf_nan=False),
        Flag("http", "SECONDS", "a stream that is silent for so long sends a comment; 0: never"),
    ] = 30.0
    allowed_origins: Annotated[
        tuple[str, ...],
        NoDecode,
        BeforeValidator(_split),
        Flag("http", "ORIGIN", "web pages that may ask from a browser, such as https://chat.example; may be repeated"),
    ] = ()

    max_context: Annotated[
        Count | None, Flag("limits", "N", "prompt and answer together, in tokens", default="the model's own limit")
    ] = None
    max_sequences: Annotated[Count, Flag("limits", "N", "sequences generating at once")] = 64
    max_batch_tokens: Annotated[Count, Flag("limits", "N", "tokens in one step; a longer prompt is read in chunks")] = (
        2048
    )
    max_queued: Annotated[Count, Flag("limits", "N", "requests waiting to start; more are answered with 503")] = 256
    max_connections: Annotated[
        Count, Flag("limits", "N", "open connections; a further one takes the place of the longest idle one")
    ] = 4096
    queue_timeout: Annotated[
        Seconds | None, Flag("limits", "SECONDS", "longest wait for a first step; then a request is answered with 503")
    ] = None
    request_timeout: Annotated[
        Seconds | None, Flag("limits", "SECONDS", "longest life of a request, its wait included; then it is failed")
    ] = None
    step_timeout: Annotated[
        Seconds,
        Flag("limits", "SECONDS", "longest step; one that takes longer hangs, and the process ends"),
    ] = 600.0
    max_adapter_wait: Annotated[
        Seconds,
        Flag("limits", "SECONDS", "longest wait for device room that other adapters hold; then they take turns"),
    ] = 2.0
    memory_share: Annotated[
        float,
        Field(gt=0, le=1, allow_inf_nan=False),
        Flag("limits", "SHARE", "how much of the device's free memory the server may take, all in all"),
    ] = 0.9
    kv_memory: Annotated[
        Size | None, Flag("limits", "SIZE", "device memory for the KV cache", default="a share of what is free")
    ] = None
    block_size: Annotated[
        int | None,
        Field(ge=8, le=1024, multiple_of=8),
        Flag(
            "limits", "N", "tokens in a block of the KV cache; whole blocks are reused", default="128 on a CPU, else 64"
        ),
    ] = None
    prefix_reuse: Annotated[
        Literal["on", "off"],
        BeforeValidator(_on_or_off),
        Flag("limits", "{on,off}", "whether a prompt's beginning that the KV cache still holds is not computed again"),
    ] = "on"
    overlap: Annotated[
        Literal["auto", "on", "off"],
        BeforeValidator(_on_or_off),
        Flag(
            "limits",
            "{auto,on,off}",
            "whether a step is prepared while the device computes the one before; auto: with a GPU",
        ),
    ] = "auto"
    graphs: Annotated[
        Literal["auto", "off"],
        BeforeValidator(_on_or_off),
        Flag("limits", "{auto,off}", "whether decode steps are CUDA graphs; auto: with a GPU and --ops triton"),
    ] = "auto"

    config: Annotated[UserPath | None, Flag("process", "FILE", "YAML file with any of these settings as keys")] = None
    ops: Annotated[
        Literal["auto", "reference", "native", "triton"],
        Flag(
            "process",
            "{auto,reference,native,triton}",
            "what computes adapters and attention: PyTorch's operators, C compiled for this CPU, or Triton on a GPU; "
            "auto: native on a CPU that has a C compiler, else reference",
        ),
    ] = "auto"
    four_bit_products: Annotated[
        Literal["auto", "triton"],
        Flag(
            "process",
            "{auto,triton}",
            "what multiplies a 4-bit base on a GPU: bitsandbytes, or Triton up to 128 tokens; auto: bitsandbytes",
        ),
    ] = "auto"
    attention: Annotated[
        Literal["auto", "torch", "varlen", "flashinfer"],
        Flag(
            "process",
            "{auto,torch,varlen,flashinfer}",
            "what computes the attention of prompts; auto: PyTorch's varlen_attn where it can, else chunk by chunk",
        ),
    ] = "auto"
    engine_process: Annotated[
        Literal["auto", "on", "off"],
        BeforeValidator(_on_or_off),
        Flag(
            "process",
            "{auto,on,off}",
            "whether the engine has a process of its own, which streams do not slow; auto: with a GPU",
        ),
    ] = "auto"
    drain_timeout: Annotated[
        Seconds,
        Flag("process", "SECONDS", "what runs when SIGTERM comes may take so long; then it is aborted"),
    ] = 30.0
    metrics_compat: Annotated[
        Literal["none", "vllm"],
        Flag("process", "{none,vllm}", "whose names GET /metrics has beside its own, for gateways and dashboards"),
    ] = "none"
    metrics_max_adapters: Annotated[
        Count, Flag("process", "N", "adapters with metrics of their own; the rest are summed as 'other'")
    ] = 500
    audit_log: Annotated[
        UserPath | None, Flag("process", "FILE", "file for the audit log, a line of JSON per change", default="stderr")
    ] = None
    log_format: Annotated[
        Literal["text", "json"],
        Flag("process", "{text,json}", "how lines of the log are written"),
    ] = "text"
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        Flag("process", "{debug,info,warning,error}", "how much is written to stderr"),
    ] = "info"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        path = init_settings().get("config") or env_settings().get("config")
        in_file = InitSettingsSource(settings_cls, _read_file(Path(path)) if path else {})
        return init_settings, env_settings, in_file

    @field_validator("model")
    @classmethod
    def _model_is_named(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("name the base model, a local folder or a hub id: graft serve MODEL")
        return str(Path(value).expanduser()) if value.startswith("~") else value

    @field_validator("chat_template")
    @classmethod
    def _template_exists(cls, value: Path | None) -> Path | None:
        if value is not None and not value.is_file():
            raise ValueError("no such file; correct the path")
        return value

    @field_validator("chat_template_kwargs")
    @classmethod
    def _names_are_free(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if not name.isidentifier() or name.startswith("_") or name in _TEMPLATE_OWN:
                raise ValueError(f"{name!r} cannot be left to requests; name a variable of the template's own")
        return value

    @field_validator("adapters")
    @classmethod
    def _adapters_exist(cls, value: Path | None) -> Path | None:
        return None if value is None else _is_folder(value)

    @field_validator("adapter_paths")
    @classmethod
    def _adapter_paths_exist(cls, value: tuple[Path, ...]) -> tuple[Path, ...]:
        for path in value:
            if not path.is_dir():
                raise ValueError(f"{str(path)!r} is no folder; create it or correct the path")
        return value

    @field_validator("adapter")
    @classmethod
    def _adapters_are_distinct(cls, value: tuple[NamedAdapter, ...]) -> tuple[NamedAdapter, ...]:
        names = [adapter.name for adapter in value]
        for name, path in value:
            if names.count(name) > 1:
                raise ValueError(f"{name!r} is given more than once; choose another name for one of them")
            if not path.is_dir():
                raise ValueError(f"{name!r} points to {str(path)!r}, which is no folder; correct the path")
        return value

    @field_validator("port", mode="before")
    @classmethod
    def _port_is_ours(cls, value: object) -> object:
        if isinstance(value, str) and "://" in value:
            raise ValueError(
                "it must be a number; Kubernetes sets GRAFT_PORT for a Service named 'graft': "
                "rename the Service, set enableServiceLinks: false in the pod, or pass --port"
            )
        return value

    @field_validator("allowed_origins")
    @classmethod
    def _origins_are_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"{origin!r} is no origin: write scheme, host and port as browsers do, such as "
                    "https://chat.example or http://localhost:3000, in small letters and without a path; * for all"
                )
        return value

    @field_validator("api_key")
    @classmethod
    def _key_fits_a_header(cls, value: SecretStr | None) -> SecretStr | None:
        if value is None:
            return None
        text = value.get_secret_value()  # a SecretStr of nothing is falsy, and nothing must not pass for "no key"
        if not text or not all("!" <= character <= "~" for character in text):
            raise ValueError("it must be printable ASCII without spaces, at least one character")
        return value

    @model_validator(mode="after")
    def _fit_one_another(self) -> Self:
        clashes = tuple(_clashes(self))
        if clashes:
            raise _Clashing(clashes)
        return self

    @property
    def asks_for_keys(self) -> bool:
        """Whether requests must carry a key."""
        return self.api_key is not None or self.api_keys is not None

    @property
    def has_store(self) -> bool:
        """Whether there is something to read at `store`; what a URL names is taken to be there."""
        return isinstance(self.store, str) or self.store.is_dir()

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect. A name other than localhost counts as reachable."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def url(self) -> str:
        """Where a client on this machine finds the server, once `port` is a real one."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class _Clash:
    """Settings that are good each, but not together."""

    fields: frozenset[str]
    sentence: str


class _Clashing(ValueError):
    def __init__(self, clashes: Sequence[_Clash]) -> None:
        super().__init__("\n".join(clash.sentence for clash in clashes))
        self.clashes = clashes


def _clashes(settings: Settings) -> Iterator[_Clash]:
    if settings.max_batch_tokens < settings.max_sequences:
        yield _Clash(
            frozenset({"max_batch_tokens", "max_sequences"}),
            f"max_batch_tokens ({settings.max_batch_tokens}) must be at least max_sequences "
            f"({settings.max_sequences}): every running sequence takes one token of each step. Raise the first or "
            "lower the second.",
        )
    if not (settings.is_loopback or settings.asks_for_keys or settings.insecure_public):
        yield _Clash(
            frozenset({"host", "api_key", "api_keys", "insecure_public"}),
            f"host {settings.host!r} can be reached from other machines, so an API key is required: "
            "set GRAFT_API_KEY (or --api-key), name a file with --api-keys, keep the default --host 127.0.0.1, or say "
            "--insecure-public.",
        )
    if "*" in settings.allowed_origins and not settings.asks_for_keys:
        yield _Clash(
            frozenset({"allowed_origins", "api_key", "api_keys"}),
            "allowed_origins * lets every web page that a browser on this machine opens use the server: name the "
            "origins, or set GRAFT_API_KEY (or --api-key, --api-keys).",
        )


def load(flags: Mapping[str, Any]) -> Settings:
    """The settings from `flags` (by field name, only those given), the environment, the file and the defaults.

    Raises StartupRefused with one sentence per problem, each naming where the value came from and what would do.
    """
    return _settled(flags, {})


def load_some(names: Collection[str], flags: Mapping[str, Any]) -> Settings:
    """As `load`, for a command that uses the settings in `names` alone: the rest keep their defaults.

    So the value of a setting that the command does not use, wherever it is given, cannot refuse it.
    """
    fields = Settings.model_fields.items()
    unused = {name: info.get_default(call_default_factory=True) for name, info in fields if name not in names}
    if "model" in unused:
        unused["model"] = unused["model"] or "none"  # where there is no demo, nothing stands for the base
    return _settled(flags, unused)


def _settled(flags: Mapping[str, Any], unused: Mapping[str, Any]) -> Settings:
    problems = _file_problems(flags)
    try:
        settings = Settings(**{**unused, **flags})
    except ValidationError as error:
        whence = origins(flags)
        found = error.errors()
        problems += [_sentence(detail, whence) for detail in found]
        problems += _hidden_clashes(found, {**unused, **flags})
    if problems:
        raise StartupRefused("\n".join(problems)) from None
    return settings


def _hidden_clashes(found: Sequence[ErrorDetails], values: Mapping[str, Any]) -> list[str]:
    """How settings that are good each do not fit one another, which nobody looks at where another is bad by itself."""
    bad = {str(detail["loc"][0]) for detail in found if detail["loc"]}
    defaults = {name: Settings.model_fields[name].get_default(call_default_factory=True) for name in bad}
    if not bad:
        return []
    try:
        Settings(**{**values, **defaults, "model": values.get("model") or "none"})
    except ValidationError as error:
        raised = [detail.get("ctx", {}).get("error") for detail in error.errors()]
        clashes = [clash for one in raised if isinstance(one, _Clashing) for clash in one.clashes]
        return [clash.sentence for clash in clashes if not clash.fields & bad]
    return []


def origins(flags: Mapping[str, Any]) -> dict[str, str]:
    """Where each setting's value comes from: "--port", "GRAFT_PORT", "port in graft.yaml" or "default"."""
    given = {name.upper() for name, value in os.environ.items() if value}
    path = _file_of(flags)
    in_file = _read_file(path) if path else {}

    def origin(name: str) -> str:
        if name in flags:
            return flag_name(name)
        if variable_name(name) in given:
            return variable_name(name)
        return f"{name} in {path}" if name in in_file else "default"

    return {name: origin(name) for name in Settings.model_fields}


def unknown_variables() -> Iterator[str]:
    """A sentence for each GRAFT_ variable that is no setting but is spelled almost like one: surely a slip."""
    known = [variable_name(name) for name in Settings.model_fields]
    for name in os.environ:
        if name.upper().startswith(ENV_PREFIX) and name.upper() not in known:
            for near in difflib.get_close_matches(name.upper(), known, n=1, cutoff=0.85):
                yield f"{name} is not a setting and is ignored; did you mean {near}?"


def flag_name(name: str) -> str:
    """The spelling on the command line: the model is positional, the rest are --kebab-case."""
    return "MODEL" if name == "model" else f"--{name.replace('_', '-')}"


def variable_name(name: str) -> str:
    return f"{ENV_PREFIX}{name.upper()}"


def _file_of(flags: Mapping[str, Any]) -> Path | None:
    path = flags.get("config") or os.environ.get(f"{ENV_PREFIX}CONFIG")
    return Path(path) if path else None


def _read_file(path: Path) -> dict[str, Any]:
    """The settings in a YAML file, by field name; nothing of what `_file_problems` tells of."""
    try:
        return {key: value for key, value in _file_content(path).items() if key in _keys()}
    except StartupRefused:
        return {}


def _file_content(path: Path) -> dict[str, Any]:
    """By key; "max-context" and "max_context" are one. Raises StartupRefused for what holds no settings."""
    try:
        content = yaml.safe_load(path.expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise StartupRefused(f"--config {path} cannot be read as YAML: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise StartupRefused(f"--config {path} must hold settings as 'key: value' lines, such as 'port: 8001'.")
    return {str(key).replace("-", "_"): value for key, value in content.items()}


def _file_problems(flags: Mapping[str, Any]) -> list[str]:
    path = _file_of(flags)
    if path is None:
        return []
    try:
        return [_unknown_key(key, path) for key in _file_content(path) if key not in _keys()]
    except StartupRefused as error:
        return [error.message]


def _keys() -> list[str]:
    return [name for name in Settings.model_fields if name != "config"]


def _unknown_key(key: str, path: Path) -> str:
    near = difflib.get_close_matches(key, _keys(), n=1)
    remedy = f"did you mean {near[0]}?" if near else "graft serve --help lists the settings."
    return f"{key} in {path} is not a setting; {remedy}"


def _sentence(detail: ErrorDetails, whence: Mapping[str, str]) -> str:
    """One problem as a person would say it: what was given where, and what would be accepted."""
    wish = _wish(detail)
    if not detail["loc"]:
        return wish
    name = str(detail["loc"][0])
    origin = whence.get(name, name)
    subject = name if origin == "default" else origin
    # A key must not reach a terminal or a log, and a repeated setting's sentence quotes its own bad item.
    is_quoted = name not in ("api_key", "adapter", "model")
    return f"{subject} is {detail['input']!r}: {wish}" if is_quoted else f"{subject}: {wish}"


def _wish(detail: ErrorDetails) -> str:
    if detail["type"].startswith("byte_size"):
        return "it must be a size such as 512MiB or 2GB"
    return detail["msg"].removeprefix("Value error, ").replace("Input should be", "it must be", 1)

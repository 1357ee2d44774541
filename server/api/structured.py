"""What an answer has to look like, as clients say it: OpenAI's `response_format`, vLLM's `structured_outputs`.

Owns these fields, their limits, and the way from them to a compiled grammar. Knows nothing of how one is followed.
"""

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from server.api.errors import echo
from server.api.faces import GrammarsFace
from server.api.json_body import Body, Text, levels
from server.ground.errors import BadRequest, Overloaded
from server.model.grammar import OPTIONS_KEY, WHITESPACE, Form, Grammar, GrammarSource, choice, json_schema
from server.model.grammar_trial import GrammarRefused, GrammarsUnavailable

# What is compiled at once takes well under the 2 s of the processor that a grammar may take, if it is not exponential.
MAX_SCHEMA_BYTES = 64 * 1024
MAX_GRAMMAR_BYTES = 32 * 1024
MAX_REGEX_BYTES = 8 * 1024
MAX_CHOICE_BYTES = 32 * 1024  # all texts together
MAX_OPTIONS = 1024  # texts of a choice
MAX_DEPTH = 100  # of a schema's objects and lists
MAX_NAME_CHARS = 256
# In all, the grammars before it in the queue included; the client's own patience is seldom longer.
COMPILE_TIMEOUT_S = 30.0

_ANY_OBJECT = {"type": "object"}


def _checked_schema(value: object) -> object:
    """An object, true or false; or one of these as JSON in a text, as vLLM takes it."""
    if isinstance(value, str):
        _check_size(value, MAX_SCHEMA_BYTES)
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise ValueError("must be a JSON Schema: an object, or a text that holds one") from None
    if not isinstance(value, dict | bool):
        raise ValueError("must be a JSON Schema: an object, or a text that holds one")
    if _depth(value) > MAX_DEPTH:
        raise ValueError(f"a schema may be nested {MAX_DEPTH} deep; make it flatter")
    _check_size(json.dumps(value, ensure_ascii=False), MAX_SCHEMA_BYTES)
    if isinstance(value, dict):
        check_sets_no_options(value)
    return value


def _depth(value: object) -> int:
    """Levels of objects and lists."""
    return sum(any(isinstance(item, dict | list) for item in level) for level in levels(value))


def check_sets_no_options(schema: Mapping[str, Any]) -> None:
    """No schema may turn the knobs of the grammar that it becomes."""
    if OPTIONS_KEY in schema:
        raise ValueError(f"'{OPTIONS_KEY}' is not JSON Schema; remove it")


def _check_size(text: str, max_bytes: int) -> str:
    try:
        num_bytes = len(text.encode())
    except UnicodeEncodeError:
        raise ValueError("has half of a surrogate pair; send whole characters") from None
    if num_bytes > max_bytes:
        raise ValueError(f"has {num_bytes} bytes; at most {max_bytes} are taken")
    return text


def _sized(max_bytes: int) -> BeforeValidator:
    return BeforeValidator(lambda value: _check_size(value, max_bytes) if isinstance(value, str) else value)


def _checked_options(value: object) -> object:
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise ValueError("must be a list of texts, at least one")
    if len(value) > MAX_OPTIONS:
        raise ValueError(f"has {len(value)} texts; at most {MAX_OPTIONS} are taken")
    _check_size("".join(value), MAX_CHOICE_BYTES)
    return value


_Options = Annotated[list[str], Field(min_length=1, max_length=MAX_OPTIONS)]
Schema = Annotated[
    dict[str, Any] | bool, BeforeValidator(_checked_schema, json_schema_input_type=dict[str, Any] | bool | str)
]


class TextFormat(Body):
    type: Literal["text"]


class JsonObjectFormat(Body):
    type: Literal["json_object"]


class NamedSchema(Body):
    """`strict` says nothing here: every schema is enforced, and one that cannot be is refused."""

    name: Annotated[Text, Field(min_length=1, max_length=MAX_NAME_CHARS)]
    description: Text | None = None
    schema_: Schema = Field(alias="schema")
    strict: bool = True


class JsonSchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: NamedSchema


def _format_of(value: object) -> str | None:
    """The tag of the form that was meant; a tag has a space, so that errors name the fields alone."""
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"{kind} format" if isinstance(kind, str) else None


ResponseFormat = Annotated[
    Annotated[TextFormat, Tag("text format")]
    | Annotated[JsonObjectFormat, Tag("json_object format")]
    | Annotated[JsonSchemaFormat, Tag("json_schema format")],
    Discriminator(
        _format_of,
        custom_error_type="response_format",
        custom_error_message="must be an object whose 'type' is 'text', 'json_object' or 'json_schema'",
    ),
]


class StructuredOutputs(Body):
    """vLLM's: one of the first five says what the answer is."""

    json_: Schema | None = Field(default=None, alias="json")
    json_object: bool = False
    regex: Annotated[Text, _sized(MAX_REGEX_BYTES)] | None = None
    choice: Annotated[list[Text], BeforeValidator(_checked_options, json_schema_input_type=_Options)] | None = None
    grammar: Annotated[Text, _sized(MAX_GRAMMAR_BYTES)] | None = None
    whitespace_pattern: Annotated[Text, _sized(MAX_REGEX_BYTES)] | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: Literal[False] = False  # a schema says by itself what may come
    disable_fallback: bool = False  # there is none here

    @model_validator(mode="after")
    def _says_one_thing(self) -> Self:
        told = self._told
        if len(told) != 1:
            had = f"it has {' and '.join(map(repr, told))}" if told else "it has none"
            raise BadRequest(
                "'structured_outputs' must have exactly one of 'json', 'json_object', 'regex', 'choice' and 'grammar'; "
                f"{had}.",
                param="structured_outputs",
            )
        if self.whitespace_pattern is not None and self.disable_any_whitespace:
            raise BadRequest(
                "'whitespace_pattern' and 'disable_any_whitespace' contradict one another; send one of them.",
                param="structured_outputs",
            )
        has_layout = self.whitespace_pattern is not None or self.disable_any_whitespace
        if has_layout and told[0] not in ("json", "json_object"):
            raise BadRequest(
                f"'whitespace_pattern' and 'disable_any_whitespace' are about JSON; remove them beside {told[0]!r}.",
                param="structured_outputs",
            )
        return self

    @property
    def _told(self) -> list[str]:
        values: dict[str, object] = {"json": self.json_, "json_object": self.json_object or None}
        values |= {"regex": self.regex, "choice": self.choice, "grammar": self.grammar}
        return [name for name, value in values.items() if value is not None]

    @property
    def asked(self) -> "Asked":
        param = f"structured_outputs.{self._told[0]}"
        if self.regex is not None:
            return Asked(param, GrammarSource(Form.REGEX, self.regex))
        if self.choice is not None:
            return Asked(param, choice(self.choice))
        if self.grammar is not None:
            return Asked(param, GrammarSource(Form.GRAMMAR, self.grammar))
        whitespace = WHITESPACE if self.whitespace_pattern is None else self.whitespace_pattern
        schema = _ANY_OBJECT if self.json_ is None else self.json_
        return Asked(param, json_schema(schema, "" if self.disable_any_whitespace else whitespace))


@dataclass(frozen=True, slots=True)
class Asked:
    """A grammar as a request asks for it. `param`: the field that it comes from."""

    param: str
    source: GrammarSource


class _Body(Protocol):
    """What of a request's body is about structure, and what structure does not go with."""

    @property
    def response_format(self) -> TextFormat | JsonObjectFormat | JsonSchemaFormat | None: ...
    @property
    def structured_outputs(self) -> StructuredOutputs | None: ...
    @property
    def ignore_eos(self) -> bool: ...


def asked_of(body: _Body, forced: Asked | None = None) -> Asked | None:
    """The grammar that the answer is to follow: `forced`, or what the body asks for; None where the answer is free.

    Raises BadRequest for two of them, and for a field that leaves them no end.
    """
    asked = _of_format(body.response_format)
    if body.structured_outputs is not None:
        if asked is not None:
            raise BadRequest(
                "'response_format' and 'structured_outputs' both say what the answer looks like; send one of them.",
                param="structured_outputs",
            )
        asked = body.structured_outputs.asked
    asked = forced or asked
    if asked is not None and body.ignore_eos:
        raise BadRequest(f"'{asked.param}' ends the answer where it is whole; remove 'ignore_eos'.", param="ignore_eos")
    return asked


def _of_format(wanted: TextFormat | JsonObjectFormat | JsonSchemaFormat | None) -> Asked | None:
    if isinstance(wanted, JsonSchemaFormat):
        return Asked("response_format.json_schema.schema", json_schema(wanted.json_schema.schema_))
    return Asked("response_format", json_schema(_ANY_OBJECT)) if isinstance(wanted, JsonObjectFormat) else None


async def compiled(grammars: GrammarsFace, asked: Asked) -> Grammar | GrammarSource:
    """The grammar for an order of sequences, compiled off the event loop.

    Raises BadRequest that names its field, and Overloaded.
    """
    compiling = asyncio.wrap_future(grammars.compiled(asked.source))
    try:
        # Shielded, as others may wait for the same one.
        return await asyncio.wait_for(asyncio.shield(compiling), COMPILE_TIMEOUT_S)
    except GrammarRefused as error:
        message = f"'{asked.param}' cannot be followed: {echo(error)}."
        raise BadRequest(message, param=asked.param, code="invalid_grammar") from error
    except GrammarsUnavailable as error:
        message = f"'{asked.param}' cannot be followed with this base: {echo(error)}. Remove it."
        raise BadRequest(message, param=asked.param, code="unsupported") from error
    except TimeoutError as error:
        raise Overloaded("Too many grammars wait to be compiled. Retry in a moment.", retry_after_s=5) from error

"""What every JSON body of a request is: an object in which null means absent, and text that can be encoded.

Owns what the models of all bodies share. Knows nothing about any particular one.
"""

from collections.abc import Iterator, Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticKnownError

from server.api.fields import without_ignored, without_nulls


def encodable(text: str) -> str:
    """Refuse half of a surrogate pair, which JSON can escape but no tokenizer and no answer can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PydanticKnownError("string_unicode") from None
    return text


def levels(value: object) -> Iterator[list[Any]]:
    """What lies in a JSON value, level by level: itself; then the names and values of objects and the items of lists.

    Not recursive: it may be deeper than Python's stack.
    """
    level = [value]
    while level:
        yield level
        level = [part for item in level for part in _parts(item)]


def _parts(item: Any) -> Sequence[Any]:
    if isinstance(item, dict):
        return [*item, *item.values()]
    return item if isinstance(item, list) else ()


Text = Annotated[str, AfterValidator(encodable)]


class Body(BaseModel):
    """A JSON object in which null means absent, numbers are numbers, and no number is infinite."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _nulls_are_absent(cls, body: Any) -> Any:
        body = without_nulls(body)
        known = {field.alias or name for name, field in cls.model_fields.items()}
        return without_ignored(body, known) if cls.model_config["extra"] == "forbid" else body

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Says of each field that may be left out that it may be null."""
        shown = handler(schema)
        body = handler.resolve_ref_schema(shown)
        required = body.get("required", ())
        properties = body.get("properties", {})
        for name, value in properties.items():
            value.pop("title", None)  # the name again
            if name not in required and {"type": "null"} not in value.get("anyOf", ()):
                default = {"default": value.pop("default")} if "default" in value else {}
                properties[name] = {"anyOf": [value, {"type": "null"}], **default}
        return shown

"""JSON schemas of many kinds, as programs ask for them: what structured output is measured and tested on.

Owns the schemas, each under a name that says what is particular about it. They keep to what the server enforces; what
it refuses (`not`, `if`, `uniqueItems` and the like) is in the tests of the API. Knows nothing about servers.
"""

from collections.abc import Iterator, Mapping
from typing import Any

Schema = Mapping[str, Any]

WORD: Schema = {"type": "string", "maxLength": 24}
LINE: Schema = {"type": "string", "minLength": 1, "maxLength": 60}
SMALL: Schema = {"type": "integer", "minimum": 0, "maximum": 99}
FLAG: Schema = {"type": "boolean"}
SHARE: Schema = {"type": "number", "minimum": 0, "maximum": 1, "multipleOf": 0.01}


def record(*optional: str, **properties: Schema) -> dict[str, Any]:
    """A closed object that must have all properties but the ones named `optional`."""
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def named(properties: Mapping[str, Schema]) -> dict[str, Any]:
    """A closed object whose names are no Python names."""
    closed = {"type": "object", "additionalProperties": False}
    return {**closed, "properties": dict(properties), "required": list(properties)}


def array(items: Schema, least: int = 0, most: int = 4) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


def one_of_texts(*texts: str) -> dict[str, Any]:
    return {"type": "string", "enum": list(texts)}


def pattern(text: str) -> dict[str, Any]:
    return {"type": "string", "pattern": text}


def either(*schemas: Schema) -> dict[str, Any]:
    return {"anyOf": list(schemas)}


def exactly_one(*schemas: Schema) -> dict[str, Any]:
    return {"oneOf": list(schemas)}


def ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/$defs/{name}"}


def tagged(kind: str, **properties: Schema) -> dict[str, Any]:
    return record(kind={"const": kind}, **properties)


def nullable(schema: Schema) -> dict[str, Any]:
    return either(schema, {"type": "null"})


def corpus() -> dict[str, Schema]:
    """All schemas by name."""
    parts = (_scalars, _texts, _numbers, _formats, _enums, _flat, _nested, _arrays, _unions, _references, _recursive)
    return dict(entry for part in (*parts, _open, _unicode, _tasks, _wide) for entry in part())


def _scalars() -> Iterator[tuple[str, Schema]]:
    yield "scalar/boolean", FLAG
    yield "scalar/null", {"type": "null"}
    yield "scalar/small-integer", SMALL
    yield "scalar/word", WORD
    yield "scalar/const-text", {"const": "exactly this"}
    yield "scalar/const-number", {"const": 42}
    yield "scalar/const-object", {"const": {"a": [1, None, True], "b": "c"}}
    yield "scalar/several-types", {"type": ["integer", "boolean", "null"], "minimum": 0, "maximum": 9}
    yield "scalar/text-or-null", {"type": ["string", "null"], "maxLength": 20}


def _texts() -> Iterator[tuple[str, Schema]]:
    yield "text/exact-length", {"type": "string", "minLength": 5, "maxLength": 5}
    yield "text/at-least", {"type": "string", "minLength": 10, "maxLength": 40}
    yield "text/empty", {"type": "string", "maxLength": 0}
    yield "text/sentence", record(sentence={"type": "string"})
    yield "text/code", pattern("^[A-Z]{2}-[0-9]{4}$")
    yield "text/hex-colour", pattern("^#[0-9a-f]{6}$")
    yield "text/slug", pattern("^[a-z]+(-[a-z]+){0,3}$")
    yield "text/version", pattern("^v[0-9]{1,2}\\.[0-9]{1,2}\\.[0-9]{1,2}$")
    yield "text/phone", pattern("^\\+[1-9][0-9]{6,12}$")
    yield "text/words-only", pattern("^[A-Za-z ]{3,30}$")
    yield "text/alternatives", pattern("^(north|south|east|west)-(gate|tower)$")
    yield "text/unanchored", {"type": "string", "pattern": "fish", "maxLength": 30}
    yield "text/pattern-and-length", {"type": "string", "pattern": "^[a-z]+$", "minLength": 4, "maxLength": 8}
    yield "text/quotes-inside", pattern('^"[a-z]{1,5}"\\\\[a-z]{1,3}$')


def _numbers() -> Iterator[tuple[str, Schema]]:
    yield "number/between", {"type": "integer", "minimum": 18, "maximum": 65}
    yield "number/negative", {"type": "integer", "minimum": -40, "maximum": -1}
    yield "number/around-zero", {"type": "integer", "minimum": -5, "maximum": 5}
    yield "number/exclusive", {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 10}
    yield "number/share", SHARE
    yield "number/tens", {"type": "integer", "multipleOf": 10, "minimum": 0, "maximum": 990}
    yield "number/money", {"type": "number", "minimum": 0, "maximum": 1000, "multipleOf": 0.01}
    yield "number/fractions", {"type": "number", "exclusiveMinimum": -1.5, "maximum": 2.25, "multipleOf": 0.25}
    yield "number/large", {"type": "integer", "minimum": 1_000_000, "maximum": 9_999_999}
    yield "number/one-value", {"type": "integer", "minimum": 7, "maximum": 7}


def _formats() -> Iterator[tuple[str, Schema]]:
    for name in ("date", "time", "date-time", "uuid", "ipv4", "duration"):
        yield f"format/{name}", record(value={"type": "string", "format": name})
    yield "format/email", record(to={"type": "string", "format": "email", "maxLength": 40})
    yield "format/hostname", record(host={"type": "string", "format": "hostname", "maxLength": 40})
    yield "format/uri", record(link={"type": "string", "format": "uri", "maxLength": 60})
    yield (
        "format/dates-of-a-stay",
        record(arrival={"type": "string", "format": "date"}, departure={"type": "string", "format": "date"}),
    )


def _enums() -> Iterator[tuple[str, Schema]]:
    yield "enum/texts", one_of_texts("red", "green", "blue")
    yield "enum/prefixes", one_of_texts("a", "ab", "abc", "abcd")
    yield "enum/mixed", {"enum": [1, "one", None, True, 1.5]}
    yield "enum/one", {"enum": ["only"]}
    yield "enum/objects", {"enum": [{"x": 1}, {"x": 2}, {"x": [3]}]}
    yield "enum/with-quotes", one_of_texts('say "yes"', "back\\slash", "new\nline", "tab\there")
    yield "enum/many", one_of_texts(*(f"option {number}" for number in range(60)))
    yield "enum/integers", {"type": "integer", "enum": [2, 3, 5, 7, 11, 13]}


def _flat() -> Iterator[tuple[str, Schema]]:
    yield "flat/person", record(name=WORD, age=SMALL)
    yield "flat/one-optional", record("nickname", name=WORD, nickname=WORD)
    yield "flat/all-optional", record("a", "b", "c", a=SMALL, b=FLAG, c=WORD)
    yield "flat/empty", record()
    yield "flat/nullable-fields", record(title=nullable(WORD), year=nullable(SMALL))
    yield "flat/with-defaults", record("size", colour=one_of_texts("red", "blue"), size={**SMALL, "default": 3})
    yield (
        "flat/titles-and-descriptions",
        {
            **record(city={**WORD, "title": "City", "description": "where they live"}),
            "title": "Place",
            "description": "one place",
            "$schema": "https://json-schema.org/draft/2020-12/schema",
        },
    )
    yield "flat/ten-fields", record(**{f"field_{letter}": SMALL for letter in "abcdefghij"})
    yield "flat/examples", record(tag={**WORD, "examples": ["sea", "hill"]})


def _nested() -> Iterator[tuple[str, Schema]]:
    yield "nested/two", record(owner=record(name=WORD), dog=record(name=WORD, age=SMALL))
    yield (
        "nested/address",
        record(
            name=WORD, address=record(street=WORD, zip=pattern("^[0-9]{5}$"), country=one_of_texts("AT", "DE", "CH"))
        ),
    )
    yield "nested/five-deep", record(a=record(b=record(c=record(d=record(e=SMALL)))))
    yield "nested/optional-inner", record("inner", outer=FLAG, inner=record(depth=SMALL))
    yield "nested/lists-of-records", record(crew=array(record(name=WORD, role=one_of_texts("cook", "mate")), 1, 3))
    yield "nested/records-of-lists", record(odd=array(SMALL, 1, 3), even=array(SMALL, 1, 3), words=array(WORD, 0, 2))
    yield "nested/matrix", array(array(SMALL, 2, 2), 2, 2)
    yield "nested/same-name", record(name=record(name=record(name=WORD)))
    yield "nested/lists-ten-deep", _lists_deep(10)


def _lists_deep(depth: int) -> dict[str, Any]:
    return array(SMALL, 1, 1) if depth == 1 else array(_lists_deep(depth - 1), 1, 1)


def _arrays() -> Iterator[tuple[str, Schema]]:
    yield "array/of-words", array(WORD, 1, 5)
    yield "array/exactly-three", array(SMALL, 3, 3)
    yield "array/may-be-empty", array(FLAG, 0, 3)
    yield "array/must-be-empty", array(FLAG, 0, 0)
    yield "array/pair", {"type": "array", "prefixItems": [WORD, SMALL], "items": False, "minItems": 2}
    yield "array/head-and-rest", {"type": "array", "prefixItems": [FLAG], "items": SMALL, "minItems": 2, "maxItems": 4}
    yield "array/of-enums", array(one_of_texts("x", "y"), 4, 4)
    yield "array/of-either", array(either(SMALL, FLAG), 2, 4)
    yield "array/of-nulls", array({"type": "null"}, 2, 3)


def _unions() -> Iterator[tuple[str, Schema]]:
    circle, square = tagged("circle", radius=SMALL), tagged("square", side=SMALL)
    yield "union/tagged", either(circle, square)
    yield "union/tagged-exactly-one", exactly_one(circle, square)
    yield "union/types", exactly_one(SMALL, WORD, {"type": "null"})
    yield "union/in-a-field", record(shape=either(circle, square), colour=one_of_texts("red", "blue"))
    yield "union/list-of-shapes", array(either(circle, square), 1, 3)
    yield "union/result-or-error", either(record(result=SMALL), record(error=LINE))
    yield "union/all-of", {"allOf": [{"type": "integer", "minimum": 3}, {"type": "integer", "maximum": 12}]}
    yield "union/nested", either(either(SMALL, FLAG), either({"type": "null"}, array(SMALL, 1, 2)))
    yield (
        "union/three-commands",
        either(tagged("move", x=SMALL, y=SMALL), tagged("say", text=LINE), tagged("stop", now=FLAG)),
    )


def _references() -> Iterator[tuple[str, Schema]]:
    point = record(x=SMALL, y=SMALL)
    yield "ref/one", {"$defs": {"point": point}, **record(at=ref("point"))}
    yield "ref/twice", {"$defs": {"point": point}, **record(start=ref("point"), end=ref("point"))}
    yield "ref/chain", {"$defs": {"a": ref("b"), "b": ref("c"), "c": SMALL}, "$ref": "#/$defs/a"}
    yield "ref/in-list", {"$defs": {"point": point}, **record(path=array(ref("point"), 2, 3))}
    yield "ref/definitions", {"definitions": {"w": WORD}, **record(word={"$ref": "#/definitions/w"})}
    yield "ref/to-a-property", record(first=SMALL, second={"$ref": "#/properties/first"})
    yield "ref/escaped-name", {"$defs": {"a/b": SMALL}, **record(n={"$ref": "#/$defs/a~1b"})}
    yield (
        "ref/pydantic",
        {
            "$defs": {
                "Mood": {"enum": ["glad", "sad"], "title": "Mood", "type": "string"},
                "Actor": record(name={"title": "Name", **WORD}, mood=ref("Mood")),
            },
            **record(lead=ref("Actor"), rival=either(ref("Actor"), {"type": "null"})),
            "title": "Play",
        },
    )


def _recursive() -> Iterator[tuple[str, Schema]]:
    yield "recursive/tree", {"$defs": {"node": record(value=SMALL, children=array(ref("node"), 0, 2))}, **ref("node")}
    yield "recursive/linked-list", {"$defs": {"cell": record("next", head=SMALL, next=ref("cell"))}, **ref("cell")}
    yield "recursive/maybe-null", {"$defs": {"cell": record(head=FLAG, tail=nullable(ref("cell")))}, **ref("cell")}
    yield "recursive/root", record("inner", word=WORD, inner={"$ref": "#"})
    yield (
        "recursive/mutual",
        {
            "$defs": {
                "even": record("next", n=SMALL, next=ref("odd")),
                "odd": record("next", m=SMALL, next=ref("even")),
            },
            **ref("even"),
        },
    )
    yield (
        "recursive/sum",
        {
            "$defs": {"term": either(SMALL, record(op=one_of_texts("+", "-"), left=ref("term"), right=SMALL))},
            **ref("term"),
        },
    )


def _open() -> Iterator[tuple[str, Schema]]:
    yield "open/typed-values", {"type": "object", "additionalProperties": SMALL, "maxProperties": 3}
    yield "open/required-and-more", {**record(id=SMALL), "additionalProperties": FLAG, "maxProperties": 3}
    yield "open/patterned-names", {
        "type": "object", "patternProperties": {"^[a-z]{1,6}$": SMALL}, "additionalProperties": False,
        "minProperties": 1, "maxProperties": 3,
    }  # fmt: skip
    yield "open/at-least-two", {"type": "object", "additionalProperties": WORD, "minProperties": 2, "maxProperties": 2}


def _unicode() -> Iterator[tuple[str, Schema]]:
    yield "unicode/german", named({"straße": WORD, "größe": SMALL})
    yield "unicode/japanese", named({"名前": WORD, "年齢": SMALL})
    yield "unicode/emoji", named({"🐟": FLAG, "👩‍🚀": one_of_texts("🚀", "🌍")})
    yield "unicode/right-to-left", named({"اسم": WORD})
    yield "unicode/values", one_of_texts("ά", "ß", "漢字", "é", "e\u0301")
    yield "unicode/spaces-and-quotes", named({"a b": SMALL, 'c"d': SMALL, "e\\f": SMALL, "": FLAG})
    yield "unicode/pattern", pattern("^[α-ω]{2,6}$")
    yield "unicode/dots-and-dollars", named({"$id_": SMALL, "a.b.c": SMALL, "#": FLAG})


def _tasks() -> Iterator[tuple[str, Schema]]:
    yield "task/sentiment", record(label=one_of_texts("positive", "neutral", "negative"), confidence=SHARE)
    yield "task/entities", record(entities=array(record(text=WORD, kind=one_of_texts("PER", "LOC", "ORG")), 0, 3))
    yield "task/weather-call", record(location=WORD, unit=one_of_texts("celsius", "fahrenheit"))
    yield "task/reasoned-answer", record(reasoning=LINE, answer=one_of_texts("A", "B", "C", "D"))
    yield "task/recipe", record(title=WORD, minutes=SMALL, steps=array(LINE, 1, 3))
    yield "task/invoice", record(
        number=pattern("^INV-[0-9]{3,6}$"),
        lines=array(record(item=WORD, count=SMALL, price={"type": "number", "multipleOf": 0.01, "minimum": 0,
                                                          "maximum": 500}), 1, 2),
        paid=FLAG,
    )  # fmt: skip
    yield "task/review", record(stars={"type": "integer", "minimum": 1, "maximum": 5}, title=WORD, body=LINE)
    yield (
        "task/appointment",
        record(
            who=WORD, day={"type": "string", "format": "date"}, hour={"type": "integer", "minimum": 8, "maximum": 18}
        ),
    )
    yield "task/translation", record(source=one_of_texts("en", "de"), target=one_of_texts("en", "de"), text=LINE)
    yield "task/summary", record(headline=LINE, points=array(LINE, 2, 3))
    yield "task/story", record(hero=WORD, place=WORD, mood=one_of_texts("glad", "sad"), ending=LINE)
    yield (
        "task/filter",
        record(field=one_of_texts("age", "name"), op=one_of_texts("=", "<", ">"), value=exactly_one(SMALL, WORD)),
    )


def _wide() -> Iterator[tuple[str, Schema]]:
    """What is large rather than clever."""
    yield "wide/twenty-flags", record(**{f"flag_{number:02}": FLAG for number in range(20)})
    yield (
        "wide/twenty-optional",
        record(*(f"o{number}" for number in range(20)), **{f"o{number}": SMALL for number in range(20)}),
    )
    yield "wide/long-names", record(**{"a_rather_long_name_for_a_field_" * 2 + letter: FLAG for letter in "ab"})
    yield "wide/eight-variants", either(*(tagged(f"kind_{number}", value=SMALL) for number in range(8)))
    yield "wide/long-pattern", pattern("^(" + "|".join(f"item{number:03}" for number in range(100)) + ")$")

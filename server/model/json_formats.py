"""Formats of JSON Schema of which llguidance enforces less than they say, made to say it as patterns.

It knows the form of dates and times, but no leap years, has a year 0, which most readers of dates have not, and lets
every minute have a leap second. Owns the patterns and the way through a schema. Knows nothing about grammars.
"""

from collections.abc import Mapping
from typing import Any

_YEAR = "([1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])"
_LEAP = "([0-9]{2}(0[48]|[2468][048]|[13579][26])|([2468][048]|[13579][26]|0[48])00)"
_DAY = f"^({_YEAR}-(0[13-9]|1[0-2])-|{_YEAR}-02-([01]|2[0-8])|{_LEAP}-02-29)"
_PATTERNS: Mapping[str, tuple[str, ...]] = {
    "date": (_DAY,),
    "date-time": (_DAY, "^.{17}[0-5]"),
    "time": ("^.{6}[0-5]",),
}
# Where schemas lie in a schema: in an object by any name, in a list, or by themselves. All else is data.
_NAMED = frozenset({"$defs", "definitions", "patternProperties", "properties"})
_LISTED = frozenset({"allOf", "anyOf", "oneOf", "prefixItems"})
_SINGLE = frozenset({"additionalProperties", "items"})


def with_calendar(schema: Any) -> Any:
    """The schema, which allows no dates that are none: 29 February of a common year, the year 0, a second 60."""
    if not isinstance(schema, dict):
        return schema
    bound = {name: _inside(name, value) for name, value in schema.items()}
    patterns = _PATTERNS.get(schema["format"], ()) if isinstance(schema.get("format"), str) else ()
    if patterns:
        others = bound.get("allOf", [])
        bound["allOf"] = [
            *(others if isinstance(others, list) else [others]),
            *({"pattern": each} for each in patterns),
        ]
    return bound


def _inside(name: str, value: Any) -> Any:
    if name in _NAMED and isinstance(value, dict):
        return {key: with_calendar(inner) for key, inner in value.items()}
    if name in _LISTED and isinstance(value, list):
        return [with_calendar(inner) for inner in value]
    return with_calendar(value) if name in _SINGLE else value

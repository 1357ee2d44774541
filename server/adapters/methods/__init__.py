"""The methods this server knows: every module in this package that has a `METHOD`.

Owns discovery and the choice of the method for a config. Knows nothing about any particular one, so that adding a
method is adding a file.
"""

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from server.adapters.format.unserved import why_unserved
from server.adapters.method import Method
from server.ground.errors import AdapterRejected


@cache
def discover() -> tuple[Method, ...]:
    """The methods of this package, by name of their module."""
    names = sorted(found.name for found in iter_modules(__path__))
    modules = [import_module(f"{__name__}.{name}") for name in names]
    return tuple(module.METHOD for module in modules if hasattr(module, "METHOD"))


def method_for(config: Mapping[str, Any]) -> Method:
    """The one method that claims an adapter_config.json.

    Raises AdapterRejected, with the methods that there are, if none does.
    """
    claiming = [method for method in discover() if method.claims(config)]
    if not claiming:
        raise _refusal(config.get("peft_type"))
    if len(claiming) > 1:
        raise RuntimeError(f"several methods claim one config: {', '.join(method.name for method in claiming)}")
    return claiming[0]


def _refusal(given: Any) -> AdapterRejected:
    start = f"peft_type = {given!r:.60} in adapter_config.json is not served"
    if reason := why_unserved(given):
        return AdapterRejected(f"{start}: {reason}.")
    if isinstance(given, str) and given != given.upper():
        return AdapterRejected(f"{start}: PEFT writes it in capitals.")
    names = ", ".join(method.name for method in discover())
    return AdapterRejected(
        f"{start}; the methods are {names}. Train with one of them, or merge the adapter into the base."
    )

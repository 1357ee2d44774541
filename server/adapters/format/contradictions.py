"""Where an adapter's config says another thing about the adapter than the tensors beside it.

Owns the sentences that warn of it: the tensors decide what is applied, so nothing here is refused. Knows nothing about
files, shapes or sites.
"""

from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

_REMEDY = "The tensors are applied as they are; check that config and weights belong together."


def contradictions(config: Mapping[str, Any], modules: Sequence[str], *, has_up_bias: bool = True) -> tuple[str, ...]:
    """Warnings for the owner of an adapter whose file has tensors for each of `modules`, paths as in the file.

    Only what is beyond doubt: lists of plain names are compared, patterns ("all-linear", regular expressions) are not.
    `has_up_bias` matters to LoRA alone, whose config may ask for it.
    """
    return tuple(f"{sentence} {_REMEDY}" for sentence in _found(config, modules, has_up_bias)) if modules else ()


def feedforward_contradictions(config: Mapping[str, Any], scales_input: Mapping[str, bool]) -> tuple[str, ...]:
    """Warnings for an IA3 adapter: module path as in the file -> whether its vector scales the input, by its shape.

    PEFT scales the input of a module whose path ends in one of the config's `feedforward_modules`, with or without a
    dot before it.
    """
    named = config.get("feedforward_modules")
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        return ()
    ends = tuple(named)
    named_output = next((m for m, is_input in scales_input.items() if not is_input and m.endswith(ends)), "")
    unnamed_input = next((m for m, is_input in scales_input.items() if is_input and not m.endswith(ends)), "")
    found = []
    if named_output:
        found.append(f"feedforward_modules names {named_output}, whose vector scales its output. {_REMEDY}")
    if unnamed_input:
        found.append(f"feedforward_modules leaves out {unnamed_input}, whose vector scales its input. {_REMEDY}")
    return tuple(found)


def _found(config: Mapping[str, Any], modules: Sequence[str], has_up_bias: bool) -> Iterator[str]:
    targets = _items(config, "target_modules", str)
    # The last name alone is compared: what stands before it is spelled differently by every generation of trainers.
    if targets and {_last(target) for target in targets}.isdisjoint(map(_last, modules)):
        yield f"target_modules names none of the modules that have tensors, {modules[0]} for one."
    excluded = set(_items(config, "exclude_modules", str))
    if module := next((module for module in modules if not excluded.isdisjoint(_endings(module))), ""):
        yield f"exclude_modules names {module}, which has tensors."
    layers = set(_items(config, "layers_to_transform", int))
    if layers and (module := next((module for module in modules if _is_outside(module, layers)), "")):
        yield f"layers_to_transform leaves out the layer of {module}, which has tensors."
    if config.get("lora_bias") is True and not has_up_bias:
        yield "lora_bias is true, and the file has no lora_B.bias."


def _items(config: Mapping[str, Any], name: str, kind: type) -> list[Any]:
    """A field's list; one number is a list of one, and anything else is empty: nothing is compared with it."""
    value = config.get(name)
    if kind is int and type(value) is int:
        return [value]
    return value if isinstance(value, list) and all(type(item) is kind for item in value) else []


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _endings(path: str) -> Iterator[str]:
    """The path, and what stands behind each of its dots: the names that PEFT takes for this module."""
    parts = path.split(".")
    return (".".join(parts[place:]) for place in range(len(parts)))


def _is_outside(module: str, layers: Set[int]) -> bool:
    """Whether the path has numbers and none is among `layers`: in `layers.3.experts.5` either may be the layer's."""
    numbers = {int(part) for part in module.split(".") if part.isdecimal()}
    return bool(numbers) and numbers.isdisjoint(layers)

"""The fields of an adapter_config.json: typed, and none of them passed over.

Owns how a field is read and how an unknown one is refused. Knows nothing about what the fields mean to a method.
"""

from collections.abc import Callable, Mapping, Set
from math import isfinite
from typing import Any

from server.adapters.format.patterns import ModulePatterns
from server.ground.errors import AdapterRejected

# Fields of every PEFT config that say nothing about the result: book-keeping, or a choice of modules, layers and inits
# whose outcome is in the file's keys and tensors.
NEUTRAL = frozenset({
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "fan_in_fan_out", "inference_mode",
    "layers_pattern", "layers_to_transform", "peft_type", "peft_version", "revision", "target_modules", "task_type",
})  # fmt: skip

# Fields that mean the same in many methods, and that are refused when they are set.
REFUSED = {
    "modules_to_save": "fully trained copies of modules are served beside LoRA and DoRA only; train without them",
    "trainable_token_indices": "trained token rows are served beside LoRA and DoRA, and alone as TRAINABLE_TOKENS",
    "target_parameters": "adapters on bare parameters (expert stacks) are not served yet; target modules instead",
    "layer_replication": "it changes the number of layers, which makes another model than the base",
}


_MAX_TEXT_LENGTH = 1024


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= _MAX_TEXT_LENGTH


def _is_of(kind: type) -> Callable[[Any], bool]:
    """Whether a value is of a kind, or a list of such."""
    return lambda value: all(type(item) is kind for item in (value if isinstance(value, list) else [value]))


# What neutral fields must be all the same: what is not even of their form was not written for this adapter.
_FORMS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "base_model_name_or_path": (_is_text, f"a string of at most {_MAX_TEXT_LENGTH} characters"),
    "target_modules": (_is_of(str), "a string or a list of strings"),
    "exclude_modules": (_is_of(str), "a string or a list of strings"),
    "layers_pattern": (_is_of(str), "a string or a list of strings"),
    "layers_to_transform": (_is_of(int), "a whole number or a list of whole numbers"),
}


def check_known(config: Mapping[str, Any], known: Set[str], refused: Mapping[str, str] = REFUSED) -> None:
    """Refuses each field that is set (true, not empty) and listed in `refused`, not known at all, or of no form."""
    for name, value in config.items():
        if not value or name in known:
            continue
        if name in NEUTRAL:
            _check_form(name, value)
            continue
        reason = refused.get(name, "this field is not known, and it might change what the adapter computes; remove it")
        raise AdapterRejected(f"{name:.60} = {str(value):.60} in adapter_config.json: {reason}.")


def _check_form(name: str, value: Any) -> None:
    fits, form = _FORMS.get(name, (None, ""))
    if fits is not None and not fits(value):
        raise AdapterRejected(f"{name} in adapter_config.json must be {form}, not {value!r:.40}.")


def text(config: Mapping[str, Any], name: str) -> str:
    value = config.get(name)
    if not isinstance(value, str):
        raise AdapterRejected(f"{name} in adapter_config.json must be a string.")
    return value


def flag(config: Mapping[str, Any], name: str, default: bool = False) -> bool:
    value = config.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise AdapterRejected(f"{name} in adapter_config.json must be true or false, not {value!r:.40}.")
    return value


def count(value: Any, name: str) -> int:
    """A whole number of at least 1, and no more than a float can hold."""
    if type(value) is not int or not 1 <= value < 1 << 53:
        raise AdapterRejected(f"{name} in adapter_config.json must be a whole number of at least 1, not {value!r:.40}.")
    return value


def number(value: Any, name: str) -> float:
    if type(value) not in (int, float) or abs(value) > 1e30 or not isfinite(value):
        raise AdapterRejected(f"{name} in adapter_config.json must be a finite number, not {value!r:.40}.")
    return float(value)


def table(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = config.get(name) or {}
    if not isinstance(value, dict):
        raise AdapterRejected(f"{name} in adapter_config.json must be an object, not {value!r:.40}.")
    return value


def by_pattern(
    config: Mapping[str, Any], name: str, pattern_name: str, read: Callable[[Any, str], float], default: int
) -> Callable[[str], float]:
    """A field's value for a module path: that of the first pattern in the file that matches, else the field's own."""
    general = read(config.get(name, default), name)
    special = {pattern: read(value, pattern_name) for pattern, value in table(config, pattern_name).items()}
    patterns = ModulePatterns(special, pattern_name)

    def value(module: str) -> float:
        pattern = patterns.first(module)
        return general if pattern is None else special[pattern]

    return value


def check_no_bias(config: Mapping[str, Any], method: str) -> None:
    """Refuses `bias` other than none, for methods whose trained biases are not read."""
    if config.get("bias") not in (None, "none"):
        raise AdapterRejected(
            f"bias = {config['bias']!r:.40} in adapter_config.json: {method}'s biases are not served yet. "
            "Train with bias = 'none'."
        )

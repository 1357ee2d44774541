"""Flags made from the settings: a definition of a setting is also the definition of its flag.

Owns how a setting looks on the command line and how its value is written for people. Values stay text here:
`config.load` judges them. Knows nothing about commands.
"""

import argparse
from collections.abc import Collection

from pydantic import ByteSize, SecretStr

from server.ground import config
from server.ground.config import Flag, NamedAdapter, Settings

_GROUPS = {
    "base": "base model",
    "adapters": "adapters",
    "http": "HTTP",
    "limits": "limits",
    "process": "process",
}
_UNITS = (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))


def add_settings(parser: argparse.ArgumentParser) -> None:
    """A flag for each setting, the model as a positional. Only those given reach the namespace."""
    groups = {key: parser.add_argument_group(title) for key, title in _GROUPS.items()}
    for name in Settings.model_fields:
        _add(groups[flag_of(name).group], name, is_positional=name == "model")
    parser.epilog = _EPILOG


def add_some_settings(parser: argparse.ArgumentParser, names: Collection[str]) -> None:
    """A flag for each of some settings, the model's too. Only those given reach the namespace."""
    group = parser.add_argument_group("settings, as for graft serve")
    for name in Settings.model_fields:
        if name in names:
            _add(group, name, is_positional=False)
    parser.epilog = _EPILOG


def flag_of(name: str) -> Flag:
    """How a setting is shown in the help."""
    return next(item for item in Settings.model_fields[name].metadata if isinstance(item, Flag))


def shown_bytes(num_bytes: int) -> str:
    """A size as the settings take it: in the largest unit that it is a whole number of."""
    for unit, unit_bytes in _UNITS:
        if num_bytes and num_bytes % unit_bytes == 0:
            return f"{num_bytes // unit_bytes}{unit}"
    return str(num_bytes)


_EPILOG = (
    f"Every setting is also a variable ({config.variable_name('max_context')}) and a key of the --config file "
    "(max_context). A flag wins over a variable, a variable over the file."
)


def _add(group: argparse._ArgumentGroup, name: str, *, is_positional: bool) -> None:
    flag, default = flag_of(name), Settings.model_fields[name].get_default()
    text = f"{flag.help} (default: {_shown_default(flag, default)})".replace("%", "%%")
    if is_positional:
        group.add_argument(name, nargs="?", metavar=flag.metavar, help=text)
    elif isinstance(default, bool):
        group.add_argument(f"--{name.replace('_', '-')}", dest=name, action=argparse.BooleanOptionalAction, help=text)
    else:
        action = "append" if isinstance(default, tuple) else "store"
        spelled = f"--{name.replace('_', '-')}"
        group.add_argument(spelled, dest=name, action=action, metavar=flag.metavar, help=text)


def _shown_default(flag: Flag, value: object) -> str:
    if flag.default is not None:
        return flag.default
    return shown_value(value)


def shown_value(value: object) -> str:
    """A setting's value as people write it; the key is not shown."""
    match value:
        case None | ():
            return "none"
        case bool():
            return "on" if value else "off"
        case ByteSize():
            return shown_bytes(value)
        case SecretStr():
            return "(set, not shown)"
        case tuple():
            return ", ".join(map(_shown_item, value))
        case _:
            return str(value)


def _shown_item(item: object) -> str:
    return f"{item.name}={item.path}" if isinstance(item, NamedAdapter) else str(item)

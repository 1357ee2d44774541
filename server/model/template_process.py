"""The program of a process that renders chat templates: nothing but jinja2, under limits that end it if need be.

A template is a program, and one that loops or grows cannot be stopped from within Python. So it runs here, under a
limit of processor time that ends the process, one of memory, and one of the text that comes out. Runs as a script, by
its path and isolated, so that it imports neither this package nor torch. Knows nothing about models, tokens or HTTP.

Each message on stdin and stdout is its length, 8 bytes big-endian, and that many bytes of JSON:

    {"template": text, "variables": {...}}   ->  {"text": what it renders to}
    {"template": text, "variables": null}    ->  {"variables": the names that it reads and does not set}
                                             or  {"error": {"kind": name of the exception, "words": what it says}}
"""

import json
import resource
import signal
import struct
import sys
from datetime import datetime
from functools import lru_cache
from typing import Any, BinaryIO

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

_LENGTH = struct.Struct(">Q")
_MAX_WORDS = 1000  # of an error
_MAX_COMPILED = 64


class _Generation(jinja2.ext.Extension):
    """{% generation %} marks an assistant's turn for training; here what is inside is rendered as it stands."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


class _Namespace(jinja2.utils.Namespace):
    """Of which no attribute may begin with an underscore: those lead to Python's insides."""

    def __init__(*args: Any, **values: Any) -> None:
        attributes = dict(*args[1:], **values)
        for name in attributes:
            _refuse_private(name)
        jinja2.utils.Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot have the attribute {name!r}")


class _Dict:
    """`dict` without the attributes of the type."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _raise_exception(message: object) -> None:
    raise jinja2.exceptions.TemplateError(str(message))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON; jinja2's own filter escapes what matters in HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _environment() -> ImmutableSandboxedEnvironment:
    """What templates find: the same names, filters and blank lines as in transformers, for which they are written."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_Dict(), namespace=_Namespace
    )
    return environment


_ENVIRONMENT = _environment()


@lru_cache(_MAX_COMPILED)
def _compiled(template: str) -> jinja2.Template:
    return _ENVIRONMENT.from_string(template)


def _render(template: str, variables: dict[str, Any], max_chars: int) -> dict[str, Any]:
    pieces, num_chars = [], 0
    for piece in _compiled(template).generate(variables):
        num_chars += len(piece)
        if num_chars > max_chars:
            raise OverflowError(f"it writes more than {max_chars} characters")
        pieces.append(piece)
    return {"text": "".join(pieces)}


def _names(template: str) -> dict[str, Any]:
    _compiled(template)
    return {"variables": sorted(jinja2.meta.find_undeclared_variables(_ENVIRONMENT.parse(template)))}


def _answer(request: dict[str, Any], max_chars: int) -> dict[str, Any]:
    template, variables = request["template"], request["variables"]
    try:
        return _names(template) if variables is None else _render(template, variables, max_chars)
    except jinja2.TemplateSyntaxError as error:
        return _failure("TemplateSyntaxError", f"line {error.lineno}: {error.message}")
    except MemoryError:
        return _failure("MemoryError", "it takes more memory than a template may")
    except Exception as error:  # a template may raise anything, on purpose (raise_exception) or not
        return _failure(type(error).__name__, str(error) or type(error).__name__)


def _failure(kind: str, words: str) -> dict[str, Any]:
    return {"error": {"kind": kind, "words": words[:_MAX_WORDS]}}


def _answer_within(cpu_s: float, request: dict[str, Any], max_chars: int) -> dict[str, Any]:
    """At the end of the time SIGPROF ends the process, whatever it is in the middle of."""
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    try:
        return _answer(request, max_chars)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _read(stream: BinaryIO) -> dict[str, Any] | None:
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    request: dict[str, Any] = json.loads(stream.read(_LENGTH.unpack(head)[0]))
    return request


def _write(stream: BinaryIO, answer: dict[str, Any]) -> None:
    content = json.dumps(answer).encode()
    stream.write(_LENGTH.pack(len(content)) + content)
    stream.flush()


def main(cpu_s: float, max_bytes: int, max_chars: int) -> None:
    """Answers until stdin ends. Nothing that it may write to is left: no file can grow."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to the server, which closes stdin when it ends
    for limit, value in ((resource.RLIMIT_AS, max_bytes), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(limit, (value, value))
    while (request := _read(sys.stdin.buffer)) is not None:
        _write(sys.stdout.buffer, _answer_within(cpu_s, request, max_chars))


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))

"""Grammars that bind what is generated: compiled for the base's tokenizer, off every loop, and kept for the next time.

Owns the forms in which a grammar may be written (a JSON schema, a regular expression, a choice of texts, a context-free
grammar, or an expression that joins JSON values and literal text), their compilation and its cache. Knows nothing about
requests, sequences, tensors or logits. llguidance does the parsing: https://github.com/guidance-ai/llguidance
"""

import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from types import NoneType
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from server.ground.errors import Overloaded
from server.model.grammar_trial import GRAMMAR_LIMITS, GrammarRefused, GrammarsUnavailable, GrammarTrial, TokenizerText
from server.model.json_formats import with_calendar

Schema = Mapping[str, Any] | bool

# Between two parts of a JSON text: a space, or a line's end and the next one's indentation. JSON allows any amount,
# and a model that has no better idea goes on with it until its tokens are used up.
WHITESPACE = r"(\x20|\x0A[\x20\x09]{0,32})"
OPTIONS_KEY = "x-guidance"  # under which llguidance looks for its options in a schema
MAX_PENDING = 256  # grammars that wait to be compiled
MAX_KEPT = 256
_MAX_KEPT_BYTES = 256 << 20  # of what is compiled, as its trial has measured it, and of the sources
_LEAST_BYTES = 32 << 10  # counted for each, refusals too: what Python and the tables around it take

log = logging.getLogger(__name__)


class Form(StrEnum):
    """How a grammar is written."""

    JSON_SCHEMA = "json schema"
    REGEX = "regex"
    LARK = "lark"
    GRAMMAR = "grammar"  # Lark, or GBNF (`::=`), which is translated


@dataclass(frozen=True, slots=True)
class GrammarSource:
    """A grammar as it is written; equal ones are compiled once. `text` of a JSON schema is the schema as JSON."""

    form: Form
    text: str


class Grammar:
    """A compiled grammar. May be used from any thread."""

    def __init__(self, matcher: LLMatcher, vocab_size: int, compiled_bytes: int) -> None:
        self._matcher = matcher
        self.vocab_size = vocab_size  # logits of the model that it was compiled for
        self.compiled_bytes = compiled_bytes

    def start(self) -> LLMatcher:
        """A matcher of its own for one answer, before its first token."""
        return self._matcher.deep_copy()


def json_schema(schema: Schema, whitespace: str = WHITESPACE) -> GrammarSource:
    """JSON that satisfies a schema, with its properties in the schema's order.

    `whitespace`: a regular expression for what may stand between the parts; "": nothing may.
    """
    return GrammarSource(Form.JSON_SCHEMA, _dumped(schema, whitespace))


def choice(texts: Iterable[str]) -> GrammarSource:
    """One of the texts, exactly."""
    return GrammarSource(Form.REGEX, "|".join("".join(map(_escaped, text)) for text in texts))


def expression(text: str) -> GrammarSource:
    """An expression of llguidance's Lark, such as one made of `literal` and `json_value`.

    `f"{literal('<call>')} ({json_value(a)} | {json_value(b)}) {literal('</call>')}"` is a call of one of two schemas;
    `(...)?`, `(...)*` and `(...){1,4}` repeat.
    """
    return GrammarSource(Form.LARK, f"start: {text}")


def literal(text: str) -> str:
    """The expression for exactly this text, which may be empty."""
    return f"/{''.join(map(_escaped, text))}/" if text else '""'


def json_value(schema: Schema, whitespace: str = WHITESPACE) -> str:
    """The expression for JSON that satisfies a schema; `whitespace` as `json_schema` has it."""
    return f"%json {_dumped(schema, whitespace)}"


class Grammars:
    """Compiles grammars for one tokenizer, each once, in a thread of its own, and keeps the last ones used.

    Refusals are kept as well. What is kept is bounded by its number and its memory. `load_tokenizer` is called once,
    in that thread; a tokenizer of which no grammars can be made is remembered as such.
    """

    def __init__(self, load_tokenizer: Callable[[], TokenizerText], *, max_kept: int = MAX_KEPT) -> None:
        self._load_tokenizer = load_tokenizer
        self._max_kept = max_kept
        self._lock = threading.Lock()  # the next field
        self._kept: OrderedDict[GrammarSource, Future[Grammar]] = OrderedDict()  # the longest unused first
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._tokenizer: LLTokenizer | None = None  # the thread's own, as are the next two
        self._trial: GrammarTrial | None = None
        self._unavailable: str | None = None  # why there are no grammars for this tokenizer

    def load(self) -> None:
        """Reads the tokenizer now and not with the first grammar: it holds Python's lock meanwhile, so a server that
        is answering would stand still. Returns also where no grammars can be made, which each is then told."""
        self._thread.submit(self._read_tokenizer).result()

    def compiled(self, source: GrammarSource) -> Future[Grammar]:
        """The compiled grammar, perhaps not yet. Any thread; never blocks.

        The future raises GrammarRefused, GrammarsUnavailable or Overloaded. Raises Overloaded when too many wait to be
        compiled.
        """
        with self._lock:
            future = self._kept.get(source)
            if future is None or _says_nothing(future):
                if sum(not kept.done() for kept in self._kept.values()) >= MAX_PENDING:
                    raise Overloaded(f"{MAX_PENDING} grammars wait to be compiled. Retry in a moment.")
                future = self._kept[source] = self._thread.submit(self._compile, source)
            self._kept.move_to_end(source)
            return future

    def close(self) -> None:
        """Ends the thread and its process; blocks until they are gone. A grammar that is being compiled is given up."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        if self._trial is not None:
            self._trial.stop()  # first: the thread may wait for it
        self._thread.shutdown()
        if self._trial is not None:
            self._trial.close()

    def _compile(self, source: GrammarSource) -> Grammar:
        self._forget_oldest()
        self._read_tokenizer()
        if self._tokenizer is None or self._trial is None:
            raise GrammarsUnavailable(self._unavailable)
        tried = self._trial.compilable(source.form, source.text)
        matcher = LLMatcher(self._tokenizer, tried.grammar, log_level=0, limits=LLParserLimits(**GRAMMAR_LIMITS))
        if matcher.is_error():  # the process has it compiled, so this is no matter of what it says
            raise GrammarRefused("it takes more than this server gives a grammar")
        return Grammar(matcher, self._tokenizer.vocab_size, tried.compiled_bytes)

    def _forget_oldest(self) -> None:
        """Of those that are done: who asks for one that is not is to find it.

        Before each is compiled, so that what is kept exceeds its bound by one grammar at most.
        """
        with self._lock:
            num_bytes = sum(_kept_bytes(source, future) for source, future in self._kept.items())
            for source, future in list(self._kept.items()):
                if len(self._kept) <= self._max_kept and num_bytes <= _MAX_KEPT_BYTES:
                    return
                if future.done():
                    del self._kept[source]
                    num_bytes -= _kept_bytes(source, future)

    def _read_tokenizer(self) -> None:
        """Once."""
        if self._tokenizer is not None or self._unavailable is not None:
            return
        try:
            text = self._load_tokenizer()
            self._tokenizer, self._trial = text.loaded(), GrammarTrial(text)
        except Exception as error:  # tokenizers are of any make, and one may fail to be written down in any way
            self._unavailable = str(error) or type(error).__name__
            log.warning("no grammars with this base's tokenizer, so no structured output: %s", self._unavailable)


def _says_nothing(future: Future[Grammar]) -> bool:
    """Whether it tells of the machine, or of the tokenizer, and nothing of the grammar."""
    if not future.done():
        return False
    return future.cancelled() or not isinstance(future.exception(), GrammarRefused | NoneType)


def _kept_bytes(source: GrammarSource, future: Future[Grammar]) -> int:
    is_compiled = future.done() and not future.cancelled() and future.exception() is None
    return len(source.text) + max(_LEAST_BYTES, future.result().compiled_bytes if is_compiled else 0)


def _dumped(schema: Schema, whitespace: str) -> str:
    """With options, which llguidance finds in the schema: what is not enforced must be refused, not passed over."""
    layout = {"whitespace_pattern": whitespace} if whitespace else {"whitespace_flexible": False}
    options = {OPTIONS_KEY: {"lenient": False, "coerce_one_of": False, **layout}}
    bound = {} if schema is True else with_calendar(schema)
    return json.dumps(bound if bound is False else {**bound, **options}, ensure_ascii=False, separators=(",", ":"))


def _escaped(character: str) -> str:
    """As it stands in a regular expression for itself."""
    is_plain = character.isascii() and (character.isalnum() or character == " ")
    return character if is_plain else f"\\x{{{ord(character):x}}}"

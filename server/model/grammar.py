"""Grammars that bind what is generated: compiled for the base's tokenizer, off every loop, and kept for the next time.

Owns the forms in which a grammar may be written (a JSON schema, a regular expression, a choice of texts, a context-free
grammar, or an expression that joins JSON values and literal text), their compilation and its cache. Knows nothing about
requests, sequences, tensors or logits. llguidance does the parsing: https://github.com/guidance-ai/llguidance
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from server.ground.errors import Overloaded
from server.model.grammar_trial import GRAMMAR_LIMITS, GrammarRefused, GrammarsUnavailable, GrammarTrial, TokenizerText
from server.model.json_formats import with_calendar

Schema = Mapping[str, Any] | bool

# Between two parts of a JSON text: a space, or a line's end and the next one's indentation. JSON allows any amount,
# and a model that has no better idea goes on with it until its tokens are used up.
WHITESPACE = r"(\x20|\x0A[\x20\x09]{0,32})"
MAX_PENDING = 256  # grammars that wait to be compiled
MAX_KEPT = 256
_MAX_KEPT_CHARS = 8 << 20  # of their sources: what is compiled takes a few times as much


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

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self.vocab_size = vocab_size  # logits of the model that it was compiled for

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

    Refusals are kept as well. `load_tokenizer` is called before the first grammar is compiled, in that thread.
    """

    def __init__(self, load_tokenizer: Callable[[], TokenizerText], *, max_kept: int = MAX_KEPT) -> None:
        self._load_tokenizer = load_tokenizer
        self._max_kept = max_kept
        self._lock = threading.Lock()  # the two fields below
        self._kept: OrderedDict[GrammarSource, Future[Grammar]] = OrderedDict()  # the longest unused first
        self._kept_chars = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._tokenizer: LLTokenizer | None = None  # the thread's own, as is the next
        self._trial: GrammarTrial | None = None

    def compiled(self, source: GrammarSource) -> Future[Grammar]:
        """The compiled grammar, perhaps not yet. Any thread; never blocks.

        The future raises GrammarRefused or GrammarsUnavailable. Raises Overloaded when too many wait to be compiled.
        """
        with self._lock:
            future = self._kept.get(source)
            if future is None or _says_nothing(future):
                if sum(not kept.done() for kept in self._kept.values()) >= MAX_PENDING:
                    raise Overloaded(f"{MAX_PENDING} grammars wait to be compiled. Retry in a moment.")
                future = self._kept[source] = self._thread.submit(self._compile, source)
                self._kept_chars = sum(len(kept.text) for kept in self._kept)
                self._forget_oldest()
            self._kept.move_to_end(source)
            return future

    def close(self) -> None:
        """Ends the thread and its process; blocks until they are gone."""
        self._thread.shutdown(cancel_futures=True)
        if self._trial is not None:
            self._trial.close()

    def _forget_oldest(self) -> None:
        """Of those that are done: who asks for one that is not is to find it."""
        for source in [source for source, future in self._kept.items() if future.done()]:
            if len(self._kept) <= self._max_kept and self._kept_chars <= _MAX_KEPT_CHARS:
                return
            del self._kept[source]
            self._kept_chars -= len(source.text)

    def _compile(self, source: GrammarSource) -> Grammar:
        if self._tokenizer is None or self._trial is None:
            text = self._load_tokenizer()
            self._tokenizer, self._trial = text.loaded(), GrammarTrial(text)
        grammar = self._trial.compilable(source.form, source.text)
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=LLParserLimits(**GRAMMAR_LIMITS))
        if matcher.is_error():  # the process has it compiled, so this is no matter of what it says
            raise GrammarRefused("it takes more than this server gives a grammar")
        return Grammar(matcher, self._tokenizer.vocab_size)


def _says_nothing(future: Future[Grammar]) -> bool:
    """Whether it tells of the machine, and nothing of the grammar."""
    return future.done() and isinstance(future.exception(), GrammarsUnavailable)


def _dumped(schema: Schema, whitespace: str) -> str:
    """With options, which llguidance finds in the schema: what is not enforced must be refused, not passed over."""
    layout = {"whitespace_pattern": whitespace} if whitespace else {"whitespace_flexible": False}
    options = {"x-guidance": {"lenient": False, "coerce_one_of": False, **layout}}
    bound = {} if schema is True else with_calendar(schema)
    return json.dumps(bound if bound is False else {**bound, **options}, ensure_ascii=False, separators=(",", ":"))


def _escaped(character: str) -> str:
    """As it stands in a regular expression for itself."""
    is_plain = character.isascii() and (character.isalnum() or character == " ")
    return character if is_plain else f"\\x{{{ord(character):x}}}"

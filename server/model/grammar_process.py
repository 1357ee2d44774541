"""The program of a process that tries grammars: whether they compile, in what time, and whether they begin at all.

A grammar that a stranger sends may take for ever to compile, or overflow the compiler's stack, and neither can be
stopped from within Python. So each is compiled here first, under a limit of processor time that ends the process, one
of memory, and on a small stack; what comes back is known to compile anywhere else. Runs as a script, by its path and
isolated, so that it imports neither this package nor torch. Knows nothing about requests.

Each line on stdin and stdout is one JSON value. The first line is the tokenizer,

    {"tokenizer": its JSON, "vocab_size": n, "eos_ids": [...], "limits": {...}}   ->  {}  or  {"error": what it says}

and each one after it a grammar:

    {"form": ..., "text": ...}   ->  {"grammar": as llguidance compiles it, "compiled_bytes": n}
                                 or  {"error": what it says}
"""

import ctypes
import json
import resource
import signal
import sys
import threading
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, grammar_from

_NUM_WALKED = 8  # tokens
_STACK_BYTES = 1 << 20  # other threads have at least twice as much

_MALLOC_FIELDS = (
    *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
    *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
)


class _Malloc(ctypes.Structure):
    """glibc's `struct mallinfo2`, see mallinfo(3)."""

    _fields_ = [(name, ctypes.c_size_t) for name in _MALLOC_FIELDS]


def _mallinfo() -> Any:
    """The C library's function, or None."""
    function = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if function is not None:
        function.restype = _Malloc
    return function


_MALLINFO = _mallinfo()


def _allocated_bytes() -> int:
    """What malloc has given out. Resident memory would not do: what one grammar leaves free the next one takes."""
    if _MALLINFO is None:
        return 0
    info = _MALLINFO()
    return int(info.uordblks) + int(info.hblkhd)


def _lowered(form: str, text: str) -> str:
    """A grammar in llguidance's own form. Raises ValueError for one that is not in the form that it is said to be."""
    if form == "json schema":
        return LLMatcher.grammar_from_json_schema(text)
    if form == "regex":
        return LLMatcher.grammar_from_regex(text)
    return LLMatcher.grammar_from_lark(text) if form == "lark" else grammar_from("grammar", text)


def _answer(tokenizer: LLTokenizer, limits: LLParserLimits, request: dict[str, Any]) -> dict[str, Any]:
    try:
        grammar = _lowered(**request)
    except (ValueError, RecursionError) as error:
        return {"error": str(error) or "it is nested too deeply"}
    before = _allocated_bytes()
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    compiled_bytes = max(_allocated_bytes() - before, 0)
    _walk(matcher)
    if matcher.is_error():
        return {"error": matcher.get_error()}
    return {"grammar": grammar, "compiled_bytes": compiled_bytes}


def _walk(matcher: LLMatcher) -> None:
    """Goes a few tokens along: finds a grammar that nothing can begin, one that must go on for ever, and one that is
    too involved to be followed."""
    for _ in range(_NUM_WALKED):
        if matcher.is_stopped():
            return
        allowed = int.from_bytes(matcher.compute_bitmask(), "little")
        matcher.consume_token((allowed & -allowed).bit_length() - 1)  # the first of them


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def _serve(cpu_s: float) -> None:
    start = json.loads(sys.stdin.readline())
    limits = LLParserLimits(**start["limits"])
    try:
        tokenizer = LLTokenizer(start["tokenizer"], n_vocab=start["vocab_size"], eos_token=start["eos_ids"] or None)
    except ValueError as error:
        return _say({"error": str(error)})
    _say({})
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, cpu_s)  # at its end SIGPROF ends the process
        answer = _answer(tokenizer, limits, request)
        signal.setitimer(signal.ITIMER_PROF, 0)
        _say(answer)
    return None


def main(cpu_s: float, max_bytes: int) -> None:
    """Answers until stdin ends."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to the server, which closes stdin when it ends
    for limit, value in ((resource.RLIMIT_AS, max_bytes), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(limit, (value, value))
    threading.stack_size(_STACK_BYTES)
    thread = threading.Thread(target=_serve, args=(cpu_s,))
    thread.start()
    thread.join()


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))

"""Loading a checkpoint in little memory: what is asked of transformers, safetensors and malloc while it goes on.

Owns that, and how far the loading has come. Knows nothing about which model it is, or what is made of it.

transformers reads and quantizes one tensor after the other. By itself that still takes more than the whole unquantized
checkpoint, for two reasons. Files are mapped, and every page that was read counts as this process's; tensors that are
not quantized stay pieces of the files, so that a file that is overwritten changes a running server, or ends it. And
what quantization needs for a moment, some tens of megabytes for each tensor, malloc keeps in pieces.
"""

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from safetensors import safe_open
from transformers import modeling_utils
from transformers.utils import logging as transformers_logging

from server.ground.heap import give_back_free_memory, large_blocks_given_back

log = logging.getLogger(__name__)

_WEIGHTS = "Loading weights"  # what transformers calls its progress over the tensors
_TOLD_EVERY_S = 10.0


@contextmanager
def lean_loading(name: str) -> Iterator[None]:
    """What transformers loads within this takes the memory of the loaded model and of one tensor beside it.

    Where standard error is no terminal, the log says now and then how far it has come. For one load at a time.
    """
    with large_blocks_given_back(), _files_read(), _progress_told(name):
        yield
    give_back_free_memory()


@contextmanager
def _files_read() -> Iterator[None]:
    """safetensors reads each tensor into memory of its own, as transformers has it do on Windows."""
    loading: Any = modeling_utils  # the name that its functions find when they are called
    given = getattr(loading, "safe_open", None)
    if given is None:  # a version that opens files by another name
        yield
        return
    loading.safe_open = _open
    try:
        yield
    finally:
        loading.safe_open = given


def _open(file: str, **options: Any) -> Any:
    try:
        return safe_open(file, **{**options, "backend": "pread"})
    except TypeError:  # versions of safetensors that only map
        return safe_open(file, **options)


@contextmanager
def _progress_told(name: str) -> Iterator[None]:
    set_hook: Callable[[Any], Any] | None = getattr(transformers_logging, "set_tqdm_hook", None)
    if set_hook is None or sys.stderr.isatty():  # there transformers draws a bar
        yield
        return

    def hook(factory: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        bar = factory(*args, **kwargs)
        return _Told(bar, len(args[0]), name) if kwargs.get("desc") == _WEIGHTS and args else bar

    previous = set_hook(hook)
    try:
        yield
    finally:
        set_hook(previous)


class _Told:
    """A progress bar whose iteration also tells the log."""

    def __init__(self, bar: Any, num_tensors: int, name: str) -> None:
        self._bar = bar
        self._num_tensors = num_tensors
        self._name = name

    def __iter__(self) -> Iterator[Any]:
        told_at_s = time.monotonic()
        for done, item in enumerate(self._bar):
            if time.monotonic() - told_at_s >= _TOLD_EVERY_S:
                told_at_s = time.monotonic()
                log.info("loading %s: %d of %d tensors", self._name, done, self._num_tensors)
            yield item

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._bar, attribute)

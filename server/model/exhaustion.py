"""Memory that has run out while the server works: how it is told, and what can be given back at once.

Owns the words in which a device or a heap says so. Knows nothing about what wanted the memory.
"""

import gc

import torch

# torch has a class of its own for a device's memory; a CPU's and the libraries' are told by what they say.
_WORDS = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed", "cannot allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this says that there was no memory, in whatever words."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    said = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in said for words in _WORDS)


def free_device_memory() -> None:
    """Gives back what a failed step has left and what torch keeps for later. Not within `except`: the error that is
    being handled holds the frames of the step, and these its tensors."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

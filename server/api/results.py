"""How an upload or a merge ended, in the one word that metrics count it under.

Owns the words. Knows nothing about what was uploaded or merged.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from server.api.disconnect import ClientGone
from server.ground.errors import GraftError


@dataclass(slots=True)
class Result:
    """Filled in by who makes it: whether what is there now is new."""

    is_new: bool = False


@contextmanager
def counted(count: Callable[[str], None]) -> Iterator[Result]:
    """Tells `count` how the block ended: "stored" or "unchanged" by its result, else "rejected" for what its client
    can mend, "abandoned" where the client left, "failed" for all else."""
    result, word = Result(), "failed"
    try:
        yield result
        word = "stored" if result.is_new else "unchanged"
    except ClientGone:
        word = "abandoned"
        raise
    except GraftError as error:
        word = "rejected" if error.status < 500 else "failed"
        raise
    finally:
        count(word)

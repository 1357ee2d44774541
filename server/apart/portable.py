"""Errors that cross to the other process: the same kind, with all that they say.

Owns what becomes of one that cannot cross, and how a defect there is told here. Knows nothing about channels.
"""

import pickle
import traceback

from server.ground.errors import GraftError


def portable(error: BaseException) -> Exception:
    """The error as the other process is to raise it. What nobody foresaw has with it where it was raised."""
    if not isinstance(error, GraftError):
        error.add_note("In the engine's process:\n" + "".join(traceback.format_exception(error)))
    try:
        crossed = pickle.loads(pickle.dumps(error))
    except Exception:  # whatever a class of exceptions does when it is pickled
        crossed = None
    return crossed if isinstance(crossed, Exception) else RuntimeError(f"{type(error).__name__}: {error}")

"""Errors that cross to the other process: the same kind, with all that they say.

Owns what becomes of one that cannot cross, and how a defect there is told here. Knows nothing about channels.
"""

import pickle
import traceback

from server.ground.errors import GraftError
from server.model.grammar_trial import GrammarRefused, GrammarsUnavailable

_FORESEEN = (GraftError, GrammarRefused, GrammarsUnavailable)


def portable(error: BaseException) -> Exception:
    """The error as the other process is to raise it. What nobody foresaw has with it where it was raised.

    The error itself stays as it is: the same refusal may be told to many.
    """
    try:
        crossed = pickle.loads(pickle.dumps(error))
    except Exception:  # whatever a class of exceptions does when it is pickled
        crossed = None
    # What a library raises in its own language may be no Exception.
    told = crossed if isinstance(crossed, Exception) else RuntimeError(f"{type(error).__name__}: {error}")
    if not isinstance(error, _FORESEEN):
        told.add_note("In the engine's process:\n" + "".join(traceback.format_exception(error)))
    return told

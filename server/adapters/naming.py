"""How a failure of a content speaks of it: by its digest, until somebody is told who has a name for it.

A content may be several owners', and what is remembered of it is told to all of them. So what fails to read or mix a
content names none of its versions; whoever asks is told of those that they asked for. Knows nothing about owners.
"""

import re
from collections.abc import Iterable
from copy import copy
from typing import Protocol

from server.ground.errors import GraftError

_LABEL = re.compile(r"(?<![a-z0-9._-])@[0-9a-f]{12}(?![0-9a-f])")


class Named(Protocol):
    """A version; as a string it is its name and its digest's beginning."""

    @property
    def digest(self) -> str: ...


def label(digest: str) -> str:
    """A content in a failure that others may be told, too."""
    return f"@{digest[:12]}"


def told(failure: GraftError, versions: Iterable[Named]) -> GraftError:
    """A failure for one who knows the contents in it as these versions: always a new one, since it may be raised."""
    names = {label(version.digest): str(version) for version in versions}
    own = copy(failure)
    own.message = _LABEL.sub(lambda found: names.get(found[0], found[0]), failure.message)
    own.args = (own.message,)
    return own

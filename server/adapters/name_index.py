"""Names in order, by owner: so that an owner's are found without a look at everybody's.

Owns the order. Not safe for threads by itself, as the catalog that it belongs to. Knows nothing about adapters.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence


class NameIndex:
    """Names, each with its owner; None is the operator."""

    def __init__(self) -> None:
        self._owner_of: dict[str, str | None] = {}
        self._all: list[str] = []
        self._of_owner: dict[str | None, list[str]] = {}

    def put(self, name: str, owner: str | None) -> None:
        """Adds a name, or gives one that is there to another owner."""
        if name in self._owner_of:
            if self._owner_of[name] == owner:
                return
            self.remove(name)
        self._owner_of[name] = owner
        insort(self._all, name)
        insort(self._of_owner.setdefault(owner, []), name)

    def remove(self, name: str) -> None:
        """Takes a name out that is there."""
        owner = self._owner_of.pop(name)
        for names in (self._all, self._of_owner[owner]):
            del names[bisect_left(names, name)]
        if not self._of_owner[owner]:
            del self._of_owner[owner]

    def of(self, owner: str | None) -> Sequence[str]:
        """The names of one owner, sorted; true until the next change."""
        return self._of_owner.get(owner, ())

    def open_to(self, owner: str | None) -> tuple[Sequence[str], ...]:
        """All names that an owner may see, as sorted lists without repetition: everybody's for the operator, its own
        and the operator's for others. True until the next change."""
        return (self._all,) if owner is None else (self.of(owner), self.of(None))

    def owners(self) -> dict[str, str | None]:
        """Whose each name is."""
        return dict(self._owner_of)

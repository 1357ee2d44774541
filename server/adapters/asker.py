"""Who asks: the owner in whose name a request reads and changes adapters, and what of them it may see.

Owns the rule of sight. Every look-up by name obeys it (`catalog`), so that no verb and no route can forget it; and so
does every change of a store, at the moment of the change. Knows nothing about keys or HTTP; where nobody has said who
asks, it is the operator.
"""

from contextvars import ContextVar
from dataclasses import dataclass

from server.adapters.name_patterns import NamePatterns, name_patterns
from server.ground.errors import AdapterNotFound, Conflict, Forbidden, StorageFull


@dataclass(frozen=True, slots=True)
class Asker:
    """An owner's request. Adapters without an owner are the operator's, and are seen by all whose `names` they match.

    `names` are patterns with * and ?. The limits are of all that the owner has in the store, every version counted.
    """

    who: str = "operator"  # for the audit log
    owner: str | None = None  # None: the operator, who sees what everybody has
    names: tuple[str, ...] = ("*",)
    max_bytes: int | None = None
    max_adapters: int | None = None
    request_id: str | None = None

    def may_name(self, name: str) -> bool:
        """Whether its patterns have this name."""
        return self.patterns.match(name)

    @property
    def patterns(self) -> NamePatterns:
        return name_patterns(self.names)

    def sees(self, name: str, owner: str | None) -> bool:
        """Whether an adapter exists as far as it is concerned."""
        return self.may_name(name) and (self.owner is None or owner in (None, self.owner))

    def owns(self, owner: str | None) -> bool:
        """Whether it may change what belongs to `owner`."""
        return self.owner is None or owner == self.owner

    def check_owns(self, name: str, owner: str | None) -> None:
        """Raises Forbidden for an adapter that it sees, and that is the operator's."""
        if not self.owns(owner):
            raise Forbidden(
                f"The adapter {name!r} is the operator's: this key may use it, and not change it.",
                param="adapter",
                code="not_owner",
            )

    def check_may_change(self, name: str, owner: str | None) -> None:
        """Raises AdapterNotFound for an adapter that does not exist as far as it is concerned, else as `check_owns`."""
        if not self.sees(name, owner):
            raise AdapterNotFound(f"There is no adapter {name[:80]!r}.", param="adapter")
        self.check_owns(name, owner)

    def owner_for(self, name: str, owner: str | None, *, exists: bool) -> str | None:
        """Whose a new version of a name is: whoever has the name keeps it. Raises Conflict where it may not give it."""
        self.check_may_claim(name, owner, exists=exists)
        return owner if exists else self.owner

    def check_may_claim(self, name: str, owner: str | None, *, exists: bool) -> None:
        """Raises Conflict for a name that it may not give, in the same words whatever the reason is."""
        if not self.may_name(name) or (exists and not self.owns(owner)):
            raise Conflict(
                f"The name {name!r} is not free for this key, whose names match {' or '.join(self.names) or 'none'}: "
                f"choose another.",
                param="name",
                code="name_unavailable",
            )

    def check_room(
        self, *, taken_bytes: int, deleted_bytes: int, added_bytes: int, num_adapters: int, is_new_name: bool
    ) -> None:
        """Raises StorageFull where the owner, who has `num_adapters`, would come to have more than it may.

        `deleted_bytes` are those of `taken_bytes` that go by themselves when requests end.
        """
        after_bytes = taken_bytes + added_bytes
        if self.max_bytes is not None and added_bytes > 0 and after_bytes > self.max_bytes:
            leaving = f" ({deleted_bytes} of them deleted ones, until requests on them end)" if deleted_bytes else ""
            raise StorageFull(
                f"The adapters of this key's owner may take {self.max_bytes} bytes, all versions counted. They take "
                f"{taken_bytes}{leaving}, and with this one they would take {after_bytes}: delete some of them, or ask "
                f"the operator for more.",
                code="quota_exceeded",
            )
        if self.max_adapters is not None and is_new_name and num_adapters >= self.max_adapters:
            raise StorageFull(
                f"This key's owner may have {self.max_adapters} adapters, and has them: delete one, or ask the "
                f"operator for more.",
                code="quota_exceeded",
            )


OPERATOR = Asker()
_asker: ContextVar[Asker] = ContextVar("asker", default=OPERATOR)


def current_asker() -> Asker:
    """Who asks here: in a request's tasks and threads whom `ask_as` named, elsewhere the operator."""
    return _asker.get()


def ask_as(asker: Asker) -> None:
    """For the rest of the calling task, and what it begins."""
    _asker.set(asker)

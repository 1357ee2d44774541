"""What the two processes tell each other: plain values, a class for each kind.

Owns their fields; what a step gave is in `steps`. Two channels carry them: `calls`, which threads of both sides use,
and `deltas`, which is the front's event loop's. Knows nothing about who sends or how.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from server.adapters.asker import Asker
from server.api.services import BaseInfo
from server.api.snapshot import Snapshot
from server.assemble import Figures
from server.engine.entry import GroupOrder, Held
from server.ground.config import Settings

# On `calls`, to the child


@dataclass(frozen=True, slots=True)
class Start:
    """The first message. `prepare` is called with the settings before anything is loaded: a function of a module."""

    settings: Settings
    prepare: Callable[[Settings], None]


@dataclass(frozen=True, slots=True)
class Call:
    """A method of one of the child's parts, in the name of `asker`; answered with an `Answer` of this number."""

    number: int
    part: str
    method: str
    arguments: Sequence[Any]
    named: Mapping[str, Any]
    asker: Asker


@dataclass(frozen=True, slots=True)
class Close:
    """The last message: end in good order."""


# On `calls`, from the child


@dataclass(frozen=True, slots=True)
class Ready:
    """It has loaded, and answers. All that never changes while it runs."""

    base: BaseInfo
    eos_ids: frozenset[int]
    figures: Figures
    snapshot: Snapshot
    max_versions: int | None
    is_shared: bool  # whether other servers change the store


@dataclass(frozen=True, slots=True)
class Refused:
    """It cannot start, and ends: the sentence of a StartupRefused."""

    sentence: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What a call gave or, with `has_failed`, raised. `is_told`: whether the audit log has a line of its refusal."""

    number: int
    value: Any
    has_failed: bool = False
    is_told: bool = False


@dataclass(frozen=True, slots=True)
class Beat:
    """It lives. `is_engine_alive` False: its engine does not, and never will again."""

    is_engine_alive: bool


# On `deltas`, to the child


@dataclass(frozen=True, slots=True)
class Enter:
    """A request's sequences; answered with `LetIn`."""

    number: int
    order: GroupOrder
    asker: Asker


@dataclass(frozen=True, slots=True)
class Abort:
    """Sequences to be ended within one step, if they have not ended."""

    sequence_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Withdraw:
    """An `Enter` whose reader is gone: whatever has become of it, its sequences are to end."""

    number: int
    sequence_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Drain:
    """As `Works.drain`; answered with `Drained`."""

    number: int
    timeout_s: float


# On `deltas`, from the child


@dataclass(frozen=True, slots=True)
class LetIn:
    """What became of an `Enter`: what is held, or why nothing is."""

    number: int
    held: Held | Exception


@dataclass(frozen=True, slots=True)
class Drained:
    number: int

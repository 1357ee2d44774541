"""The way into the engine for the sequences of one request: leased and submitted together, all of them or none.

Owns that nothing is held and nothing runs of a request that is refused. Knows nothing about HTTP, or about who reads
the deltas.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TypeVar

from server.adapters.catalog import AdapterVersion
from server.adapters.registry import Lease, Portion, Registry
from server.engine.engine import Engine
from server.engine.flight import DeltaStream, GenerationRequest
from server.engine.sequence import SamplingParams
from server.ground.errors import GraftError
from server.model.grammar import Grammar, GrammarSource

Part = tuple[str, float]  # ("name" or "name@version-prefix", weight)
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class SequenceOrder:
    """One sequence of a request. Prompts and params that several share are one object each."""

    sequence_id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams


@dataclass(frozen=True, slots=True)
class GroupOrder:
    """The sequences of a request, all on the same adapters and along the same grammar: a plain value.

    Where the order crosses to another process its grammar, which was compiled there, is named by its source.
    """

    sequences: tuple[SequenceOrder, ...]
    parts: tuple[Part, ...] = ()  # none: the bare base
    cache_salt: str | None = None
    grammar: Grammar | GrammarSource | None = None


@dataclass(frozen=True, slots=True)
class Held:
    """What a request's sequences hold; of the bare base nothing. `refusal`: why none of them runs, though leased."""

    version: AdapterVersion | None = None
    portions: tuple[Portion, ...] = ()
    refusal: GraftError | None = None

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of those that each sequence uses."""
        return tuple(portion.version.name for portion in self.portions)


@dataclass(frozen=True, slots=True)
class Entered:
    """What a request holds, and its streams in the order of its sequences; none where it was refused."""

    held: Held
    streams: tuple[DeltaStream, ...] = ()


class Entry:
    """Leases from a registry, submits to an engine."""

    def __init__(self, engine: Engine, registry: Registry) -> None:
        self._engine = engine
        self._registry = registry

    async def enter(self, order: GroupOrder) -> Entered:
        """Call it on the event loop that reads the streams. Raises what a lease raises."""
        held, streams = self.take(order, self._engine.submit)
        return Entered(held, tuple(streams))

    def take(self, order: GroupOrder, submit: Callable[[GenerationRequest], _T]) -> tuple[Held, list[_T]]:
        """Leases, and has each sequence submitted; what `submit` gave for each of them. Its refusal is in `Held`.

        The grammar has to be there by now. Raises what a lease raises. Never blocks.
        """
        grammar = order.grammar
        assert not isinstance(grammar, GrammarSource)
        leases = self._lease_all(order.parts, len(order.sequences))
        held = _held(leases[0])
        requests = [
            GenerationRequest(one.sequence_id, one.prompt_ids, one.params, lease, order.cache_salt, grammar)
            for one, lease in zip(order.sequences, leases, strict=True)
        ]
        try:
            return held, self._submit_all(requests, submit)
        except GraftError as error:
            return replace(held, refusal=error), []

    def _lease_all(self, parts: Sequence[Part], count: int) -> list[Lease | None]:
        """`count` leases on the same versions; None for each if that is the bare base. Released here if one fails."""
        with ExitStack() as undo:
            first = self._registry.lease_mix(parts)
            if first is None:
                return [None] * count
            undo.callback(first.release)
            leases: list[Lease | None] = [first]
            exact = [(f"{p.version.name}@{p.version.digest}", p.weight) for p in first.portions]
            while len(leases) < count:
                lease = self._registry.lease_mix(exact)
                assert lease is not None
                undo.callback(lease.release)
                leases.append(lease)
            undo.pop_all()
            return leases

    def _submit_all(self, requests: Sequence[GenerationRequest], submit: Callable[[GenerationRequest], _T]) -> list[_T]:
        """Takes the leases over: they are released here if a sequence is not accepted."""
        accepted: list[_T] = []
        try:
            for request in requests:
                accepted.append(submit(request))
        except GraftError:
            for request in requests[: len(accepted)]:
                self._engine.abort(request.sequence_id)
            for request in requests[len(accepted) :]:
                if request.lease is not None:
                    request.lease.release()
            raise
        return accepted


def _held(lease: Lease | None) -> Held:
    return Held() if lease is None else Held(lease.version, lease.portions)

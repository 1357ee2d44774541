"""What the engine, the registry and the fetches tell a scrape, asked for at one moment and told as one value.

Owns what is asked. Knows nothing about metrics' names, nor about who asks: the value may cross to another process.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from prometheus_client.core import Metric

from server.adapters.adapter_info import RegistryStats
from server.adapters.registry import Registry
from server.adapters.remote.fetches import Fetches
from server.engine.engine import Engine, EngineStats
from server.ground.adapter_series import AdapterState


@dataclass(frozen=True, slots=True)
class Snapshot:
    engine: EngineStats
    registry: RegistryStats
    num_fetching: int = 0
    num_to_fetch: int = 0
    adapters: Sequence[AdapterState] = ()  # those on host or device, or with sequences in flight
    gone: Collection[str] = ()  # of the names that were asked about: those that no adapter has
    families: Sequence[Metric] = ()  # what the process that was asked has counted itself, if it is another


def snapshot_of(engine: Engine, registry: Registry, fetches: Fetches, names: Collection[str]) -> Snapshot:
    """Of now. It takes milliseconds where thousands of adapters are loaded."""
    num_fetching, num_to_fetch = fetches.counts()
    return Snapshot(
        engine=engine.stats(),
        registry=registry.stats(),
        num_fetching=num_fetching,
        num_to_fetch=num_to_fetch,
        adapters=tuple(_adapters(engine, registry)),
        gone=frozenset(names) - registry.known(names),
    )


def _adapters(engine: Engine, registry: Registry) -> Iterator[AdapterState]:
    in_flight = engine.in_flight()
    for adapter in registry.on_tiers():
        uses = in_flight.pop(adapter.name, None)
        if uses is None:
            yield adapter
        else:
            yield adapter._replace(num_running=uses.num_running, num_waiting=uses.num_waiting)
    for name, uses in in_flight.items():  # that are still on their way, or in a mix alone
        yield AdapterState(name, num_running=uses.num_running, num_waiting=uses.num_waiting)

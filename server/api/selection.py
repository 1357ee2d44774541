"""Which adapter, or mix of several, a request means: its fields `adapter` and `model`, checked against each other, and
what is held of them.

Knows nothing about prompts and generation.
"""

from collections.abc import Iterable, Sequence

from starlette.concurrency import run_in_threadpool

from server.api import notes
from server.api.errors import echo
from server.api.schemas import AdapterPart
from server.api.services import Services
from server.engine.entry import GroupOrder, Held, Part
from server.engine.flight import DeltaStream
from server.ground.errors import AdapterNotFound, BadRequest, NotFound

_MAX_LISTED = 20


def chosen_parts(services: Services, model: str | None, adapters: Sequence[AdapterPart] | None) -> list[Part]:
    """The adapters that the two fields mean together; none for the bare base.

    Raises BadRequest if they name different adapters. Whether an adapter exists shows when it is leased.
    """
    parts = [(adapter.name, adapter.weight) for adapter in adapters or ()]
    if model is None or model in services.base.served_names:
        return parts
    if not parts:
        return [(model, 1.0)]
    spec, weight = parts[0]
    if len(parts) > 1 or not _is_same(spec, model):
        named = " + ".join(echo(name) for name, _ in parts)
        raise BadRequest(
            f"'adapter' says '{echo(named)}' and 'model' says '{echo(model)}': name one adapter, "
            f"or '{services.base.served_names[0]}' as the model.",
            param="adapter",
        )
    return [(max(spec, model, key=len), weight)]


def _is_same(spec: str, other: str) -> bool:
    """Whether two specs may mean one version."""
    name, _, version = spec.partition("@")
    other_name, _, other_version = other.partition("@")
    return name == other_name and (version.startswith(other_version) or other_version.startswith(version))


async def look_elsewhere(services: Services, specs: Iterable[str]) -> None:
    """Looks for adapters that are unknown here in a store that servers share; of those that are known it costs nothing.

    Raises StoreUnreachable.
    """
    for spec in specs:
        if services.registry.may_be_elsewhere(spec):
            await run_in_threadpool(services.registry.look_for, spec)


async def entered(services: Services, order: GroupOrder, *, is_model: bool) -> tuple[Held, Sequence[DeltaStream]]:
    """What the sequences of a request are leased on, and their streams.

    Raises NotFound (`is_model`: the client named the adapter in the field `model`), what a recent load of it raised,
    Overloaded and ContextTooLong, with nothing held and nothing running.
    """
    try:
        found = await services.entry.enter(order)
    except AdapterNotFound as error:
        services.metrics.adapters.count_unknown()
        if is_model and order.parts:
            raise await run_in_threadpool(unknown_model, services, order.parts[0][0]) from error
        raise
    notes.current().adapter = None if found.held.version is None else str(found.held.version)
    if found.held.refusal is not None:
        raise found.held.refusal
    return found.held, found.streams


def unknown_model(services: Services, name: str) -> NotFound:
    """What to raise for a `model` that is neither a name of the base nor an adapter: it lists what exists, of many
    those that are nearest to it. Blocks: for a worker thread."""
    known = ", ".join([*services.base.served_names, *services.registry.names_near(name, _MAX_LISTED)])
    return NotFound(
        f"There is no model or adapter '{echo(name)}'; GET /v1/models lists those that there are, such as {known}.",
        param="model",
        code="model_not_found",
    )

"""Which adapter, or mix of several, a request means: its fields `adapter` and `model`, checked against each other, as
leases.

Knows nothing about prompts and generation.
"""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack

from starlette.concurrency import run_in_threadpool

from server.adapters.registry import Lease
from server.api.errors import echo
from server.api.schemas import AdapterPart
from server.api.services import Services
from server.ground.errors import AdapterNotFound, BadRequest, NotFound

_MAX_LISTED = 20


Part = tuple[str, float]  # ("name" or "name@version-prefix", weight)


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


def lease_all(services: Services, parts: Sequence[Part], count: int, *, is_model: bool) -> list[Lease | None]:
    """`count` leases on the same versions; None for each if that is the bare base. Released here if one fails.

    Raises NotFound (`is_model`: the client named it in the field `model`), and what a recent load of it raised.
    """
    with ExitStack() as undo:
        first = _first_lease(services, parts, is_model)
        if first is None:
            return [None] * count
        undo.callback(first.release)
        leases: list[Lease | None] = [first]
        exact = [(f"{p.version.name}@{p.version.digest}", p.weight) for p in first.portions]
        while len(leases) < count:
            lease = services.registry.lease_mix(exact)
            assert lease is not None
            undo.callback(lease.release)
            leases.append(lease)
        undo.pop_all()
        return leases


def _first_lease(services: Services, parts: Sequence[Part], is_model: bool) -> Lease | None:
    try:
        return services.registry.lease_mix(parts)
    except AdapterNotFound as error:
        services.metrics.adapters.count_unknown()
        if is_model and parts:
            raise unknown_model(services, parts[0][0]) from error
        raise


def unknown_model(services: Services, name: str) -> NotFound:
    """What to raise for a `model` that is neither a name of the base nor an adapter: it lists what exists, of many
    those that are nearest to it."""
    known = ", ".join([*services.base.served_names, *services.registry.names_near(name, _MAX_LISTED)])
    return NotFound(
        f"There is no model or adapter '{echo(name)}'; GET /v1/models lists those that there are, such as {known}.",
        param="model",
        code="model_not_found",
    )

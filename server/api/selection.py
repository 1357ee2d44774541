"""Which adapter a request means: its fields `adapter` and `model`, checked against each other, as leases.

Knows nothing about prompts and generation.
"""

from contextlib import ExitStack

from server.adapters.registry import Lease
from server.api.errors import echo
from server.api.services import Services
from server.ground.errors import AdapterNotFound, BadRequest, NotFound

_MAX_LISTED = 20


def adapter_spec(services: Services, model: str | None, adapter: str | None) -> str | None:
    """The adapter that the two fields mean together ("name" or "name@version-prefix"), or None for the bare base.

    Raises BadRequest if they name different adapters. Whether the adapter exists shows when it is leased.
    """
    if model is None or model in services.base.served_names:
        return adapter
    if adapter is None:
        return model
    name, _, version = adapter.partition("@")
    model_name, _, model_version = model.partition("@")
    if name != model_name or not (version.startswith(model_version) or model_version.startswith(version)):
        raise BadRequest(
            f"'adapter' says '{echo(adapter)}' and 'model' says '{echo(model)}': name one adapter, "
            f"or '{services.base.served_names[0]}' as the model.",
            param="adapter",
        )
    return max(adapter, model, key=len)


def lease_all(services: Services, spec: str | None, count: int, *, is_model: bool) -> list[Lease | None]:
    """`count` leases on one and the same version; None for each if `spec` is None. Released here if one fails.

    Raises NotFound (`is_model`: the client named it in the field `model`), and what a recent load of it raised.
    """
    if spec is None:
        return [None] * count
    with ExitStack() as undo:
        first = _first_lease(services, spec, is_model)
        undo.callback(first.release)
        leases: list[Lease | None] = [first]
        exact = f"{first.version.name}@{first.version.digest}"
        while len(leases) < count:
            lease = services.registry.lease(exact)
            undo.callback(lease.release)
            leases.append(lease)
        undo.pop_all()
        return leases


def _first_lease(services: Services, spec: str, is_model: bool) -> Lease:
    try:
        return services.registry.lease(spec)
    except AdapterNotFound as error:
        if is_model:
            raise unknown_model(services, spec) from error
        raise


def unknown_model(services: Services, name: str) -> NotFound:
    """What to raise for a `model` that is neither a name of the base nor an adapter: it lists what exists."""
    known = [*services.base.served_names, *(info.name for info in services.registry.list())]
    more = len(known) - _MAX_LISTED
    listed = ", ".join(known[:_MAX_LISTED]) + (f" and {more} more" if more > 0 else "")
    return NotFound(
        f"There is no model or adapter '{echo(name)}'; there are {listed}.", param="model", code="model_not_found"
    )

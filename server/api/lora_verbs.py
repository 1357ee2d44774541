"""vLLM's two verbs, for what was written for vLLM: POST /v1/load_lora_adapter and /v1/unload_lora_adapter.

Owns their answers, which are vLLM's in status, shape and wording, and which folders of this machine a request may have
read. Knows nothing about how an adapter is loaded.
"""

from collections.abc import Sequence
from pathlib import Path

from fastapi import APIRouter
from starlette.responses import PlainTextResponse, Response

from server.adapters.audit import about
from server.adapters.format.content import CONFIG_FILE
from server.adapters.store.folder_store import content_files
from server.api.errors import ErrorResponse, echo
from server.api.json_route import JsonRoute
from server.api.results import counted
from server.api.schemas import LoadLoraBody, UnloadLoraBody
from server.api.services import Services
from server.ground.errors import AdapterNotFound, BadRequest, Conflict, Forbidden, GraftError, NotFound


def router(services: Services) -> APIRouter:
    routes = APIRouter(tags=["adapters"], route_class=JsonRoute)

    @routes.post("/v1/load_lora_adapter")
    async def load(body: LoadLoraBody) -> Response:
        """Copies an adapter folder of this machine into the store, validated as an upload is."""
        try:
            with counted(services.metrics.count_upload) as result:
                name, result.is_new = await services.lanes.registering.run(_load, services, body)
        except GraftError as error:
            return _refusal(error)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    @routes.post("/v1/unload_lora_adapter")
    async def unload(body: UnloadLoraBody) -> Response:
        """Forgets the name, as DELETE /v1/adapters/{name} does: requests that run finish, and then all is freed."""
        try:
            name = await services.lanes.changing.run(_unload, services, body)
        except GraftError as error:
            return _refusal(error)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    return routes


def _load(services: Services, body: LoadLoraBody) -> tuple[str, bool]:
    """The name, and whether its content is new."""
    about(body.lora_name)
    if not body.lora_name or not body.lora_path:
        raise BadRequest("Both 'lora_name' and 'lora_path' must be provided.")
    base = services.base
    if body.base_model_name not in (None, base.name, *base.served_names):
        raise BadRequest(f"'base_model_name' is '{echo(body.base_model_name)}', and this server has {base.name}.")
    if body.lora_name in base.served_names:
        raise Conflict(f"'{body.lora_name}' is a name of the base; choose another for the adapter.")
    if not body.load_inplace and _is_known(services, body.lora_name):
        raise _already_loaded(body.lora_name)
    folder = readable_folder(body.lora_path, services.adapter_paths)
    with services.store.incoming(max_bytes=services.max_upload_bytes) as incoming:
        try:
            incoming.copy(folder)
        except OSError as error:
            raise BadRequest(f"'{echo(body.lora_path)}' cannot be read: {error.strerror or error}.") from error
        registered = services.registry.register(incoming, body.lora_name, replace=body.load_inplace)
    if not registered.is_new and not body.load_inplace:
        raise _already_loaded(body.lora_name)
    return body.lora_name, registered.is_new


def _unload(services: Services, body: UnloadLoraBody) -> str:
    about(body.lora_name)
    if not body.lora_name:
        raise BadRequest("'lora_name' needs to be provided to unload a LoRA adapter.")
    try:
        services.registry.delete(body.lora_name)
    except AdapterNotFound as error:
        raise NotFound(f"The lora adapter '{echo(body.lora_name)}' cannot be found.") from error
    return body.lora_name


def readable_folder(path: str, allowed: Sequence[Path]) -> Path:
    """The adapter folder at `path`, links resolved, if it and its files lie under one of the `allowed` folders.

    Raises Forbidden for every path that does not, whatever is there, and NotFound where no adapter is.
    """
    roots = [root.resolve() for root in allowed]
    if not roots:
        raise Forbidden(
            "This server reads no adapters from its disk by request: upload the files with POST /v1/adapters, or start "
            "it with --adapter-paths DIR, the folder that they lie in."
        )
    folder = _resolved(Path(path)) if Path(path).is_absolute() else None
    if folder is None or not _lies_in(folder, roots):
        raise Forbidden(
            f"'{echo(path)}' is not the absolute path of a folder that this server may read; names of a hub are not "
            f"looked up. Folders are allowed with --adapter-paths DIR when the server is started."
        )
    if not (folder / CONFIG_FILE).is_file():
        raise NotFound(f"No adapter found at '{echo(path)}': there is no {CONFIG_FILE} in it.")
    for file in content_files(folder):
        target = _resolved(file)
        if target is None or not _lies_in(target, roots):
            raise Forbidden(f"'{echo(path)}': its {file.name} is a link out of the folders in --adapter-paths.")
    return folder


def _resolved(path: Path) -> Path | None:
    """Without links and dots; None for what cannot be a path (a zero byte, a loop of links)."""
    try:
        return path.resolve()
    except (OSError, ValueError, RuntimeError):
        return None


def _lies_in(path: Path, roots: Sequence[Path]) -> bool:
    return any(path.is_relative_to(root) for root in roots)


def _is_known(services: Services, name: str) -> bool:
    try:
        return bool(services.registry.versions(name))
    except AdapterNotFound:
        return False


def _already_loaded(name: str) -> Conflict:
    return Conflict(
        f"The lora adapter '{echo(name)}' has already been loaded. If you want to load the adapter in place, set "
        f"'load_inplace' to True."
    )


def _refusal(error: GraftError) -> ErrorResponse:
    """As vLLM words it: the status is in `code` too, and what the caller can mend is a 400 or a 404."""
    if error.status >= 500:
        raise error
    kind, status = "InvalidUserInput", 400
    if isinstance(error, NotFound):
        kind, status = "NotFoundError", 404
    elif isinstance(error, Forbidden):
        kind, status = "ForbiddenError", 403
    message = error.message.encode(errors="replace").decode()
    shown = {"error": {"message": message, "type": kind, "param": error.param, "code": status}}
    return ErrorResponse(error, status, None, shown)

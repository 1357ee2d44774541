"""POST /v1/adapters/merge: several adapters made into a new one, by a recipe.

Owns the body and the answer. Knows nothing about how merging is done, or when.
"""

import asyncio
import time
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse

from server.adapters.audit import about
from server.adapters.merging.live import Made, MergeOrder
from server.adapters.merging.merge import MAX_RANK, Merged
from server.adapters.merging.recipe import MAX_INPUTS, recipe_for
from server.adapters.store.folder_store import check_name
from server.api.adapters import check_is_no_base, described
from server.api.disconnect import until_gone
from server.api.faces import MergeFace
from server.api.json_body import Body, Text
from server.api.json_route import JsonRoute
from server.api.results import counted
from server.api.selection import look_elsewhere
from server.api.services import Services


class MergeInput(Body):
    name: Text  # or "name@version-prefix"
    weight: float = 1.0


class MergeBody(Body):
    """What `graft merge` takes; a parameter that the strategy has no use for is refused."""

    name: Text  # of the result
    adapters: Annotated[list[MergeInput], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)]
    strategy: Text = "linear"
    rank: int | None = None
    density: float | None = None
    seed: int | None = None
    majority_sign: Text | None = None
    replace: bool = False


def router(services: Services) -> APIRouter:
    routes = APIRouter(tags=["adapters"], route_class=JsonRoute)

    @routes.post("/v1/adapters/merge", status_code=201)
    async def merge(request: Request, body: MergeBody) -> JSONResponse:
        """Answers when the result is stored: 201, or 200 where it is there already. Who leaves gives the merge up."""
        begun_s = time.perf_counter()
        with counted(lambda word: services.metrics.count_merge(word, time.perf_counter() - begun_s)) as result:
            about(body.name)
            check_name(body.name)
            check_is_no_base(services, body.name)
            await look_elsewhere(services, (item.name for item in body.adapters))
            begun = await run_in_threadpool(services.merges.begin, _order(body))
            try:
                made = await until_gone(request.receive, _end_of(begun))
            finally:
                begun.give_up()
            result.is_new = made.registered.is_new
        answer = await run_in_threadpool(described, services, made.registered.info)
        return JSONResponse({**answer, "merge": _shown(made.merged)}, 201 if made.registered.is_new else 200)

    return routes


def _order(body: MergeBody) -> MergeOrder:
    recipe = recipe_for(
        body.strategy,
        max_rank=MAX_RANK,
        rank=body.rank,
        density=body.density,
        seed=body.seed,
        majority_sign=body.majority_sign,
    )
    return MergeOrder(body.name, tuple((item.name, item.weight) for item in body.adapters), recipe, body.replace)


async def _end_of(merge: MergeFace) -> Made:
    return await asyncio.wrap_future(merge.future)


def _shown(merged: Merged) -> dict[str, Any]:
    """What was made, and what it lost."""
    return {
        "sites": merged.num_sites,
        "rank": merged.rank,
        "relative_error": merged.relative_error,
        "worst_site": merged.worst_site,
        "worst_error": merged.worst_error,
        "warnings": list(merged.warnings),
    }

"""The API key: what is open, and that everything else is closed, routes of tomorrow included."""

from http.client import HTTPConnection

import httpx
import openai
import pytest
from fastapi.routing import APIRoute

from server.api.keys.scopes import OPEN_PATHS
from tests.api.conftest import KEY, Live

WRONG = [
    {},
    {"authorization": ""},
    {"authorization": "Bearer"},
    {"authorization": "Bearer x"},
    {"authorization": f"Bearer {KEY}x"},
    {"authorization": f"Bearer {KEY[:-1]}"},
    {"authorization": KEY},
    {"authorization": f"Basic {KEY}"},
    {"x-api-key": KEY},
]


def ask(strict: Live, method: str, path: str, headers: dict[str, str]) -> httpx.Response:
    return httpx.request(method, strict.url + path, headers=headers, timeout=120)  # httpx gives up after 5 s


def test_probes_need_no_key(strict: Live) -> None:
    for path in OPEN_PATHS:
        assert ask(strict, "GET", path, {}).status_code == 200
    assert {"/health", "/ping", "/ready", "/v2/health/live", "/v2/health/ready", "/version"} == OPEN_PATHS


@pytest.mark.parametrize("headers", WRONG, ids=str)
def test_without_the_key_nothing_is_told(strict: Live, headers: dict[str, str]) -> None:
    refused = ask(strict, "GET", "/v1/models", headers)
    assert refused.status_code == 401
    assert refused.headers["www-authenticate"] == "Bearer"
    assert refused.json()["error"]["code"] == "invalid_api_key"
    assert "tiny" not in refused.text


def test_every_route_asks_for_the_key(strict: Live) -> None:
    for path in (*_paths(strict), "/nowhere", "/openapi.json"):
        for method in ("GET", "POST", "DELETE", "OPTIONS"):
            assert ask(strict, method, path, {}).status_code == 401


LOOKALIKES = [
    "/health/",
    "//health",
    "/v1/../health",
    "/health/../v1/models",
    "/HEALTH",
    "/v1/models?x=/health",
    "/health%2F",
]


@pytest.mark.parametrize("path", LOOKALIKES)
def test_paths_that_resemble_an_open_one_are_closed(strict: Live, path: str) -> None:
    connection = HTTPConnection(*strict.address, timeout=120)  # sends the path as it is
    connection.request("GET", path)
    assert connection.getresponse().status == 401
    connection.close()


def test_a_forged_host_opens_nothing(strict: Live) -> None:
    assert ask(strict, "GET", "/v1/models", {"host": "x/health?"}).status_code in (400, 401)


def test_the_key_opens(strict: Live) -> None:
    assert ask(strict, "GET", "/v1/models", {"authorization": f"Bearer {KEY}"}).status_code == 200
    assert ask(strict, "GET", "/v1/models", {"authorization": f"bearer {KEY}"}).status_code == 200
    assert strict.openai.models.list().data[0].id == "tiny"


def test_openais_client_says_what_is_wrong(strict: Live) -> None:
    with (
        openai.OpenAI(base_url=f"{strict.url}/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError) as refused,
    ):
        client.models.list()
    assert refused.value.code == "invalid_api_key"
    assert refused.value.request_id


def _paths(strict: Live) -> list[str]:
    paths = strict.server.app.openapi()["paths"]
    routes = [route for route in strict.server.app.state.routes if isinstance(route, APIRoute)]
    assert len(routes) > 20
    assert {route.path_format for route in routes} <= set(paths) | OPEN_PATHS
    return [path for path in paths if path not in OPEN_PATHS]

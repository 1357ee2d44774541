"""A real Prometheus, with the configuration of deploy/, scrapes a server that works, and one that stops working."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from server.ground.config import Settings
from tests.api.adapter_files import lora_files
from tests.api.conftest import KEY, Live, serving
from tests.deploy import expressions
from tests.deploy.prometheus import INTERVAL_S, program, scraping

NAMES = ("first", "second", "third")
_MAX_ROUNDS = 20
_BETWEEN_S = 2.5 * INTERVAL_S  # so that each round of work falls between two scrapes
_NUM_TOKENS = 200


def work(live: Live) -> None:
    """Something of all that the dashboard draws."""
    mixed = [{"name": "first", "weight": 0.5}, {"name": "second", "weight": 0.5}]
    for adapter in (None, *NAMES, mixed):
        chosen = {} if adapter is None else {"adapter": adapter}
        live.post("/v1/completions", prompt="Hi there", max_tokens=4, ignore_eos=True, **chosen).raise_for_status()
    live.post("/v1/completions", prompt="Hi", adapter="no-such")
    live.upload("third", lora_files(3), replace="true").raise_for_status()
    live.http.post("/v1/adapters/second/unload").raise_for_status()


def slowed(run: Callable[..., Any]) -> Callable[..., Any]:
    """Steps so slow that `_NUM_TOKENS` of them outlast a scrape, however fast the machine is."""

    def slow(*step: Any) -> Any:
        time.sleep(1.2 * _BETWEEN_S / _NUM_TOKENS)
        return run(*step)

    return slow


@pytest.mark.slow
@pytest.mark.skipif(program("prometheus") is None, reason="prometheus is not installed (Debian: prometheus)")
def test_prometheus_answers_the_dashboard_and_wakes_somebody(
    settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(settings(api_key=KEY, metrics_compat="vllm")) as live:
        for number, name in enumerate(NAMES):
            live.upload(name, lora_files(number)).raise_for_status()
        with scraping("{}:{}".format(*live.address), KEY, tmp_path) as prometheus:
            prometheus.await_true(lambda: prometheus.values("up") == [1.0])
            unanswered = set(expressions.of_dashboard())
            monkeypatch.setattr(live.server.runner, "run", slowed(live.server.runner.run))
            for _ in range(_MAX_ROUNDS):
                work(live)
                with live.send(
                    "/v1/completions", prompt="Hi", max_tokens=_NUM_TOKENS, n=8, ignore_eos=True, adapter="first"
                ):
                    time.sleep(_BETWEEN_S)
                    unanswered -= {expr for expr in unanswered if prometheus.values(expr)}
                if not unanswered:
                    break
            assert unanswered == set()
            assert all(prometheus.ask("query", query=expr) is not None for expr in expressions.of_rules())
            for name in ("graft:request_errors:ratio5m", "graft:time_to_first_token_seconds:p95_5m"):
                prometheus.await_true(lambda name=name: bool(prometheus.values(name)))
            assert prometheus.values("vllm:num_gpu_loaded_lora_adapters")
            assert not prometheus.values("vllm:lora_requests_info"), "each change of it would be a new series"
            assert not {"GraftEngineDown", "GraftDown"} & prometheus.firing()

            def broken(*step: Any) -> Any:
                raise RuntimeError("the device is gone")

            monkeypatch.setattr(live.server.runner, "run", broken)
            while live.server.engine.is_alive:
                live.post("/v1/completions", prompt="Hi", max_tokens=1)
            prometheus.await_true(lambda: "GraftEngineDown" in prometheus.firing())

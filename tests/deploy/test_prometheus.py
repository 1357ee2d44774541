"""A real Prometheus, with the configuration of deploy/, scrapes a server that works, and one that stops working."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from server.ground.config import Settings
from tests.api.adapter_files import lora_files
from tests.api.conftest import KEY, Gate, Live, eventually, serving
from tests.deploy import expressions
from tests.deploy.prometheus import INTERVAL_S, program, scraping

NAMES = ("first", "second", "third")
_MAX_ROUNDS = 20
_BETWEEN_S = 2.5 * INTERVAL_S  # so that each round of work falls between two scrapes


def work(live: Live) -> None:
    """Something of all that the dashboard draws."""
    mixed = [{"name": "first", "weight": 0.5}, {"name": "second", "weight": 0.5}]
    for adapter in (None, *NAMES, mixed):
        chosen = {} if adapter is None else {"adapter": adapter}
        live.post("/v1/completions", prompt="Hi there", max_tokens=4, ignore_eos=True, **chosen).raise_for_status()
    live.post("/v1/completions", prompt="Hi", adapter="no-such")
    live.upload("third", lora_files(3), replace="true").raise_for_status()
    live.http.post("/v1/adapters/second/unload").raise_for_status()


@contextmanager
def in_flight(live: Live, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sequences that run as long as the block does, however fast the machine is."""
    with monkeypatch.context() as patch:
        gate = Gate(live.server.runner.run)
        patch.setattr(live.server.runner, "run", gate)
        with live.send("/v1/completions", prompt="Hi", max_tokens=200, n=8, ignore_eos=True, adapter="first"):
            eventually(lambda: live.server.engine.stats().num_running > 0)
            yield
        gate.allow(1_000_000)
    eventually(lambda: live.server.engine.stats().num_in_flight == 0)


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
            for _ in range(_MAX_ROUNDS):
                work(live)
                with in_flight(live, monkeypatch):
                    time.sleep(_BETWEEN_S)
                    unanswered -= {expr for expr in unanswered if prometheus.values(expr)}
                if not unanswered:
                    break
            assert unanswered == set()
            for expr in expressions.of_rules():
                prometheus.ask("query", query=expr)  # which Prometheus takes, whether it has a value now or not
            assert len(expressions.recorded()) >= 5
            for name in expressions.recorded():
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

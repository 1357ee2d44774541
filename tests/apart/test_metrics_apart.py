"""GET /metrics of two processes: one page, each family once, the names of one process and those of the other's own."""

from prometheus_client.parser import text_string_to_metric_families

from server.ground.families import FAMILIES, OTHER_PROCESS
from tests.api.conftest import Live

OWN = ("cpu_seconds_total", "resident_memory_bytes", "open_fds")


def scraped(live: Live) -> str:
    return live.http.get("/metrics").text


def heads(text: str) -> list[str]:
    """The names of the families, as often as they stand there."""
    return [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE ")]


def use(live: Live) -> None:
    for adapter in ("pirate-lora", None):
        asked = {"prompt": "The old boat", "max_tokens": 4, "ignore_eos": True}
        live.post("/v1/completions", **asked | ({} if adapter is None else {"adapter": adapter}))


def test_the_names_are_those_of_one_process_each_once(one: Live, two: Live) -> None:
    use(one)
    use(two)
    found, expected = heads(scraped(two)), heads(scraped(one))
    assert len(found) == len(set(found))
    assert {name for name in found if not name.startswith(f"{OTHER_PROCESS}_process_")} == set(expected)
    assert set(FAMILIES) <= set(found)
    assert any(name.startswith("vllm:") for name in found)


def test_the_page_is_prometheus_text_and_no_series_is_there_twice(two: Live) -> None:
    families = list(text_string_to_metric_families(scraped(two)))
    series = [(s.name, *sorted(s.labels.items())) for family in families for s in family.samples]
    assert len(series) == len(set(series))


def test_what_happens_in_either_process_is_counted_once(two: Live) -> None:
    names = ("graft_step_tokens_sum", "graft_prompt_tokens_total", "graft_output_tokens_total", "graft_requests_total")
    before = {name: two.metric(name) for name in names}
    use(two)
    after = {name: two.metric(name) - before[name] for name in names}
    assert after["graft_output_tokens_total"] == 8
    assert after["graft_step_tokens_sum"] >= 6 + 2, "what a step computes: prompts that are not found, and tokens"
    assert after["graft_prompt_tokens_total"] == 8
    assert two.metric("graft_adapter_load_seconds_count", transition="host_to_device") > 0
    assert two.metric("graft_engine_up") == 1


def test_the_other_process_has_its_own_figures(two: Live) -> None:
    for name in OWN:
        theirs, ours = two.metric(f"{OTHER_PROCESS}_process_{name}"), two.metric(f"process_{name}")
        assert theirs > 0
        assert theirs != ours

"""Series that carry the name of an adapter: bounded, gone with their adapter, and never falling."""

import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.ground import adapter_series
from server.ground.adapter_series import SERIES_PER_ADAPTER, AdapterSeries, AdapterState


class Watched:
    """What is loaded and what exists, as a test wants it; and what a scrape then says."""

    def __init__(self, max_adapters: int) -> None:
        self.series = AdapterSeries(max_adapters)
        self.loaded: dict[str, AdapterState] = {}
        self.existing: set[str] = set()

    def load(self, name: str, **facts: object) -> None:
        self.existing.add(name)
        self.loaded[name] = AdapterState(name, **{"method": "lora", "rank": 8, "host_bytes": 100, **facts})  # type: ignore[arg-type]

    def scrape(self) -> dict[tuple[str, ...], float]:
        """Values by (metric without its prefix, adapter, more label values)."""
        gone = {*self.series.names()} - self.existing
        families = text_string_to_metric_families(self.series.shown(tuple(self.loaded.values()), gone).text)
        samples = [sample for family in families for sample in family.samples]
        values = {(s.name.removeprefix("graft_adapter_"), *s.labels.values()): s.value for s in samples}
        assert len(values) == len(samples), "a series is there twice"
        return values

    def named(self) -> set[str]:
        return {key[1] for key in self.scrape()} - {"other", "unknown"}


@pytest.fixture
def watched() -> Watched:
    return Watched(max_adapters=3)


def test_an_adapter_has_its_place_its_bytes_and_its_totals(watched: Watched) -> None:
    watched.load("legal", device_bytes=60, is_pinned=True, num_running=2, num_waiting=1)
    watched.series.count_sequence(["legal"])
    watched.series.count_tokens(["legal"], num_prompt=7, num_output=5)
    watched.series.count_failure(["legal"])
    values = watched.scrape()
    assert values["loaded", "legal", "host", "lora", "8", "true"] == 1
    assert values["loaded", "legal", "device", "lora", "8", "true"] == 1
    assert values["bytes", "legal", "device"] == 60
    assert (values["sequences_running", "legal"], values["sequences_waiting", "legal"]) == (2, 1)
    totals = ("sequences_total", "failures_total", "prompt_tokens_total", "output_tokens_total")
    assert [values[name, "legal"] for name in totals] == [1, 1, 7, 5]
    assert sum(key[1] == "legal" for key in values) == SERIES_PER_ADAPTER


def test_series_vanish_with_their_adapter_and_come_back_with_what_they_had(watched: Watched) -> None:
    watched.load("legal")
    watched.series.count_tokens(["legal"], num_output=5)
    assert watched.named() == {"legal"}
    evicted = watched.loaded.pop("legal")
    assert watched.named() == set()
    watched.loaded["legal"] = evicted
    watched.series.count_tokens(["legal"], num_output=2)
    assert watched.scrape()["output_tokens_total", "legal"] == 7


def test_an_adapter_that_was_deleted_begins_anew(watched: Watched) -> None:
    watched.load("legal")
    watched.series.count_tokens(["legal"], num_output=5)
    del watched.loaded["legal"]
    watched.existing.clear()
    watched.scrape()
    watched.load("legal")
    assert watched.scrape()["output_tokens_total", "legal"] == 0


def test_beyond_the_cap_all_are_one(watched: Watched) -> None:
    for index in range(10):
        watched.load(f"a{index}", device_bytes=50 if index % 2 else None, num_running=1)
    values = watched.scrape()
    assert watched.named() == {"a1", "a3", "a5"}, "those on the device come first"
    assert values["loaded", "other", "host", "", "", ""] == 7
    assert values["bytes", "other", "device"] == 100
    assert values["sequences_running", "other"] == 7


def test_no_total_ever_falls_and_nothing_is_counted_twice(watched: Watched) -> None:
    """Whoever takes and leaves a seat, the sum over adapters is what happened."""
    before: dict[tuple[str, ...], float] = {}
    for turn in range(30):
        watched.loaded.clear()
        for index in range(turn, turn + 5):
            watched.load(f"a{index % 11}")
            watched.series.count_tokens([f"a{index % 11}"], num_output=1)
        values = watched.scrape()
        totals = {key: value for key, value in values.items() if key[0] == "output_tokens_total"}
        assert all(value >= before.get(key, 0) for key, value in totals.items())
        before |= totals
    assert sum(before.values()) == 150


def test_what_happens_between_two_scrapes_is_bounded_too(watched: Watched) -> None:
    for index in range(1000):
        watched.existing.add(f"a{index}")
        watched.series.count_sequence([f"a{index}"])
    values = watched.scrape()
    assert values["sequences_total", "other"] == 997
    assert len(values) < 20


def test_invented_names_are_unknown(watched: Watched) -> None:
    watched.series.count_unknown()
    watched.series.count_unknown()
    assert watched.scrape()["sequences_total", "unknown"] == 2


@pytest.mark.parametrize("name", ["other", "unknown"])
def test_an_adapter_called_as_a_sum_is_called_does_not_double_it(watched: Watched, name: str) -> None:
    watched.load(name)
    watched.series.count_sequence([name])
    values = watched.scrape()
    assert values["sequences_total", "other"] == 1
    assert values["sequences_total", "unknown"] == 0
    assert values["loaded", "other", "host", "", "", ""] == 1


def test_what_is_as_it_was_is_not_written_again(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    quoted = adapter_series.quoted
    monkeypatch.setattr(adapter_series, "quoted", lambda value: written.append(value) or quoted(value))
    for name in ("a", "b"):
        watched.load(name)
    watched.scrape()
    assert {"a", "b"} <= set(written)
    written.clear()
    watched.series.count_tokens(["b"], num_output=3)
    values = watched.scrape()
    assert (values["output_tokens_total", "a"], values["output_tokens_total", "b"]) == (0, 3)
    assert set(written) == {"b"}


def test_names_of_any_characters_are_read_as_they_are(watched: Watched) -> None:
    hostile = 'a"b\\c\nd'
    watched.load(hostile, device_bytes=5)
    values = watched.scrape()
    assert values["bytes", hostile, "device"] == 5
    assert values["output_tokens_total", hostile] == 0


def test_a_mix_counts_for_each_of_its_adapters(watched: Watched) -> None:
    watched.load("a")
    watched.load("b")
    watched.series.count_tokens(["a", "b"], num_output=3)
    values = watched.scrape()
    assert values["output_tokens_total", "a"] == values["output_tokens_total", "b"] == 3

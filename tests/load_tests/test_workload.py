"""The command from its arguments to its files: against our own server, and against one of another make."""

import gc
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from load_tests import workload
from load_tests.outcome import End, Outcome
from load_tests.plan import Load, Request, draw, ranked
from load_tests.report import SCHEMA, Limits, report
from server.ground.config import Settings
from tests.api.adapter_files import lora_files
from tests.api.conftest import Live, serving
from tests.load_tests.another_make import BASE, AnotherMake, nobody_listening

OURS = ("first", "second", "third")
# Which kind of error each answer of the other make is; None for one that completes.
KINDS = {
    "whole": None,
    "uncounted": None,
    "missing": "http_404",
    "broken": "http_500",
    "cut": "cut",
    "unstreamed": "not_a_stream",
    "failing": "stream_error",
}
FAST = ["--rate", "100", "--duration", "0.4", "--drain", "120"]
LENIENT = ["--slo-ttft-ms", "1e6", "--slo-itl-ms", "1e6"]  # no machine is too slow for these
PLAIN_KEYS = {"schema", "date", "label", "server", "client", "workload", "slo", "is_interrupted", "num_unsent"}
REPORT_KEYS = {
    "totals",
    "errors",
    "schedule_lag_ms",
    "num_adapters_asked",
    "share_of_adapters_within_slo",
    "groups",
    "adapters",
    "warnings",
}


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(workload.KEY_VARIABLE, raising=False)


@pytest.fixture(scope="module")
def live(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """Our own server with three adapters."""
    store = tmp_path_factory.mktemp("load") / "store"
    names = ("tiny", "org/tiny")
    settings = Settings(
        model=str(tiny_llama), served_model_name=names, quantize="none", dtype="float32", device="cpu", store=store
    )
    with serving(settings) as live:
        for seed, name in enumerate(OURS):
            assert live.upload(name, lora_files(seed)).status_code == 201
        yield live


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., tuple[int, dict[str, Any], list[dict[str, Any]]]]:
    """Runs the command with some flags: its exit code, its report, and its requests."""

    def run(*flags: str) -> tuple[int, dict[str, Any], list[dict[str, Any]]]:
        out, requests = tmp_path / "run.json", tmp_path / "run.jsonl"
        code = workload.main([*flags, "--out", str(out), "--requests", str(requests)])
        lines = requests.read_text(encoding="utf-8").splitlines()
        return code, json.loads(out.read_text(encoding="utf-8")), [json.loads(line) for line in lines]

    return run


def outcome_of(line: dict[str, Any]) -> Outcome:
    """Back from a line of --requests."""
    request = Request(line["number"], line["scheduled_s"], line["adapter"], line["rank"], 0)
    told = {key: line[key] for key in ("error", "detail", "finish_reason", "num_prompt_tokens", "num_output_tokens")}
    times = tuple(line["token_times_s"])
    return Outcome(request, End(line["end"]), line["sent_s"], line["ended_s"], token_times_s=times, **told)


def names_file(tmp_path: Path, *names: str) -> str:
    path = tmp_path / "names.txt"
    path.write_text("\n".join(["", *names, " "]), encoding="utf-8")
    return str(path)


def test_our_server_answers_every_request_of_every_adapter(
    live: Live, run: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--adapters", "3", "--prompt-tokens", "20:60", "--max-tokens", "4", "--ignore-eos", "--seed", "1"]
    code, whole, lines = run("--url", live.url, *FAST, *asked, *LENIENT, "--label", "ours")
    planned = draw(Load(100.0, 0.4, 1.0, 20, 60, 1), ranked(OURS, 3, 1))
    assert code == 0
    assert whole.keys() == PLAIN_KEYS | REPORT_KEYS
    assert (whole["schema"], whole["label"], whole["server"]["base"]) == (SCHEMA, "ours", "tiny")
    assert whole["totals"]["num_completed"] == whole["totals"]["num_sent"] == len(planned)
    assert whole["totals"]["num_output_tokens"] == 4 * len(planned)
    assert whole["groups"]["all"]["share_within_slo"] == 1.0
    assert (whole["errors"], whole["num_unsent"], whole["is_interrupted"]) == ({}, 0, False)
    assert [entry["adapter"] for entry in whole["adapters"]] == list(ranked(OURS, 3, 1))
    assert [(line["adapter"], line["rank"]) for line in lines] == [(r.adapter, r.rank) for r in planned]
    assert "| all |" in capsys.readouterr().out


def test_every_figure_can_be_computed_again_from_the_requests(live: Live, run: Callable[..., Any]) -> None:
    asked = ["--adapters", "3", "--prompt-tokens", "30", "--max-tokens", "3"]
    _, whole, lines = run("--url", live.url, *FAST, *LENIENT, *asked)
    limits = Limits(whole["slo"]["ttft_ms"] / 1000, whole["slo"]["tpot_ms"] / 1000)
    names = [entry["adapter"] for entry in whole["adapters"]]
    again = report([outcome_of(line) for line in lines], names, 1.0, whole["totals"]["elapsed_s"], limits)
    for name, figures in whole["groups"].items():
        for key in ("ttft_ms", "ttft_from_sent_ms", "itl_ms", "tpot_ms", "e2el_ms"):
            # The lines are in whole microseconds.
            assert again["groups"][name][key] == pytest.approx(figures[key], abs=0.005), (name, key)
    assert again["totals"] == pytest.approx(whole["totals"], rel=0.01)


@pytest.mark.parametrize(
    ("flags", "base"), [(["--chat", "--adapter-field", "adapter"], "tiny"), (["--base", "org/tiny"], "org/tiny")]
)
def test_our_other_ways_to_name_an_adapter_work(
    live: Live, run: Callable[..., Any], flags: list[str], base: str
) -> None:
    code, whole, _ = run("--url", live.url + "/v1", *FAST, "--adapters", "2", "--max-tokens", "2", *flags)
    assert code == 0
    assert whole["errors"] == {}
    assert whole["server"]["base"] == base


def test_the_bare_base_can_be_measured(live: Live, run: Callable[..., Any]) -> None:
    code, whole, lines = run("--url", live.url, *FAST, "--adapters", "0", "--max-tokens", "2")
    assert (code, whole["errors"], whole["adapters"]) == (0, {}, [])
    assert list(whole["groups"]) == ["all"]
    assert {line["adapter"] for line in lines} == {None}


def test_more_adapters_than_our_server_has_is_no_run(live: Live, capsys: pytest.CaptureFixture[str]) -> None:
    assert workload.main(["--url", live.url, "--adapters", "4"]) == 2
    assert "asks for 4, but only 3 are known" in capsys.readouterr().err


def test_every_request_to_another_make_ends_as_its_answer_says(
    run: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    make = AnotherMake(tuple(KINDS))
    with make.in_a_thread() as url:
        code, whole, lines = run("--url", url, *FAST, "--adapters", str(len(KINDS)), "--zipf", "0")
    planned = draw(Load(100.0, 0.4, 0.0, 32, 128, 0), ranked(tuple(KINDS), len(KINDS), 0))
    kinds = Counter(KINDS[request.adapter] for request in planned if request.adapter is not None)
    assert set(kinds) == set(KINDS.values())
    assert code == 0
    assert [(line["adapter"], line["error"]) for line in lines] == [(r.adapter, KINDS[str(r.adapter)]) for r in planned]
    assert {kind: entry["count"] for kind, entry in whole["errors"].items()} == {k: n for k, n in kinds.items() if k}
    assert whole["errors"]["http_404"]["first"] == "The model `missing` does not exist."
    assert whole["totals"]["num_without_usage"] == sum(request.adapter == "uncounted" for request in planned)
    assert any("came without a usage" in warning for warning in whole["warnings"])
    assert "http_404: " in capsys.readouterr().out


def test_prompts_come_as_close_to_the_wanted_tokens_as_words_can(run: Callable[..., Any]) -> None:
    make = AnotherMake(("whole",))
    with make.in_a_thread() as url:
        _, whole, lines = run("--url", url, *FAST, "--adapters", "1")
    planned = draw(Load(100.0, 0.4, 1.0, 32, 128, 0), ("whole",))
    assert whole["workload"]["tokens_per_word"] == 2.0
    assert all(
        abs(line["num_prompt_tokens"] - request.num_prompt_tokens) <= 1
        for line, request in zip(lines, planned, strict=True)
    )
    prompts = [asked["prompt"] for asked in make.asked[2:]]
    assert len(set(prompts)) == len(planned)


def test_the_same_seed_sends_the_same_requests(run: Callable[..., Any]) -> None:
    sent = []
    for _ in range(2):
        make = AnotherMake(("whole", "uncounted"))
        with make.in_a_thread() as url:
            run("--url", url, *FAST, "--adapters", "2", "--seed", "5")
        # The order in which simultaneous requests arrive is the sockets'.
        sent.append(sorted(json.dumps(asked) for asked in make.asked))
    assert sent[0] == sent[1]


def test_a_make_that_lists_no_parents_is_told_its_adapters_by_name(run: Callable[..., Any], tmp_path: Path) -> None:
    """As LoRAX: no list of models, no name for the base, no usage."""
    make = AnotherMake(models=(404, ""))
    flags = ["--adapters", "2", "--adapter-names", names_file(tmp_path, "whole", "without_done"), "--no-usage"]
    with make.in_a_thread() as url:
        code, whole, _ = run("--url", url, *FAST, *flags)
    assert (code, whole["errors"]) == (0, {})
    assert whole["server"]["base"] is None
    assert whole["workload"]["tokens_per_word"] is None
    assert whole["totals"]["num_without_usage"] == whole["totals"]["num_sent"]
    assert {asked["model"] for asked in make.asked} == {"whole", "without_done"}


def test_adapters_without_a_parent_are_not_taken_for_adapters(capsys: pytest.CaptureFixture[str]) -> None:
    cards = {"data": [{"id": "base"}, {"id": "whole"}]}
    with AnotherMake(models=(200, json.dumps(cards))).in_a_thread() as url:
        assert workload.main(["--url", url, "--adapters", "1"]) == 2
    assert "--adapter-names" in capsys.readouterr().err


def test_names_of_the_base_and_the_adapters_need_no_list(run: Callable[..., Any], tmp_path: Path) -> None:
    make = AnotherMake(models=(500, ""))
    template = ["--model-template", "{base}:{adapter}", "--base", BASE]
    with make.in_a_thread() as url:
        code, _, _ = run(
            "--url", url, *FAST, "--adapters", "1", "--adapter-names", names_file(tmp_path, "a"), *template
        )
    assert code == 0
    assert {asked["model"] for asked in make.asked} == {BASE, f"{BASE}:a"}


# A connection that is given up before it stands is left to the collector, which must find it in this test.
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_a_run_without_any_answer_says_so_with_its_exit_code(
    run: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--rate", "100", "--duration", "0.1", "--drain", "0", "--adapters", "1"]
    with AnotherMake(("held",)).in_a_thread() as url:
        code, whole, lines = run("--url", url, *flags)
    gc.collect()
    assert code == 1
    assert lines
    assert whole["totals"]["num_cancelled"] == whole["totals"]["num_sent"] == len(lines)
    assert whole["groups"]["all"]["ttft_ms"]["p50"] is None
    assert any("cancelled unanswered" in warning for warning in whole["warnings"])
    assert f"cancelled: {len(lines)}" in capsys.readouterr().out


def test_a_plot_is_drawn_if_it_is_asked_for(run: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with AnotherMake(("whole", "missing")).in_a_thread() as url:
        code, _, _ = run("--url", url, *FAST, "--adapters", "2", "--plot", str(tmp_path / "run.svg"))
    assert code == 0
    assert "time to first token" in (tmp_path / "run.svg").read_text(encoding="utf-8")


def test_the_key_is_read_from_the_environment_and_never_reported(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(workload.KEY_VARIABLE, "sesame-open")
    make = AnotherMake(("whole",))
    with make.in_a_thread() as url:
        _, whole, lines = run("--url", url, *FAST, "--adapters", "1")
    assert set(make.keys) == {"Bearer sesame-open"}
    assert "sesame" not in json.dumps([whole, lines])


def test_a_server_that_is_not_there_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with nobody_listening() as url:
        assert workload.main(["--url", url, "--out", str(tmp_path / "run.json")]) == 2
    assert "Is the server up, and --url right?" in capsys.readouterr().err
    assert not (tmp_path / "run.json").exists()


def test_a_server_that_refuses_a_first_request_is_no_run(capsys: pytest.CaptureFixture[str]) -> None:
    with AnotherMake().in_a_thread() as url:
        assert workload.main(["--url", url, "--base", "missing", "--adapters", "0"]) == 2
    assert "a first request failed (http_404): The model `missing` does not exist." in capsys.readouterr().err


def test_a_template_with_a_base_that_nobody_named_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = names_file(tmp_path, "a")
    with AnotherMake(models=(404, "")).in_a_thread() as url:
        flags = ["--adapters", "1", "--adapter-names", names, "--model-template", "{base}:{adapter}"]
        assert workload.main(["--url", url, *flags]) == 2
    assert "say --base NAME" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--url", "localhost:8000"], "no http:// or https:// URL"),
        (["--url", "ftp://x"], "no http:// or https:// URL"),
        (["--url", "http://me:sesame@x"], "leave the password out"),
        (["--prompt-tokens", "9:3"], "MIN:MAX"),
        (["--prompt-tokens", "0"], "MIN:MAX"),
        (["--rate", "0"], "more than 0"),
        (["--rate", "fast"], "is not a number"),
        (["--duration", "inf"], "finite"),
        (["--zipf", "-1"], "0 or more"),
        (["--zipf", "nan"], "0 or more"),
        (["--adapters", "-1"], "whole number"),
        (["--max-tokens", "0"], "1 or more"),
        (["--model-template", "{base}"], "{adapter}"),
        (["--adapter-names", "/nowhere/names.txt"], "/nowhere/names.txt"),
        (["--out", "/nowhere/run.json"], "there is no folder /nowhere"),
        (["--requests", "/"], "it is a folder"),
        (["--plot", "run.jpeg"], ".png or .svg"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_sent(
    flags: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        workload.main(flags)
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert told in said
    assert flags[0] in said
    assert "sesame" not in said


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://127.0.0.1:8000/", "http://127.0.0.1:8000"),
        ("https://host/v1/", "https://host"),
        ("https://host/behind/v1", "https://host/behind"),
    ],
)
def test_the_path_of_the_api_may_be_typed_or_not(typed: str, meant: str) -> None:
    assert workload._parser().parse_args(["--url", typed]).url == meant

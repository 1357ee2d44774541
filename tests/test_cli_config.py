"""`graft config`: the effective settings and where each comes from."""

import json
from pathlib import Path

import pytest

from server.cli import main
from server.ground.config import Settings

KEY = "sesame-open"


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A file and variables, and the flags that name the file and overrule both."""
    file = tmp_path / "graft.yaml"
    file.write_text("port: 1\nmax-queued: 7\nkv_memory: 64MiB\nserved_model_name: [a, b]\n")
    monkeypatch.setenv("GRAFT_PORT", "2")
    monkeypatch.setenv("GRAFT_MAX_SEQUENCES", "3")
    monkeypatch.setenv("GRAFT_API_KEY", KEY)
    return ["base", "--config", str(file), "--max-context", "99"]


def test_each_setting_is_shown_with_its_value_and_its_origin(
    sources: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", *sources, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown.keys() == Settings.model_fields.keys()
    file = sources[2]
    assert {name: (entry["value"], entry["from"]) for name, entry in shown.items()}.items() >= {
        "model": ("base", "MODEL"),
        "max_context": (99, "--max-context"),
        "port": (2, "GRAFT_PORT"),
        "max_sequences": (3, "GRAFT_MAX_SEQUENCES"),
        "max_queued": (7, f"max_queued in {file}"),
        "kv_memory": (64 << 20, f"kv_memory in {file}"),
        "quantize": ("nf4", "default"),
        "adapter_memory": (512 << 20, "default"),
    }.items()
    assert shown["served_model_name"]["value"] == ["a", "b"]


def test_the_table_has_a_line_for_each_setting(sources: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", *sources]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["SETTING", "VALUE", "FROM"]
    assert [line.split()[0] for line in lines] == list(Settings.model_fields)
    shown = {line.split()[0]: " ".join(line.split()[1:]) for line in lines}
    assert shown["port"] == "2 GRAFT_PORT"
    assert shown["kv_memory"].startswith("64MiB kv_memory in ")
    assert shown["adapter_memory"] == "512MiB default"
    assert shown["served_model_name"].startswith("a, b served_model_name in ")
    assert shown["strict_base"] == "off default"


@pytest.mark.parametrize("form", [[], ["--json"]])
@pytest.mark.parametrize("source", ["flag", "variable", "file"])
def test_the_key_is_not_shown(
    form: list[str],
    source: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ["base", *form]
    if source == "flag":
        argv += ["--api-key", KEY]
    elif source == "variable":
        monkeypatch.setenv("GRAFT_API_KEY", KEY)
    else:
        (tmp_path / "graft.yaml").write_text(f"api_key: {KEY}")
        argv += ["--config", str(tmp_path / "graft.yaml")]
    assert main(["config", *argv]) == 0
    printed = capsys.readouterr()
    assert KEY not in printed.out + printed.err
    assert "not shown" in printed.out


def test_without_a_key_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "base", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["api_key"] == {"value": None, "from": "default"}


def test_what_serve_would_refuse_is_refused_in_the_same_words(capsys: pytest.CaptureFixture[str]) -> None:
    refused = []
    for command in ("config", "serve"):
        assert main([command, "base", "--port", "x"]) == 2
        refused.append(capsys.readouterr().err)
    assert refused[0] == refused[1] != ""


def test_it_takes_the_flags_of_serve(capsys: pytest.CaptureFixture[str]) -> None:
    helps = []
    for command in ("config", "serve"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        helps.append({word for word in capsys.readouterr().out.split() if word.startswith("--")})
    assert helps[0] - {"--json"} >= helps[1]


def test_a_variable_that_is_almost_a_setting_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GRAFT_MAX_CONTEXTS", "1")
    assert main(["config", "base"]) == 0
    assert "did you mean GRAFT_MAX_CONTEXT?" in capsys.readouterr().err


@pytest.mark.parametrize(("argv", "is_on"), [([], False), (["--strict-base"], True), (["--no-strict-base"], False)])
def test_a_switch_is_a_flag_and_its_opposite(argv: list[str], is_on: bool, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "base", "--json", *argv]) == 0
    assert json.loads(capsys.readouterr().out)["strict_base"]["value"] is is_on

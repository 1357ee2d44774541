"""`graft doctor`: what is there, what a server would use, and an exit code of 1 for what it needs and has not."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from server.cli import main

Found = dict[tuple[str, str], dict[str, str]]


def doctor(capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, Found]:
    code = main(["doctor", *flags, "--json"])
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert told["is_ready"] == (code == 0)
    return code, {(finding["section"], finding["name"]): finding for finding in told["findings"]}


def missing(found: Found) -> dict[tuple[str, str], str]:
    return {key: finding["text"] for key, finding in found.items() if finding["state"] == "missing"}


@pytest.fixture
def good(tiny_llama: Path, tmp_path: Path) -> list[str]:
    return [str(tiny_llama), "--store", str(tmp_path / "store"), "--port", "0", "--device", "cpu"]


def test_where_all_is_well_it_says_what_would_be_used(
    good: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = doctor(capsys, *good, "--dtype", "float32", "--max-context", "64")
    assert (code, missing(found)) == (0, {})
    assert {section for section, _ in found} == {
        "machine", "versions", "configuration", "base", "memory", "places", "extras",
    }  # fmt: skip
    assert found["base", "quantization"]["text"] == "nf4: native products of 4-bit weights, by vectors"
    assert found["base", "device"]["text"] == "cpu, float32"
    assert found["base", "engine"]["text"] == "a thread of the process that answers requests"
    assert found["base", "ops"]["text"] == "native: C compiled for this CPU"
    assert found["base", "attention"]["text"] == (
        "prompts by PyTorch, chunk by chunk (varlen: it needs a GPU, and the base is on the CPU)"
    )
    assert found["memory", "base"]["text"].startswith("at least 0.")
    assert "--kv-memory: 64 blocks, 4,096 tokens" in found["memory", "KV cache"]["text"]
    assert "made at the start" in found["places", "store"]["text"]
    assert not (tmp_path / "store").exists(), "looking changes nothing"


def test_as_text_it_has_sections_and_marks_what_is_missing(good: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *good, "--ops", "triton", "--max-queued", "9"]) in (0, 1)  # by Triton's interpreter
    told = capsys.readouterr()
    assert told.out.startswith("machine\n  system")
    assert "\n\nmemory\n  base" in told.out
    assert main(["doctor", *good, "--port", "x"]) == 1
    told = capsys.readouterr()
    assert "! problem 1" in told.out
    assert "graft: 1 missing: see the lines marked with !" in told.err


def test_every_problem_with_the_settings_is_told_and_the_machine_all_the_same(
    good: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = doctor(capsys, *good, "--port", "x", "--block-size", "12", "--host", "0.0.0.0")
    assert code == 1
    told = missing(found)
    assert [section for section, _ in told] == ["configuration"] * 3
    assert "--block-size is '12'" in told["configuration", "problem 1"] + told["configuration", "problem 2"]
    assert ("machine", "ram") in found


def test_what_a_server_would_meet_is_met_here(
    good: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A port that is taken, a store that is a file, memory that is not there, a package that is not installed."""
    (tmp_path / "file").write_text("")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code, found = doctor(
            capsys, *good, "--port", port, "--store", str(tmp_path / "file" / "store"), "--adapter-memory", "100TB"
        )
    told = missing(found)
    assert code == 1
    assert told.keys() == {("memory", "plan"), ("places", "store"), ("places", "port")}
    assert "lower --adapter-memory to at most" in told["memory", "plan"]
    assert f"{tmp_path / 'file'} is no folder" in told["places", "store"]
    assert port in told["places", "port"]


def test_a_base_that_is_not_there_is_missing(
    good: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = doctor(capsys, "/nonesuch", *good[1:])
    assert code == 1
    assert "there is no such folder" in missing(found)["base", "model"]


def test_what_is_not_installed_is_named_with_what_it_would_give(
    good: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    code, found = doctor(capsys, *good)
    assert code == 0
    assert "pip install 'graftserve[objects]' for --store s3://" in found["extras", "objects"]["text"]
    assert found["extras", "objects"]["state"] == "note"


@pytest.mark.parametrize("library", ["varlen", "flashinfer"])
def test_a_library_for_attention_that_cannot_be_used_is_missing_with_the_reason(
    library: str, good: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = doctor(capsys, *good, "--attention", library)
    assert code == 1
    assert missing(found) == {
        ("base", "attention"): f"--attention {library}: it needs a GPU, and the base is on the CPU; or use --attention "
        "torch"
    }
    assert found["base", "attention"]["state"] == "missing"


def test_torch_for_attention_needs_no_reason(good: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    _, found = doctor(capsys, *good, "--attention", "torch")
    assert found["base", "attention"]["text"] == "prompts by PyTorch, chunk by chunk"

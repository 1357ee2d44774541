"""What the roof computes and refuses before anything is served."""

import json
import logging
from pathlib import Path

import pytest

from server.ground.errors import StartupRefused
from server.model.base import Base
from tests.serving import serving


def broken_adapter(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4}))
    (folder / "adapter_model.safetensors").write_bytes(b"\x00" * 32)
    return folder


def test_an_adapter_named_at_the_start_that_cannot_be_served_stops_the_start(tiny_llama: Path, tmp_path: Path) -> None:
    folder = broken_adapter(tmp_path / "legal")
    with (
        pytest.raises(StartupRefused, match=r"--adapter legal=.*adapter_model\.safetensors"),
        serving(tiny_llama, tmp_path, adapter=f"legal={folder}"),
    ):
        pass


def test_one_in_a_watched_folder_does_not(tiny_llama: Path, tmp_path: Path) -> None:
    broken_adapter(tmp_path / "adapters" / "legal")
    with serving(tiny_llama, tmp_path, adapters=str(tmp_path / "adapters")) as server:
        assert [info.name for info in server.registry.list()] == ["legal"]


def test_a_kv_cache_smaller_than_a_block_is_refused_with_both_sizes(tiny_llama: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(StartupRefused, match=r"1000 bytes.*block of 128 tokens takes 65536.*--kv-memory"),
        serving(tiny_llama, tmp_path, kv_memory="1000"),
    ):
        pass


def test_the_context_is_what_was_asked_for_within_what_the_model_has(tiny_llama: Path, tmp_path: Path) -> None:
    with serving(tiny_llama, tmp_path, max_context="40", kv_memory="1MiB") as server:
        assert server.engine._scheduler.max_total_tokens == 40


def test_a_context_beyond_the_models_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(StartupRefused, match=r"--max-context 100000: .* at most 256"),
        serving(tiny_llama, tmp_path, max_context="100000"),
    ):
        pass


def test_memory_that_is_not_there_is_refused_by_flag(tiny_llama: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(StartupRefused, match=r"lower --adapter-memory"),
        serving(tiny_llama, tmp_path, adapter_memory="100TB"),
    ):
        pass


def test_what_cannot_fit_is_refused_before_the_base_is_loaded(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Base, "load", lambda _: pytest.fail("the base was loaded"))
    with (
        pytest.raises(StartupRefused, match=r"--memory-share 0\.0001 of .*raise --memory-share to"),
        serving(tiny_llama, tmp_path, memory_share="0.0001"),
    ):
        pass


def test_the_plan_is_what_the_server_takes(tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="server.assemble")
    with serving(tiny_llama, tmp_path, kv_memory="1MiB") as server:
        needs = server.memory.needs
        assert needs.base_bytes == server.base.weight_bytes
        assert needs.adapter_bytes == server.adapters.capacity_bytes == 64 << 20
        assert server.memory.kv_bytes == server.runner.cache.total_bytes == 1 << 20
        assert server.memory.num_blocks == server.engine.stats().num_blocks
        assert f"memory of the cpu:\n{server.memory.table()}" in caplog.messages


def test_a_name_for_the_base_and_an_adapter_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    broken_adapter(tmp_path / "adapters" / "legal")
    with (
        pytest.raises(StartupRefused, match=r"'legal' names the base and an adapter"),
        serving(tiny_llama, tmp_path, adapters=str(tmp_path / "adapters"), served_model_name="legal"),
    ):
        pass


def test_the_banner_tells_what_is_loaded_and_how_to_ask(tiny_llama: Path, tmp_path: Path) -> None:
    with serving(tiny_llama, tmp_path) as server:
        banner = server.banner()
    assert "http://127.0.0.1:8000/v1/completions" in banner
    assert "float32 on cpu" in banner
    assert "none yet" in banner
    assert "Authorization" not in banner


def test_the_banner_of_a_server_with_a_key_sends_it_without_showing_it(tiny_llama: Path, tmp_path: Path) -> None:
    with serving(tiny_llama, tmp_path, api_key="not-to-be-printed") as server:
        banner = server.banner()
    assert """-H "Authorization: Bearer $GRAFT_API_KEY" """ in banner
    assert "not-to-be-printed" not in banner


def test_the_tokenizer_of_grammars_is_read_before_anything_is_served(tiny_llama: Path, tmp_path: Path) -> None:
    """It would stop a server that is answering."""
    with serving(tiny_llama, tmp_path) as server:
        assert server.grammars._tokenizer is not None


def test_a_library_for_attention_that_cannot_be_used_is_refused_before_the_base_is_loaded(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Base, "load", lambda options: pytest.fail("loaded"))
    with (
        pytest.raises(StartupRefused, match=r"--attention varlen: it needs a GPU.*use --attention torch"),
        serving(tiny_llama, tmp_path, attention="varlen"),
    ):
        pass


def test_the_attention_of_prompts_is_logged(tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), serving(tiny_llama, tmp_path):
        pass
    assert [message for message in caplog.messages if message.startswith("attention of prompts: ")] == [
        "attention of prompts: PyTorch, chunk by chunk; varlen: it needs a GPU, and the base is on the CPU"
    ]

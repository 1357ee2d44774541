"""The native library: compiled once for a processor, kept where nobody else can write, and refused with a remedy."""

import logging
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from server.ground.errors import StartupRefused
from server.ops import load_kernels, native
from server.ops.native import build as module

CPU = torch.device("cpu")


@pytest.fixture
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "_FLAGS", ("-std=gnu11", "-O0"))  # made in a second, and never called
    module.library.cache_clear()
    yield
    module.library.cache_clear()


@pytest.mark.usefixtures("_cache")
def test_it_is_compiled_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = module._built()
    assert first.parent == tmp_path / "cache" / "graftserve" / "kernels"
    assert stat.S_IMODE(first.parent.stat().st_mode) == 0o700
    compiled = first.stat()
    assert module._built() == first
    assert first.stat().st_mtime_ns == compiled.st_mtime_ns
    assert os.listdir(first.parent) == [first.name]  # nothing of the way there is left
    monkeypatch.setattr(module, "_FLAGS", (*module._FLAGS, "-DANOTHER"))
    assert module._built() != first


@pytest.mark.usefixtures("_cache")
def test_a_folder_that_others_can_write_to_is_not_run_from(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "cache" / "graftserve" / "kernels"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    with caplog.at_level(logging.WARNING):
        built = module._built()
    assert built.parent != folder
    assert stat.S_IMODE(built.parent.stat().st_mode) == 0o700
    assert "can be written by others" in caplog.text
    shutil.rmtree(built.parent)


@pytest.mark.usefixtures("_cache")
def test_without_a_compiler_auto_falls_back_and_native_is_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(StartupRefused, match="no C compiler.*apt install gcc.*use --ops reference"):
        load_kernels("native", CPU, torch.bfloat16)
    with caplog.at_level(logging.WARNING):
        assert load_kernels("auto", CPU, torch.bfloat16) is None
    assert "PyTorch's operators, which is slower" in caplog.text


@pytest.mark.usefixtures("_cache")
@pytest.mark.parametrize("command", ["", "no-such-compiler", "false"])
def test_a_compiler_that_fails_is_named(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", command)
    with pytest.raises(native.CannotCompile, match=command or "no C compiler"):
        module.library()


def test_only_what_it_computes_is_taken() -> None:
    assert load_kernels("auto", CPU, torch.float16) is None
    assert load_kernels("auto", CPU, torch.float32) is native
    with pytest.raises(StartupRefused, match="--dtype bfloat16, or --ops reference"):
        load_kernels("native", CPU, torch.float16)
    with pytest.raises(StartupRefused, match="use --ops triton"):
        load_kernels("native", torch.device("cuda"), torch.bfloat16)

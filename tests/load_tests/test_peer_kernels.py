"""Other servers' kernels: the importer with packages of our own, and the real ones where `.peers` has their files."""

import json
import sys
import zipfile
from pathlib import Path

import pytest

from load_tests.kernels import main
from load_tests.peer_kernels import found, importing, unpack, version_in

pytest.importorskip("triton")

PEERS = Path(__file__).parents[2] / ".peers"
FETCH = "python -m load_tests.peer_kernels --fetch .peers"


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package whose own start fails, with one module that asks for what is not there."""
    inner = tmp_path / "strange" / "inner"
    inner.mkdir(parents=True)
    (tmp_path / "strange" / "__init__.py").write_text("raise RuntimeError('a server starts')\n")
    (inner / "__init__.py").write_text("raise RuntimeError('a server starts')\n")
    (inner / "kernel.py").write_text(
        "from strange import settings\nfrom strange.far.away import ANSWER\nfrom elsewhere import Base\n"
        "found = settings.FLAG, ANSWER, Base\n"
    )
    return tmp_path


STAND_INS = {"strange.settings": {"FLAG": True}, "strange.far.away": {"ANSWER": 42}, "elsewhere": {"Base": int}}


def test_a_kernel_is_imported_without_its_package_and_leaves_nothing(package: Path) -> None:
    before = dict(sys.modules)
    with importing("strange", package, STAND_INS):
        from strange.inner import kernel  # type: ignore[import-not-found]
    assert kernel.found == (True, 42, int)
    assert dict(sys.modules) == before
    with pytest.raises(ModuleNotFoundError):
        import strange  # noqa: F401


def test_what_was_loaded_before_stays(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = type(sys)("elsewhere")
    monkeypatch.setitem(sys.modules, "elsewhere", real)
    with importing("strange", package, STAND_INS):
        from strange.inner import kernel
    assert kernel.found[2] is int
    assert sys.modules["elsewhere"] is real


def test_what_is_neither_there_nor_stood_in_for_is_missing(package: Path) -> None:
    with importing("strange", package, {}), pytest.raises(ImportError, match="settings"):
        from strange.inner import kernel  # noqa: F401


def test_a_folder_without_peers_has_none(tmp_path: Path) -> None:
    peers = found([tmp_path])
    assert (peers.ways, peers.versions, peers.failures) == ((), {"vllm": None, "sglang": None}, ())


def test_a_peer_that_does_not_load_is_said_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "vllm").mkdir()
    [failure] = found([tmp_path]).failures
    assert failure.startswith("vllm, _vllm_ways: ModuleNotFoundError")
    assert main(["--quick", "--seconds", "-1", "--peers", str(tmp_path)]) == 0
    assert "not loaded: vllm, _vllm_ways" in capsys.readouterr().err


def test_of_a_wheel_only_what_is_wanted_is_kept(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "p.whl", "w") as wheel:
        for name in ("p/kernels/one.py", "p/kernels/one.so", "p/other.py"):
            wheel.writestr(name, "")
        wheel.writestr("p-1.5.dist-info/METADATA", "Metadata-Version: 2.4\nName: p\nVersion: 1.5\n\nVersion: none\n")
    unpack(tmp_path / "p.whl", tmp_path / "kept", ("p/kernels/*.py", "p-*.dist-info/METADATA"))
    files = {str(file.relative_to(tmp_path / "kept")) for file in (tmp_path / "kept").rglob("*") if file.is_file()}
    assert files == {"p/kernels/one.py", "p-1.5.dist-info/METADATA"}
    assert version_in(tmp_path / "kept", "p") == "1.5"
    assert version_in(tmp_path / "kept", "q") == "unknown"


@pytest.mark.slow
@pytest.mark.skipif(not PEERS.is_dir(), reason=f"their files are not here: {FETCH}")
def test_vllm_and_sglang_compute_what_we_do(tmp_path: Path) -> None:
    out = tmp_path / "kernels.json"
    assert main(["--quick", "--peers", str(PEERS), "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    served = {row["way"] for row in result["rows"] if row["is_peer"] and row["is_right"]}
    assert served == {"vllm", "sglang chunks of 16", "sglang chunks of 128", "sglang sgemm", "sglang plans"}
    refused = {row["way"] for row in result["rows"] if row["batch"] == "methods" and row["not_served"]}
    assert refused >= served
    assert all(result["peers"].values())

"""Which library computes the attention of prompts: the conditions as a table, the trial, and what is said of both."""

import logging
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from server.ground.errors import StartupRefused
from server.ops.prefill import AttentionLayer, PrefillNeeds, choose_prefill, prefill_refusal, refuse_prefill
from server.ops.prefill import choice as module
from server.ops.prefill.choice import CANDIDATES, Candidate
from server.ops.prefill.varlen import Varlen
from tests.ops.prefill.libraries import varlen_attn

LAYER = AttentionLayer(num_heads=8, kv_heads=2, width=64, scaling=0.125)
GOOD = PrefillNeeds(torch.device("cuda"), (9, 0), torch.bfloat16, 256, frozenset({LAYER, replace(LAYER, window=512)}))
ON_CPU = replace(GOOD, device=torch.device("cpu"), capability=None, dtype=torch.float32, block_size=64)
CASES: dict[str, tuple[PrefillNeeds, str | None, str | None]] = {  # needs, and what varlen and flashinfer say
    "good": (GOOD, None, None),
    "float16": (replace(GOOD, dtype=torch.float16), None, None),
    "larger blocks": (replace(GOOD, block_size=512), None, None),
    "small blocks": (replace(GOOD, block_size=64), "a multiple of 256 tokens: --block-size 256", None),
    "on a CPU": (ON_CPU, "needs a GPU", "needs a GPU"),
    "an old GPU": (replace(GOOD, capability=(7, 5)), "compute capability 8.0", "compute capability 8.0"),
    "float32": (replace(GOOD, dtype=torch.float32), "--dtype bfloat16", "--dtype bfloat16"),
    "a cap": (replace(GOOD, layers=frozenset({LAYER, replace(LAYER, softcap=50.0)})), "no cap on scores", None),
    "heads of 80": (replace(GOOD, layers=frozenset({replace(LAYER, width=80)})), None, "heads of 64, 128 or 256"),
    "heads of 36": (replace(GOOD, layers=frozenset({replace(LAYER, width=36)})), "multiples of 8", "64, 128 or 256"),
    "heads of 512": (replace(GOOD, layers=frozenset({replace(LAYER, width=512)})), "up to 256", "64, 128 or 256"),
    "a config that does not tell": (replace(GOOD, layers=frozenset()), None, None),
}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both libraries, whatever there is on this machine."""
    for name in ("varlen", "flashinfer"):
        monkeypatch.setitem(CANDIDATES, name, replace(CANDIDATES[name], lacks=lambda: None))  # type: ignore[arg-type]


@pytest.fixture
def trying(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., torch.Tensor]], None]:
    """Puts a function in the place of PyTorch's, and asks for nothing but the trial, which a CPU can do."""

    def put(function: Callable[..., torch.Tensor]) -> None:
        candidate = Candidate((), lambda: None, lambda device: Varlen(function))
        monkeypatch.setitem(CANDIDATES, "varlen", candidate)  # type: ignore[arg-type]

    return put


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("case", list(CASES))
def test_each_condition_has_its_words(case: str) -> None:
    needs, *expected = CASES[case]
    for name, words in zip(("varlen", "flashinfer"), expected, strict=True):
        reason = prefill_refusal(name, needs)
        if words is None:
            assert reason is None
        else:
            assert reason is not None
            assert reason.startswith(f"{name}: it ")
            assert words in reason


@pytest.mark.usefixtures("installed")
def test_auto_asks_what_varlen_asks_and_torch_asks_nothing() -> None:
    for needs, reason, _ in CASES.values():
        assert (prefill_refusal("auto", needs) is None) == (reason is None)
        assert prefill_refusal("torch", needs) is None


def test_what_is_not_installed_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert prefill_refusal("flashinfer", GOOD) == (
        "flashinfer: flashinfer is not installed: pip install 'graftserve[flashinfer]'"
    )


def test_what_was_named_and_cannot_be_stops_the_start_before_the_base_is_loaded() -> None:
    with pytest.raises(StartupRefused, match="--attention varlen: it needs a GPU, .* or use --attention torch"):
        refuse_prefill("varlen", ON_CPU)
    refuse_prefill("auto", ON_CPU)
    refuse_prefill("torch", ON_CPU)


def test_auto_goes_without_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "server.ops.prefill.choice"):
        assert choose_prefill("auto", ON_CPU) is None
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert record.message == (
        "attention of prompts: PyTorch, chunk by chunk; varlen: it needs a GPU, and the base is on the CPU"
    )


def test_what_passes_its_trial_is_used(trying: Callable[..., None], caplog: pytest.LogCaptureFixture) -> None:
    trying(varlen_attn())
    for name in ("auto", "varlen"):
        with caplog.at_level(logging.INFO, "server.ops.prefill.choice"):
            library = choose_prefill(name, ON_CPU)
        assert isinstance(library, Varlen)
        assert caplog.messages[-1] == "attention of prompts: varlen, after a trial of 2 kinds of layers"


@pytest.mark.parametrize("fault", ["counts the window itself", "writes the first sequence only"])
def test_what_fails_its_trial_is_not_used_and_warned_of(
    fault: str, trying: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    trying(varlen_attn(fault))
    with caplog.at_level(logging.INFO, "server.ops.prefill.choice"):
        assert choose_prefill("auto", ON_CPU) is None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "PyTorch, chunk by chunk; varlen: it differs from PyTorch's (relative difference" in record.message
    with pytest.raises(StartupRefused, match="--attention varlen: it differs .* or use --attention torch"):
        choose_prefill("varlen", ON_CPU)


@pytest.mark.parametrize("error", [RuntimeError("no kernel"), TypeError("block_table"), OSError("nvcc")], ids=repr)
def test_what_raises_is_not_used_and_warned_of(
    error: Exception, trying: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*arguments: object, **options: object) -> torch.Tensor:
        raise error

    trying(broken)
    assert choose_prefill("auto", ON_CPU) is None
    assert f"it fails on this device ({type(error).__name__}: {error})" in caplog.text


def test_only_the_layers_of_the_base_are_tried(trying: Callable[..., None]) -> None:
    """A fault in windows does not matter to a base that has none."""
    trying(varlen_attn("has no window"))
    assert choose_prefill("varlen", replace(ON_CPU, layers=frozenset({LAYER}))) is not None
    assert choose_prefill("auto", ON_CPU) is None

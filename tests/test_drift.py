"""`graft drift`: its figures against transformers and PEFT computed directly, its refusals and its limits."""

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from demo.prompts import UNSEEN_CHATS, UNSEEN_PROMPTS
from server.drift import add_arguments, encoding, run
from server.drift.divergence import NO_TARGET, token_drift
from server.drift.figures import Figures, Subject, beside_base, breaches, figures
from server.drift.passes import plan
from server.drift.prompts import read_prompts
from server.drift.request import Limits
from server.drift.room import Shape, check_room
from server.ground.errors import GraftError, StartupRefused
from server.model.base import Base
from server.model.pretrained import BaseOptions
from server.model.quantize import Quantization, quantization_config
from tests.adapters.peft_adapters import make_adapter, peft_logits
from tests.demo_files import ADAPTERS, BASE, ROOT, STORE, store_of_five
from tests.test_fidelity import REAL_STRENGTH, dequantized_twin

KINDS = ("lora", "rslora", "dora", "vera", "ia3", "oft", "lokr")
DEMO_PROMPTS = ROOT / "demo" / "prompts.jsonl"
TEXTS = ("The old fisherman looked at the sky and", "x", "Nobody knew why the bells rang all night long.", "ab")


def graft_drift(*argv: object) -> int:
    """The command, through the two functions that `graft` calls."""
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS, allow_abbrev=False)
    add_arguments(parser)
    return run(parser.parse_args([str(item) for item in argv]))


def measured(folder: Path, *argv: object) -> tuple[int, dict[str, Any]]:
    """(exit status, the report that it wrote as JSON)."""
    out = folder / "report.json"
    status = graft_drift(*argv, "--json", out)
    report: dict[str, Any] = json.loads(out.read_text())
    return status, report


def write_lines(folder: Path, lines: Sequence[str], name: str = "prompts.txt") -> Path:
    path = folder / name
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def _small_adapter_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default is for real adapters, and every run here would fill it with zeros."""
    monkeypatch.setenv("GRAFT_ADAPTER_MEMORY", "16MiB")


# The figures


@pytest.fixture(scope="module")
def tiny(model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of adapters of the tiny model, by name."""
    dense = AutoModelForCausalLM.from_pretrained(model_folder("llama"), dtype=torch.float32).eval()
    root = tmp_path_factory.mktemp("drift-adapters")
    return {kind: make_adapter(dense, kind, root / kind, seed, REAL_STRENGTH) for seed, kind in enumerate(KINDS)}


def direct_figures(
    dense: PreTrainedModel, twin: PreTrainedModel, folder: Path | None, prompts: Sequence[Sequence[int]]
) -> dict[str, float]:
    """The definition, with nothing of ours: whole prompts one by one, transformers and PEFT, torch's own KL."""
    kl, agrees, nll = [], [], ([], [])  # type: ignore[var-annotated]
    for ids in prompts:
        tokens = torch.tensor([list(ids)])
        sides = []
        for model in (dense, twin):
            with torch.no_grad():
                logits = model(input_ids=tokens).logits if folder is None else peft_logits(model, folder, tokens)
            sides.append(torch.log_softmax(logits[0].double(), dim=-1))
        reference, served = sides
        kl.append(torch.nn.functional.kl_div(served, reference, log_target=True, reduction="none").sum(dim=-1))
        agrees.append(reference.argmax(dim=-1) == served.argmax(dim=-1))
        for side, values in zip(sides, nll, strict=True):
            values.append(-side[:-1].gather(-1, tokens[0, 1:, None])[:, 0])
    all_kl, all_agrees = torch.cat(kl), torch.cat(agrees).double()
    return {
        "num_tokens": len(all_kl),
        "mean_kl": float(all_kl.mean()),
        "max_kl": float(all_kl.max()),
        "agreement": float(all_agrees.mean()),
        "num_scored_tokens": sum(len(part) for part in nll[0]),
        "reference_perplexity": float(torch.cat(nll[0]).mean().exp()),
        "served_perplexity": float(torch.cat(nll[1]).mean().exp()),
    }


@pytest.fixture(scope="module")
def tiny_figures(tiny_llama: Path, tiny: dict[str, Path]) -> dict[str | None, dict[str, float]]:
    """What the tiny model's base and adapters must come to in NF4 and float32 on TEXTS."""
    dense = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    twin = dequantized_twin(tiny_llama, Quantization.NF4, torch.float32)
    ids = [AutoTokenizer.from_pretrained(tiny_llama)(text).input_ids for text in TEXTS]
    folders: dict[str | None, Path | None] = {None: None, **tiny}
    return {name: direct_figures(dense, twin, folder, ids) for name, folder in folders.items()}


def check_figures(rows: Sequence[Mapping[str, Any]], expected: Mapping[str | None, Mapping[str, float]]) -> None:
    assert [row["adapter"] for row in rows] == list(expected)
    for row in rows:
        wanted = expected[row["adapter"]]
        assert wanted["mean_kl"] > 1e-4, "quantization changes nothing here, so nothing is compared"
        assert {name: row[name] for name in wanted} == pytest.approx(wanted, rel=2e-3)


@pytest.mark.parametrize("max_rows", [1024, 7], ids=["packed", "in chunks"])
def test_the_figures_are_those_of_transformers_and_peft(
    max_rows: int,
    tiny_llama: Path,
    tiny: dict[str, Path],
    tiny_figures: dict[str | None, dict[str, float]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """NF4 in float32 dequantizes to exact values, so the direct computation on the dequantized twin must be met."""
    monkeypatch.setattr(encoding, "MAX_ROWS", max_rows)
    named = [f"{name}={folder}" for name, folder in tiny.items()]
    prompts = write_lines(tmp_path, TEXTS)
    status, report = measured(
        tmp_path, tiny_llama, "--prompts", prompts, "--device", "cpu", "--dtype", "float32", "--adapter", *named
    )
    check_figures(report["rows"], tiny_figures)
    assert status == 0


def test_the_figures_of_the_demo_are_those_of_transformers_and_peft(tmp_path: Path) -> None:
    prompts = DEMO_PROMPTS.read_text(encoding="utf-8").splitlines()[:2]
    file = write_lines(tmp_path, prompts, "some.jsonl")
    flags = ("--store", STORE, "--dtype", "float32", "--device", "cpu")
    _, report = measured(tmp_path, BASE, "--prompts", file, *flags, "--adapter", *ADAPTERS)
    dense = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    # The base is quantized from the values that it is loaded with: float32, as the command does.
    twin = dequantized_twin(BASE, Quantization.NF4, torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    ids = [tokenizer(json.loads(line)["prompt"]).input_ids for line in prompts]
    expected = {None: direct_figures(dense, twin, None, ids)}
    for row in report["rows"][1:]:
        folder = STORE / row["adapter"] / row["version"]
        expected[row["adapter"]] = direct_figures(dense, twin, folder, ids)
    check_figures(report["rows"], expected)


def test_the_demo_as_served_keeps_what_its_page_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command of docs/drift.md. The page's table is of one machine; 16-bit products differ a little on others."""
    page = (ROOT / "docs" / "drift.md").read_text(encoding="utf-8")
    store = store_of_five(tmp_path / "store")
    status, report = measured(tmp_path, "--prompts", DEMO_PROMPTS, "--store", store, "--adapter", "all")
    assert status == 0
    assert [row["adapter"] for row in report["rows"]] == [None, *sorted(ADAPTERS)]
    printed = capsys.readouterr().out
    for line in printed.splitlines():
        name, *cells = line.split()[:9] or [""]
        if name in ("(base)", *ADAPTERS) and len(cells) == 8:
            shown = next(text for text in page.splitlines() if text.startswith(name)).split()
            assert float(cells[0]) == pytest.approx(float(shown[1]), rel=0.3)
            assert float(cells[5].rstrip("%")) == pytest.approx(float(shown[6].rstrip("%")), abs=4)
            assert float(cells[6]) == pytest.approx(float(shown[7]), rel=1e-3), "the reference is float32 anywhere"


def test_an_unquantized_base_in_the_same_dtype_does_not_drift(
    tiny_llama: Path, tiny: dict[str, Path], tmp_path: Path
) -> None:
    prompts = write_lines(tmp_path, TEXTS)
    flags = ("--quantize", "none", "--dtype", "float32", "--device", "cpu", "--adapter", f"dora={tiny['dora']}")
    status, report = measured(
        tmp_path, tiny_llama, "--prompts", prompts, *flags, "--max-kl", "1e-9", "--min-agreement", "1"
    )
    assert status == 0
    assert all(row["max_kl"] < 1e-9 and row["agreement"] == 1 for row in report["rows"])


def test_int8_drifts_less_than_nf4(tiny_llama: Path, tmp_path: Path) -> None:
    prompts = write_lines(tmp_path, TEXTS)
    kl = {}
    for quantize in ("int8", "nf4"):
        _, report = measured(tmp_path, tiny_llama, "--prompts", prompts, "--quantize", quantize, "--device", "cpu")
        assert report["served"]["quantization"] == quantize
        assert report["reference"]["quantization"] == "none"
        kl[quantize] = report["rows"][0]["mean_kl"]
    assert 0 < kl["int8"] < kl["nf4"]


def test_a_quantized_checkpoint_is_compared_with_its_original(tiny_llama: Path, tmp_path: Path) -> None:
    config = quantization_config(Quantization.NF4, torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32, quantization_config=config)
    model.save_pretrained(tmp_path / "nf4")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "nf4")
    prompts = write_lines(tmp_path, TEXTS)
    flags = ("--prompts", prompts, "--dtype", "float32", "--device", "cpu")
    with pytest.raises(StartupRefused, match="is a quantized checkpoint.*--reference"):
        graft_drift(tmp_path / "nf4", *flags)
    _, report = measured(tmp_path, tmp_path / "nf4", *flags, "--reference", tiny_llama)
    _, same = measured(tmp_path, tiny_llama, *flags)
    assert report["rows"][0]["mean_kl"] == pytest.approx(same["rows"][0]["mean_kl"], rel=1e-6)


def test_the_demos_prompts_are_those_of_its_check() -> None:
    """No training text holds any of them: demo/check_styles.py sees to that."""
    prompts = read_prompts(DEMO_PROMPTS).prompts
    assert [p.text for p in prompts if p.text] == list(UNSEEN_PROMPTS)
    assert [p.messages for p in prompts if p.messages] == [({"role": "user", "content": q},) for q in UNSEEN_CHATS]


# What is not finite


def test_nan_logits_are_counted_and_fail_and_reach_no_other_prompt(
    model_folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder("llama"), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_folder("llama"))
    broken_id = tokenizer("~").input_ids[-1]
    model.model.embed_tokens.weight.data[broken_id] = math.nan
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    flags = ("--device", "cpu", "--dtype", "float32")
    sound = write_lines(tmp_path, ["A fine day", "x", "and more"], "sound.txt")
    # 200 tokens of it fill every place that later prompts read with weight 0; a pass each, so that later ones reuse it.
    mixed = write_lines(tmp_path, ["~" * 200, "A fine day", "x", "and more"], "mixed.txt")
    _, expected = measured(tmp_path, tmp_path / "model", "--prompts", sound, *flags)
    status, report = measured(tmp_path, tmp_path / "model", "--prompts", mixed, *flags)
    row, alone = report["rows"][0], expected["rows"][0]
    assert status == 1
    assert row["num_not_finite"] == 200
    assert row["num_tokens"] == alone["num_tokens"] + 200
    assert row["mean_kl"] == pytest.approx(alone["mean_kl"], rel=1e-6)
    assert row["served_perplexity"] == pytest.approx(alone["served_perplexity"], rel=1e-6)
    assert row["agreement"] == pytest.approx(alone["agreement"] * alone["num_tokens"] / row["num_tokens"])
    assert "200 of 219 positions have NaN" in capsys.readouterr().err
    only = write_lines(tmp_path, ["~~~"], "only.txt")
    status, report = measured(tmp_path, tmp_path / "model", "--prompts", only, *flags)
    assert (status, report["rows"][0]["mean_kl"], report["rows"][0]["served_perplexity"]) == (1, None, None)


# The arithmetic


def test_the_divergence_of_two_known_distributions() -> None:
    """KL((1/2, 1/2) || (1/4, 3/4)) = ln 2 - ln 3 / 2."""
    reference, served = torch.tensor([[1 / 2, 1 / 2]]).log(), torch.tensor([[1 / 4, 3 / 4]]).log()
    drift = token_drift(reference, served, torch.tensor([0]))
    assert float(drift.kl) == pytest.approx(math.log(2) - math.log(3) / 2, rel=1e-6)
    assert (float(drift.reference_nll), float(drift.served_nll)) == pytest.approx((math.log(2), math.log(4)))
    assert bool(drift.agrees), "of a tie in the reference, either token is right"


def test_masked_tokens_count_nothing_and_an_excluded_one_is_infinite() -> None:
    masked, inf = -math.inf, math.inf
    reference = torch.tensor([[0.0, 1.0, masked], [0.0, 1.0, 0.0], [masked] * 3, [0.0, inf, 0.0]])
    served = torch.tensor([[0.0, 1.0, masked], [0.0, 1.0, masked], [0.0] * 3, [0.0] * 3])
    kl = token_drift(reference, served, torch.full((4,), NO_TARGET)).kl
    assert kl[0] == 0
    assert kl[1] == inf
    assert kl[2:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_identical_logits_do_not_drift(dtype: torch.dtype) -> None:
    logits = torch.randn(9, 50, generator=torch.Generator().manual_seed(0)).mul(8).to(dtype)
    for same in (logits, torch.zeros_like(logits)):
        drift = token_drift(same, same.clone(), torch.full((9,), NO_TARGET))
        assert float(drift.kl.max()) == 0
        assert drift.agrees.all()


def test_small_divergences_of_a_large_vocabulary_keep_their_digits() -> None:
    """Second order: KL = var(delta) / 2 for a small change delta of the logits; float32 sums would be noise here."""
    generator = torch.Generator().manual_seed(1)
    reference = torch.randn(2, 128_256, generator=generator, dtype=torch.float64)
    delta = 1e-6 * torch.randn(2, 128_256, generator=generator, dtype=torch.float64)
    kl = token_drift(reference, reference + delta, torch.full((2,), NO_TARGET)).kl
    p = reference.softmax(dim=-1)
    variance = (p * delta**2).sum(dim=-1) - (p * delta).sum(dim=-1) ** 2
    assert kl.tolist() == pytest.approx((variance / 2).tolist(), rel=1e-3)


@given(st.integers(1, 200))
def test_chunks_do_not_change_a_figure(chunk_elements: int) -> None:
    generator = torch.Generator().manual_seed(2)
    reference, served = torch.randn(7, 11, generator=generator), torch.randn(7, 11, generator=generator)
    targets = torch.tensor([0, 3, NO_TARGET, 10, 5, 5, NO_TARGET])
    whole, chunked = (token_drift(reference, served, targets, size) for size in (1000, chunk_elements))
    assert torch.allclose(whole.kl, chunked.kl, rtol=1e-12)
    assert torch.equal(whole.agrees, chunked.agrees)
    assert torch.equal(whole.served_nll.isnan(), targets == NO_TARGET)
    assert torch.allclose(whole.served_nll, chunked.served_nll, rtol=1e-12, equal_nan=True)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=20), st.integers(1, 30), st.integers(1, 5))
def test_passes_hold_every_token_once_in_order(lengths: list[int], max_rows: int, max_sequences: int) -> None:
    prompts = [tuple(range(100 * number, 100 * number + length)) for number, length in enumerate(lengths)]
    passes = plan(prompts, max_rows, max_sequences)
    tokens = [t for chunks in passes for c in chunks for t in c.token_ids[c.start : c.start + c.num_tokens]]
    assert tokens == [token for prompt in prompts for token in prompt]
    for chunks in passes:
        assert sum(chunk.num_tokens for chunk in chunks) <= max_rows
        assert len(chunks) <= max_sequences
        assert len(chunks) == 1 or all(chunk.num_tokens == len(chunk.token_ids) for chunk in chunks)
    targets = [target for chunks in passes for chunk in chunks for target in chunk.targets()]
    assert targets == [target for prompt in prompts for target in (*prompt[1:], NO_TARGET)]


# Figures and limits


def some_figures(kl: Sequence[float], agreement: float = 1.0) -> Figures:
    logits = torch.zeros(len(kl), 2)
    drift = replace(
        token_drift(logits, logits, torch.full((len(kl),), NO_TARGET)), kl=torch.tensor(kl, dtype=torch.float64)
    )
    return replace(figures(Subject(), drift, torch.arange(len(kl)) % 4), agreement=agreement)


def test_quantiles_and_quarters() -> None:
    row = some_figures([0.01 * n for n in range(100)])
    assert (row.mean_kl, row.median_kl, row.p99_kl, row.max_kl) == pytest.approx((0.495, 0.49, 0.98, 0.99))
    assert [quarter.num_tokens for quarter in row.quarters] == [25] * 4
    assert [quarter.mean_kl for quarter in row.quarters] == pytest.approx([0.48, 0.49, 0.5, 0.51])
    assert row.reference_perplexity is None, "no token follows another"


def test_an_adapter_stands_beside_the_base() -> None:
    base, worse = beside_base([some_figures([0.1, 0.3]), some_figures([0.4, 0.6])])
    assert (base.kl_of_base, worse.kl_of_base) == (None, pytest.approx(2.5))
    assert beside_base([some_figures([0.0]), some_figures([0.1])])[1].kl_of_base is None


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        (Limits(), []),
        (Limits(max_kl=0.2, min_agreement=0.9), []),
        (Limits(max_kl=0.1), ["the base: the mean KL divergence is 0.2 nats, above --max-kl 0.1"]),
        (Limits(min_agreement=0.95), ["the base: the top-1 agreement is 0.9000, below --min-agreement 0.95"]),
    ],
)
def test_a_limit_is_broken_beyond_it(limits: Limits, said: list[str]) -> None:
    assert list(breaches(some_figures([0.2, 0.2], agreement=0.9), limits)) == said


def test_a_broken_limit_ends_with_1_and_names_who_broke_it(
    tiny_llama: Path, tiny: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = write_lines(tmp_path, TEXTS)
    named = f"mine={tiny['lora']}"
    status, report = measured(
        tmp_path, tiny_llama, "--prompts", prompts, "--device", "cpu", "--adapter", named, "--max-kl", "0"
    )
    assert status == 1
    assert not report["is_within_limits"]
    assert [sentence.partition(":")[0] for sentence in report["breaches"]] == ["the base", "mine"]
    out, err = capsys.readouterr()
    assert "mine: the mean KL divergence is" in err
    assert "mine: 110 of 110 tokens" not in out, "progress is not part of the table"
    assert "(base)" in out


# Prompts


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.txt", "", "has no prompt"),
        ("p.txt", "\n  \n", "has no prompt"),
        ("p.txt", b"good\nb\xffd\n", "line 2: it is not UTF-8"),
        ("p.jsonl", '{"prompt": "a"}\n\nnot json\n', "line 3: it is not JSON"),
        ("p.jsonl", '{"text": "a"}\n', 'line 1: a line must be {"prompt"'),
        ("p.jsonl", '["a"]\n', "line 1: a line must be"),
        ("p.jsonl", '{"prompt": "a", "messages": []}\n', "line 1: a line must be"),
        ("p.jsonl", '{"prompt": ""}\n', "line 1: the prompt must be a text that is not empty"),
        ("p.jsonl", '{"prompt": 3}\n', "line 1: the prompt must be a text"),
        ("p.jsonl", '{"prompt": "\\ud800"}\n', "line 1: it holds half of a surrogate pair"),
        ("p.jsonl", '{"prompt": "a", "adapter": "b"}\n', "line 1: 'adapter' would be passed over"),
        ("p.jsonl", '{"messages": []}\n', "line 1: messages must be a list that is not empty"),
        ("p.jsonl", '{"messages": [{"role": "user"}]}\n', "line 1: each message must have a role and a content"),
        ("p.txt", '{"prompt": "a"}\nplain\n', "line 2: it is not JSON"),
    ],
)
def test_a_bad_line_is_refused_by_its_number(name: str, content: str | bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(StartupRefused) as refused:
        read_prompts(path)
    assert said in refused.value.message


def test_both_forms_are_read(tmp_path: Path) -> None:
    text = tmp_path / "p.txt"
    text.write_bytes("\ufeffone \r\n\n{two}\u2028still two".encode())
    assert [(p.line, p.text) for p in read_prompts(text).prompts] == [(1, "one "), (3, "{two}\u2028still two")]
    chat = '{"messages": [{"role": "user", "content": "Hi"}], "id": 7}'
    lines = read_prompts(write_lines(tmp_path, ['{"prompt": "a"}', chat], "p.jsonl"))
    assert lines.prompts[0].text == "a"
    assert lines.prompts[1].messages == ({"role": "user", "content": "Hi"},)
    assert lines.sha256 == read_prompts(write_lines(tmp_path, ['{"prompt": "a"}', chat], "p.log")).sha256


def test_conversations_and_long_prompts(tiny_llama: Path, tmp_path: Path) -> None:
    chat = json.dumps({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]})
    prompts = write_lines(tmp_path, [chat, json.dumps({"prompt": "y" * 300})], "p.jsonl")
    with pytest.raises(StartupRefused, match=r"line 2: it has 300 tokens.*at most 256.*--max-tokens-per-prompt 256"):
        graft_drift(tiny_llama, "--prompts", prompts)
    flags = ("--device", "cpu", "--max-tokens-per-prompt", 20)
    _, report = measured(tmp_path, tiny_llama, "--prompts", prompts, *flags)
    assert report["prompts"]["num_truncated"] == 1
    # begin, user, "Hi", assistant, "Yes", assistant; and 20 of the second
    assert report["rows"][0]["num_tokens"] == 9 + 20
    assert report["rows"][0]["num_scored_tokens"] == 8 + 19


def test_what_the_chat_template_refuses_is_refused_by_its_line(tiny_llama: Path, tmp_path: Path) -> None:
    lines = ['{"prompt": "a"}', '{"messages": [{"role": "bard", "content": "Hi"}]}']
    with pytest.raises(StartupRefused, match=r"line 2: .*unknown role"):
        graft_drift(tiny_llama, "--prompts", write_lines(tmp_path, lines, "p.jsonl"))


# Refusals


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--adapter", "nobody"), "--adapter nobody: there is no such adapter; there are: mine"),
        (("--adapter", "mine", "--store", "nowhere"), "there is no store at nowhere"),
        (("--json", "nowhere/out.json"), "--json nowhere/out.json: it cannot be written"),
        (("--quantize", "nf5"), "--quantize is 'nf5'"),
        (("--reference", "./nowhere"), "cannot read the model './nowhere'"),
        (("--reference", str(BASE)), "only bases with one vocabulary can be compared"),
    ],
)
def test_what_cannot_be_measured_is_refused_and_leaves_nothing(
    flags: tuple[str, ...], said: str, tiny_llama: Path, tiny: dict[str, Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    prompts = write_lines(tmp_path, TEXTS)
    named = f"mine={tiny['lora']}"
    (tmp_path / "store").mkdir()
    with pytest.raises(GraftError) as refused:
        graft_drift(tiny_llama, "--prompts", prompts, "--store", "store", "--device", "cpu", "--adapter", named, *flags)
    assert said in refused.value.message
    left = {path.name for path in tmp_path.rglob("*")}
    assert left - {".incoming"} == {"prompts.txt", "store"}, "opening a store makes its place for uploads, no more"


def test_an_adapter_of_another_base_is_refused_before_the_reference_loads(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = write_lines(tmp_path, TEXTS)
    with pytest.raises(StartupRefused, match="--adapter butler-lora-fa: "):
        graft_drift(tiny_llama, "--prompts", prompts, "--store", STORE, "--device", "cpu", "--adapter", "all")
    assert "loading the reference" not in capsys.readouterr().err


def test_no_store_is_made_where_none_is_needed(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    prompts = write_lines(tmp_path, TEXTS)
    assert graft_drift(tiny_llama, "--prompts", prompts, "--store", "nowhere", "--device", "cpu") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]


@pytest.mark.parametrize(
    "flags",
    [
        ("--max-kl", "-1"), ("--max-kl", "nan"), ("--max-kl", "inf"), ("--min-agreement", "98"),
        ("--min-agreement", "most"), ("--max-tokens-per-prompt", "0"), ("--max-tokens-per-prompt", "1.5"),
    ],
)  # fmt: skip
def test_numbers_out_of_range_are_refused_by_the_parser(
    flags: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        graft_drift("--prompts", tmp_path, *flags)
    assert ended.value.code == 2
    assert f"argument {flags[0]}" in capsys.readouterr().err


def test_two_bases_that_do_not_fit_are_refused_with_the_remedy() -> None:
    with pytest.raises(StartupRefused, match=r"1048576.2 GiB side by side.*--reference-dtype bfloat16"):
        check_room({torch.device("cpu"): 1 << 50})
    check_room({torch.device("cpu"): 1})


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("quantize", ["none", "nf4", "int8"])
def test_the_memory_of_a_base_is_foretold(
    quantize: str, architecture: str, model_folder: Callable[[str], Path]
) -> None:
    folder = model_folder(architecture)
    base = Base.load(BaseOptions(str(folder), Quantization(quantize), torch.float32))
    foretold = Shape.of(str(folder)).weight_bytes(quantize, torch.float32)
    assert foretold == pytest.approx(base.weight_bytes, rel=0.15)


def test_the_flags_are_read_without_torch() -> None:
    blocked = "import sys; sys.modules.update(torch=None, transformers=None, bitsandbytes=None)"
    code = f"{blocked}; import argparse; from server.drift import add_arguments; p = argparse.ArgumentParser()"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; add_arguments(p); p.print_help()"], cwd=ROOT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "--min-agreement" in done.stdout

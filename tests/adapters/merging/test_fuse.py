"""Fusing: the checkpoint served alone is the base with the adapter beside it, and what rounding takes is told."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from server.adapters.merging.fuse import RECIPE_FILE, Fused, fuse
from server.engine.sequence import SamplingParams
from server.ground.errors import AdapterRejected, BadRequest, StartupRefused
from server.model.pretrained import BaseOptions
from server.model.quantize import Quantization, quantization_config
from server.model.rounding import nf4_rounded, passage, total
from tests.adapters.peft_adapters import make_adapter
from tests.fidelity import dense_model, dequantized_twin
from tests.models import ARCHITECTURES, VOCAB_SIZE, byte_tokenizer, save_filled
from tests.serving import Answer, Ask, answer_all, logprob_rows, serving

KINDS = [
    "lora", "rslora-patterns", "lora-bias-of-b", "lora-embedding-and-head", "lora-bias-all", "dora",
    "dora-embedding-and-head", "vera", "vera-drawn", "ia3", "ia3-feedforward", "road-4", "oft-shared", "oft-bias-all",
    "boft", "c3a", "lokr",
]  # fmt: skip
PARAMS = SamplingParams(6, temperature=0.0, ignore_eos=True, logprobs=VOCAB_SIZE, prompt_logprobs=VOCAB_SIZE)
PROMPT = (3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26, 43)
Adapters = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def adapter(model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    dense = cache(lambda architecture: dense_model(model_folder(architecture)))

    def made(architecture: str, kind: str) -> Path:
        folder = tmp_path_factory.mktemp(architecture) / kind
        # A twin of the model: for tied tables PEFT would warn, and refuse to go on in tests.
        model = dense(architecture)
        model.config.tie_word_embeddings = False
        return make_adapter(model, kind, folder, 3, 0.3)

    return cache(made)


def options(model: Path, dtype: torch.dtype = torch.float32, quantize: str = "none") -> BaseOptions:
    return BaseOptions(str(model), Quantization(quantize), dtype)


def log_probabilities(got: Answer) -> torch.Tensor:
    """(positions, vocabulary) of prompt and output, without the first, which has none."""
    assert got.error is None
    return logprob_rows([*got.prompt_logprobs[1:], *got.logprobs], VOCAB_SIZE)


def served(model: Path, scratch: Path, adapter: Path | None = None) -> Answer:
    """The answer of the base, or of an adapter on it, to one prompt."""
    flags = {} if adapter is None else {"adapters": str(adapter.parent)}
    with serving(model, scratch, **flags) as server:
        return answer_all(server, [Ask(None if adapter is None else adapter.name, PROMPT, PARAMS)])[0]


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        *(("llama", kind) for kind in KINDS),
        *(("gpt2", kind) for kind in ("lora", "dora", "ia3", "lora-bias-only")),
        *(("gemma2", kind) for kind in ("lora-embedding-and-head", "dora-embedding-and-head")),
        ("gemma2", "oft-shared"),
        ("qwen2", "lora-embedding-and-head"),
        ("qwen3_moe", "lora"),
    ],
)
def test_the_fused_checkpoint_answers_as_base_and_adapter_do(
    architecture: str, kind: str, model_folder: Callable[[str], Path], adapter: Adapters, tmp_path: Path
) -> None:
    model, folder, out = model_folder(architecture), adapter(architecture, kind), tmp_path / "fused"
    told = fuse(options(model), folder, out)
    beside, alone = served(model, tmp_path, adapter=folder), served(out, tmp_path)
    expected, found = log_probabilities(beside), log_probabilities(alone)
    assert ((found - expected).abs().max() / expected.abs().max()).item() < 1e-5
    assert alone.token_ids == beside.token_ids
    assert told.relative_error < 1e-5
    assert told.divergence < 1e-7
    assert told.saved.whole.kept == pytest.approx(1.0, abs=1e-4)


def test_a_shared_table_becomes_two_where_the_adapter_changes_it(
    model_folder: Callable[[str], Path], adapter: Adapters, tmp_path: Path
) -> None:
    model = model_folder("qwen2")
    assert "lm_head.weight" not in load_file(model / "model.safetensors")
    changed = fuse(options(model), adapter("qwen2", "lora-embedding-and-head"), tmp_path / "changed")
    unchanged = fuse(options(model), adapter("qwen2", "lora"), tmp_path / "unchanged")
    assert changed.is_untied
    assert not unchanged.is_untied
    assert "lm_head.weight" in load_file(tmp_path / "changed" / "model.safetensors")
    assert "lm_head.weight" not in load_file(tmp_path / "unchanged" / "model.safetensors")


def test_a_base_in_pieces_is_a_base(tiny_llama: Path, adapter: Adapters, tmp_path: Path) -> None:
    pieces = tmp_path / "pieces"
    dense_model(tiny_llama).save_pretrained(pieces, max_shard_size="100KB")
    byte_tokenizer().save_pretrained(pieces)
    assert len(list(pieces.glob("*.safetensors"))) > 1
    for model, name in ((pieces, "one"), (tiny_llama, "other")):
        fuse(options(model), adapter("llama", "lora"), tmp_path / name)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "other"))
    assert all(torch.equal(one[key], other[key]) for key in one.keys() | other.keys())


def test_the_checkpoint_is_whole(tiny_llama: Path, adapter: Adapters, tmp_path: Path) -> None:
    fuse(options(tiny_llama), adapter("llama", "lora"), tmp_path / "out", recipe={"adapter": "lora"})
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", RECIPE_FILE}
    assert json.loads((tmp_path / "out" / RECIPE_FILE).read_bytes()) == {"adapter": "lora"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_adapter_of_another_base_is_told(tiny_llama: Path, adapter: Adapters, tmp_path: Path) -> None:
    stranger = weak(adapter("llama", "lora"), tmp_path / "in", 1)
    config = json.loads((stranger / "adapter_config.json").read_bytes())
    (stranger / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "org/Other-7B"}))
    assert "org/Other-7B" in fuse(options(tiny_llama), stranger, tmp_path / "out").warnings[-1]


# Quantized bases, and rounding


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that comes in NF4, its widths such that every linear is."""
    torch.manual_seed(0)
    plain = save_filled(ARCHITECTURES["llama"](), tmp_path_factory.mktemp("plain"))
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=config, dtype=torch.float32)
    folder = tmp_path_factory.mktemp("packed")
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
def test_a_quantized_base_is_dequantized(kind: str, packed: Path, adapter: Adapters, tmp_path: Path) -> None:
    folder = adapter("llama", kind)
    fuse(options(packed), folder, tmp_path / "fused")
    assert "quantization_config" not in json.loads((tmp_path / "fused" / "config.json").read_bytes())
    expected = log_probabilities(served(packed, tmp_path, adapter=folder))
    found = log_probabilities(served(tmp_path / "fused", tmp_path))
    assert ((found - expected).abs().max() / expected.abs().max()).item() < 1e-5


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_the_values_of_a_quantized_base_can_be_asked_for(
    quantize: str, architecture: str, model_folder: Callable[[str], Path], adapter: Adapters, tmp_path: Path
) -> None:
    """What is fused into is what the quantized weights stand for, in the checkpoint's own keys and shapes."""
    model, folder = model_folder(architecture), adapter(architecture, "dora")
    config = quantization_config(Quantization(quantize), torch.float32)
    twin = dequantized_twin(model, config, torch.float32)
    twin.save_pretrained(tmp_path / "twin")
    byte_tokenizer().save_pretrained(tmp_path / "twin")
    fuse(options(model, quantize=quantize), folder, tmp_path / "one")
    fuse(options(tmp_path / "twin"), folder, tmp_path / "other")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "other"))
    assert one.keys() == other.keys()
    for key, tensor in other.items():
        torch.testing.assert_close(one[key], tensor, rtol=1e-5, atol=1e-6)


def weak(folder: Path, copied: Path, factor: float) -> Path:
    """The adapter with a smaller change."""
    copied.mkdir()
    config = json.loads((folder / "adapter_config.json").read_bytes())
    (copied / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": config["lora_alpha"] * factor}))
    (copied / "adapter_model.safetensors").write_bytes((folder / "adapter_model.safetensors").read_bytes())
    return copied


def test_rounding_to_nf4_takes_a_small_change_of_a_base_that_was_nf4_before(
    packed: Path, tiny_llama: Path, adapter: Adapters, tmp_path: Path
) -> None:
    """On its grid, numbers that move less than half a step fall back; beside it, the share that is kept is right."""
    small = weak(adapter("llama", "lora"), tmp_path / "weak", 0.01)
    on_grid, beside = (fuse(options(model), small, tmp_path / f"{model.name}-out") for model in (packed, tiny_llama))
    assert kept(on_grid) < 0.3
    assert kept(beside) == pytest.approx(1.0, abs=0.3)
    assert beside.nf4 is not None
    assert beside.nf4.whole.noise > 1


def kept(fused: Fused) -> float:
    assert fused.nf4 is not None
    return fused.nf4.whole.kept


def test_sixteen_bits_are_told_from_thirty_two(tiny_llama: Path, adapter: Adapters, tmp_path: Path) -> None:
    small = weak(adapter("llama", "lora"), tmp_path / "weak", 0.001)
    exact = fuse(options(tiny_llama), small, tmp_path / "float32")
    rounded = fuse(options(tiny_llama, torch.bfloat16), small, tmp_path / "bfloat16")
    assert exact.saved.whole.noise < 0.01
    assert rounded.saved.whole.noise > 0.5
    assert load_file(tmp_path / "bfloat16" / "model.safetensors")["lm_head.weight"].dtype is torch.bfloat16


def test_the_figures_of_a_passage() -> None:
    change = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    whole, half = passage(change, change), passage(change, torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    assert (whole.kept, whole.noise) == (1.0, 0.0)
    assert half.kept == pytest.approx(9 / 25)
    assert half.noise == pytest.approx((32 / 25) ** 0.5)
    assert total([whole, half]).kept == pytest.approx(34 / 50)
    assert (total([]).kept, total([]).noise) == (1.0, 0.0)


def test_rounding_to_nf4_twice_is_rounding_once() -> None:
    weight = torch.randn(32, 128)
    once = nf4_rounded(weight)
    assert 0.05 < ((once - weight).norm() / weight.norm()).item() < 0.15
    assert ((nf4_rounded(once) - once).norm() / once.norm()).item() < 5e-3  # the scales are rounded again


# Refusals


def test_a_bias_that_the_architecture_lacks_is_refused(
    model_folder: Callable[[str], Path], adapter: Adapters, tmp_path: Path
) -> None:
    with pytest.raises(AdapterRejected, match="adds a bias at .*Serve the adapter beside its base"):
        fuse(options(model_folder("mistral")), adapter("mistral", "lora-bias-of-b"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_fused_is_refused_and_leaves_nothing(
    tiny_llama: Path, model_folder: Callable[[str], Path], adapter: Adapters, tmp_path: Path
) -> None:
    with pytest.raises(AdapterRejected, match="no module"):
        fuse(options(tiny_llama), adapter("gpt2", "lora"), tmp_path / "out")
    with pytest.raises(StartupRefused, match="nowhere"):
        fuse(options(tmp_path / "nowhere"), adapter("llama", "lora"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    with pytest.raises(BadRequest, match="exists already"):
        fuse(options(tiny_llama), adapter("llama", "lora"), tmp_path / "out")

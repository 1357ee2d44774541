"""`graft convert extract`: exact changes come back exactly, what is lost is told, and bad folders are refused."""

import json
import shutil
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from server.adapters.converting.extract import Extracted, Extraction, extract
from server.adapters.format.content import CONFIG_FILE, MANIFEST_FILE
from server.adapters.merging.truncate import truncate_dense, truncate_drawn
from server.cli import main
from server.ground.errors import BadRequest, GraftError
from tests.adapters.dense import sites_of
from tests.adapters.peft_adapters import peft_logits
from tests.models import save_filled, tiny_gpt2, tiny_llama

IDS = torch.arange(97, 127)[None]
Change = Callable[[PreTrainedModel], None]


def low_rank_everywhere(rank: int, but: str = "lm_head", size: float = 0.1) -> Change:
    """Adds a random product of this rank to every linear but the named one."""

    def change(model: PreTrainedModel) -> None:
        generator = torch.Generator().manual_seed(7)
        for path, site in sites_of(model).items():
            if site.kind == "linear" and path != but:
                up = torch.randn(site.d_out, rank, generator=generator) * size
                down = torch.randn(rank, site.d_in, generator=generator) * size
                site.weight.add_(up @ down)

    return change


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A base in float32 by architecture."""
    makers: Mapping[str, Callable[[], PreTrainedModel]] = {"llama": tiny_llama, "gpt2": tiny_gpt2}

    def saved(name: str) -> Path:
        torch.manual_seed(0)
        return save_filled(makers[name](), tmp_path_factory.mktemp(name) / "base")

    return cache(saved)


@pytest.fixture
def tuned(base: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    def save(change: Change, name: str = "llama", **options: object) -> Path:
        model = AutoModelForCausalLM.from_pretrained(base(name), dtype=torch.float32)
        with torch.no_grad():
            change(model)
        model.save_pretrained(tmp_path / "tuned", **options)
        return tmp_path / "tuned"

    return save


def logits_of(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(input_ids=IDS).logits


def extracted_from(base: Path, tuned: Path, out: Path, **how: object) -> Extracted:
    return extract(str(base), str(tuned), out, Extraction(**how))  # type: ignore[arg-type]


# What comes back


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("how", [{"rank": 3}, {"rank": 8}, {"energy": 0.99999999}], ids=str)
def test_an_exact_low_rank_change_comes_back(
    architecture: str, how: dict[str, object], base: Callable[[str], Path], tuned: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tuned(low_rank_everywhere(3), architecture, max_shard_size="100KB")  # shards, and a whole file
    out = tmp_path / "out"
    result = extracted_from(base(architecture), folder, out, **how)
    dense = AutoModelForCausalLM.from_pretrained(base(architecture), dtype=torch.float32).eval()
    found, expected = peft_logits(dense, out, IDS), logits_of(folder)
    assert torch.allclose(found, expected, atol=1e-5 * expected.abs().max().item())
    assert not result.left
    config = json.loads((out / CONFIG_FILE).read_bytes())
    assert config["lora_alpha"] == config["r"]
    assert config["base_model_name_or_path"] == str(base(architecture))
    assert len(json.loads((out / MANIFEST_FILE).read_bytes())["base_fingerprint"]) == 64


def test_the_energy_figures_are_those_of_a_full_decomposition(
    base: Callable[[str], Path], tuned: Callable[..., Path], tmp_path: Path
) -> None:
    def change(model: PreTrainedModel) -> None:
        generator = torch.Generator().manual_seed(1)
        for site in sites_of(model).values():
            site.weight.add_(torch.randn(site.d_out, site.d_in, generator=generator) * 0.01)

    folder = tuned(change)
    result = extracted_from(base("llama"), folder, tmp_path / "out", rank=5)
    old, new = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (base("llama"), folder))
    for module in result.carried:
        before, after = (model.get_submodule(module.path).weight.detach() for model in (old, new))
        squares = torch.linalg.svdvals((after - before).double()).square()
        assert module.rank == 5
        assert module.kept_square == pytest.approx(float(squares[:5].sum()), rel=1e-5)
        assert module.change_square == pytest.approx(float(squares.sum()), rel=1e-5)
        assert module.weight_square == pytest.approx(float(before.double().square().sum()), rel=1e-5)


def test_each_module_gets_the_smallest_rank_that_holds_the_energy(
    base: Callable[[str], Path], tuned: Callable[..., Path], tmp_path: Path
) -> None:
    def change(model: PreTrainedModel) -> None:
        torch.manual_seed(2)
        for layer in model.model.layers:
            for module, values in ((layer.self_attn.q_proj, [3.0, 1, 1]), (layer.mlp.up_proj, [2.0, 2, 2, 1])):
                left, right = (torch.linalg.qr(torch.randn(n, len(values))).Q for n in module.weight.shape)
                module.weight.add_(left * torch.tensor(values) @ right.T)

    folder, out = tuned(change), tmp_path / "out"
    result = extracted_from(base("llama"), folder, out, energy=0.8)
    assert {module.path.rpartition(".")[2]: module.rank for module in result.carried} == {"q_proj": 1, "up_proj": 3}
    for module in result.carried:
        expected = 9 / 11 if module.path.endswith("q_proj") else 12 / 13
        assert module.kept_square / module.change_square == pytest.approx(expected, rel=1e-4)
    config = json.loads((out / CONFIG_FILE).read_bytes())
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert set(config["rank_pattern"].values()) | {config["r"]} == {1, 3}
    dense = AutoModelForCausalLM.from_pretrained(base("llama"), dtype=torch.float32).eval()
    assert peft_logits(dense, out, IDS).isfinite().all()


@pytest.mark.parametrize("energy", [1.0, 0.9])
def test_a_drawn_basis_keeps_as_much_as_a_full_decomposition(energy: float) -> None:
    torch.manual_seed(0)
    values = torch.arange(1, 301) ** -0.7  # a slow fall, the hard case
    left, right = (torch.linalg.qr(torch.randn(n, 300)).Q for n in (500, 400))
    matrix = left * values @ right.T
    exact, drawn = truncate_dense(matrix, 64, energy), truncate_drawn(matrix, 64, energy)
    assert drawn.down.shape == exact.down.shape
    assert drawn.squared_norm == pytest.approx(exact.squared_norm, rel=1e-5)
    assert drawn.squared_error == pytest.approx(exact.squared_error, rel=2e-3)
    lost = float((matrix - drawn.up.T @ drawn.down).double().square().sum())
    assert lost == pytest.approx(drawn.squared_error, rel=1e-3)
    again = truncate_drawn(matrix, 64, energy)
    assert torch.equal(again.up, drawn.up)


# What does not


def change_others(model: PreTrainedModel) -> None:
    low_rank_everywhere(2)(model)
    model.model.norm.weight.mul_(1.5)
    model.model.layers[0].self_attn.q_proj.bias.add_(1)
    model.lm_head.weight.mul_(1.1)


def test_what_a_lora_cannot_carry_is_listed_with_its_change(
    base: Callable[[str], Path], tuned: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tuned(change_others)
    result = extracted_from(base("llama"), folder, tmp_path / "out", rank=2)
    left = {one.name: one.relative_change for one in result.left}
    assert left.keys() == {"model.norm.weight", "model.layers.0.self_attn.q_proj.bias", "lm_head.weight"}
    assert left["model.norm.weight"] == pytest.approx(0.5, rel=1e-4)
    assert left["lm_head.weight"] == pytest.approx(0.1, rel=1e-4)
    with pytest.raises(BadRequest, match="--strict: 3 tensors changed"):
        extracted_from(base("llama"), folder, tmp_path / "strict", rank=2, is_strict=True)
    assert not (tmp_path / "strict").exists()


def test_only_named_modules_are_carried_the_head_too(
    base: Callable[[str], Path], tuned: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tuned(change_others)
    result = extracted_from(
        base("llama"), folder, tmp_path / "out", rank=2, targets=("v_proj", "1.mlp.up_proj", "lm_head")
    )
    assert {module.path for module in result.carried} == {
        "model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj", "model.layers.1.mlp.up_proj", "lm_head",
    }  # fmt: skip
    assert "model.layers.0.mlp.up_proj.weight" in {one.name for one in result.left}


def test_modules_that_are_the_same_are_left_out(
    base: Callable[[str], Path], tuned: Callable[..., Path], tmp_path: Path
) -> None:
    def change(model: PreTrainedModel) -> None:
        model.model.layers[1].mlp.down_proj.weight.add_(torch.ones(64, 192))

    result = extracted_from(base("llama"), tuned(change), tmp_path / "out", rank=4)
    (module,) = result.carried
    assert (module.path, module.rank) == ("model.layers.1.mlp.down_proj", 1)
    config = json.loads((tmp_path / "out" / CONFIG_FILE).read_bytes())
    assert config["target_modules"] == ["model.layers.1.mlp.down_proj"]


def drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def grow_vocabulary(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"] = torch.zeros(300, 64)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def add_nan(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def cut(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def point_outside(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "../../secret.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def quantize(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_bytes())
    quantization = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))


def stretch(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_bytes())
    config["rope_parameters"]["rope_theta"] = 500_000.0
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (stretch, "differ in rope_parameters: the same weights compute something else"),
        (drop_tensor, "lacks model.norm.weight"),
        (grow_vocabulary, r"embed_tokens.weight has the shape \[300, 64\]"),
        (add_nan, "NaN or infinity"),
        (cut, "is not whole"),
        (point_outside, "is not there"),
        (quantize, "quantized checkpoint"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda folder: (folder / "config.json").unlink(), "cannot read the model"),
        (shutil.rmtree, "is no folder"),
        (lambda folder: None, "the same weights"),
    ],
)
def test_a_folder_that_does_not_belong_is_refused_and_nothing_is_left(
    spoil: Callable[[Path], None], words: str, base: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "tuned"
    shutil.copytree(base("llama"), folder)
    spoil(folder)
    with pytest.raises(GraftError, match=words):
        extracted_from(base("llama"), folder, tmp_path / "out", rank=2)
    assert {path.name for path in tmp_path.iterdir()} <= {"tuned"}


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"rank": 65}, "the largest rank that these modules can have is 64"),
        ({"rank": 513}, "from 1 to 512"),
        ({"rank": 2, "targets": ("wq",)}, "has no such linear; it has .*q_proj"),
        ({"rank": 2, "targets": ("embed_tokens",)}, "has no such linear"),
    ],
)
def test_what_cannot_be_done_is_refused_before_the_work(
    how: dict[str, object], words: str, base: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(BadRequest, match=words):
        extracted_from(base("llama"), base("llama"), tmp_path / "out", **how)
    assert not list(tmp_path.iterdir())


def test_another_architecture_is_refused(base: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(GraftError, match="is a llama and .* a gpt2"):
        extracted_from(base("llama"), base("gpt2"), tmp_path / "out", rank=2)


# The command


def test_the_command_prints_the_energy_by_layer_and_draws_it(
    base: Callable[[str], Path], tuned: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    out, plot = tmp_path / "out", tmp_path / "energy.svg"
    asked = ["convert", "extract", str(base("llama")), str(tuned(change_others)), str(out)]
    assert main([*asked, "--rank", "1", "--plot", str(plot)]) == 0
    captured = capsys.readouterr()
    header, first, second, last = captured.out.splitlines()
    assert header.split() == ["LAYER", "MODULES", "RANK", "CHANGE", "ENERGY", "KEPT", "LEAST", "KEPT", "AT"]
    assert first.split()[:3] == ["model.layers.0", "7", "1"]
    assert second.split()[:3] == ["model.layers.1", "7", "1"]
    assert last.startswith(f"{out}: lora, 14 modules, rank 1, ")
    assert "model.norm.weight" in captured.err
    assert plot.read_text().startswith("<?xml")


def test_all_of_the_energy_needs_no_rank(
    base: Callable[[str], Path], tuned: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Though the largest rank that is served is more than these modules can have."""
    out = tmp_path / "out"
    asked = ["convert", "extract", str(base("llama")), str(tuned(low_rank_everywhere(2))), str(out)]
    assert main([*asked, "--energy", "1"]) == 0
    assert "100.0% of the change's energy kept" in capsys.readouterr().out


@pytest.mark.parametrize(("flags", "words"), [([], "Say how much to keep"), (["--rank", "99"], "is 64")])
def test_the_command_says_what_is_missing(
    flags: list[str], words: str, base: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", "extract", str(base("llama")), str(base("llama")), str(tmp_path / "out"), *flags]) == 2
    assert words in capsys.readouterr().err

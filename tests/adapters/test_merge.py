"""Merging: the result does what the weighted changes do, PEFT's own merge says the same, and nothing is guessed."""

import copy
import itertools
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, VeraConfig
from peft.tuners.lora import LoraLayer
from peft.utils import merge_utils
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from server.adapters.format.checkpoint import Checkpoint
from server.adapters.format.content import CONFIG_FILE, MANIFEST_FILE, WEIGHTS_FILE
from server.adapters.lowering import lower
from server.adapters.merging import combine
from server.adapters.merging.merge import MAX_RANK, MergeBase, Merged, merge, projected_weight, site_seed
from server.adapters.merging.recipe import Ingredient, Recipe, Strategy, recipe_for
from server.adapters.merging.truncate import truncate_dense, truncate_product
from server.adapters.store.folder_store import folder_digest
from server.ground.errors import AdapterRejected, BadRequest, GraftError
from server.model.base import Base
from server.model.dense import DenseBase
from server.model.outline import outline
from server.model.pretrained import BaseOptions
from server.model.quantize import Quantization
from tests.adapters.dense import edited_logits
from tests.adapters.peft_adapters import make_adapter, peft_logits, save_trained
from tests.fidelity import dense_model

IDS = torch.tensor([[3, 14, 15, 92, 65, 35, 89, 79, 32, 38]])
Adapters = Callable[[str, str], Path]
Mixture = Sequence[tuple[str, float]]


@pytest.fixture(scope="module")
def dense(model_folder: Callable[[str], Path]) -> Callable[[str], PreTrainedModel]:
    def loaded(architecture: str) -> PreTrainedModel:
        model = dense_model(model_folder(architecture))
        model.config.tie_word_embeddings = False  # else PEFT would merge an edit of the embedding into the head, too
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        return model

    return cache(loaded)


@pytest.fixture(scope="module")
def adapter(dense: Callable[[str], PreTrainedModel], tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    """The folder of an adapter for an architecture; "kind#seed" makes others of a kind."""

    def made(architecture: str, kind: str) -> Path:
        name, _, seed = kind.partition("#")
        return make_adapter(dense(architecture), name, tmp_path_factory.mktemp(name), int(seed or len(name)), 0.3)

    return cache(made)


@pytest.fixture(scope="module")
def base(model_folder: Callable[[str], Path]) -> Callable[[str], MergeBase]:
    """The base with its weights."""

    def loaded(architecture: str) -> MergeBase:
        known = DenseBase.load(BaseOptions(str(model_folder(architecture)), Quantization.NONE, torch.float32))
        sites = known.sites
        return MergeBase(known.name, known.fingerprint, sites, lambda site: sites[site.path].weight())

    return cache(loaded)


@pytest.fixture(scope="module")
def outlined(tiny_llama: Path) -> MergeBase:
    """The base of which only the config was read."""
    known = outline(BaseOptions(str(tiny_llama), Quantization.NONE, torch.float32))
    return MergeBase(known.name, known.fingerprint, known.sites)


@pytest.fixture
def llama(base: Callable[[str], MergeBase]) -> MergeBase:
    return base("llama")


def ingredients(folders: Mapping[str, Path], mixture: Mixture) -> list[Ingredient]:
    return [Ingredient(kind, folder_digest(folders[kind]).digest, folders[kind], weight) for kind, weight in mixture]


def recipe(strategy: str, **parameters: object) -> Recipe:
    return recipe_for(strategy, max_rank=MAX_RANK, **parameters)  # type: ignore[arg-type]


@pytest.fixture
def mix(adapter: Adapters, tmp_path: Path) -> Callable[..., tuple[Path, Merged]]:
    """Merges kinds of one architecture; the new folder, and what was told."""
    numbers = itertools.count()

    def merged(base: MergeBase, mixture: Mixture, how: Recipe, architecture: str = "llama") -> tuple[Path, Merged]:
        folders = {kind: adapter(architecture, kind) for kind, _ in mixture}
        out = tmp_path / f"merged-{next(numbers)}"
        return out, merge(ingredients(folders, mixture), how, base, out)

    return merged


def summed_weights(dense: PreTrainedModel, adapters: Sequence[tuple[Path, float]]) -> PreTrainedModel:
    """The model whose weights are the base's and the weighted changes that PEFT itself would merge."""
    total = copy.deepcopy(dense)
    for folder, weight in adapters:
        changed = as_peft(dense, folder).merge_and_unload()
        for (name, now), was in zip(changed.named_parameters(), dense.parameters(), strict=True):
            total.get_parameter(name).data.add_(now.data - was.data, alpha=weight)
    return total


def as_peft(dense: PreTrainedModel, folder: Path, name: str = "default") -> PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(copy.deepcopy(dense), folder, adapter_name=name).eval()


def logits(dense: PreTrainedModel, folder: Path, base: MergeBase) -> torch.Tensor:
    return edited_logits(dense, lower(Checkpoint.open(folder), base.sites).edits, IDS)


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).abs().max() / other.abs().max()).item()


# The sum


def summed_logits(model: PreTrainedModel, mixture: Sequence[tuple[Path, float]]) -> torch.Tensor:
    """Of the model whose weights PEFT's own merged weights have been summed into."""
    with torch.no_grad():
        logits: torch.Tensor = summed_weights(model, mixture)(input_ids=IDS).logits
    return logits


SUMS: Mapping[str, tuple[str, Mixture]] = {
    "two ranks": ("llama", [("lora", 0.7), ("lora-wide", 0.4)]),
    "scalings": ("llama", [("rslora", 0.5), ("lora-patterns", 0.5), ("rslora-patterns", 0.25)]),
    "taken away": ("llama", [("lora", 1.0), ("lora-r1", -0.8)]),
    "other modules": ("llama", [("lora-query-only", 0.5), ("lora-layer-1", 1.5), ("lora-excluded", 0.5)]),
    "methods": ("llama", [("lora", 0.5), ("vera", 0.5), ("vera-drawn", 1.0)]),
    "biases": ("llama", [("lora-bias-of-b", 0.6), ("rslora", 0.5), ("lora-bias-only", 0.8)]),
    "biases of all": ("llama", [("lora-bias-all", 0.5)]),
    "blocks": ("llama", [("lora-blocks", 0.5), ("lora", 0.5)]),
    "embedding and head": ("llama", [("lora-embedding-and-head", 0.6), ("lora", 0.4)]),
    "transposed weights": ("gpt2", [("lora", 0.7), ("lora-wide", 0.4), ("vera", 0.4)]),
    "scaled embeddings": ("gemma2", [("lora-embedding-and-head", 0.5), ("rslora", 0.5)]),
    "one alone": ("llama", [("rslora", 0.5)]),
}


@pytest.mark.parametrize("strategy", ["linear", "cat"])
@pytest.mark.parametrize("case", SUMS)
def test_a_sum_of_low_rank_changes_is_exact(
    case: str,
    strategy: str,
    dense: Callable[[str], PreTrainedModel],
    adapter: Adapters,
    base: Callable[[str], MergeBase],
    mix: Callable[..., tuple[Path, Merged]],
) -> None:
    architecture, mixture = SUMS[case]
    out, merged = mix(base(architecture), mixture, recipe(strategy), architecture)
    expected = summed_logits(dense(architecture), [(adapter(architecture, kind), weight) for kind, weight in mixture])
    assert distance(logits(dense(architecture), out, base(architecture)), expected) < 1e-5
    assert merged.relative_error == 0


@pytest.mark.parametrize("case", ["two ranks", "scalings", "methods"])
def test_the_config_of_the_base_is_enough_where_no_weight_matters(
    case: str, outlined: MergeBase, llama: MergeBase, mix: Callable[..., tuple[Path, Merged]]
) -> None:
    _, mixture = SUMS[case]
    one, _ = mix(outlined, mixture, recipe("linear"))
    other, _ = mix(llama, mixture, recipe("linear"))
    assert folder_digest(one).digest == folder_digest(other).digest


FULL_RANK: Mapping[str, tuple[str, Mixture]] = {
    "dora": ("llama", [("dora", 0.7), ("lora", 0.5)]),
    "dora with embeddings": ("llama", [("dora-embedding-and-head", 0.6)]),
    "ia3": ("llama", [("ia3", 0.5), ("vera", 0.5)]),
    "all of them": ("llama", [("ia3", 0.4), ("dora-rslora", 0.3), ("lora-bias-only", 0.4), ("vera", 0.2)]),
    "transposed weights": ("gpt2", [("dora", 0.6), ("ia3", 0.4)]),
}


@pytest.mark.parametrize("case", FULL_RANK)
def test_changes_that_scale_the_weight_are_exact_at_full_rank(
    case: str,
    dense: Callable[[str], PreTrainedModel],
    adapter: Adapters,
    base: Callable[[str], MergeBase],
    mix: Callable[..., tuple[Path, Merged]],
) -> None:
    architecture, mixture = FULL_RANK[case]
    out, merged = mix(base(architecture), mixture, recipe("linear", rank=64), architecture)
    expected = summed_logits(dense(architecture), [(adapter(architecture, kind), weight) for kind, weight in mixture])
    assert distance(logits(dense(architecture), out, base(architecture)), expected) < 1e-5
    assert merged.relative_error == 0


SCALED_ROWS: Mapping[str, tuple[str, Mixture]] = {
    "dora": ("llama", [("dora", 0.7), ("lora", 0.5)]),
    "doras": ("llama", [("dora", 0.7), ("dora-rslora", -0.4), ("dora-patterns", 0.5)]),
    "dora with embeddings": ("llama", [("dora-embedding-and-head", 0.6), ("lora-embedding-and-head", 0.4)]),
    "ia3": ("llama", [("ia3-attention", 0.5), ("vera", 0.5)]),
    "ia3 alone": ("llama", [("ia3-attention", 0.5)]),
    "biases": ("llama", [("ia3-attention", 0.4), ("dora-bias-only", 0.3), ("lora-bias-of-b", 0.4)]),
    "transposed weights": ("gpt2", [("dora", 0.6), ("ia3-attention", 0.4)]),
}


@pytest.mark.parametrize("strategy", ["linear", "cat"])
@pytest.mark.parametrize("case", SCALED_ROWS)
def test_changes_that_scale_rows_sum_to_a_dora_without_loss(
    case: str,
    strategy: str,
    dense: Callable[[str], PreTrainedModel],
    adapter: Adapters,
    base: Callable[[str], MergeBase],
    mix: Callable[..., tuple[Path, Merged]],
) -> None:
    architecture, mixture = SCALED_ROWS[case]
    out, merged = mix(base(architecture), mixture, recipe(strategy), architecture)
    expected = summed_logits(dense(architecture), [(adapter(architecture, kind), weight) for kind, weight in mixture])
    assert json.loads((out / CONFIG_FILE).read_bytes())["use_dora"]
    assert distance(logits(dense(architecture), out, base(architecture)), expected) < 1e-5
    assert distance(peft_logits(dense(architecture), out, IDS), expected) < 1e-5
    assert merged.relative_error == 0


def test_a_row_that_is_scaled_to_nothing_is_refused(
    llama: MergeBase, mix: Callable[..., tuple[Path, Merged]], adapter: Adapters, tmp_path: Path
) -> None:
    """Of two IA3 of zeros, weighted by one half each, the rows vanish."""
    folders = {
        str(number): altered(adapter("llama", "ia3-attention"), tmp_path / str(number), ia3_l=torch.tensor(number))
        for number in (0.0, 1e-4)
    }
    mixture = [(name, 0.5) for name in folders]
    with pytest.raises(BadRequest, match="scale a row of .* to nothing") as refused:
        merge(ingredients(folders, mixture), recipe("linear"), llama, tmp_path / "out")
    assert refused.value.param == "adapters"


@pytest.mark.parametrize("mixture", [SUMS["two ranks"][1], FULL_RANK["dora"][1]], ids=["thin", "dense"])
def test_the_told_error_is_the_share_of_the_change_that_was_lost(
    mixture: Mixture, llama: MergeBase, mix: Callable[..., tuple[Path, Merged]]
) -> None:
    whole = changes(mix(llama, mixture, recipe("linear", rank=64))[0], llama)
    cut_folder, merged = mix(llama, mixture, recipe("linear", rank=3))
    cut = changes(cut_folder, llama)
    lost = {path: (cut[path] - delta).norm() for path, delta in whole.items()}
    of_all = torch.stack(list(lost.values())).norm() / torch.stack([d.norm() for d in whole.values()]).norm()
    assert merged.rank == 3
    assert merged.relative_error == pytest.approx(of_all.item(), rel=1e-4)
    assert merged.worst_site is not None
    share = (lost[merged.worst_site] / whole[merged.worst_site].norm()).item()
    assert merged.worst_error == pytest.approx(share, rel=1e-4)


def changes(folder: Path, base: MergeBase) -> dict[str, torch.Tensor]:
    edits = lower(Checkpoint.open(folder), base.sites).edits
    return {path: edit.up.T @ edit.down for path, edit in edits.items()}  # type: ignore[union-attr, operator]


def test_vera_adapters_of_one_seed_keep_their_rank(
    dense: Callable[[str], PreTrainedModel], llama: MergeBase, tmp_path: Path
) -> None:
    config = VeraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=8, projection_prng_key=3)
    folders = {str(seed): save_trained(dense("llama"), config, tmp_path / str(seed), seed) for seed in (1, 2)}
    mixture = [("1", 0.5), ("2", 0.5)]
    assert merge(ingredients(folders, mixture), recipe("linear"), llama, tmp_path / "linear").rank == 8
    assert merge(ingredients(folders, mixture), recipe("cat"), llama, tmp_path / "cat").rank == 16
    linear, cat = (changes(tmp_path / name, llama) for name in ("linear", "cat"))
    assert all(distance(linear[path], cat[path]) < 1e-5 for path in cat)


# PEFT as the oracle


ORACLE = {
    "cat": ({"strategy": "cat"}, {"combination_type": "cat"}),
    "svd": ({"strategy": "svd"}, {"combination_type": "svd"}),
    "svd of rank 2": ({"strategy": "svd", "rank": 2}, {"combination_type": "svd", "svd_rank": 2}),
    "linear of rank 5": ({"strategy": "linear", "rank": 5}, {"combination_type": "svd", "svd_rank": 5}),
    "ties": (
        {"strategy": "ties", "density": 0.4, "rank": 32},
        {"combination_type": "ties_svd", "density": 0.4, "svd_rank": 32},
    ),
    "ties of the inputs' rank": (
        {"strategy": "ties", "density": 0.7},
        {"combination_type": "ties_svd", "density": 0.7},
    ),
    "ties by frequency": (
        {"strategy": "ties", "density": 0.4, "rank": 32, "majority_sign": "frequency"},
        {"combination_type": "ties_svd", "density": 0.4, "svd_rank": 32, "majority_sign_method": "frequency"},
    ),
}
MIXTURE: Mixture = (("lora", 0.7), ("rslora", -0.4), ("lora-layer-1", 0.9))


@pytest.mark.parametrize("case", ORACLE)
def test_the_result_is_that_of_peft(
    case: str,
    dense: Callable[[str], PreTrainedModel],
    adapter: Adapters,
    llama: MergeBase,
    mix: Callable[..., tuple[Path, Merged]],
) -> None:
    own, theirs = ORACLE[case]
    out, _ = mix(llama, MIXTURE, recipe(**own))  # type: ignore[arg-type]
    model = with_adapters(dense("llama"), {kind: adapter("llama", kind) for kind, _ in MIXTURE})
    model.double()  # its decomposition in float32 is the less exact of the two
    names, weights = [kind for kind, _ in MIXTURE], [weight for _, weight in MIXTURE]
    model.base_model.add_weighted_adapter(names, weights, "theirs", **theirs)
    assert_same_changes(model, out)


@pytest.mark.parametrize(("own", "theirs"), [("dare_linear", "dare_linear_svd"), ("dare_ties", "dare_ties_svd")])
def test_the_result_of_a_random_choice_is_that_of_peft_with_the_same_draws(
    own: str, theirs: str, dense: Callable[[str], PreTrainedModel], llama: MergeBase, tmp_path: Path
) -> None:
    """PEFT draws from one stream for all modules; with one module it is the stream of ours."""
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], layers_to_transform=[1], r=4)
    folders = {name: save_trained(dense("llama"), config, tmp_path / name, seed) for seed, name in enumerate("abc")}
    mixture = [("a", 0.7), ("b", -0.4), ("c", 0.5)]
    merge(ingredients(folders, mixture), recipe(own, density=0.6, seed=11, rank=64), llama, out := tmp_path / "merged")
    model = with_adapters(dense("llama"), folders)
    inject = model.base_model.inject_adapter

    def inject_then_seed(*arguments: object, **options: object) -> None:
        inject(*arguments, **options)  # draws the new adapter's initial weights
        torch.manual_seed(site_seed(11, "model.layers.1.self_attn.q_proj"))

    model.base_model.inject_adapter = inject_then_seed
    with torch.random.fork_rng():
        model.base_model.add_weighted_adapter(
            [name for name, _ in mixture], [weight for _, weight in mixture], "theirs", theirs, density=0.6, svd_rank=64
        )
    assert_same_changes(model, out)


def with_adapters(dense: PreTrainedModel, folders: Mapping[str, Path]) -> PeftModel:
    (first, folder), *rest = folders.items()
    model = as_peft(dense, folder, first)
    for name, folder in rest:
        model.load_adapter(folder, name)
    return model


def assert_same_changes(model: PeftModel, out: Path) -> None:
    """That PEFT's "theirs" changes every module as the adapter in `out` does, which PEFT loads, too."""
    model.load_adapter(out, "ours")
    layers = [module for module in model.modules() if isinstance(module, LoraLayer) and "theirs" in module.lora_A]
    assert layers
    for layer in layers:
        assert "ours" in layer.lora_A
        assert distance(layer.get_delta_weight("ours"), layer.get_delta_weight("theirs")) < 1e-5


def test_pefts_own_linear_is_another_merge(
    dense: Callable[[str], PreTrainedModel],
    adapter: Adapters,
    llama: MergeBase,
    mix: Callable[..., tuple[Path, Merged]],
) -> None:
    """It adds A to A and B to B, whose product has cross terms; here is why ours differs on purpose."""
    mixture = [("lora", 0.5), ("lora#7", 0.5)]
    out, _ = mix(llama, mixture, recipe("linear"))
    model = with_adapters(dense("llama"), {"a": adapter("llama", "lora"), "b": adapter("llama", "lora#7")})
    model.base_model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "theirs", "linear")
    model.load_adapter(out, "ours")
    layer = next(module for module in model.modules() if isinstance(module, LoraLayer))
    summed = 0.5 * layer.get_delta_weight("a") + 0.5 * layer.get_delta_weight("b")
    assert distance(layer.get_delta_weight("ours"), summed) < 1e-5
    assert distance(layer.get_delta_weight("theirs"), summed) > 0.1


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (37,)])
@pytest.mark.parametrize("density", [0.3, 0.99])
@pytest.mark.parametrize("strategy", ["ties", "dare_linear", "dare_ties"])
def test_the_strategies_are_pefts_number_for_number(strategy: str, density: float, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(shape, generator=generator) for _ in range(3)]
    weights = [0.5, -0.25, 2.0]
    own = combine.combine(tensors, weights, recipe(strategy, density=density), torch.Generator().manual_seed(9))
    with torch.random.fork_rng():
        torch.manual_seed(9)
        theirs = getattr(merge_utils, strategy)([t.clone() for t in tensors], torch.tensor(weights), density)
    torch.testing.assert_close(own, theirs, rtol=0, atol=1e-6)


def test_a_density_of_one_drops_nothing() -> None:
    tensors = [torch.randn(6, 4), torch.randn(6, 4)]
    own = combine.combine(tensors, [1.0, 0.5], recipe("dare_linear", density=1.0), torch.Generator())
    torch.testing.assert_close(own, tensors[0] + 0.5 * tensors[1])


def test_a_draw_depends_on_its_seed_and_site_alone(llama: MergeBase, mix: Callable[..., tuple[Path, Merged]]) -> None:
    two = [("lora-layer-1", 1.0), ("lora-layer-1#3", 0.5)]
    one = changes(mix(llama, two, recipe("dare_linear", seed=5, rank=64))[0], llama)
    same = changes(mix(llama, two, recipe("dare_linear", seed=5, rank=64))[0], llama)
    other = changes(mix(llama, two, recipe("dare_linear", seed=6, rank=64))[0], llama)
    beside = changes(mix(llama, [*two, ("lora-query-only", 1.0)], recipe("dare_linear", seed=5, rank=64))[0], llama)
    path = "model.layers.1.mlp.up_proj"  # which the third adapter does not touch
    assert torch.equal(one[path], same[path])
    assert not torch.allclose(one[path], other[path])
    torch.testing.assert_close(beside[path], one[path], rtol=0, atol=1e-5)


# Cutting ranks


@pytest.mark.parametrize(("d_out", "d_in"), [(24, 40), (40, 24), (16, 16)])
@pytest.mark.parametrize("rank", [1, 5, 16])
def test_both_ways_of_cutting_give_the_best_approximation(d_out: int, d_in: int, rank: int) -> None:
    down, up = torch.randn(18, d_in), torch.randn(18, d_out)
    matrix = up.T @ down
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ v[:rank]
    for found in (truncate_product(down, up, rank), truncate_dense(matrix, rank)):
        assert distance(found.up.T @ found.down, best) < 1e-5
        assert found.squared_norm == pytest.approx(s.square().sum().item(), rel=1e-5)
        assert found.squared_error == pytest.approx(s[rank:].square().sum().item(), rel=1e-4, abs=1e-4)


def test_directions_that_are_not_there_take_no_rank() -> None:
    row, column = torch.randn(3, 30), torch.randn(3, 20)
    twice_down, twice_up = torch.cat([row, row]), torch.cat([column, 2 * column])
    assert truncate_product(twice_down, twice_up, 6).down.shape[0] == 3
    assert truncate_dense(twice_up.T @ twice_down, 6).down.shape[0] == 3
    assert truncate_product(row, torch.zeros(3, 20), 6).down.shape[0] == 0


# The folder


def test_the_recipe_is_part_of_the_result(
    adapter: Adapters, llama: MergeBase, mix: Callable[..., tuple[Path, Merged]]
) -> None:
    out, merged = mix(llama, [("lora", 0.7), ("vera", 0.2)], recipe("dare_ties", density=0.5, seed=3, rank=6))
    manifest = json.loads((out / MANIFEST_FILE).read_bytes())
    assert manifest["base_fingerprint"] == llama.fingerprint
    assert manifest["recipe"] == {
        "strategy": "dare_ties",
        "inputs": [
            {"name": kind, "version": folder_digest(adapter("llama", kind)).digest, "weight": weight, "method": kind}
            for kind, weight in (("lora", 0.7), ("vera", 0.2))
        ],
        "rank": 6,
        "density": 0.5,
        "seed": 3,
        "majority_sign": "total",
        "relative_error": pytest.approx(merged.relative_error, rel=1e-2),
    }


def test_the_same_recipe_gives_the_same_version(llama: MergeBase, mix: Callable[..., tuple[Path, Merged]]) -> None:
    made = [mix(llama, MIXTURE, recipe("dare_ties", seed=3)) for _ in range(2)]
    assert folder_digest(made[0][0]).digest == folder_digest(made[1][0]).digest


def test_modules_are_named_by_their_last_names_where_that_says_it(
    llama: MergeBase, mix: Callable[..., tuple[Path, Merged]]
) -> None:
    def targets(mixture: Mixture) -> list[str]:
        config: dict[str, list[str]] = json.loads((mix(llama, mixture, recipe("cat"))[0] / CONFIG_FILE).read_bytes())
        return config["target_modules"]

    assert targets([("lora-query-only", 1.0)]) == ["q_proj"]
    assert all(target.startswith("model.layers.1.") for target in targets([("lora-layer-1", 1.0)]))


def test_an_adapter_of_another_base_is_told(adapter: Adapters, llama: MergeBase, tmp_path: Path) -> None:
    folders = {"lora": adapter("llama", "lora"), "stranger": altered(adapter("llama", "rslora"), tmp_path / "in")}
    config = json.loads((folders["stranger"] / CONFIG_FILE).read_bytes())
    (folders["stranger"] / CONFIG_FILE).write_text(json.dumps(config | {"base_model_name_or_path": "org/Other-7B"}))
    merged = merge(ingredients(folders, [("stranger", 1.0)]), recipe("cat"), llama, tmp_path / "out")
    assert "org/Other-7B" in merged.warnings[0]
    assert "base_fingerprint" not in json.loads((tmp_path / "out" / MANIFEST_FILE).read_bytes())


def altered(folder: Path, copied: Path, **tensors: torch.Tensor) -> Path:
    """A copy, in which the tensors whose keys hold one of the words are others."""
    copied.mkdir()
    (copied / CONFIG_FILE).write_bytes((folder / CONFIG_FILE).read_bytes())
    held = load_file(folder / WEIGHTS_FILE)
    for key, tensor in held.items():
        held[key] = next((new.expand_as(tensor).contiguous() for word, new in tensors.items() if word in key), tensor)
    save_file(held, copied / WEIGHTS_FILE)
    return copied


def test_progress_counts_the_sites(adapter: Adapters, llama: MergeBase, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    folders = {"lora": adapter("llama", "lora")}
    merge(
        ingredients(folders, [("lora", 1.0)]), recipe("cat"), llama, tmp_path / "out",
        progress=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    assert told == [(number, 14) for number in range(1, 15)]


# Refusals


@pytest.mark.parametrize(
    ("parameters", "param"),
    [
        ({"strategy": "average"}, "strategy"),
        ({"strategy": "svd", "rank": 0}, "rank"),
        ({"strategy": "svd", "rank": MAX_RANK + 1}, "rank"),
        ({"strategy": "cat", "rank": 4}, "rank"),
        ({"strategy": "ties", "density": 0.0}, "density"),
        ({"strategy": "ties", "density": 1.01}, "density"),
        ({"strategy": "ties", "density": float("nan")}, "density"),
        ({"strategy": "linear", "density": 0.5}, "density"),
        ({"strategy": "ties", "seed": 1}, "seed"),
        ({"strategy": "dare_ties", "seed": -1}, "seed"),
        ({"strategy": "ties", "majority_sign": "loudest"}, "majority_sign"),
        ({"strategy": "dare_linear", "majority_sign": "total"}, "majority_sign"),
    ],
)
def test_a_parameter_out_of_place_is_refused_by_name(parameters: dict[str, object], param: str) -> None:
    with pytest.raises(BadRequest) as refused:
        recipe(**parameters)  # type: ignore[arg-type]
    assert refused.value.param == param
    assert refused.value.message.startswith(param)


def test_parameters_have_the_defaults_of_their_strategy() -> None:
    assert recipe("linear") == Recipe(Strategy.LINEAR)
    assert recipe("dare_ties") == Recipe(Strategy.DARE_TIES, density=0.5, seed=0, majority_sign="total")


@pytest.mark.parametrize(
    ("mixture", "how", "param"),
    [
        ([], {"strategy": "linear"}, "adapters"),
        ([("lora", 0.0)], {"strategy": "linear"}, "adapters"),
        ([("lora", float("inf"))], {"strategy": "linear"}, "adapters"),
        ([("lora", float("nan"))], {"strategy": "linear"}, "adapters"),
        ([("lora", 1.0), ("lora", 0.5)], {"strategy": "ties"}, "adapters"),
        ([("ia3", 1.0)], {"strategy": "linear"}, "rank"),
        ([("dora", 1.0)], {"strategy": "ties"}, "rank"),
        ([("ia3", 1.0), ("lora", 1.0)], {"strategy": "svd"}, "rank"),
        ([("dora", 1.0), ("ia3-feedforward", 1.0)], {"strategy": "cat"}, "rank"),
    ],
)
def test_inputs_that_make_no_merge_are_refused(
    mixture: Mixture,
    how: dict[str, object],
    param: str,
    llama: MergeBase,
    mix: Callable[..., tuple[Path, Merged]],
    tmp_path: Path,
) -> None:
    with pytest.raises(BadRequest) as refused:
        mix(llama, mixture, recipe(**how))  # type: ignore[arg-type]
    assert refused.value.param == param
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["dora", "ia3", "lora-bias-only"])
def test_what_depends_on_the_weights_is_refused_without_them(
    kind: str, outlined: MergeBase, mix: Callable[..., tuple[Path, Merged]], tmp_path: Path
) -> None:
    with pytest.raises(BadRequest, match=rf"{kind} .*--load-base"):
        mix(outlined, [("lora", 1.0), (kind, 1.0)], recipe("linear", rank=8))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("kind", "op"), [("road", "pair_rotation"), ("oft", "block_rotation"), ("lokr", "kronecker")])
def test_what_is_beside_the_normal_form_is_refused_by_name(
    kind: str, op: str, llama: MergeBase, mix: Callable[..., tuple[Path, Merged]], tmp_path: Path
) -> None:
    with pytest.raises(AdapterRejected, match=rf"{kind} cannot be merged: its {kind} has {op} beside .* Leave it out"):
        mix(llama, [("lora", 1.0), (kind, 1.0)], recipe("linear"))
    assert list(tmp_path.iterdir()) == []


def test_ranks_that_add_up_to_too_much_are_refused(
    dense: Callable[[str], PreTrainedModel], llama: MergeBase, tmp_path: Path
) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], layers_to_transform=[0], r=300)
    folders = {name: save_trained(dense("llama"), config, tmp_path / name, seed) for seed, name in enumerate("ab")}
    mixture = [("a", 0.5), ("b", 0.5)]
    with pytest.raises(BadRequest, match="add up to 600; the limit is 512") as refused:
        merge(ingredients(folders, mixture), recipe("linear"), llama, tmp_path / "out")
    assert refused.value.param == "rank"
    assert merge(ingredients(folders, mixture), recipe("svd", rank=64), llama, tmp_path / "out").relative_error == 0


def test_adapters_that_cancel_out_are_refused(adapter: Adapters, llama: MergeBase, tmp_path: Path) -> None:
    one = adapter("llama", "lora-query-only")
    other = altered(one, tmp_path / "twin")
    (other / MANIFEST_FILE).write_text("{}")  # another version of equal numbers
    folders = {"one": one, "other": other}
    with pytest.raises(BadRequest, match="zero at every site"):
        merge(ingredients(folders, [("one", 1.0), ("other", -1.0)]), recipe("linear"), llama, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("number", "message"), [(float("nan"), "one: .*NaN"), (3e38, "not finite")])
def test_numbers_out_of_range_are_refused(
    number: float, message: str, adapter: Adapters, llama: MergeBase, tmp_path: Path
) -> None:
    folders = {"one": altered(adapter("llama", "lora"), tmp_path / "in", lora_B=torch.tensor(number))}
    with pytest.raises(BadRequest, match=message):
        merge(ingredients(folders, [("one", 1000.0)]), recipe("linear"), llama, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_folder_that_is_there_is_left_alone(llama: MergeBase, adapter: Adapters, tmp_path: Path) -> None:
    (tmp_path / "kept.txt").write_text("mine")
    folders = {"lora": adapter("llama", "lora")}
    with pytest.raises(BadRequest, match="exists already"):
        merge(ingredients(folders, [("lora", 1.0)]), recipe("linear"), llama, tmp_path)
    with pytest.raises(GraftError, match="cannot be written"):
        merge(ingredients(folders, [("lora", 1.0)]), recipe("linear"), llama, tmp_path / "kept.txt" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


def test_a_served_base_is_a_base_to_merge_on(
    dense: Callable[[str], PreTrainedModel], llama: MergeBase, tiny_llama: Path, adapter: Adapters, tmp_path: Path
) -> None:
    """What is served gives its weights through its own product, so that the server can merge without a second copy."""
    live = Base.load(BaseOptions(str(tiny_llama), Quantization.NONE, torch.float32))
    served = MergeBase(live.name, live.fingerprint, live.sites.by_path, projected_weight)
    folders = {"dora": adapter("llama", "dora"), "ia3": adapter("llama", "ia3")}
    mixture = [("dora", 0.5), ("ia3", 0.5)]
    for name, base in (("one", llama), ("other", served)):
        merge(ingredients(folders, mixture), recipe("svd", rank=64), base, tmp_path / name)
    one, other = (logits(dense("llama"), tmp_path / name, llama) for name in ("one", "other"))
    assert distance(one, other) < 1e-5

"""LoRA whose init changed the base's weights: with the pair that it began with, it is served on the unchanged base."""

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from server.adapters.format.checkpoint import Checkpoint
from server.adapters.lowering import lower
from server.adapters.method import Lowered
from server.ground.errors import AdapterRejected
from tests.adapters.dense import edited_logits, sites_of
from tests.adapters.peft_adapters import add_initial_pair, initial_pair, move_away
from tests.fidelity import dense_model

IDS = torch.tensor([[1, 5, 9, 94, 3, 22, 47, 8], [7, 7, 2, 60, 61, 62, 0, 33]])
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(model_folder: Callable[[str], Path]) -> PreTrainedModel:
    return dense_model(model_folder("llama"))


def _corda(model: PreTrainedModel, config: LoraConfig) -> None:
    sample = torch.randint(0, 96, (1, 200), generator=torch.Generator().manual_seed(0))
    preprocess_corda(model, config, run_model=lambda: model(input_ids=sample))


def _lora_ga(model: PreTrainedModel, config: LoraConfig) -> None:
    preprocess_loraga(model, config, lambda: model(input_ids=IDS, labels=IDS).loss.backward())


def _nothing(model: PreTrainedModel, config: LoraConfig) -> None:
    pass


INITS = {
    "pissa": (LoraConfig(init_lora_weights="pissa"), _nothing),
    "pissa_niter": (LoraConfig(init_lora_weights="pissa_niter_2"), _nothing),
    "olora": (LoraConfig(init_lora_weights="olora"), _nothing),
    "corda": (LoraConfig(init_lora_weights="corda", corda_config=CordaConfig(corda_method="ipm")), _corda),
    "lora_ga": (LoraConfig(init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig()), _lora_ga),
}


def trained(base: PreTrainedModel, init: str, folder: Path, seed: int = 0) -> PeftModel:
    """PEFT's own model, its base changed by the init and its pairs moved; saved beside the pairs that it began with."""
    config, prepare = INITS[init]
    config = copy.deepcopy(config)
    config.r, config.lora_alpha, config.target_modules = 4, 7, set(TARGETS)
    model = copy.deepcopy(base)
    with torch.random.fork_rng(), warnings.catch_warnings(action="ignore"):
        torch.manual_seed(seed)
        prepare(model, config)
        adapted = get_peft_model(model, config)
        initial = initial_pair(adapted)
        move_away(adapted, strength=0.3)
        adapted.create_or_update_model_card = lambda _: None
        adapted.save_pretrained(str(folder))
    add_initial_pair(folder, initial)
    return adapted.eval()


def lowered(folder: Path, base: PreTrainedModel) -> Lowered:
    return lower(Checkpoint.open(folder), sites_of(base))


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


@pytest.mark.parametrize("init", INITS)
def test_with_its_initial_pair_it_is_the_model_that_was_trained(
    init: str, base: PreTrainedModel, tmp_path: Path
) -> None:
    adapted = trained(base, init, tmp_path)
    with torch.no_grad():
        theirs, bare = adapted(input_ids=IDS).logits, base(input_ids=IDS).logits
    adapter = lowered(tmp_path, base)
    assert (adapter.rank, adapter.warnings) == (8, ())
    assert difference(edited_logits(base, adapter.edits, IDS), theirs) < 1e-5
    assert difference(bare, theirs) > 1e-2


@pytest.mark.parametrize("init", INITS)
def test_without_it_both_ways_out_are_named(init: str, base: PreTrainedModel, tmp_path: Path) -> None:
    trained(base, init, tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    save_file({key: tensor for key, tensor in load_file(weights).items() if "initial" not in key}, weights)
    with pytest.raises(
        AdapterRejected, match=f"'{init}.* changed the base's .* Save them along, or convert it with PEFT"
    ):
        lowered(tmp_path, base)


def test_half_of_a_pair_is_no_pair(base: PreTrainedModel, tmp_path: Path) -> None:
    trained(base, "pissa", tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    kept = {k: t for k, t in load_file(weights).items() if not k.endswith("0.self_attn.v_proj.lora_initial_B.weight")}
    save_file(kept, weights)
    with pytest.raises(
        AdapterRejected, match="no lora_initial_A and lora_initial_B for model.layers.0.self_attn.v_proj"
    ):
        lowered(tmp_path, base)


def test_loftq_is_served_with_a_warning(base: PreTrainedModel, tmp_path: Path) -> None:
    """Its base was rounded, too, which no pair tells. The edits are those of any other init with this pair."""
    trained(base, "pissa", tmp_path)
    exact = lowered(tmp_path, base)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": "loftq"}))
    adapter = lowered(tmp_path, base)
    assert [warning.split(".")[0] for warning in adapter.warnings] == ["LoftQ trained on a base that it had rounded"]
    logits = (edited_logits(base, one.edits, IDS) for one in (exact, adapter))
    assert torch.equal(*logits)


def test_an_initial_pair_of_an_init_that_left_the_base_alone_is_refused(base: PreTrainedModel, tmp_path: Path) -> None:
    """Subtracting it would be wrong, and passing over it might be."""
    trained(base, "pissa", tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": True}))
    with pytest.raises(AdapterRejected, match="no use for .*lora_initial_A.weight"):
        lowered(tmp_path, base)


def test_pefts_own_conversion_is_the_same_adapter(base: PreTrainedModel, tmp_path: Path) -> None:
    with warnings.catch_warnings(action="ignore"):
        model = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="pissa"))
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(str(tmp_path / "initial"))
        model.peft_config["default"].init_lora_weights = "pissa"
        initial = initial_pair(model)
        torch.manual_seed(0)
        move_away(model, strength=0.3)
        model.create_or_update_model_card = lambda _: None
        model.save_pretrained(str(tmp_path / "ours"))
        add_initial_pair(tmp_path / "ours", initial)
        model.save_pretrained(
            str(tmp_path / "theirs"), path_initial_model_for_weight_conversion=str(tmp_path / "initial")
        )
    ours, theirs = (edited_logits(base, lowered(tmp_path / name, base).edits, IDS) for name in ("ours", "theirs"))
    assert difference(ours, theirs) < 1e-5

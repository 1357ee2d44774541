"""The outline of a base has the sites of the loaded base, and nobody's weights."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    Gemma3Config,
    Gemma3TextConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
    SiglipVisionConfig,
)

from server.ground.errors import StartupRefused
from server.model.base import Base
from server.model.outline import outline
from server.model.pretrained import BaseOptions
from server.model.quantize import Quantization
from tests.demo_files import ROOT
from tests.models import ARCHITECTURES

_SMALL = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_GATED = _SMALL | {"num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 160}
_VISION = SiglipVisionConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
)


def config_only(config: PreTrainedConfig, folder: Path) -> BaseOptions:
    """A model folder with a config and nothing else."""
    config.save_pretrained(folder)
    return BaseOptions(str(folder))


@pytest.mark.parametrize(
    ("architecture", "quantize"),
    [*((name, Quantization.NONE) for name in ARCHITECTURES), ("llama", Quantization.NF4), ("llama", Quantization.INT8)],
)
def test_it_has_the_sites_and_the_groups_of_the_loaded_base(
    architecture: str, quantize: Quantization, model_folder: Callable[[str], Path]
) -> None:
    options = BaseOptions(str(model_folder(architecture)), quantize)
    base, known = Base.load(options), outline(options)
    assert (known.name, known.fingerprint, known.dtype) == (base.name, base.fingerprint, base.dtype)
    assert list(known.sites) == list(base.sites.by_path)
    for path, site in base.sites.by_path.items():
        found = known.sites[path]
        assert (found.index, found.path, found.kind, found.d_in, found.d_out) == (
            site.index, path, site.kind, site.d_in, site.d_out,
        )  # fmt: skip
        assert (found.bias is None) == (site.bias is None)
        assert found.bias is None or found.bias.shape == (site.d_out,)
    groups = [[[site.path for site in group.sites] for group in table.groups] for table in (known.table, base.sites)]
    assert groups[0] == groups[1]


def test_the_demos_base_has_the_same_sites_with_a_tied_head() -> None:
    options = BaseOptions(str(ROOT / "demo" / "base"))
    assert list(outline(options).sites) == list(Base.load(options).sites.by_path)


def test_a_config_is_enough(tmp_path: Path) -> None:
    known = outline(config_only(OPTConfig(**_SMALL, ffn_dim=160, word_embed_proj_dim=32), tmp_path))
    assert known.sites["model.decoder.project_in"].d_in == 32
    assert "model.decoder.embed_positions" not in known.sites


@pytest.mark.parametrize("kind", [MixtralConfig, Qwen3MoeConfig])
def test_experts_are_no_sites(kind: type[PreTrainedConfig], tmp_path: Path) -> None:
    sites = outline(config_only(kind(**_GATED), tmp_path)).sites
    assert "model.layers.1.self_attn.o_proj" in sites
    assert [path for path in sites if "expert" in path] == []


def test_what_a_prompt_never_passes_is_no_site(tmp_path: Path) -> None:
    """A vision tower is part of the model, and adapters on it would never be seen."""
    text = Gemma3TextConfig(**_GATED)
    config = Gemma3Config(text_config=text.to_dict(), vision_config=_VISION.to_dict(), mm_tokens_per_image=1)
    sites = outline(config_only(config, tmp_path)).sites
    assert any(path.endswith("layers.1.mlp.down_proj") for path in sites)
    assert [path for path in sites if "vision" in path] == []


def test_it_takes_no_memory_for_weights(tiny_llama: Path) -> None:
    known = outline(BaseOptions(str(tiny_llama)))
    assert {tensor.device.type for site in known.table.sites for tensor in site.module.parameters()} == {"meta"}


def test_who_asks_for_weights_gets_stand_ins_and_is_counted(tiny_llama: Path) -> None:
    known = outline(BaseOptions(str(tiny_llama)))
    site = known.sites["model.layers.0.mlp.up_proj"]
    assert known.num_asked == 0
    assert site.row_norms_squared.shape == (192,)
    assert site.project(torch.ones(3, 64)).shape == (3, 192)
    assert known.num_asked == 1


def test_stand_in_biases_differ_so_that_no_two_count_as_shared(tiny_llama: Path) -> None:
    biases = [site.bias for site in outline(BaseOptions(str(tiny_llama))).sites.values() if site.bias is not None]
    assert len({bias[0].item() for bias in biases}) == len(biases) > 10


def test_a_checkpoints_own_dtype_depends_on_the_device_and_the_device_need_not_be_there(tmp_path: Path) -> None:
    config = OPTConfig(**_SMALL, ffn_dim=160, word_embed_proj_dim=64)
    config.dtype = torch.float16
    config.save_pretrained(tmp_path)
    named = {kind: outline(BaseOptions(str(tmp_path), device=torch.device(kind))).dtype for kind in ("cpu", "cuda")}
    assert named == {"cpu": torch.bfloat16, "cuda": torch.float16}


def test_a_model_that_is_not_there_is_refused_as_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(StartupRefused, match=r"cannot read the model .*config\.json"):
        outline(BaseOptions(str(tmp_path)))


def test_what_cannot_be_built_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(StartupRefused, match=r"cannot be found without its weights .*--load-base"):
        outline(BaseOptions(str(tmp_path)))

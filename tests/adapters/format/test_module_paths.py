"""Keys as trainers write them, and the sites that they mean."""

import pytest
from torch import nn

from server.adapters.format.module_paths import SiteFinder, canonical_key, layer_of
from server.ground.errors import AdapterRejected
from tests.adapters.dense import DenseSite

PLAIN = "model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("base_model.model." + PLAIN, PLAIN),
        ("base_model.model.base_model.model." + PLAIN, PLAIN),
        (PLAIN, PLAIN),
        ("module.base_model.model." + PLAIN, PLAIN),
        ("_orig_mod.base_model.model." + PLAIN, PLAIN),
        ("base_model.model._orig_mod." + PLAIN, PLAIN),
        ("_fsdp_wrapped_module.base_model.model." + PLAIN, PLAIN),
        ("base_model.model.model.layers.0._fsdp_wrapped_module.self_attn.q_proj.lora_A.weight", PLAIN),
        ("base_model.model.model.layers.0._checkpoint_wrapped_module.self_attn.q_proj.lora_A.weight", PLAIN),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight", PLAIN),
        ("base_model.model.layers.0.mlp.up_proj.lora_B.weight", "layers.0.mlp.up_proj.lora_B.weight"),
        ("base_model.model.transformer.wte.lora_embedding_A.default", "transformer.wte.lora_embedding_A"),
        ("base_model.model.lm_head.lora_magnitude_vector.default.weight", "lm_head.lora_magnitude_vector.weight"),
        ("base_model.vera_A", "vera_A"),
        ("base_model.vera_A.default", "vera_A"),
    ],
)
def test_wrappers_and_adapter_name_leave_the_key(name: str, key: str) -> None:
    assert canonical_key(name) == key


def finder(*paths: str) -> SiteFinder:
    return SiteFinder({path: DenseSite(place, path, nn.Linear(1, 1)) for place, path in enumerate(paths)})


TEXT = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.embed_tokens", "lm_head")
MULTIMODAL = ("model.language_model.layers.0.self_attn.q_proj", "model.vision_tower.layers.0.self_attn.q_proj")


@pytest.mark.parametrize(
    ("paths", "module", "path"),
    [
        (TEXT, "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.q_proj"),
        (TEXT, "layers.1.self_attn.q_proj", "model.layers.1.self_attn.q_proj"),
        (TEXT, "model.model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.q_proj"),
        (TEXT, "language_model.model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj"),
        (TEXT, "model.language_model.embed_tokens", "model.embed_tokens"),
        (TEXT, "language_model.lm_head", "lm_head"),
        (MULTIMODAL, "language_model.model.layers.0.self_attn.q_proj", MULTIMODAL[0]),
        (MULTIMODAL, "model.layers.0.self_attn.q_proj", MULTIMODAL[0]),
        (MULTIMODAL, "vision_tower.layers.0.self_attn.q_proj", MULTIMODAL[1]),
        (("transformer.h.0.attn.c_attn",), "h.0.attn.c_attn", "transformer.h.0.attn.c_attn"),
        (("gpt_neox.layers.3.attention.dense",), "layers.3.attention.dense", "gpt_neox.layers.3.attention.dense"),
    ],
)
def test_a_path_finds_its_site(paths: tuple[str, ...], module: str, path: str) -> None:
    assert finder(*paths).find(module, "key").path == path


@pytest.mark.parametrize(
    ("paths", "module", "words"),
    [
        (TEXT, "model.layers.2.self_attn.q_proj", "no module model.layers.2.self_attn.q_proj"),
        (TEXT[:1], "model.layers.99.self_attn.q_proj", "no module"),  # a lone layer is not taken for another
        (TEXT[:1], "self_attn.q_proj", "no module"),
        (TEXT, "model.vision_tower.layers.0.self_attn.q_proj", "no module"),
        (TEXT, "model.layers.0.self_attn.w_pack", "another model"),
        (("model.layers.0.q", "language_model.layers.0.q"), "layers.0.q", "may mean language_model.layers.0.q, model"),
        (("encoder.layers.0.q", "decoder.layers.0.q"), "layers.0.q", "may mean decoder"),
    ],
)
def test_what_is_not_certain_is_refused_by_name(paths: tuple[str, ...], module: str, words: str) -> None:
    with pytest.raises(AdapterRejected, match=words) as refused:
        finder(*paths).find(module, "the.key.as.written")
    assert refused.value.message.startswith("the.key.as.written: ")


@pytest.mark.parametrize(
    ("path", "layer"),
    [
        ("model.layers.10.self_attn.q_proj", "model.layers.10"),
        ("transformer.h.0.mlp.c_proj", "transformer.h.0"),
        ("model.layers.3.mlp.experts.5.up_proj", "model.layers.3"),
        ("layers.7.attn.q", "layers.7"),
        ("model.embed_tokens", None),
        ("lm_head", None),
    ],
)
def test_a_module_lies_in_the_layer_that_its_path_numbers_first(path: str, layer: str | None) -> None:
    assert layer_of(path) == layer

"""Bottleneck adapters as AdapterHub's library saves them: served, they answer as its own forward does."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from examples.bottleneck import BottleneckConfig, load_bottleneck, save_bottleneck, train_bottleneck
from server.adapters.format.checkpoint import Checkpoint
from server.adapters.lowering import lower
from server.adapters.merging.change import what_is_no_change
from server.adapters.method import Lowered
from server.adapters.methods import method_for
from server.adapters.methods.bottleneck import _NON_LINEARITIES
from server.assemble import Server
from server.engine.sequence import SamplingParams
from server.ground.config import Settings
from server.ground.errors import AdapterRejected
from server.model.context import Scope
from server.model.site import Site
from server.model.site_table import SiteTable
from server.ops.site_ops.bottleneck import _FUNCTIONS
from tests.adapters import bottleneck_oracle as oracle
from tests.adapters.peft_adapters import make_adapter, peft_logits
from tests.api.conftest import serving as listening
from tests.models import byte_tokenizer
from tests.serving import Answer, Ask, answer_all, logprob_rows, serving

ANSWERS = load_file(oracle.DATA / oracle.ANSWERS)
WHOLE = SamplingParams(
    oracle.NUM_NEW_TOKENS,
    temperature=0.0,
    ignore_eos=True,
    logprobs=oracle.VOCAB_SIZE,
    prompt_logprobs=oracle.VOCAB_SIZE,
)


def copied(name: str, folder: Path) -> Path:
    """The adapter as the library saved it, with the weights under the name that the server reads."""
    shutil.copytree(oracle.DATA / name, folder)
    (folder / oracle.SAVED_AS).rename(folder / "adapter_model.safetensors")
    return folder


def of_model(model: str) -> list[str]:
    return [name for name, case in oracle.CASES.items() if case.model == model]


@contextmanager
def served(model: PreTrainedModel, scratch: Path, **flags: str) -> Iterator[Server]:
    """A server on a model of the oracle's, with all adapters in `scratch`/adapters; prompts in chunks of 5."""
    model.save_pretrained(scratch / "model")
    byte_tokenizer().save_pretrained(scratch / "model")
    defaults = {"adapters": str(scratch / "adapters"), "max_sequences": "16", "max_batch_tokens": "16"}
    with serving(scratch / "model", scratch, **defaults | flags) as server:
        yield server


def error(name: str, got: Answer) -> float:
    """The largest difference of log-probabilities from the library's, relative to the largest of them."""
    assert got.error is None
    rows = logprob_rows([*got.prompt_logprobs[1:], *got.logprobs], oracle.VOCAB_SIZE)[:, :: oracle.EVERY]
    expected = ANSWERS[f"{name}.log_probabilities"]
    return float((rows - expected).abs().max() / expected.abs().max())


def is_librarys(name: str, got: Answer) -> bool:
    return [*oracle.PROMPT, *got.token_ids] == ANSWERS[f"{name}.token_ids"].tolist()


@pytest.mark.parametrize("model", oracle.MODELS)
def test_answers_are_those_of_the_library(model: str, tmp_path: Path) -> None:
    """Each alone, and all in one batch with the base: the whole distribution, and what is generated."""
    names = of_model(model)
    for name in names:
        copied(name, tmp_path / "adapters" / name)
    with served(oracle.made(model), tmp_path) as server:
        asks = [Ask(name, oracle.PROMPT, WHOLE) for name in (*names, None)]
        alone = [answer_all(server, [ask])[0] for ask in asks]
        together = answer_all(server, asks)
    for answers in (alone, together):
        assert {n: e for n, got in zip(names, answers, strict=False) if not (e := error(n, got)) < 1e-5} == {}
        assert [n for n, got in zip(names, answers, strict=False) if not is_librarys(n, got)] == []
    assert together[-1].token_ids == alone[-1].token_ids


def test_in_one_batch_with_lora_everybody_gets_an_answer_of_their_own(tmp_path: Path) -> None:
    """Several of each, prompts in chunks beside decodes; and the device's memory adds up afterwards."""
    model, names = oracle.made("llama"), of_model("llama")
    for name in names:
        copied(name, tmp_path / "adapters" / name)
    lora = make_adapter(model, "lora", tmp_path / "adapters" / "lora", seed=1)
    with served(model, tmp_path) as server:
        asks = [Ask(name, oracle.PROMPT, WHOLE) for name in (*names, "lora", *names, None)]
        got = dict(zip([ask.adapter for ask in asks], answer_all(server, asks), strict=True))
        assert server.registry.check_integrity() == ()
        tier = server.adapters
        assert tier.used_bytes + tier.free_bytes + tier.waste_bytes == tier.capacity_bytes
    assert {name: e for name in names if not (e := error(name, got[name])) < 1e-5} == {}
    ids = torch.tensor([[*oracle.PROMPT, *got["lora"].token_ids]])
    for name, logits in (("lora", peft_logits(model, lora, ids)), (None, model(input_ids=ids).logits.detach())):
        first = torch.log_softmax(logits[0, : len(oracle.PROMPT) - 1].double(), dim=-1)
        rows = logprob_rows(got[name].prompt_logprobs[1:], oracle.VOCAB_SIZE).double()
        assert float((rows - first).abs().max() / first.abs().max()) < 1e-5


def test_a_neighbours_adapter_changes_nothing_where_the_op_is_for_none(tmp_path: Path) -> None:
    """Of two adapters, one reads the residual stream and one does not; each answers alike next to the other."""
    names = ["llama-parallel", "llama-houlsby"]
    for name in names:
        copied(name, tmp_path / "adapters" / name)
    with served(oracle.made("llama"), tmp_path) as server:
        long = [Ask(name, oracle.PROMPT * 4, WHOLE) for name in names]
        alone = [answer_all(server, [ask])[0].token_ids for ask in long]
        assert [answer.token_ids for answer in answer_all(server, [*long, *long])] == [*alone, *alone]


def test_tensors_of_any_size_lie_in_the_devices_buffer_and_mean_the_same(tmp_path: Path) -> None:
    """A small one beside one of the same numbers: rows of zeros make it large, and nothing else."""
    small = copied("llama-houlsby", tmp_path / "adapters" / "small")
    large = shutil.copytree(small, tmp_path / "adapters" / "large") / "adapter_model.safetensors"
    save_file({key: padded(key, tensor, 40) for key, tensor in load_file(large).items()}, large)
    with served(oracle.made("llama"), tmp_path) as server:
        for name in ("small", "large"):
            before = server.adapters.used_bytes
            assert error("llama-houlsby", answer_all(server, [Ask(name, oracle.PROMPT, WHOLE)])[0]) < 1e-5
            assert server.adapters.used_bytes > before
        both = answer_all(server, [Ask(name, oracle.PROMPT, WHOLE) for name in ("small", "large") * 2])
    assert [error("llama-houlsby", got) < 1e-5 for got in both] == [True] * 4


def padded(key: str, tensor: torch.Tensor, rank: int) -> torch.Tensor:
    """An adapter's tensor with rows of zeros up to `rank`, which silu leaves without effect."""
    if "adapter_down" in key:
        return torch.cat([tensor, tensor.new_zeros(rank - len(tensor), *tensor.shape[1:])])
    if key.endswith("adapter_up.weight"):
        return torch.cat([tensor, tensor.new_zeros(len(tensor), rank - tensor.shape[1])], dim=1)
    return tensor


def test_uploaded_under_the_librarys_own_file_name_it_answers_over_http(tmp_path: Path) -> None:
    model = oracle.made("gpt2")
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    folder = oracle.DATA / "gpt2-houlsby"
    settings = Settings(model=str(tmp_path / "model"), quantize="none", dtype="float32", store=tmp_path / "store")
    with listening(settings) as live:
        files = {"config": (folder / "adapter_config.json").read_bytes()}
        files["weights"] = (folder / oracle.SAVED_AS).read_bytes()
        made = live.http.post("/v1/adapters", data={"name": "hub"}, files=files)
        assert made.status_code == 201, made.text
        assert (made.json()["method"], made.json()["rank"]) == ("bottleneck", 4)
        body = {"adapter": "hub", "prompt": list(oracle.PROMPT), "max_tokens": oracle.NUM_NEW_TOKENS, "temperature": 0}
        answer = live.post("/v1/completions", **body).json()
    expected = ANSWERS["gpt2-houlsby.token_ids"].tolist()[len(oracle.PROMPT) :]
    assert answer["choices"][0]["text"] == byte_tokenizer().decode(expected)


@cache
def sites_of(model: str) -> Mapping[str, Site]:
    return SiteTable(oracle.made(model), Scope()).by_path


def lowered(folder: Path, model: str = "llama") -> Lowered:
    return lower(Checkpoint.open(folder), sites_of(model))


def altered(
    folder: Path,
    config: Mapping[str, Any],
    own: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor | None] | None = None,
    spell: Callable[[str], str] = str,
) -> Path:
    """With fields of the config and of the method's own part replaced, and tensors (None removes one)."""
    path = folder / "adapter_config.json"
    before = json.loads(path.read_text())
    fields = before | {"config": before["config"] | own} | config
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not DROPPED}))
    path = folder / "adapter_model.safetensors"
    changed = load_file(path) | dict(tensors or {})
    save_file({spell(name): tensor for name, tensor in changed.items() if tensor is not None}, path)
    return folder


DROPPED: Any = object()
UP = "model.layers.0.output_adapters.adapters.llama-houlsby.adapter_up.weight"
UP_BIAS = "model.layers.0.output_adapters.adapters.llama-houlsby.adapter_up.bias"
DOWN = "model.layers.0.output_adapters.adapters.llama-houlsby.adapter_down.0.weight"
OTHERS = "model.layers.0.output_adapters.adapters.others.adapter_up.weight"
GATE = "model.layers.0.output_adapters.adapters.llama-houlsby.gate.weight"
INVERTIBLE = "invertible_adapters.llama-houlsby.F.0.weight"
STREAM = {"original_ln_before": True}

# fields of the config, of the method's own part, tensors, words of the sentence
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, torch.Tensor | None], str]] = {
    "another method": ({}, {"architecture": "lora"}, {}, "architecture = lora .* train this one with PEFT"),
    "compacter": ({}, {"phm_layer": True}, {}, "phm_layer = True .* phm_layer=False"),
    "gate": ({}, {"use_gating": True}, {}, "use_gating = True .* mean over all tokens"),
    "invertible": ({}, {"inv_adapter": "nice"}, {}, "inv_adapter = nice .* inv_adapter=None"),
    "cross-attention": ({}, {"cross_adapter": True}, {}, "cross_adapter = True .* no cross-attention"),
    "unknown field": ({}, {"warp": 1}, {}, "warp = 1 .* not known"),
    "unknown field around": ({"warp": 1}, {}, {}, "warp = 1 .* not known"),
    "another model": ({"model_type": "bert"}, {}, {}, "model_type = 'bert' .* served for llama, mistral"),
    "no model": ({"model_type": DROPPED}, {}, {}, "model_type in adapter_config.json must be a string"),
    "stream lost": ({}, {"original_ln_after": False}, {}, "original_ln_after = False.* lose the residual stream"),
    "stream lost beside": ({}, {"original_ln_after": False, "is_parallel": True}, {}, "lose the residual stream"),
    "stream twice": ({}, STREAM | {"residual_before_ln": False}, {}, "add it twice"),
    "stream normalized": (
        {},
        STREAM
        | {"residual_before_ln": False, "original_ln_after": False}
        | {"ln_after": True, "adapter_residual_before_ln": True},
        {},
        "normalize it",
    ),
    "post_add": ({}, {"residual_before_ln": "post_add"}, {}, "residual_before_ln .* true or false, not 'post_add'"),
    "last norm everywhere": ({"model_type": "gemma2"}, STREAM, {}, "original_ln_before = true for gemma2"),
    "plus by hooks": ({"model_type": "qwen2"}, {"original_ln_after": False}, {}, "for qwen2: the library itself"),
    "activation": ({}, {"non_linearity": "prelu"}, {}, "non_linearity = 'prelu' .* known are gelu"),
    "activation of numbers": ({}, {"non_linearity": 3}, {}, "non_linearity in adapter_config.json must be a string"),
    "scaling": ({}, {"scaling": "much"}, {}, "scaling in adapter_config.json must be a finite number"),
    "scaling of lists": ({}, {"scaling": [1.0]}, {}, "scaling in adapter_config.json must be a finite number"),
    "scaling beyond floats": ({}, {"scaling": 1e30}, {UP: torch.full((32, 4), 1e30)}, "up of bottleneck .* not finite"),
    "no scaling": ({}, {"scaling": "channel"}, {}, "layers.0.attention_adapters has no scaling in the file"),
    "no norm": ({}, {"ln_after": True}, {}, "has no adapter_norm_after.weight"),
    "no first norm": ({}, {"ln_before": True}, {}, "has no adapter_down.1.weight"),
    "leave_out": ({}, {"leave_out": [0]}, {}, "has attention_adapters of layer 0, other than"),
    "leave_out of words": ({}, {"leave_out": ["0"]}, {}, "leave_out .* list of layer numbers"),
    "flag of words": ({}, {"mh_adapter": "yes"}, {}, "mh_adapter in adapter_config.json must be true or false"),
    "one too many": ({}, {"mh_adapter": False}, {}, "has attention_adapters of layer 0"),
    "no bias": ({}, {}, {UP_BIAS: None}, "layers.0.output_adapters has no adapter_up.bias"),
    "width": ({}, {}, {UP: torch.ones(31, 4)}, r"adapter_up.weight has the shape \[31, 4\], .* needs \[32, 4\]"),
    "scalar": ({}, {}, {DOWN: torch.tensor(1.0)}, r"adapter_down.0.weight has the shape \[\]"),
    "two adapters": ({}, {}, {OTHERS: torch.ones(32, 4)}, "adapters llama-houlsby and others: save one"),
    "gate in the file": ({}, {}, {GATE: torch.ones(1, 32)}, "no use for .*gate.weight"),
    "invertible in the file": ({}, {}, {INVERTIBLE: torch.ones(3)}, "no use for invertible_adapters"),
    "twice": ({}, {}, {UP.removeprefix("model."): torch.ones(32, 4)}, "layers.0.output_adapters is in the file twice"),
    "layer of another model": (
        {}, {}, {UP.replace("layers.0", "layers.7"): torch.ones(32, 4)}, "has output_adapters of layer 7"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("config", "own", "tensors", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_what_the_library_computes_otherwise_is_refused_by_name(
    config: dict[str, Any], own: dict[str, Any], tensors: dict[str, torch.Tensor | None], words: str, tmp_path: Path
) -> None:
    folder = altered(copied("llama-houlsby", tmp_path / "adapter"), config, own, tensors)
    with pytest.raises(AdapterRejected, match=words) as refused:
        lowered(folder)
    assert len(refused.value.message) < 400


def test_a_missing_module_is_refused_as_the_library_would_start_it_anew(tmp_path: Path) -> None:
    folder = copied("llama-houlsby", tmp_path / "adapter")
    keys = load_file(folder / "adapter_model.safetensors")
    gone = dict.fromkeys(key for key in keys if "layers.1.output" in key)
    with pytest.raises(AdapterRejected, match="lacks output_adapters of layer 1"):
        lowered(altered(folder, {}, {}, gone))


def reason(folder: Path) -> str:
    """Why the adapter is refused; empty if it is not."""
    try:
        lowered(folder)
    except AdapterRejected as refused:
        return refused.message
    return ""


def test_every_field_that_the_library_writes_was_thought_of(tmp_path: Path) -> None:
    folder = copied("llama-houlsby", tmp_path / "adapter")
    plain = (folder / "adapter_config.json").read_text()
    config = json.loads(plain)
    for name in config["config"]:
        (folder / "adapter_config.json").write_text(plain)
        assert "not known" not in reason(altered(folder, {}, {name: "peculiar"}))
    assert config["version"] == "adapters.1.3.0"


@pytest.mark.parametrize("name", ["llama-norms", "llama-plus"])
def test_the_adapters_own_name_does_not_matter(name: str, tmp_path: Path) -> None:
    """Not even the one that PEFT's keys lose."""
    plain = lowered(copied(name, tmp_path / "plain"))
    folder = copied(name, tmp_path / "default")
    other = lowered(altered(folder, {"name": "default"}, {}, spell=lambda key: key.replace(f".{name}.", ".default.")))
    assert plain.edits.keys() == other.edits.keys()
    for path, edit in plain.edits.items():
        for field, tensor in edit.ops.get("bottleneck", {}).items():
            assert tensor.equal(other.edits[path].ops["bottleneck"][field])


def test_the_norm_before_may_have_either_name_or_both_if_they_agree(tmp_path: Path) -> None:
    folder = copied("llama-norms", tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    norms = {key: t for key, t in tensors.items() if "adapter_down.0" in key}
    again = {key.replace("adapter_down.0", "adapter_norm_before"): t.clone() for key, t in norms.items()}
    plain = lowered(folder)
    both = lowered(altered(folder, {}, {}, again))
    other = lowered(altered(folder, {}, {}, dict.fromkeys(norms)))
    path = "model.layers.0.mlp.down_proj"
    for made in (both, other):
        assert made.edits[path].ops["bottleneck"]["before"].equal(plain.edits[path].ops["bottleneck"]["before"])
    with pytest.raises(AdapterRejected, match="are one norm, and differ"):
        lowered(altered(folder, {}, {}, {key: t + 1 for key, t in norms.items()}))


def test_old_files_call_an_activation_by_another_name(tmp_path: Path) -> None:
    """Files that name no version: there "gelu" is the approximate one."""

    def act(name: str, **config: Any) -> float:
        folder = copied("llama-houlsby", tmp_path / f"{name}-{len(config)}")
        edits = lowered(altered(folder, config, {"non_linearity": name})).edits
        return edits["model.layers.0.mlp.down_proj"].ops["bottleneck"]["act"].item()

    exact, approximate = act("gelu"), act("gelu_new")
    assert exact != approximate
    assert act("gelu", version=DROPPED) == approximate
    assert act("gelu_orig", version=DROPPED) == exact


@pytest.mark.parametrize("name", _NON_LINEARITIES)
def test_an_activation_is_the_one_that_transformers_calls_so(name: str) -> None:
    x = torch.linspace(-12, 12, 201)
    theirs = torch.nn.functional.leaky_relu(x) if name == "leakyrelu" else ACT2FN[name](x)
    torch.testing.assert_close(_FUNCTIONS[_NON_LINEARITIES[name]](x), theirs, rtol=1e-5, atol=1e-5)


def test_a_pickle_is_refused_with_the_librarys_own_way_out(tmp_path: Path) -> None:
    folder = copied("llama-houlsby", tmp_path / "adapter")
    torch.save({}, folder / "pytorch_adapter.bin")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterRejected, match=r"pytorch_adapter.bin is a pickle.*use_safetensors=True"):
        Checkpoint.open(folder)


def test_weights_under_the_librarys_name_are_to_be_renamed() -> None:
    with pytest.raises(AdapterRejected, match=r"no adapter_model.safetensors .*: rename adapter.safetensors to it"):
        Checkpoint.open(oracle.DATA / "llama-houlsby")


def test_a_bottleneck_is_no_part_of_a_mix(tmp_path: Path) -> None:
    reason = what_is_no_change(lowered(copied("llama-houlsby", tmp_path / "adapter")))
    assert reason == "its bottleneck has bottleneck beside the normal form"


def test_a_config_without_peft_type_and_without_a_method_is_not_claimed() -> None:
    assert method_for({"config": {}, "model_type": "llama"}).name == "bottleneck"
    with pytest.raises(AdapterRejected, match="peft_type = None"):
        method_for({"config": None, "model_type": "llama"})


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_what_the_example_trains_is_served_as_it_was_trained(model: str, tmp_path: Path) -> None:
    trained, losses = oracle.made(model), []
    config = BottleneckConfig(reduction_factor=8, non_linearity="gelu", learning_rate=0.02)
    ids = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids}
    train_bottleneck(trained, [batch] * 6, config, lambda _, loss: losses.append(loss))
    assert losses[-1] < losses[0] - 0.1
    save_bottleneck(trained, config, tmp_path / "adapters" / "own")
    with served(oracle.made(model), tmp_path) as server:
        got = answer_all(server, [Ask("own", oracle.PROMPT, WHOLE)])[0]
    with torch.no_grad():
        logits = trained(input_ids=torch.tensor([[*oracle.PROMPT, *got.token_ids]])).logits[0, :-1]
    expected = torch.log_softmax(logits.double(), dim=-1)
    rows = logprob_rows([*got.prompt_logprobs[1:], *got.logprobs], oracle.VOCAB_SIZE)
    assert float((rows - expected).abs().max() / expected.abs().max()) < 1e-5


def test_what_the_example_saved_it_loads(tmp_path: Path) -> None:
    trained, config = oracle.made("llama"), BottleneckConfig(mh_adapter=False, reduction_factor=8, learning_rate=0.02)
    ids = torch.arange(16)[None]
    train_bottleneck(trained, [{"input_ids": ids, "labels": ids}] * 3, config, lambda *_: None)
    save_bottleneck(trained, config, tmp_path, name="own")
    loaded = load_bottleneck(oracle.made("llama"), tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, trained(ids).logits)
        assert not torch.equal(loaded(ids).logits, oracle.made("llama")(ids).logits)


@pytest.mark.parametrize(
    ("model", "config", "words"),
    [("gemma2", BottleneckConfig(), "gemma2"), ("llama", BottleneckConfig(False, False), "nothing to train")],
)
def test_what_the_example_cannot_train_it_says(model: str, config: BottleneckConfig, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        train_bottleneck(oracle.made(model), [], config, lambda *_: None)

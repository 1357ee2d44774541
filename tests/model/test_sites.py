"""Sites: which there are, which share an input, and what the frozen weight answers to methods that ask."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from server.model.base import Base
from server.model.context import AttentionBatch, Scope, StepContext
from server.model.pretrained import BaseOptions
from server.model.quantize import Quantization
from server.model.site import PRODUCTS, SiteKind
from server.model.site_table import SiteTable
from server.model.sites import BaseSite
from server.ops import GroupEdits, SiteEdits, TokenLayout
from tests.adapters.dense import DenseSite, sites_of
from tests.models import ARCHITECTURES, VOCAB_SIZE

_ATTENTION = [("q_proj", "k_proj", "v_proj"), ("o_proj",)]
_LLAMA_LIKE = [*_ATTENTION, ("gate_proj", "up_proj"), ("down_proj",)]
GROUPS: dict[str, list[tuple[str, ...]]] = {
    "llama": _LLAMA_LIKE,
    "mistral": _LLAMA_LIKE,
    "qwen2": _LLAMA_LIKE,
    "qwen3": _LLAMA_LIKE,
    "gemma2": _LLAMA_LIKE,
    "gemma3": _LLAMA_LIKE,
    "opt": [("q_proj", "k_proj", "v_proj"), ("out_proj",), ("fc1",), ("fc2",)],
    "gpt_neox": [("query_key_value",), ("dense",), ("dense_h_to_4h",), ("dense_4h_to_h",)],
    "mixtral": _ATTENTION,
    "phi3": [("qkv_proj",), ("o_proj",), ("gate_up_proj",), ("down_proj",)],
    "gpt2": [("c_attn",), ("c_proj",), ("c_fc",), ("c_proj",)],
}
# What comes before the layers and after them.
STARTS: dict[str, list[tuple[str, ...]]] = {
    "gpt2": [("wte",), ("wpe",)], "opt": [("embed_tokens",), ("project_in",)], "gpt_neox": [("embed_in",)],
}  # fmt: skip
ENDS: dict[str, list[tuple[str, ...]]] = {"opt": [("project_out",), ("lm_head",)]}


@pytest.fixture(params=sorted(ARCHITECTURES))
def architecture(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def base(architecture: str, model_folder: Callable[[str], Path]) -> Base:
    return Base.load(BaseOptions(str(model_folder(architecture)), Quantization.NONE, torch.float32))


@pytest.fixture
def dense(architecture: str, model_folder: Callable[[str], Path]) -> nn.Module:
    model: nn.Module = AutoModelForCausalLM.from_pretrained(model_folder(architecture))
    return model


# Finding and grouping


def test_sites_that_share_an_input_form_a_group_in_call_order(base: Base, architecture: str) -> None:
    products = [group for group in base.sites.groups if group.sites[0].kind in PRODUCTS]
    names = [tuple(site.path.rpartition(".")[2] for site in group.sites) for group in products]
    layers = [*_LLAMA_LIKE, *_ATTENTION] if architecture == "qwen3_moe" else 2 * GROUPS[architecture]
    starts, ends = STARTS.get(architecture, [("embed_tokens",)]), ENDS.get(architecture, [("lm_head",)])
    assert names == [*starts, *layers, *ends]
    for index, group in enumerate(base.sites.groups):
        assert group.index == index
        assert [(site.group, site.member) for site in group.sites] == [(index, i) for i in range(len(group.sites))]


def test_every_site_is_described_as_its_module_is(base: Base, dense: nn.Module) -> None:
    expected = editable(dense)
    products = {path: site for path, site in base.sites.by_path.items() if site.kind in PRODUCTS}
    assert products.keys() == expected.keys()
    for path, site in products.items():
        other = expected[path]
        assert (site.kind, site.d_in, site.d_out) == (other.kind, other.d_in, other.d_out)
        assert (site.bias is None) == (other.bias is None)
        if site.bias is not None:
            torch.testing.assert_close(site.bias, other.bias, rtol=0, atol=0)
        assert site.is_head == (path == "lm_head")


def editable(dense: nn.Module) -> dict[str, DenseSite]:
    """Of the dense model's linears and embeddings those that can be sites: OPT's positions come as a mask."""
    return {path: site for path, site in sites_of(dense).items() if path != "model.decoder.embed_positions"}


class Odd(nn.Module):
    """A linear called twice, one never called, one fed other rows, two embeddings of one input, and one fit for all."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Embedding(9, 4), nn.Embedding(7, 4)
        self.twice, self.never, self.pooled, self.fit = (nn.Linear(4, 4) for _ in range(4))
        self.head = nn.Linear(4, 9)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.wide(ids) + self.narrow(ids)
        x = self.twice(self.twice(x))
        x = x + self.pooled(x.mean(dim=1, keepdim=True))
        out: torch.Tensor = self.head(self.fit(x))
        return out


def odd_table(scope: Scope) -> tuple[Odd, SiteTable]:
    torch.manual_seed(0)
    model = Odd()
    table = SiteTable(model, scope)
    calls: list[tuple[BaseSite, torch.Tensor]] = []
    for site in table.sites:
        site.observer = lambda site, x: calls.append((site, x))
    model(torch.tensor([[1, 2, 3]]))
    for site in table.sites:
        site.observer = None
    table.group_by_input(calls, num_tokens=3)
    return model, table


def test_what_cannot_be_edited_token_by_token_is_no_site() -> None:
    _, table = odd_table(Scope())
    assert sorted(table.by_path) == ["fit", "head", "narrow", "wide"]


def test_embeddings_of_the_same_ids_stay_apart() -> None:
    """Their rank rows are as wide as their vocabularies, so one shrink cannot serve both."""
    _, table = odd_table(Scope())
    assert table.by_path["wide"].group != table.by_path["narrow"].group


class EverywhereEdits:
    """Edits at every group that is asked for: each output becomes zero."""

    def group(self, index: int) -> GroupEdits | None:
        assert index >= 0
        return GroupEdits((SiteEdits(out_scale=torch.zeros(1, 1)),))

    def embedding_rows(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        raise AssertionError


def test_modules_outside_of_the_table_stay_as_they_are_during_a_step() -> None:
    scope = Scope()
    model, _ = odd_table(scope)
    nothing = torch.zeros(3, dtype=torch.long)
    layout = TokenLayout(nothing, 3, ())
    context = StepContext(AttentionBatch(nothing, nothing, None, 0, ()), layout, layout, EverywhereEdits())
    x = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outside = model.twice(x)
        with scope.enter(context):
            assert torch.equal(model.twice(x), outside)
            assert not model.fit(x).any()


def test_an_embedding_called_with_more_than_ids_is_no_site() -> None:
    class Positions(nn.Embedding):
        def forward(self, mask: torch.Tensor, offset: int = 0) -> torch.Tensor:
            return super().forward(mask.cumsum(-1) + offset)

    model = Odd()
    model.narrow = Positions(7, 4)
    assert "narrow" not in SiteTable(model, Scope()).by_path


def test_passes_do_not_nest() -> None:
    scope = Scope()
    nothing = torch.zeros(0, dtype=torch.long)
    layout = TokenLayout(nothing, 0, ())
    context = StepContext(AttentionBatch(nothing, nothing, None, 0, ()), layout, layout, None)
    with scope.enter(context), pytest.raises(AssertionError, match="do not nest"), scope.enter(context):
        pass
    assert scope.current is None


# What methods may ask


def test_row_norms_are_those_of_the_weight(base: Base, dense: nn.Module) -> None:
    for path, other in editable(dense).items():
        torch.testing.assert_close(base.sites.by_path[path].row_norms_squared, other.row_norms_squared)


def test_project_is_the_weight_without_the_bias(base: Base, dense: nn.Module) -> None:
    for path, other in editable(dense).items():
        rows = torch.randn(3, other.d_in, generator=torch.Generator().manual_seed(0))
        out = base.sites.by_path[path].project(rows)
        assert (out.dtype, out.device.type) == (torch.float32, "cpu")
        torch.testing.assert_close(out, other.project(rows), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama"], indirect=True)
def test_project_during_a_step_is_the_bare_weight(base: Base, dense: nn.Module) -> None:
    site = base.sites.by_path["lm_head"]
    assert site.kind is SiteKind.LINEAR
    nothing = torch.zeros(0, dtype=torch.long)
    layout = TokenLayout(nothing, 0, ())
    rows = torch.randn(2, site.d_in, generator=torch.Generator().manual_seed(0))
    context = StepContext(AttentionBatch(nothing, nothing, None, 0, ()), layout, layout, EverywhereEdits())
    with base.scope.enter(context):
        out = site.project(rows)
    assert out.shape == (2, VOCAB_SIZE)
    torch.testing.assert_close(out, sites_of(dense)["lm_head"].project(rows), rtol=1e-5, atol=1e-5)

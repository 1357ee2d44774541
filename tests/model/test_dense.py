"""The base with every weight at hand: what is read is what the modules multiply with."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from server.model.dense import DenseBase, DenseSite, make_plain, stored_dtype
from server.model.pretrained import BaseOptions
from server.model.quantize import Quantization
from server.model.site import PRODUCTS, SiteKind


def products(base: DenseBase) -> dict[str, DenseSite]:
    return {path: site for path, site in base.sites.items() if site.kind in PRODUCTS}


@pytest.mark.parametrize("quantize", ["none", "nf4", "int8"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_site_gives_the_weight_that_its_module_multiplies_with(
    architecture: str, quantize: str, model_folder: Callable[[str], Path]
) -> None:
    options = BaseOptions(str(model_folder(architecture)), Quantization(quantize), torch.float32)
    base = make_plain(DenseBase.load(options))
    for site in products(base).values():
        weight, bias = site.weight(), site.bias
        assert weight.shape == (site.d_out, site.d_in)
        torch.testing.assert_close(site.row_norms_squared, weight.square().sum(1))
        rows = torch.randn(3, site.d_in)
        torch.testing.assert_close(site.project(rows), rows @ weight.T)
        if site.kind is SiteKind.LINEAR:
            expected = rows @ weight.T if bias is None else rows @ weight.T + bias
            torch.testing.assert_close(site.module(rows), expected, rtol=1e-4, atol=1e-5)
        else:
            torch.testing.assert_close(site.module(torch.tensor([1, 5])), weight.T[[1, 5]])


def test_a_plain_model_has_nothing_of_the_quantization(tiny_llama: Path) -> None:
    options = BaseOptions(str(tiny_llama), Quantization.NF4, torch.float32)
    quantized = DenseBase.load(options)
    before = {path: site.weight() for path, site in products(quantized).items()}
    plain = make_plain(quantized)
    assert not hasattr(plain.model.config, "quantization_config")
    assert {type(site.module) for site in products(plain).values()} <= {nn.Linear, nn.Embedding}
    for path, site in products(plain).items():
        torch.testing.assert_close(site.weight(), before[path])


def test_the_dtype_is_the_checkpoints_own(tiny_llama: Path) -> None:
    assert stored_dtype(str(tiny_llama)) is torch.float32

"""Both ways of attention are one: values, gradients, groups of heads, masks."""

import pytest
import torch
import torch.nn.functional as F

from latentlm_core.layout import AttentionMask
from latentlm_core.nn import attend as module
from latentlm_core.nn.attend import attend
from latentlm_core.runtime import generator

TRIANGLE = torch.ones(5, 5, dtype=torch.bool).tril()
MASKS = {
    "free": AttentionMask(),
    "causal": AttentionMask(is_causal=True),
    "packed": AttentionMask(
        allowed=(TRIANGLE & (torch.arange(5) < 3).eq((torch.arange(5) < 3)[:, None]))[None, None]
    ),
}


def made(dtype: torch.dtype, kv_heads: int, length: int = 5) -> list[torch.Tensor]:
    draw = generator("attend")
    shapes = [(2, heads, length, 8) for heads in (4, kv_heads, kv_heads)]
    return [torch.randn(shape, generator=draw).to(dtype).requires_grad_() for shape in shapes]


def results(way, parts, mask) -> list[torch.Tensor]:
    out = way(*parts, mask)
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), parts)]


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("name", MASKS)
def test_products_and_the_kernel_agree(name, kv_heads):
    parts, mask = made(torch.float32, kv_heads), MASKS[name]
    ours, theirs = (results(way, parts, mask) for way in (module._by_products, attend))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MASKS)
def test_bfloat16_is_as_near_to_float32_as_the_kernel(name):
    mask, parts = MASKS[name], made(torch.bfloat16, 2)
    exact = results(attend, [part.detach().float().requires_grad_() for part in parts], mask)
    for ours, wanted in zip(results(attend, parts, mask), exact, strict=True):
        assert ours.dtype is torch.bfloat16
        torch.testing.assert_close(ours.float(), wanted, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("dtype", "length", "trains", "kernel"),
    [
        (torch.bfloat16, 5, True, False),
        (torch.bfloat16, 5, False, True),
        (torch.bfloat16, module.SHORT + 1, True, True),
        (torch.float32, 5, True, True),
    ],
)
def test_only_short_training_in_bfloat16_goes_by_products(
    monkeypatch, dtype, length, trains, kernel
):
    called = []
    real = F.scaled_dot_product_attention

    def noting(*args, **options):
        called.append(True)
        return real(*args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noting)
    parts = [part.requires_grad_(trains) for part in made(dtype, 4, length)]
    attend(*parts, AttentionMask(is_causal=True))
    assert bool(called) == kernel

"""PaCA: a few columns of the weight train (Woo et al. 2025), spec §16.4."""

import torch
from nets import make_layer, perturb
from torch import nn
from torch.nn import functional as F

from peftlite import PaCALinear, inject_adapters, summary

PACA = ("paca", {})


def test_born_as_the_base_and_changes_its_columns_only() -> None:
    """Invariant §16: PaCA is born as the base; PaCA changes the columns of its index alone."""
    layer = make_layer(PACA, 13, 7, 4, alpha=3)
    x = torch.randn(5, 13)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    perturb(layer)
    changed = (layer.effective_weight() != layer.weight).any(0)
    assert changed.nonzero().flatten().tolist() == layer.index.tolist()
    assert len(set(layer.index.tolist())) == 4


def test_is_lora_whose_a_is_a_selector() -> None:
    """Invariant §16: PaCA ≡ LoRA whose A is a selector.
    Invariant §20.7: PaCA as LoRA with a selector.
    """
    layer = make_layer(PACA, 13, 7, 4, dtype=torch.float64, alpha=3)
    lora = make_layer(("lora", {}), 13, 7, 4, dtype=torch.float64, alpha=3)
    perturb(layer)
    with torch.no_grad():
        lora.lora_a.copy_(F.one_hot(layer.index, 13))
        lora.lora_b.copy_(layer.columns)
    x = torch.randn(5, 13, dtype=torch.float64)
    for model in (layer, lora):
        model(x).pow(3).sum().backward()
    assert torch.equal(layer(x), lora(x))
    assert torch.equal(layer.columns.grad, lora.lora_b.grad)
    a, b = layer.to_lora()
    assert torch.equal(a, lora.lora_a)
    assert torch.equal(b, lora.scale * lora.lora_b)


def test_gradient_is_the_dense_gradient_in_its_columns() -> None:
    """Invariant §16: PaCA's gradient ≡ the dense one in its columns."""
    layer = make_layer(PACA, 13, 7, 4, dtype=torch.float64)
    perturb(layer)
    dense = layer.effective_weight().detach().requires_grad_()
    x = torch.randint(-8, 8, (5, 13), dtype=torch.float64)
    dy = torch.randint(-8, 8, (5, 7), dtype=torch.float64)  # small integers: their products and sums are exact
    F.linear(x, dense, layer.bias).backward(dy)
    layer(x).backward(dy)
    assert torch.equal(layer.columns.grad, dense.grad[:, layer.index])


def test_every_column_can_be_drawn() -> None:
    drawn = [PaCALinear(6, 3, 1, generator=torch.Generator().manual_seed(seed)).index.item() for seed in range(60)]
    assert set(drawn) == set(range(6))
    assert make_layer(PACA, 5, 5, 5).index.tolist() == list(range(5))


def test_count_on_roberta_base() -> None:
    """Queries and values of RoBERTa-base at r = 16: LoRA's count at r = 8.

    Invariant §16: PaCA's count is Σ r out.
    """
    model = nn.ModuleList(nn.ModuleDict({k: nn.Linear(768, 768, device="meta") for k in "qv"}) for _ in range(12))
    assert summary(inject_adapters(model, ["q", "v"], 16, method="paca")).trained == 294_912

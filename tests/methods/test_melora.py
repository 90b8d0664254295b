"""MELoRA: mini adapters on the diagonal blocks (Ren et al. 2024), spec §9."""

import copy
from typing import Any

import pytest
import torch
from budgets import assert_within_budget
from hypothesis import given
from hypothesis import strategies as st
from nets import make_layer, net, perturb
from torch import Tensor, nn
from torch.nn import functional as F

from peftlite import LoRALinear, MELoRALinear, inject_adapters, merge_adapters, summary

MELORA: tuple[str, dict[str, Any]] = ("melora", {})


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, int, int, int]:
    """Features in and out, rank and blocks that fit."""
    rank, blocks = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    return draw(st.integers(rank * blocks, 30)), draw(st.integers(rank * blocks, 30)), rank, blocks


def looped(layer: MELoRALinear, x: Tensor) -> Tensor:
    """The paper's formula, one mini adapter after the other."""
    updates = [
        layer.scale * F.linear(F.linear(chunk, a), b)
        for chunk, a, b in zip(
            x.tensor_split(layer.blocks, dim=-1),
            layer.lora_a.tensor_split(layer.blocks, dim=1),
            layer.lora_b.tensor_split(layer.blocks),
            strict=True,
        )
    ]
    return F.linear(x, layer.weight, layer.bias) + torch.cat(updates, -1)


@given(shape=shapes(), batch=st.sampled_from([(), (1,), (4,), (2, 3), (2, 1, 3)]))
def test_one_product_is_the_loop_over_blocks(shape: tuple[int, int, int, int], batch: tuple[int, ...]) -> None:
    """Invariant §9: batched ≡ looped."""
    in_features, out_features, rank, blocks = shape
    layer = make_layer(MELORA, in_features, out_features, rank, blocks=blocks, alpha=3)
    perturb(layer)
    x = torch.randn(*batch, in_features)
    oracle = looped(copy.deepcopy(layer).double(), x.double()).detach()
    assert_within_budget("y", layer(x), looped(layer, x), oracle, torch.float32)


@given(shape=shapes())
def test_forward_is_the_dense_block_diagonal_product(shape: tuple[int, int, int, int]) -> None:
    """Invariant §9: forward ≡ the dense block-diagonal product; ΔW is zero outside its blocks."""
    in_features, out_features, rank, blocks = shape
    layer = make_layer(MELORA, in_features, out_features, rank, blocks=blocks).double()
    perturb(layer)
    rows = torch.cat([torch.full((len(c),), k) for k, c in enumerate(torch.arange(out_features).tensor_split(blocks))])
    columns = torch.cat([torch.full((len(c),), k) for k, c in enumerate(torch.arange(in_features).tensor_split(blocks))])
    mask = rows[:, None] == columns
    update = layer.effective_weight() - layer.weight
    assert not update[~mask].any()
    dense = layer.weight + layer.scale * (layer.lora_b @ layer.lora_a) * mask
    x = torch.randn(3, in_features, dtype=torch.float64)
    expected = F.linear(x, dense, layer.bias)
    terms = F.linear(x.abs(), dense.abs(), layer.bias.abs())  # all three are in fp64: what they round may cancel
    assert_within_budget("y", layer(x), F.linear(x, layer.effective_weight(), layer.bias), expected, torch.float64, terms)


@given(shape=shapes())
def test_rank_of_the_update(shape: tuple[int, int, int, int]) -> None:
    """Invariant §9: the rank of ΔW is Σ r_k."""
    in_features, out_features, rank, blocks = shape
    layer = make_layer(MELORA, in_features, out_features, rank, blocks=blocks, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        layer.lora_a.copy_(torch.randn(layer.lora_a.shape, generator=generator))
        layer.lora_b.copy_(torch.randn(layer.lora_b.shape, generator=generator))
    a, b = layer.to_lora()
    assert int(torch.linalg.matrix_rank(b @ a)) == rank * blocks == a.shape[0]


def test_one_block_is_lora() -> None:
    """Invariant §9: one block ≡ LoRA.
    Invariant §20.7: MELoRA with one block.
    """
    one, lora = make_layer(MELORA, 9, 7, 3, blocks=1, alpha=5), make_layer(("lora", {}), 9, 7, 3, alpha=5)
    assert torch.equal(one.lora_a, lora.lora_a)
    perturb(one)
    perturb(lora)
    x = torch.randn(4, 9)
    assert torch.equal(one(x), lora(x))


@given(shape=shapes())
def test_count_does_not_depend_on_the_number_of_blocks(shape: tuple[int, int, int, int]) -> None:
    """Invariant §9: the count does not depend on the number of blocks."""
    in_features, out_features, rank, blocks = shape
    layer = make_layer(MELORA, in_features, out_features, rank, blocks=blocks)
    assert sum(p.numel() for p in layer.adapter_parameters().values()) == rank * (in_features + out_features)


def test_llama_2_7b_count() -> None:
    """Invariant §21: MELoRA, LLaMA-2-7B, r = 1, n = 8: 524,288."""
    model = nn.ModuleList(nn.ModuleDict({k: nn.Linear(4096, 4096, False, device="meta") for k in "qv"}) for _ in range(32))
    assert summary(inject_adapters(model, ["q", "v"], 1, method="melora", blocks=8)).trained == 524_288
    assert model[0]["q"].to_lora()[0].shape[0] == 8


def test_born_as_the_base_and_merged_as_it_computes() -> None:
    """Invariant §9: born as the base; merged ≡ unmerged."""
    model, base, x = net(), net(), torch.randn(5, 8)
    inject_adapters(model, "all-linear", 2, method="melora", blocks=3, exclude="head.*")
    assert torch.equal(model.eval()(x), base.eval()(x))
    perturb(model)
    exact, before = copy.deepcopy(model).double()(x.double()).detach(), model(x)
    merge_adapters(model)
    assert_within_budget("y", model(x), before, exact, torch.float32)


def test_each_mini_adapter_is_born_as_a_lora_of_its_size() -> None:
    layer = MELoRALinear(400, 300, 8, blocks=4, generator=torch.Generator().manual_seed(0))
    lora = LoRALinear(400, 300, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(layer.lora_a, 2 * lora.lora_a)  # √(4 / 400)
    assert layer.lora_a.abs().max() <= 0.1
    uneven = MELoRALinear(7, 9, 2, blocks=3)
    assert [chunk.shape[1] for chunk in uneven.lora_a.tensor_split(3, dim=1)] == [3, 2, 2]
    assert uneven.lora_a[:, :3].abs().max() <= 1 / 3**0.5


def test_default_blocks_and_those_that_do_not_fit() -> None:
    assert MELoRALinear(16, 8, 4).blocks == 2
    assert MELoRALinear(16, 7, 4).blocks == 1
    for blocks in (0, 3, True, 2.0):
        with pytest.raises(ValueError, match=r"blocks must be an integer from 1 to 2 for rank 4 in a layer of 16 -> 8 feat"):
            MELoRALinear(16, 8, 4, blocks=blocks)

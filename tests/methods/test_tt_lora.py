"""TT-LoRA: an update in tensor-train form (Anjum et al. 2024), spec §10."""

import copy
import math
from typing import Any

import pytest
import torch
from budgets import assert_within_budget
from hypothesis import given
from hypothesis import strategies as st
from nets import make_layer, net, perturb
from torch import Tensor, nn
from torch.nn import functional as F

from peftlite import TTLoRALinear, inject_adapters, merge_adapters, summary
from peftlite.methods.tt_lora import factorise, tt_svd

TT: tuple[str, dict[str, Any]] = ("tt_lora", {})
Q_3_2, V_3_2 = [16, 8, 4, 4, 4, 4, 8, 16], [16, 16, 2, 2, 4, 16, 16]  # Llama-3.2-1B, outputs first


def reconstructed(cores: list[Tensor]) -> Tensor:
    """ΔW as a tensor of all dimensions, from the definition."""
    train = cores[0]
    for core in cores[1:]:
        train = torch.tensordot(train, core, dims=1)
    return train.squeeze(0).squeeze(-1)


@st.composite
def layers(draw: st.DrawFn) -> TTLoRALinear:
    """Perturbed layers of every shape, with odd factors."""
    outs, ins = (draw(st.lists(st.sampled_from([1, 2, 3, 5, 7]), min_size=1, max_size=3)) for _ in range(2))
    rank = draw(st.integers(1, min(math.prod(outs), math.prod(ins), 6)))
    layer = make_layer(TT, math.prod(ins), math.prod(outs), rank, shape=[*outs, *ins], alpha=draw(st.sampled_from([1.0, 16.0])))
    perturb(layer)
    return layer


@given(layer=layers(), batch=st.sampled_from([(), (4,), (2, 3)]))
def test_contraction_is_the_dense_product(layer: TTLoRALinear, batch: tuple[int, ...]) -> None:
    """Invariant §10: contraction ≡ the dense product."""

    def dense(layer: TTLoRALinear, x: Tensor) -> Tensor:
        update = reconstructed(list(layer.cores)).reshape(layer.out_features, layer.in_features)
        return F.linear(x, layer.weight, layer.bias) + layer.scale * x @ update.T

    x = torch.randn(*batch, layer.in_features)
    oracle = dense(copy.deepcopy(layer).double(), x.double()).detach()
    terms = F.linear(x.double().abs(), layer.weight.double().abs())
    assert_within_budget("y", layer(x), dense(layer, x), oracle, torch.float32, terms)


@given(outs=st.integers(1, 12), ins=st.integers(1, 12), seed=st.integers(0, 9))
def test_tt_svd_of_full_rank_reproduces_any_matrix(outs: int, ins: int, seed: int) -> None:
    """Invariant §10: TT-SVD of full rank reproduces any matrix."""
    matrix = torch.randn(outs, ins, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    shape = [*factorise(outs), *reversed(factorise(ins))]
    cores = tt_svd(matrix, shape, min(outs, ins) * max(shape))
    error = reconstructed(cores).reshape(outs, ins) - matrix
    # As many SVDs as there are cores, each backward stable within a multiple of eps times its size
    assert torch.linalg.vector_norm(error) <= 2 * len(shape) * outs * ins * 2.3e-16 * torch.linalg.vector_norm(matrix)


def test_rank_one_is_an_outer_product() -> None:
    """Invariant §10: rank one ≡ an outer product."""
    layer = make_layer(TT, 6, 4, 1, shape=[2, 2, 3, 2], dtype=torch.float64, init="direct")
    vectors = [core.flatten() for core in layer.cores]
    outer = torch.einsum("a,b,c,d->abcd", *vectors).reshape(4, 6)
    a, b = layer.to_lora()
    assert_within_budget("ΔW", b @ a, layer.scale * outer, (layer.scale * outer).detach(), torch.float64)


def test_two_cores_are_lora() -> None:
    """Invariant §10: two cores ≡ LoRA with B = G₁ and A = G₂.
    Invariant §20.7: TT-LoRA with two cores.
    """
    layer, lora = make_layer(TT, 9, 7, 3, shape=[7, 9], alpha=2.0), make_layer(("lora", {}), 9, 7, 3, alpha=6)
    perturb(layer)
    with torch.no_grad():
        lora.lora_b.copy_(layer.cores[0][0])
        lora.lora_a.copy_(layer.cores[1][:, :, 0])
    x = torch.randn(4, 9)
    for model in (layer, lora):
        model(x).square().sum().backward()
    assert torch.equal(layer(x), lora(x))
    assert torch.equal(layer.cores[0].grad[0], lora.lora_b.grad)
    assert torch.equal(layer.cores[1].grad[:, :, 0], lora.lora_a.grad)


def test_born_as_the_base_and_merged_as_it_computes() -> None:
    """Invariant §10: init="zero" is born as the base; merged ≡ unmerged."""
    model, base, x = net(), net(), torch.randn(5, 8)
    inject_adapters(model, "all-linear", 3, method="tt_lora")
    assert torch.equal(model.eval()(x), base.eval()(x))
    perturb(model)
    exact, before = copy.deepcopy(model).double()(x.double()).detach(), model(x)
    merge_adapters(model)
    assert_within_budget("y", model(x), before, exact, torch.float32)


@pytest.mark.parametrize("init", ["direct", "tt_svd"])
def test_the_authors_starts_are_not_zero(init: str) -> None:
    layer = make_layer(TT, 12, 8, 4, init=init)
    assert (layer.effective_weight() != layer.weight).any()
    if init == "direct":
        norms = torch.stack([torch.linalg.vector_norm(core) for core in layer.cores]).double()
        assert (norms - 1).abs().max() <= 32 * torch.finfo(torch.float32).eps  # a core has at most 32 values
    else:  # of full rank, so that it is the drawn matrix
        layer = TTLoRALinear(8, 2, 2, shape=[2, 8], init=init, generator=torch.Generator().manual_seed(0))
        drawn = torch.empty(2, 8).uniform_(-(8**-0.5), 8**-0.5, generator=torch.Generator().manual_seed(0))
        a, b = layer.to_lora()
        assert (b @ a / 16 - drawn).abs().max() <= 16 * torch.finfo(torch.float32).eps


def test_counts() -> None:
    """Invariant §10: count Σ ρ k ρ.
    Invariant §21: TT-LoRA, 768 x 768 and RoBERTa-base, r = 5: 990 and 23,760; TT-LoRA, Llama-3.2-1B, r = 5: 33,920.
    """
    roberta = nn.ModuleList(nn.ModuleDict({k: nn.Linear(768, 768, device="meta") for k in "qv"}) for _ in range(12))
    assert summary(inject_adapters(roberta, ["q", "v"], 5, method="tt_lora")).trained == 23_760
    assert roberta[0]["q"].shape == [64, 4, 3, 3, 4, 64]
    assert sum(p.numel() for p in roberta[0]["q"].adapter_parameters().values()) == 990
    q = TTLoRALinear(2048, 2048, 5, shape=Q_3_2, device="meta")
    v = TTLoRALinear(2048, 512, 5, shape=V_3_2, device="meta")
    assert 16 * sum(p.numel() for layer in (q, v) for p in layer.adapter_parameters().values()) == 33_920


@given(size=st.integers(1, 5000))
def test_factors_multiply_up(size: int) -> None:
    factors = factorise(size)
    assert math.prod(factors) == size
    assert factors[0] == max(factors)
    prime = all(size % d for d in range(2, math.isqrt(size) + 1))
    assert factors == [size] if prime or size <= 64 else len(factors) > 1


@pytest.mark.parametrize("shape", [[4, 6], [2, 2, 6], [6, 2, 1], [6, -2, -2], [6, 4.0], [24], [], [True] * 6])
def test_shapes_that_do_not_fit(shape: list[Any]) -> None:
    with pytest.raises(ValueError, match=r"multiply up to out_features = 6, followed by some that multiply up to in_f"):
        TTLoRALinear(4, 6, 2, shape=shape)


def test_unknown_init() -> None:
    with pytest.raises(ValueError, match=r"init must be 'zero', 'direct' or 'tt_svd', got 'kaiming'"):
        TTLoRALinear(4, 6, 2, init="kaiming")


def test_makes_no_dense_update() -> None:
    layer = make_layer(TT, 64, 48, 3)
    perturb(layer)
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (shapes.append(tuple(t.shape)), t)[1], lambda t: t):
        layer(torch.randn(5, 64))
    assert [shape for shape in shapes if shape == (48, 64)] == [(48, 64)]  # the frozen weight, and nothing else of its size

"""LoRA-Gen: pool, router and generator (Xiao et al. 2025)."""

from typing import Any

import pytest
import torch
from nets import net
from torch import Tensor, nn
from torch.func import functional_call

from peftlite import adapters, inject_adapters, load_adapters, save_adapters
from peftlite.training.lora_gen import (
    LayerwiseRouter,
    LoRAExpertPool,
    LoRAGenerator,
    append_meta_tokens,
    load_balance_loss,
    write_adapter,
)

EPS = torch.finfo(torch.float64).eps
KINDS = {"query": (8, 8), "up": (8, 16)}


def generator_of(rank: int = 2, **options: Any) -> tuple[nn.Module, LoRAGenerator]:
    """An fp64 net with LoRA of `rank`, and a generator for it with states of size 5."""
    model = inject_adapters(net().double(), list(KINDS), rank, alpha=3 * rank, seed=0).eval()
    seeded = torch.Generator().manual_seed(1)
    options = {"experts": 4, "b_std": 0.3, **options}
    return model, LoRAGenerator.for_model(model, 5, **options, generator=seeded).double()


def states(seed: int = 0) -> Tensor:
    """States of two layers."""
    return torch.randn(2, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def updates(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """``s B A`` of each layer under `state`."""
    return {
        name: layer.scale * (state[f"{name}.lora_b"] @ state[f"{name}.lora_a"]).detach()
        for name, layer in adapters(model).items()
    }


@pytest.mark.parametrize("mix", ["factors", "products"])
def test_a_one_hot_router_gives_that_expert(mix: str) -> None:
    """Invariant §15: a one-hot router ≡ that expert's LoRA."""
    pool = LoRAExpertPool(KINDS, 4, 2, b_std=0.3).double()
    gates = torch.eye(4, dtype=torch.float64)[2]
    mixed = pool(gates, mix=mix, top=1)
    for kind, a, b in zip(pool.kinds, pool.expert_a, pool.expert_b, strict=True):
        assert torch.equal(mixed[kind][0], a[2])
        assert torch.equal(mixed[kind][1], b[2])


def test_gates_sum_to_one_with_k_of_them_not_zero() -> None:
    """Invariant §15: gates sum to one, exactly K of them not zero."""
    for top in (1, 2, 4):
        gates = LayerwiseRouter(5, 4, top).double()(torch.randn(3, 7, 5, dtype=torch.float64))
        assert gates.shape == (3, 7, 4)
        assert ((gates > 0).sum(-1) == top).all()
        assert ((gates.sum(-1) - 1).abs() <= 4 * EPS).all()


def test_the_largest_scores_win() -> None:
    router = LayerwiseRouter(5, 4, 2, norm="layer").double()
    x = torch.randn(6, 5, dtype=torch.float64)
    scores = router.norm(router.f2(nn.functional.silu(router.f1(x))))
    gates = router(x)
    assert torch.equal(gates.topk(2).indices, scores.topk(2).indices)
    expected = scores.topk(2).values.softmax(-1)  # a softmax over the K largest is the renormalised one
    torch.testing.assert_close(gates.topk(2).values, expected, rtol=16 * EPS, atol=16 * EPS)


def test_load_balance() -> None:
    """Invariant §15: the balance loss is zero for uniform load."""
    uniform = torch.eye(4, dtype=torch.float64).repeat(3, 1)
    assert load_balance_loss(uniform) == 0
    assert load_balance_loss(uniform.view(2, 6, 4)) == 0
    one = torch.eye(4, dtype=torch.float64)[:1].expand(5, 4)
    assert load_balance_loss(one, weight=1.0).item() == pytest.approx(3)  # (std / mean)² of (1, 0, 0, 0) is n - 1
    gates = torch.rand(6, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(load_balance_loss, (gates,))


@pytest.mark.parametrize(("mix", "rank"), [("factors", 2), ("products", 4)])
def test_loaded_as_a_standard_adapter_it_computes_the_same(tmp_path: Any, mix: str, rank: int) -> None:
    """Invariant §15: the generated adapter, loaded as a standard one ≡ the functional forward."""
    model, generator = generator_of(rank, mix=mix)
    state, _ = generator.eval()(states())
    x = torch.randn(4, 8, dtype=torch.float64)
    expected = functional_call(model, state, x)
    base = net().double().eval()
    assert not torch.equal(expected, base(x))
    write_adapter(model, state)
    assert torch.equal(model(x), expected)
    save_adapters(model, tmp_path / "f.safetensors")
    assert torch.equal(load_adapters(base, tmp_path / "f.safetensors")(x), expected)


def test_a_pool_of_zero_b_is_the_base() -> None:
    """Invariant §15: a pool of zero B ≡ the base."""
    model, generator = generator_of(b_std=0.0)
    x = torch.randn(4, 8, dtype=torch.float64)
    assert torch.equal(functional_call(model, generator(states())[0], x), net().double().eval()(x))


def test_products_are_the_mix_of_updates_and_factors_have_cross_terms() -> None:
    """Invariant §15: mix="products" ≡ Σ G_j ΔW_j."""
    model, generator = generator_of(4, mix="products")
    state, gates = generator(states())
    pool = generator.pool
    for name, update in updates(model, state).items():
        block, kind = int(name.split(".")[1]), pool.kinds.index(name.rpartition(".")[2])
        experts = torch.einsum("nor,nri->noi", pool.expert_b[kind], pool.expert_a[kind])
        expected = 3 * torch.einsum("n,noi->oi", gates[block], experts).detach()
        torch.testing.assert_close(update, expected, rtol=64 * EPS, atol=64 * EPS)
    crossed = pool(gates, mix="factors")["query"]
    a, b = (torch.einsum("n,nxy->xy", gates[0], t[0]) for t in (pool.expert_a, pool.expert_b))
    torch.testing.assert_close(crossed[1][0] @ crossed[0][0], b @ a, rtol=64 * EPS, atol=64 * EPS)


@pytest.mark.parametrize("mix", ["factors", "products"])
def test_gradients_reach_experts_router_and_prompt(mix: str) -> None:
    model, generator = generator_of(2, mix=mix)
    prompt = states().requires_grad_()
    state, gates = generator(prompt)
    out = functional_call(model, state, torch.randn(4, 8, dtype=torch.float64))
    (out.square().sum() + load_balance_loss(gates)).backward()
    assert all(p.grad is not None and p.grad.any() for name, p in generator.named_parameters() if name != "router.f2.bias")
    assert prompt.grad.any()
    chosen = (gates > 0).any(dim=0)
    for expert in generator.pool.expert_b:
        assert torch.equal(expert.grad.flatten(1).any(1), chosen)  # only those that were chosen learn


def test_gradients_are_right() -> None:
    pool = LoRAExpertPool({"q": (3, 2)}, 3, 2, b_std=0.5).double()
    gates = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]], dtype=torch.float64, requires_grad=True)
    for mix in ("factors", "products"):
        assert torch.autograd.gradcheck(lambda g, mix=mix: pool(g, mix=mix)["q"], (gates,))


def test_meta_tokens_follow_the_prompt() -> None:
    prompt, mask = torch.randn(3, 4, 6), torch.tensor([[1, 1, 1, 0]] * 3)
    meta = nn.Parameter(torch.randn(2, 6))
    longer, longer_mask = append_meta_tokens(prompt, mask, meta)
    assert torch.equal(longer[:, :4], prompt)
    assert torch.equal(longer[1, 4:], meta)
    assert longer_mask.tolist() == [[1, 1, 1, 0, 1, 1]] * 3
    longer.sum().backward()
    assert torch.equal(meta.grad, torch.full_like(meta, 3))


def test_sizes() -> None:
    _, generator = generator_of(2)
    assert sum(p.numel() for p in generator.pool.parameters()) == 4 * (2 * (8 + 8) + 2 * (8 + 16))
    assert generator.layers == [{kind: f"encoder.{i}.{kind}" for kind in ("query", "up")} for i in range(2)]
    assert (generator_of(4, mix="products")[1].pool.rank, generator_of(4)[1].pool.rank) == (2, 4)


def test_errors() -> None:
    model, generator = generator_of(2)
    state, _ = generator(states())
    with pytest.raises(ValueError, match=r"states must be \(2, d\), one row for each layer, got \(3, 5\)"):
        generator(torch.zeros(3, 5))
    with pytest.raises(ValueError, match=r"Net carries no LoRA to generate"):
        LoRAGenerator.for_model(net(), 5)
    with pytest.raises(ValueError, match=r"all layers must have one rank that 2 divides, got \[3\]"):
        generator_of(3, mix="products")
    named = inject_adapters(nn.ModuleDict({"first": nn.Linear(4, 4)}), "first", 2)
    with pytest.raises(ValueError, match=r"'first' has no number in its name"):
        LoRAGenerator.for_model(named, 5)
    uneven = inject_adapters(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), "all-linear", 1)
    with pytest.raises(ValueError, match=r"'1' is \(4, 2\), another 'layer' is \(3, 4\)"):
        LoRAGenerator.for_model(uneven, 5)
    with pytest.raises(ValueError, match=r"layer 1 has the kinds \['query'\], the pool \['query', 'up'\]"):
        LoRAGenerator(generator.pool, generator.router, [generator.layers[0], {"query": "x"}])
    with pytest.raises(ValueError, match=r"mix must be 'factors' or 'products', got 'sum'"):
        generator_of(2, mix="sum")
    with pytest.raises(ValueError, match=r"mix must be 'factors' or 'products', got 'sum'"):
        generator.pool(torch.ones(4), mix="sum")
    with pytest.raises(ValueError, match=r"a pool needs at least one expert, rank 1 and one shape"):
        LoRAExpertPool({}, 2, 2)
    with pytest.raises(ValueError, match=r"top must be from 1 to the number of experts, 4, got 5"):
        LayerwiseRouter(5, 4, 5)
    with pytest.raises(ValueError, match=r"norm must be 'batch' or 'layer', got 'none'"):
        LayerwiseRouter(5, norm="none")
    with pytest.raises(ValueError, match=r"in training there is only one \(one layer, one prompt\)"):
        LayerwiseRouter(5)(torch.zeros(1, 5))
    with pytest.raises(ValueError, match=r"meta must be \(L, 6\), as wide as the embedded prompt, got \(2, 5\)"):
        append_meta_tokens(torch.zeros(1, 2, 6), torch.ones(1, 2), torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"does not fit Net: missing \['encoder.0.query.lora_a'\], left over \['x'\]"):
        write_adapter(model, {"x": torch.ones(1), **{k: t for k, t in state.items() if k != "encoder.0.query.lora_a"}})
    with pytest.raises(ValueError, match=r"encoder.0.query.lora_a: generated \(1, 8\), the model has \(2, 8\)"):
        write_adapter(model, {**state, "encoder.0.query.lora_a": torch.ones(1, 8)})

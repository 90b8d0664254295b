"""ShareLoRA: what is shared among which layers, the counts, what it is equivalent to (Song et al. 2024)."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nets import net, perturb, refused
from torch import nn

from peftlite import ShareLoRALinear, adapters, inject_adapters


def transformer(layers: int, width: int, hidden: int, **factory: Any) -> nn.Module:
    """Blocks with the linear layers of LLaMA."""
    sizes = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (width, width))
    sizes |= {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
    factory["bias"] = False
    return nn.ModuleList(
        nn.ModuleDict({key: nn.Linear(*size, **factory) for key, size in sizes.items()}) for _ in range(layers)
    )


def trained(model: nn.Module) -> int:
    """Trained parameters, shared ones once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(("share", "count"), [(None, 294_912), ("a", 159_744), ("b", 159_744), ("ab", 24_576)])
def test_published_counts_of_roberta(share: str | None, count: int) -> None:
    """Invariant §11: counts of the three variants.
    Invariant §21: LoRA, RoBERTa-base, queries and values, r = 8: 294,912; ShareLoRA, RoBERTa-base, r = 8, A and AB: 159,744
    and 24,576.
    """
    blocks = [nn.ModuleDict({key: nn.Linear(768, 768, device="meta") for key in ("query", "value")}) for _ in range(12)]
    options = {"method": "lora"} if share is None else {"method": "sharelora", "share": share}
    assert trained(inject_adapters(nn.ModuleList(blocks), ["query", "value"], 8, **options)) == count


@pytest.mark.parametrize(("share", "count"), [(None, 159_907_840), ("a", 89_309_184), ("ab", 4_997_120)])
def test_published_counts_of_llama(share: str | None, count: int) -> None:
    """Invariant §11: counts of the three variants.
    Invariant §21: LLaMA-7B, all linear layers, r = 64, LoRA, ShareLoRA A and AB: 159,907,840, 89,309,184 and 4,997,120.
    """
    options = {"method": "lora"} if share is None else {"method": "sharelora", "share": share}
    model = inject_adapters(transformer(32, 4096, 11008, device="meta"), "all-linear", 64, adapter_dtype="bfloat16", **options)
    assert trained(model) == count


@given(
    share=st.sampled_from(["a", "b", "ab"]),
    layers=st.integers(1, 3),
    width=st.integers(2, 6),
    hidden=st.integers(2, 6),
)
def test_closed_formula(share: str, layers: int, width: int, hidden: int) -> None:
    """Invariant §11: counts of the three variants."""
    model = inject_adapters(transformer(layers, width, hidden), "all-linear", 2, method="sharelora", share=share)
    shapes = [(m.in_features, m.out_features) for m in model[0].values()]
    factor_a, factor_b = (1 if "a" in share else layers), (1 if "b" in share else layers)
    assert trained(model) == sum(2 * (factor_a * i + factor_b * o) for i, o in shapes)


def test_one_layer_with_both_shared_is_lora() -> None:
    """Invariant §11: both factors shared by one layer ≡ LoRA.
    Invariant §20.7: ShareLoRA of one layer.
    """
    shared = inject_adapters(nn.Sequential(nn.Linear(6, 5)), "0", 2, method="sharelora", share="ab", alpha=3)
    plain = inject_adapters(nn.Sequential(nn.Linear(6, 5)), "0", 2, alpha=3)
    perturb(shared)
    with torch.no_grad():
        plain[0].weight.copy_(shared[0].weight)
        plain[0].bias.copy_(shared[0].bias)
        plain[0].lora_a.copy_(shared[0].lora_a)
        plain[0].lora_b.copy_(shared[0].lora_b)
    x = torch.randn(4, 6)
    assert torch.equal(shared(x), plain(x))
    for model in (shared, plain):
        model(x).square().sum().backward()
    assert torch.equal(shared[0].lora_a.grad, plain[0].lora_a.grad)
    assert torch.equal(shared[0].lora_b.grad, plain[0].lora_b.grad)


def test_a_shared_a_and_equal_bs_are_one_update() -> None:
    """Invariant §11: a shared A and equal Bs are one ΔW in every layer."""
    model = inject_adapters(net(), "query", 2, method="sharelora", share="a")
    first, second = adapters(model).values()
    with torch.no_grad():
        first.lora_b.normal_()
        second.lora_b.copy_(first.lora_b)
    for a, b in ((layer.to_lora()) for layer in (first, second)):
        assert torch.equal(b @ a, first.to_lora()[1] @ first.to_lora()[0])


def test_one_training_step_of_tied_layers_is_one_of_the_sum() -> None:
    """Invariant §11: the shared gradient is the sum of those of an untied copy."""
    model = inject_adapters(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double(), "all-linear", 2, method="sharelora")
    perturb(model)
    apart = nn.Sequential(copy.deepcopy(model[0]), copy.deepcopy(model[1]))
    x = torch.randn(3, 4, dtype=torch.float64)
    for module in (model, apart):
        module(x).square().sum().backward()
    expected = apart[0].lora_a.grad + apart[1].lora_a.grad
    torch.optim.SGD([model[0].lora_a], 0.5).step()
    assert torch.equal(model[1].lora_a, apart[0].lora_a - 0.5 * expected)


def groups(model: nn.Module, factor: str) -> set[frozenset[str]]:
    """The last names of the layers of each group that shares `factor`."""
    held: dict[int, list[str]] = {}
    for name, layer in adapters(model).items():
        held.setdefault(id(getattr(layer, factor)), []).append(name.rpartition(".")[2])
    return {frozenset(names) for names in held.values()}


def test_scopes_and_grouped_query_attention() -> None:
    """With ``"qkv"`` the three share A; B only where their sizes allow: keys and values."""
    blocks = [
        nn.ModuleDict({"q_proj": nn.Linear(8, 8), "k_proj": nn.Linear(8, 4), "v_proj": nn.Linear(8, 4), "o": nn.Linear(8, 8)})
        for _ in range(2)
    ]
    model = nn.ModuleList(blocks)
    options = {"method": "sharelora", "share": "ab"}
    by_type = inject_adapters(copy.deepcopy(model), "all-linear", 2, **options)
    each = {frozenset({key}) for key in ("q_proj", "k_proj", "v_proj", "o")}
    assert groups(by_type, "lora_a") == groups(by_type, "lora_b") == each
    qkv = inject_adapters(copy.deepcopy(model), "all-linear", 2, scope="qkv", **options)
    assert groups(qkv, "lora_a") == {frozenset({"q_proj", "k_proj", "v_proj"}), frozenset({"o"})}
    assert groups(qkv, "lora_b") == {frozenset({"q_proj"}), frozenset({"k_proj", "v_proj"}), frozenset({"o"})}
    shape = inject_adapters(copy.deepcopy(model), "all-linear", 2, scope="shape", **options)
    assert groups(shape, "lora_a") == {frozenset({"q_proj", "k_proj", "v_proj", "o"})}
    assert groups(shape, "lora_b") == {frozenset({"q_proj", "o"}), frozenset({"k_proj", "v_proj"})}


def test_layers_of_different_ranks_do_not_share() -> None:
    model = inject_adapters(net(), "query", 2, method="sharelora", rank_pattern={"1.query": 3})
    assert model.encoder[0].query.lora_a.shape != model.encoder[1].query.lora_a.shape


@pytest.mark.parametrize("share", ["a", "b", "ab"])
def test_what_is_not_shared_is_each_layers_own(share: str) -> None:
    first, second = adapters(inject_adapters(net(), "query", 2, method="sharelora", share=share)).values()
    assert (first.lora_a is second.lora_a) == ("a" in share)
    assert (first.lora_b is second.lora_b) == ("b" in share)
    assert not first.lora_b.any()
    assert first.lora_a.any()
    assert "a" in share or not torch.equal(first.lora_a, second.lora_a)


def test_wrong_share() -> None:
    with refused(model := net(), r"share must be 'a', 'b' or 'ab', got 'ba'"):
        inject_adapters(model, "query", 2, method="sharelora", share="ba")


def test_a_layer_alone_shares_with_nobody() -> None:
    assert ShareLoRALinear(4, 4, 2).lora_a is not ShareLoRALinear(4, 4, 2).lora_a

"""What holds for several methods at once: they learn, their updates add up, and they have the published counts."""

import copy

import pytest
import torch
from nets import net, perturb
from torch import nn
from torch.nn import functional as F

from peftlite import METHODS, adapters, disable_adapters, inject_adapters, merge_adapters, param_groups, remove_adapters


@pytest.mark.parametrize("method", METHODS)
def test_each_method_learns_a_low_rank_regression(method: str) -> None:
    """Invariant §20: half the loss of a low-rank regression is learnt.

    The update has the rows of the base, so that IA3, which scales what is there, can reach it as well; rank 7 of 8 gives
    frozen and chosen directions enough of it, and VeRA's random ones ask for more.
    """
    torch.manual_seed(0)
    rows, update = torch.randn(1, 8) / 8**0.5, torch.randn(8, 1)
    linear = nn.Linear(8, 8)
    with torch.no_grad():
        linear.weight.copy_((1 + torch.rand(8, 1)) @ rows + 0.1 * torch.randn(8, 8))
        x = torch.randn(64, 8)
        y = F.linear(x, linear.weight + update @ rows, linear.bias)
    model = inject_adapters(nn.Sequential(linear), "0", 64 if method == "vera" else 7, method=method, seed=1)
    optimizer = torch.optim.AdamW(param_groups(model, 0.05, weight_decay=0.0))
    losses = []
    for _ in range(100):
        loss = F.mse_loss(model(x), y)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] <= losses[0] / 2


@pytest.mark.parametrize("second", ["melora", "tt_lora", "vera"])
def test_two_updates_add_up(second: str) -> None:
    """Invariant §20: additive updates add up, and disabling gives the base.

    A layer carries one adapter at a time; a second one comes over the first one's merged weight.
    """
    model, x = net().double().eval(), torch.randn(5, 8, dtype=torch.float64)
    base = {name: m.weight.detach().clone() for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    updates, rank = dict.fromkeys(base, torch.zeros(())), 2
    for method in ("lora", second):
        inject_adapters(model, "all-linear", rank, method=method, seed=0)
        before = model(x)
        perturb(model)
        assert not torch.equal(model(x), before)
        with disable_adapters(model):
            assert torch.equal(model(x), before)
        alone = copy.deepcopy(model)
        for name, layer in adapters(alone).items():
            updates[name] = updates[name] + layer.effective_weight().detach() - layer.weight
        merge_adapters(model)
        assert torch.equal(remove_adapters(alone)(x), before)
    eps = torch.finfo(torch.float64).eps
    for name, weight in base.items():
        expected = weight + updates[name]
        rounding = 8 * eps * (weight.abs() + updates[name].abs()).max()  # four sums and differences, each rounded once
        assert (model.get_submodule(name).weight - expected).abs().max() <= rounding
        assert updates[name].abs().max() > 0


def test_published_counts() -> None:
    """Invariant §21: LoRA, LLaMA-2-7B, queries and values, r = 8 and 64: 4,194,304 and 33,554,432;
    DoRA, RoBERTa-base, queries and values, r = 8: 313,344;
    LoRA, RoBERTa-base, queries and values, r = 8: 294,912.
    """
    llama, roberta = (32, 4096), (12, 768)
    for (layers, width), method, rank, count in [
        (llama, "lora", 8, 4_194_304),
        (llama, "lora", 64, 33_554_432),
        (roberta, "lora", 8, 294_912),
        (roberta, "dora", 8, 313_344),
    ]:
        blocks = (nn.ModuleDict({key: nn.Linear(width, width, device="meta") for key in ("q", "v")}) for _ in range(layers))
        model = inject_adapters(nn.ModuleList(blocks), ["q", "v"], rank, method=method)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count

"""RefLoRA: the metric S, what a step does to BA, and factors that would make NaN (Zhang, Li and Giannakis 2025)."""

import copy
import math
from typing import Any

import pytest
import torch
from budgets import assert_within_budget
from nets import net, perturb, refused
from torch import Tensor, nn
from torch.nn import functional as F

from peftlite import RefLoRA, adapters, inject_adapters, param_groups
from peftlite.training.reflora import balance

EPS = torch.finfo(torch.float64).eps


def factors(rank: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A pair A ``(r, in)``, B ``(out, r)`` of unequal norms."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, 9, generator=generator, dtype=torch.float64)
    return a, 0.1 * torch.randn(7, rank, generator=generator, dtype=torch.float64)


def made(optimizer: Any, dtype: torch.dtype = torch.float64, method: str = "lora", **options: Any) -> Any:
    """A perturbed net, its optimizer, and a controller without warm-up."""
    model = inject_adapters(net().to(dtype), ["query", "up"], 3, method=method, seed=0)
    perturb(model)
    steps = optimizer(param_groups(model.eval(), 0.01, weight_decay=0.0))
    return model, steps, RefLoRA(model, steps, **{"warmup_steps": 0, **options})


def step(model: nn.Module, optimizer: Any, seed: int = 0) -> None:
    """One step of the user's loop."""
    dtype = next(model.parameters()).dtype
    generator = torch.Generator().manual_seed(seed)
    x, target = (torch.randn(8, size, generator=generator).to(dtype) for size in (8, 3))
    F.mse_loss(model(x), target).backward()
    optimizer.step()
    optimizer.zero_grad()


def products(model: nn.Module) -> dict[str, Tensor]:
    """``B A`` of every layer."""
    return {name: (layer.lora_b @ layer.lora_a).detach() for name, layer in adapters(model).items()}


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_metric(rank: int) -> None:
    """Invariant §14: S (A Aᵀ) S = Bᵀ B; refactoring preserves B A; refactored factors are balanced."""
    pairs = [factors(rank, seed) for seed in range(4)]
    gram_a, gram_b = torch.stack([a @ a.T for a, _ in pairs]), torch.stack([b.T @ b for _, b in pairs])
    damping = 1e-12
    metrics, inverses = balance(gram_a, gram_b, damping)
    for (a, b), s, inverse, first, second in zip(pairs, metrics, inverses, gram_a, gram_b, strict=True):
        condition = (torch.linalg.cond(first) * torch.linalg.cond(second)).item()
        bound = 100 * rank * condition * (EPS + damping)  # both Gram matrices are inverted once
        assert (s @ first @ s - second).norm() <= bound * second.norm()
        assert (s @ inverse - torch.eye(rank)).norm() <= bound
        assert (s - s.T).norm() <= bound * s.norm()
        p = torch.linalg.cholesky(s)  # any P with P Pᵀ = S
        new_a, new_b = p.T @ a, torch.linalg.solve_triangular(p, b.T, upper=False).T
        assert (new_b @ new_a - b @ a).norm() <= bound * (b @ a).norm()
        assert (new_a @ new_a.T - new_b.T @ new_b).norm() <= bound * (new_a @ new_a.T).norm()
        norms = new_a.square().sum() + new_b.square().sum()
        assert norms <= a.square().sum() + b.square().sum()
        for seed in range(5):  # no other factorisation has smaller factors
            q = torch.randn(rank, rank, generator=torch.Generator().manual_seed(seed)).double() + 2 * torch.eye(rank)
            assert (q @ new_a).square().sum() + (new_b @ torch.linalg.inv(q)).square().sum() >= norms * (1 - bound)


def test_balanced_factors_have_the_identity() -> None:
    """Invariant §14: S = I where A Aᵀ = Bᵀ B."""
    gram = factors()[0] @ factors()[0].T
    metric, inverse = balance(gram, gram, 1e-12)
    bound = 100 * len(gram) * (torch.linalg.cond(gram) ** 2) * (EPS + 1e-12)
    assert (metric - torch.eye(4)).norm() <= bound
    assert (inverse - torch.eye(4)).norm() <= bound


def test_zero_and_infinite_factors_are_left_alone() -> None:
    """Invariant §14: B = 0 gives no NaN."""
    gram = torch.eye(3).double()
    for bad in (torch.zeros(3, 3), torch.full((3, 3), math.nan), torch.full((3, 3), math.inf)):
        for pair in ((gram, bad.double()), (bad.double(), gram)):
            assert all(torch.equal(m, gram) for m in balance(*pair, 1e-6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_factors_of_deficient_rank_stay_finite(dtype: torch.dtype) -> None:
    for kept in range(3):
        for key in ("lora_a", "lora_b"):
            model, optimizer, _ = made(torch.optim.AdamW, torch.float32)
            with torch.no_grad():
                for layer in adapters(model.to(dtype)).values():
                    (layer.lora_a if key == "lora_a" else layer.lora_b.T)[kept:] = 0
            for number in range(4):
                step(model, optimizer, number)
            assert all(torch.isfinite(p).all() for p in model.parameters())


def test_the_step_does_not_depend_on_the_gauge() -> None:
    """Invariant §14: an SGD step of B A does not depend on the gauge, as plain LoRA's does."""
    spread = {}
    for refactored in (True, False):
        updates = []
        for gauge in (False, True):
            model, optimizer, controller = made(torch.optim.SGD, damping=1e-15)
            if not refactored:
                controller.detach()
            if gauge:
                q = torch.randn(3, 3, generator=torch.Generator().manual_seed(1)).double() + 2 * torch.eye(3)
                with torch.no_grad():
                    for layer in adapters(model).values():
                        layer.lora_a.copy_(q @ layer.lora_a)
                        layer.lora_b.copy_(layer.lora_b @ torch.linalg.inv(q))
            before = products(model)
            step(model, optimizer)
            updates.append(torch.cat([(products(model)[name] - before[name]).flatten() for name in before]))
        spread[refactored] = (updates[0] - updates[1]).norm() / updates[0].norm()
    assert spread[False] > 0.1
    assert spread[True] < 1e-6 * spread[False]


def test_the_hook_is_refactor_step_and_back() -> None:
    model, optimizer, _ = made(torch.optim.SGD, damping=1e-15)
    twin, plain = copy.deepcopy(model), {}
    for name, layer in adapters(twin).items():
        a, b = layer.lora_a.detach(), layer.lora_b.detach()
        p = torch.linalg.cholesky(balance(a @ a.T, b.T @ b, 1e-15)[0])
        plain[name] = p
        with torch.no_grad():
            layer.lora_a.copy_(p.T @ a)
            layer.lora_b.copy_(b @ torch.linalg.inv(p).T)
    step(model, optimizer)
    step(twin, torch.optim.SGD(param_groups(twin, 0.01, weight_decay=0.0)))
    for name, layer in adapters(twin).items():
        p, other = plain[name], adapters(model)[name]
        bound = 1e4 * EPS * torch.linalg.cond(p) ** 4
        assert (torch.linalg.inv(p).T @ layer.lora_a - other.lora_a).norm() <= bound * other.lora_a.norm()
        assert (layer.lora_b @ p.T - other.lora_b).norm() <= bound * other.lora_b.norm()


OPTIMIZERS = [
    (torch.optim.AdamW, {}),
    (torch.optim.AdamW, {"amsgrad": True}),
    (torch.optim.AdamW, {"fused": True}),
    (torch.optim.SGD, {"momentum": 0.9}),
    (torch.optim.Adamax, {}),
    (torch.optim.RMSprop, {"centered": True, "momentum": 0.9}),
    (torch.optim.Adagrad, {}),
]


@pytest.mark.parametrize(("optimizer", "settings"), OPTIMIZERS)
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_scalar_version(optimizer: Any, settings: Any, method: str) -> None:
    """Invariant §14: the scalar version preserves B A and equalises the norms."""
    model, steps, controller = made(lambda groups: optimizer(groups, **settings), method=method, variant="scalar")
    act, ratios = controller.after_step, []

    def spy() -> None:
        state = {p: copy.deepcopy(steps.state[p]) for layer in adapters(model).values() for p in (layer.lora_a, layer.lora_b)}
        before, norms = products(model), {}
        for name, layer in adapters(model).items():
            norms[name] = (layer.lora_b.norm() / layer.lora_a.norm()).sqrt().item()
        act()
        for name, layer in adapters(model).items():
            after = layer.lora_b @ layer.lora_a
            assert (after - before[name]).norm() <= 16 * EPS * layer.lora_b.norm() * layer.lora_a.norm()  # 3 terms, 2 factors
            assert (layer.lora_a.norm() - layer.lora_b.norm()).abs() <= 64 * EPS * layer.lora_a.norm()  # sums of 64 squares
            ratios.append(norms[name])
            for p, factor in ((layer.lora_a, norms[name]), (layer.lora_b, 1 / norms[name])):
                for key, moment in steps.state[p].items():
                    if torch.is_tensor(moment) and moment.ndim:
                        power = 2 if key in ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum") else 1
                        expected = state[p][key] / factor**power
                        if key == "momentum_buffer" and optimizer is torch.optim.RMSprop:
                            expected = state[p][key]  # of gradients over their own size
                        assert (moment - expected).abs().max() <= 16 * EPS * expected.abs().max()

    controller.after_step = spy
    for number in range(3):
        step(model, steps, number)
    assert any(abs(ratio - 1) > 0.1 for ratio in ratios)


def test_an_optimizer_whose_state_is_unknown() -> None:
    model, optimizer, _ = made(torch.optim.Rprop, variant="scalar")
    with pytest.raises(RuntimeError, match=r"it is not known how 'prev', a state of Rprop, scales .*use variant='matrix'"):
        step(model, optimizer)


@pytest.mark.parametrize("variant", ["matrix", "scalar"])
def test_an_endless_warm_up_is_lora_and_an_interval_spares_steps(variant: str) -> None:
    """Invariant §14: an endless warm-up ≡ LoRA.
    Invariant §20.7: RefLoRA with an endless warm-up.
    """
    model, optimizer, controller = made(torch.optim.AdamW, variant=variant, warmup_steps=10**9)
    plain, other, detached = made(torch.optim.AdamW)
    detached.detach()
    for number in range(4):
        step(model, optimizer, number)
        step(plain, other, number)
    assert controller.step == 4
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    steps = []
    for options in ({"interval": 3}, {"interval": 1}):
        model, optimizer, controller = made(torch.optim.SGD, variant=variant, warmup_steps=2, **options)
        twin, other, detached = made(torch.optim.SGD)
        detached.detach()
        acted = []
        for number in range(9):
            twin.load_state_dict(model.state_dict())
            step(model, optimizer, number)
            step(twin, other, number)
            acted.append(any(not torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True)))
        steps.append([number for number, differs in enumerate(acted) if differs])
    first = 2 if variant == "matrix" else 1  # before the third step, or after the second
    assert steps == [list(range(first, 9, 3)), list(range(first, 9))]


@pytest.mark.parametrize("variant", ["matrix", "scalar"])
def test_training_from_b_zero(variant: str) -> None:
    torch.manual_seed(0)
    model = inject_adapters(nn.Sequential(nn.Linear(16, 16)), "0", 4, seed=0)
    goal = model[0].weight + torch.randn(16, 2) @ torch.randn(2, 16) / 8
    optimizer = torch.optim.AdamW(param_groups(model, 0.01, weight_decay=0.0))
    RefLoRA(model, optimizer, variant=variant, warmup_steps=5)
    x, losses = torch.randn(64, 16), []
    for _ in range(120):
        loss = F.mse_loss(model(x), F.linear(x, goal, model[0].bias))
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.5 * losses[0]


def test_gradients_in_16_bits_are_computed_in_more() -> None:
    model, _, controller = made(torch.optim.SGD, torch.float32)
    model.bfloat16()
    model(torch.randn(4, 8).bfloat16()).float().square().sum().backward()
    grads = {name: (layer.lora_a.grad.clone(), layer.lora_b.grad.clone()) for name, layer in adapters(model).items()}
    controller.before_step()
    for name, layer in adapters(model).items():
        results = []
        for dtype in (torch.float32, torch.float64):
            a, b = layer.lora_a.detach().to(dtype), layer.lora_b.detach().to(dtype)
            metric, inverse = (m.to(dtype) for m in balance(a @ a.T, b.T @ b, 1e-6))
            results.append([inverse @ grads[name][0].to(dtype), grads[name][1].to(dtype) @ metric])
        for actual, eager, oracle in zip((layer.lora_a.grad, layer.lora_b.grad), *results, strict=True):
            assert actual.dtype == torch.bfloat16
            assert_within_budget(name, actual, eager, oracle, torch.bfloat16)


WRONG = [
    ({"variant": "vector"}, r"variant must be one of 'matrix', 'scalar', got 'vector'"),
    ({"warmup_steps": -1}, r"warmup_steps must be an integer of at least 0, got -1"),
    ({"interval": 0}, r"interval must be an integer of at least 1, got 0"),
    ({"damping": 0.0}, r"damping must be a positive number, got 0.0"),
    ({"damping": math.nan}, r"damping must be a positive number, got nan"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(torch.optim.SGD, **options)


def test_shared_factors_are_refused() -> None:
    model = inject_adapters(net(), "query", 2)
    first, second = adapters(model).values()
    second.lora_a = first.lora_a
    with refused(model, r"RefLoRA: encoder.1.query.lora_a is shared with 'encoder.0.query'; each layer must have its own"):
        RefLoRA(model, torch.optim.SGD(param_groups(model, 0.1)))

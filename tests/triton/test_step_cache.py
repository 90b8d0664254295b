"""The step cache: used, grouped, and never stale."""

import gc

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import peftlite
from peftlite.kernels.launch_triton import observing
from peftlite.training import StepCache

HALF = torch.bfloat16
PREPARING = ("pack", "row_norm")


@pytest.fixture(autouse=True)
def triton_runs(monkeypatch):
    monkeypatch.setenv("PEFTLITE_IMPL", "triton")


def make(method="dora", dtype=HALF):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 8)).to(dtype)
    peftlite.inject_adapters(model, ["0", "2"], rank=3, method=method)
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.lora_b.normal_()
    return model


def adamw(model, **options):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, **options)


def preparations(model, x):
    """How many launches of a forward pass prepare, and its output."""
    names = []
    with observing(lambda event: names.append(event.name)):
        y = model(x)
    return sum(any(part in name for part in PREPARING) for name in names), y


def assert_fresh(model, cache, x, *, used=True):
    """The output is that of layers that prepare themselves, bit for bit, and the cache was used or was not."""
    count, y = preparations(model, x)
    assert (count == 0) == used
    was = cache._prepared.fresh
    cache.invalidate()
    count, expected = preparations(model, x)
    cache._prepared.fresh = was
    assert count > 0
    assert torch.equal(y, expected)


def train(model, optimizer, x):
    optimizer.zero_grad()
    model(x).float().square().sum().backward()
    optimizer.step()


X = torch.linspace(-1, 1, 5 * 24).reshape(5, 24).to(HALF)


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("kind", [{"foreach": True}, {"fused": True}, {"foreach": False}], ids=str)
def test_fresh_after_every_step(method, kind):
    model = make(method)
    optimizer = adamw(model, **kind)
    with StepCache(model, optimizer, dtype=HALF) as cache:
        before = model(X)
        for _ in range(2):
            assert_fresh(model, cache, X)
            train(model, optimizer, X)
        assert_fresh(model, cache, X)
        assert not torch.equal(model(X), before)
    assert preparations(model, X)[0] > 0


def test_two_optimizers():
    model = make()
    first, second = (torch.optim.SGD(model[i].adapter_parameters().values(), lr=0.1, fused=True) for i in (0, 2))
    cache = StepCache(model, first, second, dtype=HALF)
    for optimizer in (first, second):
        train(model, optimizer, X)
        assert_fresh(model, cache, X)


def test_data_edits_need_invalidate():
    model = make()
    cache = StepCache(model, adamw(model), dtype=HALF)
    before = model(X)
    model[0].lora_b.data.mul_(2)
    assert torch.equal(model(X), before)  # torch cannot see it: hence invalidate
    cache.invalidate()
    assert not torch.equal(model(X), before)
    assert_fresh(model, cache, X, used=False)
    cache.refresh()
    assert_fresh(model, cache, X)


def test_loading_moving_and_scaling_are_seen():
    model, other = make(), make()
    with torch.no_grad():
        other[0].lora_a.mul_(2)
        other[2].magnitude.mul_(2)
    optimizer = adamw(model)
    cache = StepCache(model, optimizer, dtype=HALF)
    model.load_state_dict(other.state_dict())
    assert_fresh(model, cache, X, used=False)
    train(model, optimizer, X)
    assert_fresh(model, cache, X)
    model.float().to(HALF)  # other memory for all but the magnitudes; the factors are in 16 bits now
    assert_fresh(model, cache, X, used=False)
    cache.refresh()
    assert_fresh(model, cache, X)
    model[0].scale = 3.0
    assert_fresh(model, cache, X, used=False)


def test_merging_and_other_dtypes_pass_the_cache_by():
    model = make()
    with StepCache(model, adamw(model), dtype=HALF) as cache:
        assert_fresh(model, cache, X)
        with torch.autocast("cpu", torch.float16):
            assert_fresh(model, cache, X, used=False)
        expected = [layer.effective_weight().to(HALF) for layer in (model[0], model[2])]
        peftlite.merge_adapters(model)
        assert torch.equal(model[0].weight, expected[0])
        assert torch.equal(model[2].weight, expected[1])


def test_checkpointed_layers_compute_the_same_again():
    grads = []
    for cached in (False, True):
        model = make()
        optimizer = adamw(model)
        cache = StepCache(model, optimizer, dtype=HALF) if cached else None
        train(model, optimizer, X)
        optimizer.zero_grad()
        checkpoint(model, X, use_reentrant=False).float().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
        assert cache is None or preparations(model, X)[0] == 0
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_backward_pass_from_before_the_step_is_an_error(method):
    model = make(method)
    optimizer = adamw(model, fused=True)
    cache = StepCache(model, optimizer, dtype=HALF)
    late = model(X)
    train(model, optimizer, X)
    with pytest.raises(RuntimeError, match=r"in.?place"):
        late.sum().backward()
    cache.close()


def test_a_cache_that_is_gone_is_not_used():
    model = make()
    cache = StepCache(model, adamw(model), dtype=HALF)
    assert preparations(model, X)[0] == 0
    del cache
    gc.collect()
    assert preparations(model, X)[0] > 0


def test_one_launch_of_each_kind_serves_all_layers_of_a_kind():
    model = nn.Sequential(*[nn.Linear(32, 32, dtype=HALF) for _ in range(6)])
    peftlite.inject_adapters(model, [str(i) for i in range(6)], rank=4, method="dora")
    names = []
    with observing(lambda event: names.append(event.name)):
        StepCache(model, adamw(model), dtype=HALF)
    assert names == ["_pack_grouped_kernel", "_row_norm_grouped_kernel"]


def test_what_cannot_be_cached_is_said():
    model = make()
    with pytest.raises(ValueError, match=r"Linear has no LoRA or DoRA layer; call inject_adapters first"):
        StepCache(nn.Linear(2, 2), adamw(model), dtype=HALF)
    with pytest.raises(ValueError, match=r"no optimizer was given.*pass them all"):
        StepCache(model, dtype=HALF)
    with pytest.raises(ValueError, match=r"StepCache prepares adapters for the Triton kernels, but .* float64; train without"):
        StepCache(model, adamw(model), dtype=torch.float64)

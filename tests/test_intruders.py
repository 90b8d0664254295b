"""Intruder dimensions: the report's measures and the scaling (Shuttleworth et al. 2024)."""

import math
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nets import net, perturb
from torch import Tensor, nn

from peftlite import adapters, inject_adapters, merge_adapters
from peftlite.analysis import intruder_report, scale_intruders
from peftlite.analysis.intruders import find_intruders


def base_of(out: int = 24, inn: int = 20, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A weight in fp64 with well-separated singular values, and its ``U, σ, V``."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(out, out, generator=generator, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(inn, inn, generator=generator, dtype=torch.float64))[0]
    sigma = torch.arange(min(out, inn), 0, -1, dtype=torch.float64)
    k = len(sigma)
    return (u[:, :k] * sigma) @ v[:, :k].T, u, sigma, v


def unit(size: int, seed: int) -> Tensor:
    """A random unit vector in fp64."""
    x = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x / x.norm()


def report(before: Tensor, after: Tensor, **options: Any) -> Any:
    """The report of a single matrix."""
    return intruder_report({"w.weight": after}, {"w.weight": before}, **options)


def test_equal_weights_have_none() -> None:
    """Invariant §17: equal weights have none."""
    w = base_of()[0]
    found = report(w, w.clone())
    assert (found.total(), found.matrices, found.unchanged) == (0, (), ("w",))
    assert "1 matrices unchanged" in str(found)
    model = inject_adapters(net(), "all-linear", 2)
    assert len(intruder_report(model).unchanged) == len(adapters(model))


def test_a_large_random_spike_is_one_intruder() -> None:
    """Invariant §17: a large random spike is exactly one."""
    w, _, sigma, _ = base_of(60, 60)
    spiked = w + 3 * sigma[0] * torch.outer(unit(60, 1), unit(60, 2))
    found = report(w, spiked, top=10)
    assert found.total() == 1
    matrix = found.matrices[0]
    assert matrix.intruders() == (0,)
    assert matrix.cosines[0] == (torch.linalg.svd(spiked)[0][:, 0] @ torch.linalg.svd(w)[0]).abs().max().item()
    assert matrix.singular_values == tuple(torch.linalg.svd(spiked, full_matrices=False)[1][:10].tolist())


def test_a_spike_along_the_base_is_none() -> None:
    """Invariant §17: a spike along the base's first direction is none."""
    w, u, sigma, v = base_of()
    assert report(w, w + 3 * sigma[0] * torch.outer(u[:, 0], v[:, 0])).total() == 0


def test_small_dense_noise_makes_none() -> None:
    """Invariant §17: small noise on a well-separated spectrum makes none."""
    w = base_of()[0]
    noise = 1e-3 * torch.randn(w.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    found = report(w, w + noise, thresholds=(0.3, 0.9))
    assert found.total(0.9) == 0
    assert found.matrices[0].effective_rank > 10


@given(seed=st.integers(0, 999), size=st.floats(0.1, 40))
def test_counts_grow_with_threshold_and_top(seed: int, size: float) -> None:
    """Invariant §17: counts grow with ε and with k."""
    w = base_of(12, 15)[0]
    after = w + size * torch.outer(unit(12, seed), unit(15, seed + 1000))
    few, many = (report(w, after, top=top) for top in (3, 8))
    thresholds = (0.2, 0.4, 0.6, 0.8, 0.95)
    for found in (few, many):
        counts = [found.total(e) for e in thresholds]
        assert counts == sorted(counts)
    assert all(few.total(e) <= many.total(e) for e in thresholds)


def test_effective_and_stable_rank_and_norms() -> None:
    """Invariant §17: the effective rank of I_n is n, that of a rank-1 matrix 1."""
    w = torch.diag(torch.arange(9.0, 0, -1, dtype=torch.float64))
    found = report(w, w + torch.eye(9, dtype=torch.float64)).matrices[0]
    assert found.effective_rank == pytest.approx(9, rel=1e-12)
    assert found.stable_rank == pytest.approx(9, rel=1e-12)
    assert found.relative_norm == pytest.approx(3 / w.norm().item(), rel=1e-12)
    assert found.relative_spectral_norm == pytest.approx(1 / 9, rel=1e-12)
    one = report(w, w + torch.outer(unit(9, 1), unit(9, 2))).matrices[0]
    assert one.effective_rank == pytest.approx(1, abs=1e-10)
    assert one.stable_rank == pytest.approx(1, rel=1e-12)


def test_energy_outside_the_span_needs_more_rows_than_columns() -> None:
    tall, u, sigma, _ = base_of(24, 10)
    after = tall + 3 * sigma[0] * torch.outer(u[:, 20], unit(10, 2))  # a left vector that the base does not have
    assert report(tall, after).matrices[0].outside[0] > 0.8
    wide = base_of(10, 24)[0]
    spiked = wide + 30 * torch.outer(unit(10, 1), unit(24, 2))
    assert max(report(wide, spiked).matrices[0].outside) < 1e-12


def test_window_cosine_sees_through_a_rotation_among_equal_singular_values() -> None:
    w = torch.eye(16, dtype=torch.float64)
    q = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64))[0]
    found = report(w, q @ torch.diag(torch.linspace(1.05, 1, 16, dtype=torch.float64)) @ q.T, top=1).matrices[0]
    assert found.cosines[0] < 0.7
    assert found.window_cosines[0] == pytest.approx(1, rel=1e-12)


def test_an_adapted_model_is_its_own_base() -> None:
    for method in ("lora", "dora"):
        model = inject_adapters(net().double(), "all-linear", 2, method=method, exclude="head*")
        perturb(model)
        dense = net().double()
        with torch.no_grad():
            for name, layer in adapters(model).items():
                dense.get_submodule(name).weight.copy_(layer.effective_weight())
        expected = intruder_report(dense, net().double())
        assert intruder_report(model).matrices == expected.matrices
        assert intruder_report(model, net().double()).matrices == expected.matrices
        assert intruder_report(dense.state_dict(), net().double().state_dict()).matrices == expected.matrices
        merge_adapters(model)
        assert intruder_report(model, net().double()).matrices == expected.matrices


def test_the_base_is_read_through_its_accessor() -> None:
    model = inject_adapters(net(), "query", 2)
    perturb(model)
    other = base_of(8, 8)[0].float()
    with mock.patch("peftlite.LoRALinear.base_weight", return_value=other):
        found = intruder_report(model).matrices[0]
    assert found.relative_norm != intruder_report(model).matrices[0].relative_norm
    assert found.singular_values[0] > 7


def test_16_bit_adapters_are_widened_first() -> None:
    model = inject_adapters(net(), "query", 2)
    perturb(model)
    model.bfloat16()
    found, exact = intruder_report(model), intruder_report(model.float())
    assert found.matrices == exact.matrices


def test_fused_transposed_and_chosen_matrices() -> None:
    parts = [base_of(8, 10, seed)[0] for seed in range(3)]
    spiked = [part + 30 * torch.outer(unit(8, i), unit(10, 9)) * (i == 1) for i, part in enumerate(parts)]
    before, after = {"qkv.weight": torch.cat(parts)}, {"qkv.weight": torch.cat(spiked)}
    found = intruder_report(after, before, split={"qkv": 3}, top=1)
    assert [matrix.name for matrix in found.matrices] == ["qkv[1]"]
    assert found.unchanged == ("qkv[0]", "qkv[2]")
    single = report(parts[1], spiked[1], top=1).matrices[0]
    assert found.matrices[0].cosines == single.cosines
    turned = intruder_report({"c": spiked[1].T}, {"c": parts[1].T}, transposed="c", top=1).matrices[0]
    assert turned.cosines == single.cosines
    assert turned.shape == (8, 10)
    model = inject_adapters(net(), ["query", "up"], 2)
    perturb(model)
    assert [m.name for m in intruder_report(model, names="1.up").matrices] == ["encoder.1.up"]


def test_cache_keeps_the_base_and_notices_another() -> None:
    w, other = base_of()[0], base_of(seed=1)[0]
    after, cache = w + 1, {}
    with mock.patch("torch.linalg.svd", wraps=torch.linalg.svd) as svd:
        first = report(w, after, cache=cache)
        assert svd.call_count == 2
        assert report(w, after, cache=cache) == first == report(w, after)
        assert svd.call_count == 5
    assert report(other, after, cache=cache) == report(other, after)


def test_table() -> None:
    model = inject_adapters(net(), "query", 2)
    perturb(model)
    found = intruder_report(model, thresholds=(0.25, 0.5))
    lines = str(found).splitlines()
    assert lines[0].split()[:3] == ["layer", "<0.25", "<0.5"]
    assert [line.split()[0] for line in lines[1:3]] == ["encoder.0.query", "encoder.1.query"]
    assert lines[3].split()[1:4] == [",".join(["mean"]), str(found.total(0.25)), str(found.total(0.5))]
    assert found.mean("stable_rank") == sum(m.stable_rank for m in found.matrices) / 2


def spiked_net(method: str, rank: int = 3, **options: Any) -> nn.Module:
    """An adapted fp64 net each of whose queries has a large random direction."""
    model = inject_adapters(net().double(), "query", rank, method=method, **options)
    perturb(model)
    for layer in adapters(model).values():
        with torch.no_grad():
            layer.lora_a[0], layer.lora_b[:, 0] = 2 * unit(8, 3), 3 * unit(8, 4)
            if method == "dora":  # a row of it made long by its magnitude: the intruder lies in that as well
                layer.magnitude[2] *= 8
    return model


def test_factor_one_changes_nothing() -> None:
    """Invariant §17: factor 1 changes nothing."""
    w = base_of()[0]
    after = {"w": w + 90 * torch.outer(unit(24, 1), unit(20, 2))}
    kept = after["w"].clone()
    assert scale_intruders(after, 1.0, {"w": w})[0].change == 0
    assert torch.equal(after["w"], kept)


def test_factor_zero_removes_the_direction() -> None:
    """Invariant §17: factor 0 leaves u_jᵀ W v_j = 0."""
    w = base_of()[0]
    after = w + 90 * torch.outer(unit(24, 1), unit(20, 2))
    u, sigma, v = find_intruders(w, after, top=10, threshold=0.7)
    assert len(sigma) >= 1
    changed = {"w.weight": after.clone()}
    result = scale_intruders(changed, 0.0, {"w.weight": w}, threshold=0.7)
    left = torch.einsum("oj,oi,ji->j", u, changed["w.weight"], v)
    assert left.abs().max().item() <= 100 * torch.finfo(torch.float64).eps * sigma[0].item()
    assert result[0].intruders == len(sigma)
    assert result[0].change == pytest.approx(sigma.norm().item(), rel=1e-12)


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("factor", [0.0, 0.75, 1.5])
def test_written_back_into_the_adapter(method: str, factor: float) -> None:
    model = spiked_net(method, rank=8, alpha=4.0)  # a rank that holds any update of an 8x8 layer
    layer = adapters(model)["encoder.0.query"]
    base, after = layer.weight.clone(), layer.effective_weight().detach()
    u, sigma, v = find_intruders(base, after, top=10, threshold=0.7)
    assert len(sigma) >= 1
    done = {matrix.name: matrix for matrix in scale_intruders(model, factor, threshold=0.7)}
    expected = after + (factor - 1) * (u * sigma) @ v
    error = (layer.effective_weight() - expected).abs().max().item()
    assert error <= 1000 * torch.finfo(torch.float64).eps * expected.abs().max().item()
    assert done["encoder.0.query"].intruders == len(sigma)
    assert done["encoder.0.query"].lost < 1e-12
    assert torch.equal(layer.weight, base)


def test_what_the_rank_cannot_hold_is_reported_and_is_the_least_possible() -> None:
    model = spiked_net("lora", rank=2)
    layer = adapters(model)["encoder.1.query"]
    base, after = layer.weight.clone(), layer.effective_weight().detach()
    u, sigma, v = find_intruders(base, after, top=10, threshold=0.7)
    wanted = after + (0.25 - 1) * (u * sigma) @ v - base
    done = {matrix.name: matrix for matrix in scale_intruders(model, 0.25, threshold=0.7)}["encoder.1.query"]
    missing = torch.linalg.svdvals(wanted)[2:].norm()
    assert (layer.effective_weight() - base - wanted).norm().item() == pytest.approx(missing.item(), rel=1e-9)
    assert done.lost == pytest.approx((missing / wanted.norm()).item(), rel=1e-9)


def test_matrices_without_intruders_stay_bit_for_bit() -> None:
    model = inject_adapters(net(), "query", 2)
    perturb(model)
    before = {key: t.clone() for key, t in model.state_dict().items()}
    assert scale_intruders(model, 0.5, threshold=0.01) == ()
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())


def test_fused_and_transposed_weights_are_written_in_place() -> None:
    parts = [base_of(8, 10, seed)[0] for seed in range(2)]
    spiked = parts[1] + 60 * torch.outer(unit(8, 1), unit(10, 9))
    model, base = nn.Linear(16, 10, bias=False).double(), nn.Linear(16, 10, bias=False).double()  # weights (10, 16)
    with torch.no_grad():
        base.weight.copy_(torch.cat(parts).T)
        model.weight.copy_(torch.cat([parts[0], spiked]).T)
    net_, base_ = nn.Sequential(model), nn.Sequential(base)
    (done,) = scale_intruders(net_, 0.0, base_, transposed="0", split={"0": 2}, threshold=0.6, top=1)
    assert done.intruders == 1
    alone = {"w": spiked.clone()}
    scale_intruders(alone, 0.0, {"w": parts[1]}, threshold=0.6, top=1)
    assert torch.equal(model.weight.T[8:], alone["w"])
    assert torch.equal(model.weight.T[:8], parts[0])


def test_errors() -> None:
    w = base_of()[0]
    model = inject_adapters(net(), "query", 2)
    perturb(model)
    with pytest.raises(ValueError, match=r"Net carries no adapters, so its base must be given"):
        intruder_report(net())
    with pytest.raises(ValueError, match=r"no matrix in common; the tuned one has a, the base b"):
        intruder_report({"a": w}, {"b": w})
    with pytest.raises(ValueError, match=r"the base has shape \(24, 20\), the tuned weight \(20, 24\)"):
        intruder_report({"a": w.T}, {"a": w})
    with pytest.raises(ValueError, match=r"a: the tuned weight is not finite"):
        intruder_report({"a": w * math.nan}, {"a": w})
    with pytest.raises(ValueError, match=r"name 'querx' matches no matrix.*Did you mean 'query'"):
        intruder_report(model, names="querx")
    with pytest.raises(ValueError, match=r"transposed 'x' matches no matrix"):
        intruder_report(model, transposed="x")
    with pytest.raises(ValueError, match=r"a: its 24 rows do not fall into 7 equal parts"):
        intruder_report({"a": w + 1}, {"a": w}, split={"a": 7})
    with pytest.raises(ValueError, match=r"top must be a positive integer, got 0"):
        intruder_report(model, top=0)
    with pytest.raises(ValueError, match=r"a threshold is a cosine in \(0, 1\], got 1.5"):
        intruder_report(model, thresholds=(1.5,))
    with pytest.raises(ValueError, match=r"factor must be a finite number of at least 0, got -1"):
        scale_intruders(model, -1)
    with pytest.raises(ValueError, match=r"the parts of an adapted layer share one adapter"):
        scale_intruders(model, 0.5, split={"query": 2})
    with pytest.raises(ValueError, match=r"cannot be written back into Other, only into LoRA and DoRA"):
        scale_intruders(foreign_model(), 0.5)


def foreign_model() -> nn.Module:
    """A model with a method that the intervention does not know."""
    from peftlite import AdapterLinear

    class Other(AdapterLinear):
        method = "other"

        def build(self) -> None:
            self.shift = nn.Parameter(torch.ones(self.out_features, 1))

        def effective_weight(self) -> Tensor:
            return self.base_weight() + self.shift

        def config(self) -> dict[str, Any]:
            return {"rank": self.rank}

    return inject_adapters(net(), "query", 1, method=Other)

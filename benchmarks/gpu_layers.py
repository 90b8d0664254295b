"""One adapted linear layer, computed by ours and by the peers: what `benchmarks.gpu` checks and times."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from benchmarks.harness import Check, compare
from peftlite.kernels.dora_linear import dora_linear
from peftlite.kernels.lora_linear import lora_linear
from peftlite.kernels.row_norm import row_norm

SCALE = 2.0
Results = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One layer and one batch."""

    operation: str  # "lora" or "dora"
    rows: int
    in_features: int
    out_features: int
    rank: int
    dtype: torch.dtype
    bias: bool = True
    dropout: float = 0.0
    norm_grad: bool = False

    def __str__(self) -> str:
        options = [
            *([] if self.bias else ["no bias"]),
            *([f"dropout {self.dropout:g}"] if self.dropout else []),
            *(["exact norm"] if self.norm_grad else []),
        ]
        dtype = str(self.dtype).removeprefix("torch.")
        shape = f"{self.operation} {self.rows} x {self.in_features} -> {self.out_features} r={self.rank}"
        return ", ".join([f"{shape} {dtype}", *options])


@dataclass(frozen=True)
class Tensors:
    """The tensors of a case; random, since matrix units run faster on zeros."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    magnitude: Tensor | None
    upstream: Tensor

    def trained(self) -> dict[str, Tensor]:
        """Those that a gradient is asked for."""
        found = {"x": self.x, "lora_a": self.lora_a, "lora_b": self.lora_b}
        return found if self.magnitude is None else {**found, "magnitude": self.magnitude}

    def to(self, dtype: torch.dtype) -> "Tensors":
        """Copies in `dtype`, with gradients where these have them."""
        copies = {}
        for name, tensor in vars(self).items():
            if tensor is not None:
                copies[name] = tensor.detach().to(dtype).requires_grad_(tensor.requires_grad)
        return replace(self, **copies)


def tensors(case: Case, device: torch.device, seed: int = 0) -> Tensors:
    """Tensors of `case`, the same on every device; factors and magnitude in fp32, none of them at birth."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int, size: float = 1.0, dtype: torch.dtype = case.dtype, grad: bool = False) -> Tensor:
        return (size * torch.randn(shape, generator=generator)).to(dtype).to(device).requires_grad_(grad)

    master = torch.float32
    weight = noise(case.out_features, case.in_features, size=case.in_features**-0.5)
    a = noise(case.rank, case.in_features, size=case.in_features**-0.5, dtype=master, grad=True)
    b = noise(case.out_features, case.rank, size=0.1, dtype=master, grad=True)
    magnitude = None
    if case.operation == "dora":
        gain = 1 + 0.05 * noise(case.out_features, dtype=master)
        magnitude = (gain * row_norm(weight, a, b, SCALE)).detach().requires_grad_()
    return Tensors(
        x=noise(case.rows, case.in_features, grad=True),
        weight=weight,
        bias=noise(case.out_features, size=0.1) if case.bias else None,
        lora_a=a,
        lora_b=b,
        magnitude=magnitude,
        upstream=noise(case.rows, case.out_features),
    )


def ours(case: Case, t: Tensors, impl: str) -> Tensor:
    """The layer's output by one of our implementations."""
    if t.magnitude is None:
        return lora_linear(t.x, t.weight, t.bias, t.lora_a, t.lora_b, SCALE, dropout=case.dropout, impl=impl)
    options = {"dropout": case.dropout, "norm_grad": case.norm_grad, "impl": impl}
    return dora_linear(t.x, t.weight, t.bias, t.lora_a, t.lora_b, t.magnitude, SCALE, **options)


def results(case: Case, t: Tensors, forward: Callable[[Case, Tensors], Tensor]) -> Results:
    """Output and gradients of everything that trains."""
    y = forward(case, t)
    trained = t.trained()
    gradients = torch.autograd.grad(y, list(trained.values()), t.upstream.to(y.dtype))
    return {"output": y.detach(), **{f"d {name}": g for name, g in zip(trained, gradients, strict=True)}}


def correctness(case: Case, device: torch.device) -> list[Check]:
    """Output and every gradient of the fused operation against fp64, within twice the error of plain torch in that dtype."""
    t = tensors(case, device)
    oracle = results(case, t.to(torch.float64), lambda case, t: ours(case, t, "reference"))
    plain = results(case, t, lambda case, t: ours(case, t, "reference"))
    actual = results(case, t, lambda case, t: ours(case, t, "triton"))
    checks = [compare(f"{case}: {name}", actual[name], plain[name], oracle[name], dtype=case.dtype) for name in oracle]
    zero = [name for name, value in actual.items() if not value.abs().sum() > 0]
    return [*checks, Check(f"{case}: nothing is all zeros {zero or ''}".rstrip(), len(zero), 0)]


def dropout_correctness(case: Case, device: torch.device) -> list[Check]:
    """The same with dropout: the mask is made visible first, and replayed in fp64.

    With ``W = 0``, ``A = I``, ``B = I`` and x of ones the output is the mask over the probability of keeping; masks depend
    on the seed, the row and the column alone, so that the same seed drops the same elements of another x.
    """
    width, dtype = case.in_features, case.dtype
    eye = torch.eye(width, device=device)
    zero, ones = torch.zeros(width, width, dtype=dtype, device=device), torch.ones(case.rows, width, dtype=dtype, device=device)
    torch.manual_seed(0)
    visible = lora_linear(ones, zero, None, eye, eye, 1.0, dropout=case.dropout, impl="triton")
    mask = visible > 0
    keep = 1 / visible.double().max().item()
    rate = 1 - mask.double().mean().item()
    spread = 5 * (case.dropout * (1 - case.dropout) / mask.numel()) ** 0.5  # five standard deviations
    checks = [Check(f"{case}: share of dropped elements", abs(rate - case.dropout), spread + 2**-16)]
    t = tensors(case, device)

    def replayed(case: Case, t: Tensors) -> Tensor:
        dropped = t.x * mask / keep
        low = dropped @ t.lora_a.to(t.x.dtype).T @ t.lora_b.to(t.x.dtype).T
        y = t.x @ t.weight.T + SCALE * low
        if t.magnitude is not None:
            norm = torch.linalg.vector_norm(t.weight + SCALE * (t.lora_b @ t.lora_a), dim=1).detach()
            y = y * (t.magnitude / norm)
        return (y if t.bias is None else y + t.bias).to(t.x.dtype)

    torch.manual_seed(0)
    actual = results(case, t, lambda case, t: ours(case, t, "triton"))
    plain, oracle = results(case, t, replayed), results(case, t.to(torch.float64), replayed)
    return checks + [compare(f"{case}: {name}", actual[name], plain[name], oracle[name], dtype=dtype) for name in oracle]


def determinism(case: Case, device: torch.device, *, runs: int = 3) -> Check:
    """How many of output and gradients differ in any bit between `runs` runs."""
    t, found = tensors(case, device), []
    for _ in range(runs):
        torch.manual_seed(0)
        found.append(results(case, t, lambda case, t: ours(case, t, "triton")))
    differ = [name for name in found[0] if any(not torch.equal(found[0][name], other[name]) for other in found[1:])]
    return Check(f"{case}: bits that differ between {runs} runs {differ or ''}".rstrip(), len(differ), 0)


class _Holder(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def peft_layer(case: Case, t: Tensors) -> nn.Module:
    """Hugging Face PEFT's layer with the same frozen weight, all of it in the dtype of the case, which is its fastest."""
    import peft

    linear = nn.Linear(case.in_features, case.out_features, bias=case.bias, device=t.x.device, dtype=case.dtype)
    with torch.no_grad():
        linear.weight.copy_(t.weight)
        if t.bias is not None:
            linear.bias.copy_(t.bias)
    config = peft.LoraConfig(
        r=case.rank,
        lora_alpha=SCALE * case.rank,
        lora_dropout=case.dropout,
        target_modules=["linear"],
        use_dora=case.operation == "dora",
        init_lora_weights=False,
    )
    model = peft.get_peft_model(_Holder(linear), config, autocast_adapter_dtype=False)
    return model.to(case.dtype).train()


def steps(case: Case, device: torch.device, *, backend: str) -> Mapping[str, Callable[[], object]]:
    """A forward and backward pass by each candidate, by name: fused, ATen, plain torch, plain torch compiled, PEFT.

    Args:
        case: the layer.
        device: where.
        backend: of `torch.compile`.
    """
    t = tensors(case, device)
    trained = list(t.trained().values())

    def passes(forward: Callable[[], Tensor], trained: list[Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(forward(), trained, t.upstream)

    compiled = torch.compile(lambda: ours(case, t, "reference"), backend=backend)
    model = peft_layer(case, t)
    theirs = [t.x, *(parameter for parameter in model.parameters() if parameter.requires_grad)]
    return {
        "triton": passes(lambda: ours(case, t, "triton"), trained),
        "torch": passes(lambda: ours(case, t, "torch"), trained),
        "reference": passes(lambda: ours(case, t, "reference"), trained),
        "compiled reference": passes(compiled, trained),
        "peft": passes(lambda: model(t.x), theirs),
    }

"""What the operations must compute, written out densely, and how far from it a result may be."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from peftlite.kernels.dora_linear import dora_linear
from peftlite.kernels.dropout import draw_keep_mask, kept
from peftlite.kernels.lora_linear import lora_linear

EPS = 1e-12  # the floor of the row norm
NAMES = ("x", "weight", "bias", "lora_a", "lora_b", "magnitude")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SIZES = st.sampled_from([1, 2, 3, 5, 7, 13, 17, 29, 40])
LAYOUTS = st.sampled_from(["plain", "transposed", "expanded", "strided", "batched"])


def draw_mask(x: Tensor, dropout: float) -> tuple[Tensor | None, float]:
    """The mask that the operations on ATen calls draw, bool like `x`, and the probability that an element is kept."""
    mask, keep = draw_keep_mask(x, dropout)
    return None if mask is None else kept(mask, x.shape, torch.uint8).bool(), keep


def lora(x, weight, bias, lora_a, lora_b, scale, *, mask=None, keep=1.0, dtype=torch.float64, dense=True):
    """LoRA from its definition in `dtype`; `dense` multiplies with the matrix ``s B A``, otherwise with A, then B."""
    x, weight, a, b = (t.to(dtype) for t in (x, weight, lora_a, lora_b))
    dropped = x if mask is None else x * mask / keep
    low_rank = dropped @ (scale * b @ a).mT if dense else scale * ((dropped @ a.mT) @ b.mT)
    y = x @ weight.mT + low_rank
    return y if bias is None else y + bias.to(dtype)


def dora(
    x, weight, bias, lora_a, lora_b, magnitude, scale, *, mode, norm_grad, mask=None, keep=1.0, dtype=torch.float64, dense=True
):
    """DoRA from its definition in `dtype`, with norm and gain in fp32 at least."""
    wide = torch.float64 if torch.float64 in (dtype, weight.dtype, lora_a.dtype) else torch.float32
    direction = weight.to(wide) + scale * (lora_b.to(wide) @ lora_a.to(wide))
    norm = torch.linalg.vector_norm(direction, dim=1).clamp_min(EPS)
    gain = magnitude.to(wide) / (norm if norm_grad else norm.detach())
    dropped = x if mask is None else x * mask / keep
    factors = (weight, None, lora_a, lora_b, scale)
    if mode == "peft" and mask is not None:
        y = lora(x - dropped, weight, None, lora_a[:0], lora_b[:, :0], scale, dtype=dtype, dense=dense)
        y = y + gain * lora(dropped, *factors, dtype=dtype, dense=dense)
    else:
        y = gain * lora(x, *factors, mask=mask, keep=keep, dtype=dtype, dense=dense)
    return (y if bias is None else y + bias).to(dtype)


@dataclass
class Case:
    """Inputs of one call: leaves by name, and what else the operation is given."""

    tensors: dict[str, Tensor | None]
    dy: Tensor
    scale: float = 0.7
    options: dict[str, Any] = field(default_factory=dict)
    compute: torch.dtype | None = None  # autocast's dtype where it is on
    seed: int = 0

    def inputs(self, dtype: torch.dtype | None = None) -> dict[str, Tensor | None]:
        """Fresh leaves with the same values (in `dtype`), strides and need of a gradient."""
        fresh = {}
        for name, tensor in self.tensors.items():
            if tensor is not None:
                copy = tensor.detach() if dtype is None else tensor.detach().to(dtype)
                tensor = copy.requires_grad_(tensor.requires_grad)
            fresh[name] = tensor
        return fresh

    def results(self, impl: str) -> dict[str, Tensor]:
        """The output and the gradients of implementation `impl`, of the fp64 ``"oracle"`` or of ``"eager"`` torch.

        In fp64 there is no wider oracle: eager torch runs in fp32 instead, and its error is scaled down to fp64; the
        oracle errs as well, so the budget of both is given (`check` doubles the eps).
        """
        x = self.tensors["x"]
        scaled_down = impl == "eager" and x.dtype == torch.float64
        dtype = torch.float64 if impl == "oracle" else torch.float32 if scaled_down else self.compute or x.dtype
        inputs = self.inputs(dtype if impl == "oracle" or scaled_down else None)
        arguments = [inputs[name] for name in NAMES if name in inputs]
        is_dora = "magnitude" in inputs
        torch.manual_seed(self.seed)
        if impl in ("oracle", "eager"):
            options: dict[str, Any] = {"dtype": dtype, "dense": impl == "oracle"}
            dropout = self.options.get("dropout", 0.0)
            if dropout:
                options |= dict(zip(("mask", "keep"), draw_mask(x, dropout), strict=True))
            arguments[0] = arguments[0].to(dtype)
            if is_dora:
                options |= {"mode": self.options.get("dropout_mode", "lowrank")}
                options |= {"norm_grad": self.options.get("norm_grad", False)}
            y = (dora if is_dora else lora)(*arguments, self.scale, **options)
        else:
            with torch.autocast("cpu", self.compute, enabled=self.compute is not None):
                y = (dora_linear if is_dora else lora_linear)(*arguments, self.scale, impl=impl, **self.options)
        trained = {name: t for name, t in inputs.items() if t is not None and t.requires_grad}
        grads = torch.autograd.grad(y, list(trained.values()), self.dy.to(y.dtype)) if trained else ()
        results = {"y": y.detach()} | dict(zip(trained, grads, strict=True))
        if scaled_down:
            oracle, ratio = self.results("oracle"), 2 * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
            return {name: oracle[name] + ratio * (value - oracle[name]) for name, value in results.items()}
        return results

    def terms_of_lora_b(self) -> Tensor:
        """``s Σ_i |g dy_i| |h_i|``: the gradient of B is a sum whose rounding grows with its terms, though they cancel."""
        x, weight, _, a, b, *magnitude = (None if t is None else t.detach().double() for t in map(self.tensors.get, NAMES))
        torch.manual_seed(self.seed)
        mask, keep = draw_mask(self.tensors["x"], self.options.get("dropout", 0.0))
        h = (x if mask is None else x * mask / keep).flatten(0, -2) @ a.T
        dy = self.dy.double().flatten(0, -2)
        if magnitude[0] is not None:
            dy = dy * magnitude[0] / torch.linalg.vector_norm(weight + self.scale * b @ a, dim=1).clamp_min(EPS)
        return abs(self.scale) * dy.abs().T @ h.abs()

    def check(self, impls: Iterable[str] = ("torch", "reference")) -> None:
        """Output and every gradient of each implementation lie within the budget."""
        oracle, eager = self.results("oracle"), self.results("eager")
        # The exact gradient is a sum of two that may cancel: each of them brings rounding of its own size.
        detached = replace(self, options=self.options | {"norm_grad": False}) if "magnitude" in self.tensors else self
        scales = {name: t.abs() + (oracle[name] - t).abs() for name, t in detached.results("oracle").items()}
        if "lora_b" in scales:
            scales["lora_b"] = scales["lora_b"] + self.terms_of_lora_b()
        for impl in impls:
            actual = self.results(impl)
            assert actual.keys() == oracle.keys()
            assert actual["y"].dtype == (self.compute or self.tensors["x"].dtype)
            for name, value in actual.items():
                if name != "y":
                    assert value.dtype == self.tensors[name].dtype, name
                widest = [self.compute or self.tensors["x"].dtype, value.dtype]
                if "magnitude" in self.tensors:  # the norm is as precise as the widest of the stored tensors
                    widest.append(torch.promote_types(torch.float32, self.tensors["lora_a"].dtype))
                eps = max(torch.finfo(dtype).eps for dtype in widest) * (2 if self.tensors["x"].dtype == torch.float64 else 1)
                assert_within_budget(value, eager[name], oracle[name], eps, f"{impl}: {name}", scales[name])


def assert_within_budget(
    actual: Tensor, eager: Tensor, oracle: Tensor, eps: float, what: str = "", scale: Tensor | None = None
) -> None:
    """``|actual - oracle| <= 2 (max |eager - oracle| + eps max |oracle|)``, eps that of the dtype of `eager`.

    `scale`, where given, is another tensor whose largest value counts if it is larger than that of `oracle`.
    """
    assert actual.shape == oracle.shape, what
    if not oracle.numel():
        return
    largest = max(t.abs().max() for t in (oracle, scale) if t is not None)
    budget = 2 * ((eager.double() - oracle).abs().max() + eps * largest)
    error = (actual.double() - oracle).abs().max()
    assert error <= budget, f"{what}: error {error:.3e}, budget {budget:.3e}, largest value {largest:.3e}"


def arrange(values: Tensor, layout: str) -> Tensor:
    """`values` (M, n), or as many of their rows repeated, in memory as `layout` says."""
    rows, columns = values.shape
    if layout == "transposed":
        return values.T.contiguous().T
    if layout == "expanded" and rows:
        return values[:1].expand(rows, columns)
    if layout == "strided":
        wide = values.new_zeros(rows, 2 * columns)
        wide[:, ::2] = values
        return wide[:, ::2]
    if layout == "batched":
        return values.reshape(rows, 1, columns).transpose(0, 1)
    return values.clone()


def make_case(
    rows, inner, outer, rank, *, x=torch.float32, stored=torch.float32, adapter=torch.float32, seed=0, **kwargs
) -> Case:
    """A case with perturbed adapters. Keywords: bias, dora, needs (names that train), x_layout, dy_layout, Case's fields."""
    bias, is_dora = kwargs.pop("bias", True), kwargs.pop("dora", False)
    needs = kwargs.pop("needs", tuple(name for name in NAMES if name != "weight"))
    x_layout, dy_layout = kwargs.pop("x_layout", "plain"), kwargs.pop("dy_layout", "plain")
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs, weight, offset = draw(rows, inner), draw(outer, inner) / inner**0.5, draw(outer)
    a, b = draw(rank, inner) / inner**0.5, draw(outer, rank) / rank**0.5
    if is_dora:  # rows of W + s B A that cancel make g ill-conditioned for everyone; test_row_norm.py has them
        update = torch.linalg.vector_norm(kwargs.get("scale", Case.scale) * b @ a, dim=1)
        b *= (torch.linalg.vector_norm(weight, dim=1) / (2 * update)).clamp_max(1)[:, None]
    tensors: dict[str, Tensor | None] = {
        "x": arrange(inputs.to(x), x_layout),
        "weight": weight.to(stored),
        "bias": offset.to(stored) if bias else None,
        "lora_a": a.to(adapter),
        "lora_b": b.to(adapter),
    }
    if is_dora:
        tensors["magnitude"] = (1 + 0.3 * draw(outer)).to(adapter if adapter == torch.float64 else torch.float32)
    for name in needs:
        if tensors.get(name) is not None:
            tensors[name].requires_grad_()
    lead = tensors["x"].shape[:-1]
    dy = arrange(draw(rows, outer).to(x), dy_layout)
    return Case(tensors, dy if dy.shape[:-1] == lead else dy.reshape(*lead, outer), seed=seed, **kwargs)


@st.composite
def cases(draw, dora: bool) -> Case:
    """Cases of every shape, dtype, layout and choice of what trains."""
    inner, outer = draw(SIZES), draw(SIZES)
    x = draw(st.sampled_from(DTYPES))
    adapter = torch.float64 if x == torch.float64 else draw(st.sampled_from([torch.float32, x]))
    options: dict[str, Any] = {"dropout": draw(st.sampled_from([0.0, 0.0, 0.3]))}
    if dora:
        options |= {"dropout_mode": draw(st.sampled_from(["lowrank", "peft"])), "norm_grad": draw(st.booleans())}
        options |= {"keep_output": draw(st.booleans())}
    return make_case(
        draw(st.sampled_from([0, 1, 2, 3, 5, 13, 31])),
        inner,
        outer,
        draw(st.integers(1, min(inner, outer))),
        x=x,
        stored=torch.float64 if x == torch.float64 else draw(st.sampled_from(DTYPES[1:])),
        adapter=adapter,
        seed=draw(st.integers(0, 99)),
        bias=draw(st.booleans()),
        dora=dora,
        needs=draw(st.sets(st.sampled_from([name for name in NAMES if name != "weight"]))),
        x_layout=draw(LAYOUTS),
        dy_layout=draw(LAYOUTS),
        scale=draw(st.sampled_from([0.25, 1.0, 3.0])),
        options=options,
        compute=torch.bfloat16 if x == torch.float32 and draw(st.booleans()) else None,
    )

"""Intruder dimensions: Shuttleworth et al. 2024, arXiv:2410.21228."""

import copy
import hashlib
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from peftlite.adapter import AdapterLinear
from peftlite.targets import as_patterns, matches, require_match

Weights = nn.Module | Mapping[str, Tensor]
Spectra = MutableMapping[str, tuple[str, Tensor, Tensor]]
THRESHOLDS = (0.3, 0.5, 0.7)
WINDOW = 0.1  # base directions whose singular values are this close, relatively, may rotate into one another


@dataclass(frozen=True)
class MatrixReport:
    """How the leading left singular vectors ``u_j`` of a tuned matrix lie to those of its base, ``u0_i``.

    Attributes:
        name: dotted name of the layer; a part of a fused matrix has its number in brackets behind it.
        shape: ``(out, in)``.
        singular_values: the ``top`` largest of the tuned matrix, ``σ_1 ≥ σ_2 ≥ ...``.
        cosines: ``max_i |⟨u_j, u0_i⟩|`` of each; below a threshold, ``u_j`` is an intruder.
        window_cosines: ``√Σ_i ⟨u_j, u0_i⟩²`` over the base directions whose singular values lie within 10 % of that of the
            nearest one. Base directions with nearly equal singular values rotate freely among themselves, so that a low
            cosine beside a high window cosine is no intruder, only such a rotation.
        outside: ``1 - Σ_i ⟨u_j, u0_i⟩²``, the energy outside the span of the base; not zero only where ``out > in``.
        effective_rank: ``exp(-Σ p_i ln p_i)``, ``p = σ / Σ σ``, of the update.
        stable_rank: ``‖ΔW‖_F² / ‖ΔW‖_2²``.
        relative_norm: ``‖ΔW‖_F / ‖W0‖_F``.
        relative_spectral_norm: ``‖ΔW‖_2 / ‖W0‖_2``.
    """

    name: str
    shape: tuple[int, int]
    singular_values: tuple[float, ...]
    cosines: tuple[float, ...]
    window_cosines: tuple[float, ...]
    outside: tuple[float, ...]
    effective_rank: float
    stable_rank: float
    relative_norm: float
    relative_spectral_norm: float

    def intruders(self, threshold: float = 0.5) -> tuple[int, ...]:
        """The places ``j``, from 0, of the intruders: those with a cosine below `threshold`."""
        return tuple(j for j, cosine in enumerate(self.cosines) if cosine < threshold)


@dataclass(frozen=True)
class IntruderReport:
    """The matrices of a model, one by one; ``str()`` is a table with the totals below it.

    Attributes:
        matrices: one report for each matrix that tuning changed.
        unchanged: names of the matrices that are the base's bit for bit, and have no intruders by definition.
        thresholds: those of the table.
    """

    matrices: tuple[MatrixReport, ...]
    unchanged: tuple[str, ...]
    thresholds: tuple[float, ...]

    def total(self, threshold: float = 0.5) -> int:
        """Intruders of all matrices together."""
        return sum(len(matrix.intruders(threshold)) for matrix in self.matrices)

    def mean(self, measure: str) -> float:
        """Mean over the matrices of a measure of `MatrixReport` that is one number, such as ``"effective_rank"``."""
        return sum(getattr(matrix, measure) for matrix in self.matrices) / max(1, len(self.matrices))

    def __str__(self) -> str:
        measures = {"erank": "effective_rank", "stable rank": "stable_rank", "|dW|/|W|": "relative_norm"}
        header = ["layer", *(f"<{threshold:g}" for threshold in self.thresholds), "min cos", "min window", *measures]
        rows = [
            [
                matrix.name,
                *(str(len(matrix.intruders(threshold))) for threshold in self.thresholds),
                *(f"{min(values):.3f}" for values in (matrix.cosines, matrix.window_cosines)),
                *(f"{getattr(matrix, measure):.4g}" for measure in measures.values()),
            ]
            for matrix in self.matrices
        ]
        totals = [str(self.total(threshold)) for threshold in self.thresholds]
        rows.append(["total, mean", *totals, "", "", *(f"{self.mean(measure):.4g}" for measure in measures.values())])
        widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
            for row in (header, *rows)
        ]
        return "\n".join([*lines, f"{len(self.unchanged)} matrices unchanged"])


@torch.no_grad()
def intruder_report(
    tuned: Weights,
    base: Weights | None = None,
    *,
    names: str | Iterable[str] | None = None,
    top: int = 10,
    thresholds: Sequence[float] = THRESHOLDS,
    transposed: str | Iterable[str] = (),
    split: Mapping[str, int] | None = None,
    cache: Spectra | None = None,
) -> IntruderReport:
    """Count ``{j ≤ top : max_i |⟨u_j, u0_i⟩| < ε}``, the intruder dimensions of each tuned matrix, and measure its update.

    An intruder is a leading singular direction of the tuned weight that no singular direction of the base resembles. The
    paper finds them after LoRA and hardly any after full fine-tuning, fewer at higher rank, and finds forgetting in them.
    Work is in fp32 (fp64 for fp64 weights): three SVDs per matrix, two with `cache`.

    Args:
        tuned: an adapted model (each layer's `effective_weight`, whatever the method), or a model or state dict to be
            compared with `base`.
        base: model or state dict before tuning. Not needed for an adapted model, which carries its base with it,
            quantised or not. In state dicts every matrix counts that both have, embeddings too: see `names`.
        names: layers to look at, as for `inject_adapters`; by default all that both sides have.
        top: how many leading directions are inspected.
        thresholds: values of ε for the table.
        transposed: layers that store ``(in, out)``, as GPT-2's ``Conv1D`` does.
        split: into how many parts the rows of a fused matrix fall: ``{"qkv": 3}``.
        cache: a dict of yours that keeps the singular vectors of the base from one call to the next.

    Raises:
        ValueError: if there is nothing to compare, a name matches nothing, shapes differ, a weight is not finite, or a value
            is out of range.

    Source: Shuttleworth et al. 2024, "LoRA vs Full Fine-tuning: An Illusion of Equivalence", arXiv:2410.21228. As the
    authors' tool we take left vectors, absolute cosines, ``top = 10`` and ``ε = 0.5``; the window cosine is ours.

    Example:
        >>> base = {"q.weight": torch.diag(torch.arange(8.0, 0.0, -1.0))}
        >>> tuned = {"q.weight": base["q.weight"] + 20 * torch.full((8, 8), 1 / 8)}
        >>> report = intruder_report(tuned, base, top=1)
        >>> report.total(), round(report.matrices[0].stable_rank, 3)
        (1, 1.0)
    """
    _check_range(top, *thresholds)
    reports, unchanged = [], []
    for pair in matrix_pairs(tuned, base, names=names, transposed=transposed, split=split):
        for name, before, after in pair.parts():
            if torch.equal(before, after):
                unchanged.append(name)
            else:
                reports.append(_report(name, before, after, top, _base_spectrum(name, before, cache)))
    return IntruderReport(tuple(reports), tuple(unchanged), tuple(thresholds))


@dataclass(frozen=True)
class Pair:
    """One matrix before and after tuning, read when it is needed."""

    name: str
    before: Callable[[], Tensor]
    after: Callable[[], Tensor]
    transposed: bool
    split: int

    def parts(self) -> list[tuple[str, Tensor, Tensor]]:
        """Name, base and tuned weight ``(out, in)`` of each part, in fp32 or wider."""
        matrices = [matrix().detach() for matrix in (self.before, self.after)]
        wide = torch.promote_types(torch.promote_types(*(m.dtype for m in matrices)), torch.float32)
        if matrices[0].shape != matrices[1].shape:
            raise ValueError(
                f"{self.name}: the base has shape {tuple(matrices[0].shape)}, the tuned weight {tuple(matrices[1].shape)}; "
                "give the base that was tuned."
            )
        before, after = (m.to(matrices[1].device, wide) for m in matrices)
        for what, matrix in (("base", before), ("tuned", after)):
            if not torch.isfinite(matrix).all():
                raise ValueError(f"{self.name}: the {what} weight is not finite, and has no singular vectors to compare.")
        if self.transposed:
            before, after = before.T, after.T
        if before.shape[0] % self.split:
            raise ValueError(f"{self.name}: its {before.shape[0]} rows do not fall into {self.split} equal parts; see `split`.")
        if self.split == 1:
            return [(self.name, before, after)]
        parts = zip(before.chunk(self.split), after.chunk(self.split), strict=True)
        return [(f"{self.name}[{i}]", old, new) for i, (old, new) in enumerate(parts)]


def matrix_pairs(
    tuned: Weights,
    base: Weights | None,
    *,
    names: str | Iterable[str] | None = None,
    transposed: str | Iterable[str] = (),
    split: Mapping[str, int] | None = None,
) -> list[Pair]:
    """The matrices to compare; arguments as for `intruder_report`."""
    if base is None:
        layers = _adapted(tuned)
        if not layers:
            raise ValueError(
                f"{type(tuned).__name__} carries no adapters, so its base must be given: intruder_report(tuned, base)."
            )
        before = {name: layer.base_weight for name, layer in layers.items()}
        after = {name: _effective(layer) for name, layer in layers.items()}
    else:
        before, after = _matrices(base), _matrices(tuned)
    common = [name for name in after if name in before]
    if not common:
        raise ValueError(
            f"the two sides have no matrix in common; the tuned one has {', '.join(list(after)[:3]) or 'none'}, the base "
            f"{', '.join(list(before)[:3]) or 'none'}. Give a model and its base, or their state dicts."
        )
    if names is not None:
        wanted = {name for pattern in as_patterns(names) for name in require_match("name", pattern, common, "matrix")}
        common = [name for name in common if name in wanted]
    for option, patterns in (("transposed", as_patterns(transposed)), ("split", list(split or {}))):
        for pattern in patterns:
            require_match(option, pattern, common, "matrix")
    return [
        Pair(
            name,
            before[name],
            after[name],
            transposed=any(matches(name, pattern) for pattern in as_patterns(transposed)),
            split=next((parts for pattern, parts in (split or {}).items() if matches(name, pattern)), 1),
        )
        for name in common
    ]


def find_intruders(before: Tensor, after: Tensor, *, top: int, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """``(U, σ, Vᵀ)`` of the intruders among the `top` leading directions of `after`: ``(out, n), (n,), (n, in)``."""
    _check_range(top, threshold)
    u0 = torch.linalg.svd(before, full_matrices=False)[0]
    u, sigma, v = torch.linalg.svd(after, full_matrices=False)
    chosen = (u[:, :top].T @ u0).abs().amax(dim=1) < threshold
    return u[:, :top][:, chosen], sigma[:top][chosen], v[:top][chosen]


def _report(name: str, before: Tensor, after: Tensor, top: int, spectrum: tuple[Tensor, Tensor]) -> MatrixReport:
    u0, sigma0 = spectrum
    u, sigma, _ = torch.linalg.svd(after, full_matrices=False)
    squares = (u[:, :top].T @ u0).square()  # (top, min(out, in))
    best, nearest = squares.max(dim=1)
    window = (sigma0[None, :] - sigma0[nearest, None]).abs() <= WINDOW * sigma0[nearest, None]
    update = torch.linalg.svdvals(after - before)
    share = update / update.sum()
    return MatrixReport(
        name=name,
        shape=(after.shape[0], after.shape[1]),
        singular_values=tuple(sigma[:top].tolist()),
        cosines=tuple(best.sqrt().tolist()),
        window_cosines=tuple((squares * window).sum(dim=1).sqrt().tolist()),
        outside=tuple((1 - squares.sum(dim=1)).clamp_min(0).tolist()),
        effective_rank=torch.exp(-torch.xlogy(share, share).sum()).item(),
        stable_rank=(update.square().sum() / update[0].square()).item(),
        relative_norm=(torch.linalg.vector_norm(update) / torch.linalg.vector_norm(sigma0)).item(),
        relative_spectral_norm=(update[0] / sigma0[0]).item(),
    )


def _base_spectrum(name: str, before: Tensor, cache: Spectra | None) -> tuple[Tensor, Tensor]:
    if cache is None:
        return torch.linalg.svd(before, full_matrices=False)[:2]
    digest = hashlib.sha256(before.contiguous().cpu().numpy().tobytes()).hexdigest()
    if name not in cache or cache[name][0] != digest:
        cache[name] = (digest, *torch.linalg.svd(before, full_matrices=False)[:2])
    return cache[name][1].to(before.device), cache[name][2].to(before.device)


def _adapted(weights: Weights) -> dict[str, AdapterLinear]:
    modules = weights.named_modules() if isinstance(weights, nn.Module) else ()
    return {name: m for name, m in modules if isinstance(m, AdapterLinear)}


def _matrices(weights: Weights) -> dict[str, Callable[[], Tensor]]:
    if not isinstance(weights, nn.Module):
        matrices = {key: t for key, t in weights.items() if t.ndim == 2 and t.is_floating_point()}
        return {key.removesuffix(".weight"): partial(Tensor.detach, t) for key, t in matrices.items()}
    found: dict[str, Callable[[], Tensor]] = {}
    for name, module in weights.named_modules():
        if isinstance(module, AdapterLinear):
            found[name] = _effective(module)
        elif isinstance(getattr(module, "weight", None), Tensor) and module.weight.ndim == 2:
            found[name] = partial(getattr, module, "weight")
    return found


def _effective(layer: AdapterLinear) -> Callable[[], Tensor]:
    """The layer's dense weight; from a copy in fp32 where the adapter is in 16 bits and would round it."""
    narrow = any(t.is_floating_point() and t.dtype.itemsize < 4 for t in layer.adapter_state().values())
    return (copy.deepcopy(layer).float() if narrow else layer).effective_weight


def _check_range(top: int, *thresholds: float) -> None:
    if isinstance(top, bool) or not isinstance(top, int) or top < 1:
        raise ValueError(f"top must be a positive integer, got {top!r}: it is how many leading directions are inspected.")
    for threshold in thresholds:
        if not 0 < threshold <= 1:
            raise ValueError(f"a threshold is a cosine in (0, 1], got {threshold!r}.")

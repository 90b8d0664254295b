"""Scale intruder dimensions, which lessens forgetting: Shuttleworth et al. 2024, arXiv:2410.21228."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftlite.adapter import AdapterLinear
from peftlite.analysis.intruders import Pair, Weights, find_intruders, matrix_pairs
from peftlite.methods import DoRALinear, LoRALinear


@dataclass(frozen=True)
class ScaledMatrix:
    """What the intervention did to one matrix.

    Attributes:
        name: dotted name of the layer.
        intruders: how many directions were scaled.
        change: ``‖W' - W‖_F`` of the change asked for.
        lost: share of the wanted update ``W' - W0`` (for DoRA: of its direction) that the adapter's rank cannot hold,
            in the Frobenius norm; 0 where the weight itself was written.
    """

    name: str
    intruders: int
    change: float
    lost: float


@torch.no_grad()
def scale_intruders(
    tuned: Weights,
    factor: float,
    base: Weights | None = None,
    *,
    names: str | Iterable[str] | None = None,
    top: int = 10,
    threshold: float = 0.5,
    transposed: str | Iterable[str] = (),
    split: Mapping[str, int] | None = None,
) -> tuple[ScaledMatrix, ...]:
    """Write ``W' = W + (λ - 1) Σ_j σ_j u_j v_jᵀ`` over the intruders ``j`` of each matrix of `tuned`, in place; λ is `factor`.

    ``λ = 0`` removes an intruder, ``λ < 1`` lessens forgetting at little cost to the task (the paper's finding), ``λ = 1``
    changes nothing. Matrices without intruders stay as they are, bit for bit.

    In a model or state dict the weights are written. In an adapted model the base stays untouched and the adapter is
    written: LoRA gets the truncated SVD of ``(W' - W0) / s`` as its factors; DoRA gets the row norms of W' as its magnitude,
    and factors for its direction. Where the rank is too low for all of it, the best approximation is written and `lost`
    says what is missing. Layers of other methods are refused: convert or merge them first.

    Args:
        tuned: as for `intruder_report`.
        factor: λ, not negative.
        base: as for `intruder_report`.
        names: as for `intruder_report`.
        top: as for `intruder_report`.
        threshold: ε; a leading direction is an intruder if its largest absolute cosine to the base's is below it.
        transposed: as for `intruder_report`.
        split: as for `intruder_report`; for an adapted model it is refused, as the scaled parts share one adapter.

    Returns:
        One entry for each matrix that has intruders.

    Raises:
        ValueError: as `intruder_report`, and for a factor out of range or a layer whose method cannot be written back.

    Source: Shuttleworth et al. 2024, "LoRA vs Full Fine-tuning: An Illusion of Equivalence", arXiv:2410.21228. Writing the
    result back into low-rank factors is ours.

    Example:
        >>> base = {"q.weight": torch.diag(torch.arange(8.0, 0.0, -1.0))}
        >>> tuned = {"q.weight": base["q.weight"] + 20 * torch.full((8, 8), 1 / 8)}
        >>> [matrix.intruders for matrix in scale_intruders(tuned, 0.0, base, top=1)]
        [1]
    """
    if isinstance(factor, bool) or not (math.isfinite(factor) and factor >= 0):
        raise ValueError(f"factor must be a finite number of at least 0, got {factor!r}; below 1 lessens the intruders.")
    if base is None and split:
        raise ValueError("split is for weights: the parts of an adapted layer share one adapter; merge the model first.")
    pairs = matrix_pairs(tuned, base, names=names, transposed=transposed, split=split)
    targets = {pair.name: _target(tuned, pair.name) for pair in pairs}
    # All that can fail is done before anything is written.
    results = [(pair, _scaled(pair, factor, top, threshold)) for pair in pairs]
    done = []
    for pair, (count, before, after, wanted) in results:
        if count:
            target = targets[pair.name]
            change = torch.linalg.vector_norm(wanted - after).item()
            if isinstance(target, LoRALinear | DoRALinear):
                lost = _write_adapter(target, before, wanted)
            else:
                target.copy_(wanted.T if pair.transposed else wanted)
                lost = 0.0
            done.append(ScaledMatrix(pair.name, count, change, lost))
    return tuple(done)


def _scaled(pair: Pair, factor: float, top: int, threshold: float) -> tuple[int, Tensor, Tensor, Tensor]:
    """Number of intruders, base, tuned and scaled weight; without intruders the weights are not kept."""
    parts, wanted, count = pair.parts(), [], 0
    for _, before, after in parts:
        u, sigma, v = find_intruders(before, after, top=top, threshold=threshold)
        wanted.append(after + (factor - 1) * (u * sigma) @ v)
        count += sigma.numel()
    if not count:
        nothing = torch.empty(0)
        return 0, nothing, nothing, nothing
    return count, torch.cat([p[1] for p in parts]), torch.cat([p[2] for p in parts]), torch.cat(wanted)


def _target(tuned: Weights, name: str) -> LoRALinear | DoRALinear | Tensor:
    """Where the scaled matrix is written: an adapted layer or a weight."""
    if not isinstance(tuned, nn.Module):
        return tuned[f"{name}.weight"] if f"{name}.weight" in tuned else tuned[name]
    layer = tuned.get_submodule(name)
    if not isinstance(layer, AdapterLinear):
        return layer.weight  # type: ignore[return-value]
    if not isinstance(layer, LoRALinear | DoRALinear):
        raise ValueError(
            f"{name}: the scaled weight cannot be written back into {type(layer).__name__}, only into LoRA and DoRA; call "
            "convert_to_lora or merge_adapters first and give the base."
        )
    return layer


def _write_adapter(layer: LoRALinear | DoRALinear, before: Tensor, wanted: Tensor) -> float:
    """Give `layer` the effective weight `wanted` as far as its rank allows; the share of the update that it cannot hold."""
    if isinstance(layer, DoRALinear):
        # Any length of the rows of the direction will do, for the magnitude makes up for it; those that they have now keep
        # the update of the direction small.
        norm = torch.linalg.vector_norm(wanted, dim=1)
        a, b = layer.lora_a.to(wanted.dtype), layer.lora_b.to(wanted.dtype)
        length = torch.linalg.vector_norm(before + layer.scale * (b @ a), dim=1)
        direction = torch.where(norm > 0, length / norm, 1.0)[:, None] * wanted
        layer.magnitude.copy_(norm)
    else:
        direction = wanted
    u, sigma, v = torch.linalg.svd((direction - before) / layer.scale, full_matrices=False)
    root = sigma[: layer.rank].sqrt()
    layer.lora_a.copy_(root[:, None] * v[: layer.rank])
    layer.lora_b.copy_(u[:, : layer.rank] * root)
    whole = torch.linalg.vector_norm(sigma).item()
    return torch.linalg.vector_norm(sigma[layer.rank :]).item() / whole if whole else 0.0

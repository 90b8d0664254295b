"""LoRA-Gen: Xiao et al. 2025, arXiv:2506.11638: adapters generated from a task's description, layer by layer."""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from peftlite.adapter import AdapterLinear

MIXES = ("factors", "products")


class LoRAExpertPool(nn.Module):
    """Compute ``A = Σ_j G_j A_j``, ``B = Σ_j G_j B_j`` from experts ``E_j = (A_j, B_j)`` that all layers of a model share.

    Mixing factors, as the paper's formula does, gives ``B A`` cross terms between experts at the rank of one. With
    ``mix="products"`` the K chosen experts stand side by side, ``B A = Σ_j G_j B_j A_j``, at K times the rank.

    Both factors are born at random: with ``B = 0``, as in LoRA, the router would get no gradient.

    Args:
        shapes: ``(in, out)`` by kind of layer, such as ``{"up": (64, 256), "down": (256, 64)}``.
        experts: n; 8 in the paper.
        rank: r of an expert; 16 in the paper.
        b_std: standard deviation of B at birth; A is uniform in ``±1/√in``. The paper does not say.
        generator: CPU generator of the initial values.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        experts: int = 8,
        rank: int = 16,
        *,
        b_std: float = 0.02,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if experts < 1 or rank < 1 or not shapes:
            raise ValueError(f"a pool needs at least one expert, rank 1 and one shape; got {experts}, {rank}, {dict(shapes)}.")
        self.kinds, self.experts, self.rank = tuple(shapes), experts, rank
        self.expert_a, self.expert_b = nn.ParameterList(), nn.ParameterList()
        for in_features, out_features in shapes.values():
            bound = in_features**-0.5
            a = torch.empty(experts, rank, in_features).uniform_(-bound, bound, generator=generator)
            b = torch.empty(experts, out_features, rank).normal_(0, b_std, generator=generator)
            self.expert_a.append(nn.Parameter(a))
            self.expert_b.append(nn.Parameter(b))

    def forward(self, gates: Tensor, *, mix: str = "factors", top: int | None = None) -> dict[str, tuple[Tensor, Tensor]]:
        """Factors A ``(..., R, in)`` and B ``(..., out, R)`` by kind from gates ``(..., n)``.

        Args:
            gates: weights of the experts.
            mix: ``"factors"``, ``R = r``, or ``"products"``, ``R = top r``.
            top: how many gates are not zero, for ``"products"``; by default all.
        """
        if mix not in MIXES:
            raise ValueError(f"mix must be 'factors' or 'products', got {mix!r}.")
        if mix == "products":
            weights, index = gates.topk(top or self.experts, dim=-1)  # (..., K)
        mixed = {}
        for kind, a, b in zip(self.kinds, self.expert_a, self.expert_b, strict=True):
            if mix == "factors":
                mixed[kind] = (torch.einsum("...n,nri->...ri", gates, a), torch.einsum("...n,nor->...or", gates, b))
            else:
                chosen = weights[..., None, None] * b[index]  # (..., K, out, r)
                mixed[kind] = (a[index].flatten(-3, -2), chosen.transpose(-3, -2).flatten(-2))
        return mixed


class LayerwiseRouter(nn.Module):
    """Compute ``G = top_K(softmax(BN(f2(SiLU(f1(T))))))``, renormalised to sum 1, for each state ``T`` of a layer.

    The paper's summaries leave open where the softmax stands; here the K largest of the softmax are renormalised.

    Args:
        features: size d of a state.
        experts: n.
        top: K; 2 in the paper.
        hidden: size between f1 and f2, by default d.
        norm: ``"batch"`` (the paper), or ``"layer"``, which a single row in training needs.
    """

    def __init__(
        self, features: int, experts: int = 8, top: int = 2, *, hidden: int | None = None, norm: str = "batch"
    ) -> None:
        super().__init__()
        if not 1 <= top <= experts:
            raise ValueError(f"top must be from 1 to the number of experts, {experts}, got {top}.")
        if norm not in ("batch", "layer"):
            raise ValueError(f"norm must be 'batch' or 'layer', got {norm!r}.")
        self.top = top
        self.f1, self.f2 = nn.Linear(features, hidden or features), nn.Linear(hidden or features, experts)
        self.norm = nn.BatchNorm1d(experts) if norm == "batch" else nn.LayerNorm(experts)

    def forward(self, states: Tensor) -> Tensor:
        """Gates ``(..., n)``, K of them not zero, from states ``(..., d)``."""
        scores = self.f2(F.silu(self.f1(states)))
        rows = scores.flatten(0, -2)
        if self.training and isinstance(self.norm, nn.BatchNorm1d) and rows.shape[0] < 2:
            raise ValueError(
                "the router normalises over the rows of a batch, and in training there is only one (one layer, one "
                "prompt); give several, or make the router with norm='layer'."
            )
        share = self.norm(rows).view_as(scores).softmax(-1)
        values, index = share.topk(self.top, dim=-1)
        return torch.zeros_like(share).scatter(-1, index, values / values.sum(-1, keepdim=True))


def load_balance_loss(gates: Tensor, *, weight: float = 0.01) -> Tensor:
    """``λ (std(G) / mean(G))²`` of the experts' mean gates, over all rows of gates ``(..., n)``; 0 for a uniform load.

    Example:
        >>> from peftlite.training.lora_gen import load_balance_loss
        >>> load_balance_loss(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        tensor(0.)
    """
    load = gates.flatten(0, -2).mean(dim=0)  # (n,)
    return weight * load.var(correction=0) / load.mean().square()


def append_meta_tokens(embedded: Tensor, mask: Tensor, meta: Tensor) -> tuple[Tensor, Tensor]:
    """Append trained tokens ``meta (L, d)`` to embedded prompts ``(B, T, d)`` with their mask ``(B, T)``, for any encoder.

    Their final hidden states, the last L, go to the router, one for each layer of the model that gets the adapter.

    Returns:
        ``(B, T + L, d)`` and the mask ``(B, T + L)``.
    """
    batch, _, features = embedded.shape
    if meta.ndim != 2 or meta.shape[1] != features:
        raise ValueError(f"meta must be (L, {features}), as wide as the embedded prompt, got {tuple(meta.shape)}.")
    tokens = meta.to(embedded.dtype).expand(batch, -1, -1)
    return torch.cat([embedded, tokens], dim=1), torch.cat([mask, mask.new_ones(batch, meta.shape[0])], dim=1)


class LoRAGenerator(nn.Module):
    """Compute a LoRA for every layer of a model from one state per layer: router, then pool; nothing of it is stored per task.

    During training call the model with the generated tensors, ``torch.func.functional_call(model, state, batch)``, through
    which pool and router get their gradients; the model's own LoRA parameters are stand-ins. Afterwards `write_adapter` makes
    them the model's own, to be saved, merged or exported like any LoRA.

    Args:
        pool: the experts.
        router: from states to gates.
        layers: for each layer in order, the names of its adapted modules by kind (the kinds of `pool`).
        mix: see `LoRAExpertPool`.

    Source: Xiao et al. 2025, "LoRA-Gen: Specializing Large Language Model via Online LoRA Generation", arXiv:2506.11638. The
    language model that reads the prompt, its data and its distillation stay outside; there is no code of the authors.

    Example:
        >>> from peftlite.training.lora_gen import LoRAGenerator
        >>> model = inject_adapters(nn.Sequential(*(nn.Linear(8, 8) for _ in range(3))), "all-linear", rank=2)
        >>> generator = LoRAGenerator.for_model(model, features=5, experts=4)
        >>> state, gates = generator(torch.randn(3, 5))
        >>> torch.func.functional_call(model, state, torch.randn(1, 8)).shape
        torch.Size([1, 8])
        >>> sorted(state)[:2], gates.shape
        (['0.lora_a', '0.lora_b'], torch.Size([3, 4]))
    """

    def __init__(
        self, pool: LoRAExpertPool, router: LayerwiseRouter, layers: Sequence[Mapping[str, str]], *, mix: str = "factors"
    ) -> None:
        super().__init__()
        if mix not in MIXES:
            raise ValueError(f"mix must be 'factors' or 'products', got {mix!r}.")
        for index, names in enumerate(layers):
            if set(names) != set(pool.kinds):
                raise ValueError(
                    f"layer {index} has the kinds {sorted(names)}, the pool {sorted(pool.kinds)}; they must agree."
                )
        self.pool, self.router, self.mix = pool, router, mix
        self.layers = [dict(names) for names in layers]

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        features: int,
        *,
        experts: int = 8,
        top: int = 2,
        hidden: int | None = None,
        norm: str = "batch",
        mix: str = "factors",
        b_std: float = 0.02,
        generator: torch.Generator | None = None,
    ) -> Self:
        """A generator for the LoRA layers of `model`, whose blocks are told apart by the first number in their names.

        Args:
            model: a model with plain LoRA of one rank, alike in every block; with ``mix="products"`` the rank is `top`
                times that of an expert.
            features: size of a state.
            experts: as for `LoRAExpertPool`.
            top: as for `LayerwiseRouter`.
            hidden: as for `LayerwiseRouter`.
            norm: as for `LayerwiseRouter`.
            mix: as for `LoRAExpertPool`.
            b_std: as for `LoRAExpertPool`.
            generator: CPU generator of the pool's initial values.

        Raises:
            ValueError: if there is no LoRA, the layers of a kind differ in shape or rank, the blocks differ in their kinds, or
                the rank cannot be divided among the experts.
        """
        found = {name: m for name, m in model.named_modules() if isinstance(m, AdapterLinear) and m.method == "lora"}
        if not found:
            raise ValueError(f"{type(model).__name__} carries no LoRA to generate; call inject_adapters(..., rank) first.")
        blocks: dict[str, dict[str, str]] = {}
        shapes: dict[str, tuple[int, int]] = {}
        for name, layer in found.items():
            match = re.match(r"((?:.*?\.)?\d+)(?:\.(.+))?$", name)
            if match is None:
                raise ValueError(f"{name!r} has no number in its name to tell its block by; give the constructor `layers`.")
            kind, shape = match[2] or "layer", (layer.in_features, layer.out_features)
            if shapes.setdefault(kind, shape) != shape:
                raise ValueError(f"{name!r} is {shape}, another {kind!r} is {shapes[kind]}; one expert must fit all blocks.")
            blocks.setdefault(match[1], {})[kind] = name
        ranks = {layer.rank for layer in found.values()}
        share = top if mix == "products" else 1
        if len(ranks) > 1 or min(ranks) % share:
            raise ValueError(f"all layers must have one rank that {share} divides, got {sorted(ranks)}.")
        pool = LoRAExpertPool(shapes, experts, min(ranks) // share, b_std=b_std, generator=generator)
        router = LayerwiseRouter(features, experts, top, hidden=hidden, norm=norm)
        return cls(pool, router, list(blocks.values()), mix=mix)

    def forward(self, states: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """From states ``(L, d)`` the tensors ``<name>.lora_a``, ``<name>.lora_b`` of all L layers, and gates ``(L, n)``."""
        if states.ndim != 2 or states.shape[0] != len(self.layers):
            raise ValueError(
                f"states must be ({len(self.layers)}, d), one row for each layer, got {tuple(states.shape)}; for several "
                "prompts call the generator for each."
            )
        gates = self.router(states)
        mixed = self.pool(gates, mix=self.mix, top=self.router.top)
        state = {}
        for index, names in enumerate(self.layers):
            for kind, name in names.items():
                state[f"{name}.lora_a"], state[f"{name}.lora_b"] = mixed[kind][0][index], mixed[kind][1][index]
        return state, gates


@torch.no_grad()
def write_adapter(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy generated tensors into the LoRA parameters of `model`, which then is an adapted model like any other.

    Raises:
        ValueError: if `state` and the LoRA of `model` do not fit, by name or by shape.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, AdapterLinear)}
    own = {f"{name}.{key}": p for name, layer in layers.items() for key, p in layer.adapter_parameters().items()}
    missing, left = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or left:
        raise ValueError(
            f"the generated adapter does not fit {type(model).__name__}: missing {missing[:2]}, left over {left[:2]}; "
            "make the generator with for_model(model)."
        )
    for key, parameter in own.items():
        if parameter.shape != state[key].shape:
            raise ValueError(f"{key}: generated {tuple(state[key].shape)}, the model has {tuple(parameter.shape)}.")
    for key, parameter in own.items():
        parameter.copy_(state[key])

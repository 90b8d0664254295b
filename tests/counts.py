"""How many parameters one layer of each method trains: the closed formulas of the papers."""

from collections.abc import Callable

from peftlite.methods.lokr import divisor_below_root
from peftlite.methods.tt_lora import factorise


def low_rank(in_features: int, out_features: int, rank: int) -> int:
    """A and B (Hu et al. 2021)."""
    return rank * (in_features + out_features)


def tensor_train(in_features: int, out_features: int, rank: int) -> int:
    """Σ ρ k ρ over the factors of both sizes (Anjum et al. 2024)."""
    shape = [*factorise(out_features), *factorise(in_features)]
    ends = shape[0] + shape[len(factorise(out_features))]  # both sizes have their large factor outside
    return rank * ends + rank**2 * (sum(shape) - ends)


def kronecker(in_features: int, out_features: int, rank: int) -> int:
    """C, and A and B of the rest (Yeh et al. 2023)."""
    o, i = divisor_below_root(out_features), divisor_below_root(in_features)
    return o * i + low_rank(in_features // i, out_features // o, rank)


COUNTS: dict[str, Callable[[int, int, int], int]] = {
    **dict.fromkeys(("lora", "melora", "pissa", "olora", "xgblora", "sharelora", "dylora"), low_rank),
    "dora": lambda i, o, r: low_rank(i, o, r) + o,
    "sdlora": lambda i, o, r: low_rank(i, o, r) + 1,
    "lora_fa": lambda i, o, r: r * o,
    "loha": lambda i, o, r: 2 * low_rank(i, o, r),
    "lokr": kronecker,
    "tt_lora": tensor_train,
    "paca": lambda i, o, r: r * o,
    "ia3": lambda i, o, r: o,
    "vera": lambda i, o, r: r + o,
    "tied_lora": lambda i, o, r: low_rank(i, o, r) + r + o,
    "adalora": lambda i, o, r: low_rank(i, o, r) + r,
}

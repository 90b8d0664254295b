"""What was promised of the step suite, and what its results say: one line per claim, judged from the result files alone.

A claim names a cell and a contest. Its figure is the contest's ratio or, where the promise is about our share of a peer's
bytes or our speed against full fine-tuning, the inverse of it.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

UNITS = {"step": "time", "saved_mib": "bytes saved for backward", "gflop": "FLOPs"}
UNITS |= {"forward_peak_mib": "peak bytes of the forward"}


class Claim(NamedTuple):
    """A limit on a ratio.

    Attributes:
        cell: settings that the cell has, besides `BASE`; for the suite `layer` all of them.
        contest: title of the ratio.
        measure: which of its figures.
        limit: what it has to reach, or to stay under.
        at_least: which of the two.
        inverse: the claim is about one over the contest's ratio.
        suite: whose result file.
    """

    cell: Mapping[str, Any]
    contest: str
    measure: str
    limit: float
    at_least: bool = False
    inverse: bool = False
    suite: str = "steps"


class Judged(NamedTuple):
    """A claim in words, its limit, the figure with its 20/80 quantiles, whose it is, whether it is met (None: not measured)."""

    where: str
    what: str
    limit: str
    figure: str
    sides: str
    met: bool | None


BASE = {"device": "cpu", "threads": 2, "width": 768, "layers": 4, "targets": "all-linear", "rank": 8, "rows": 8, "length": 64}
BASE |= {"base_dtype": "fp32", "adamw": "default"}
LAYER = {"width": 4096, "tokens": 512, "rank": 16, "dropout": 0.0}


def _claims() -> Iterator[Claim]:
    plain, dropped = {"amp": "off", "dropout": 0.0}, {"amp": "off", "dropout": 0.05}
    half, half_dropped = {"amp": "bf16", "dropout": 0.0}, {"amp": "bf16", "dropout": 0.05}
    for cell, lora, dora in ((plain, 1.05, 1.22), (dropped, 1.15, 2.2), (half, 1.0, 1.9), (half_dropped, 1.4, 3.2)):
        for kind in ("", "mixed-precision ") if cell["amp"] == "bf16" else ("",):
            yield Claim(cell, f"peft {kind}LoRA / ours", "step", lora, at_least=True)
            yield Claim(cell, f"peft {kind}DoRA / ours", "step", dora, at_least=True)
    for cell, limit in ((plain, 1.07), (half, 1.08)):
        yield Claim(cell, "ours DoRA / ours LoRA", "step", limit)
    yield Claim(plain, "DoRA one by one / LoRA one by one", "step", 1.1)
    yield Claim(plain, "ours LoRA / full", "step", 0.72)
    yield Claim(plain, "ours DoRA / full", "step", 0.77)
    for baseline in ("full fp32", "full fp32 with embeddings"):
        yield Claim(half, f"ours LoRA / {baseline}", "step", 3.3, at_least=True, inverse=True)
    yield Claim(plain, "peft DoRA / ours", "saved_mib", 0.45, inverse=True)
    yield Claim(dropped, "peft LoRA / ours", "saved_mib", 0.65, inverse=True)
    yield Claim(half, "peft LoRA / ours", "saved_mib", 1.0, inverse=True)
    yield Claim(half_dropped, "peft LoRA / ours", "saved_mib", 0.65, inverse=True)
    yield Claim(half, "peft DoRA / ours", "saved_mib", 0.4, inverse=True)
    for cell in (plain, half):
        yield Claim(cell, "ours DoRA / ours LoRA", "saved_mib", 1.2)
    for cell in (plain, dropped, half, half_dropped):
        yield Claim(cell, "ours DoRA / ours LoRA", "gflop", 1.03)
    for amp in (False, True):
        yield Claim({"amp": amp}, "ours DoRA / ours LoRA", "forward_peak_mib", 1.2, suite="layer")


CLAIMS = tuple(_claims())


def judge(claim: Claim, results: Mapping[str, Mapping[str, Any]]) -> Judged:
    """The claim beside its figure.

    Args:
        claim: what was promised.
        results: the content of the result files by suite; a suite or a cell may be missing.
    """
    wanted = (BASE if claim.suite == "steps" else LAYER) | claim.cell
    amp = {"off": "fp32", "bf16": "bf16 autocast", False: "bf16", True: "bf16, autocast"}[claim.cell["amp"]]
    layer = f"one {wanted['width']} x {wanted['width']} layer, " if claim.suite == "layer" else ""
    where = f"{layer}{amp}" + (f", dropout {wanted['dropout']:g}" if wanted["dropout"] else "")
    over, under = (side.strip() for side in claim.contest.split("/"))
    if under == "ours":
        under = f"ours {over.split()[-1]}"
    title = f"{under} / {over}" if claim.inverse else f"{over} / {under}"
    what, limit = f"{title}: {UNITS[claim.measure]}", f"{'≥' if claim.at_least else '≤'} {claim.limit:g}"
    for cell in results.get(claim.suite, {}).get("cells", {}).values():
        row = cell["figures"]["ratios"].get(claim.contest, {})
        if claim.measure in row and all(cell["settings"].get(key) == value for key, value in wanted.items()):
            median, *quantiles = row[claim.measure] if isinstance(row[claim.measure], list) else [row[claim.measure]]
            if claim.inverse:
                # One over the middle of an even number of pairs is not the median of the inverses: the same to second order.
                median, quantiles = 1 / median, [1 / value for value in reversed(quantiles)]
            met = median >= claim.limit if claim.at_least else median <= claim.limit
            figure = f"{median:.3f}" + (f" ({quantiles[0]:.3f}..{quantiles[1]:.3f})" if quantiles else "")
            sides = row["sides"][claim.measure]
            return Judged(where, what, limit, figure, " / ".join(reversed(sides) if claim.inverse else sides), met)
    return Judged(where, what, limit, "–", "", None)

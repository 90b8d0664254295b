"""Lists of cells that one command measures: what each sets is the command line's, by the names of `benchmarks.steps`."""

from typing import Any

Cell = dict[str, Any]
PRECISIONS, DROPOUTS = ("off", "bf16"), (0.0, 0.05)


def _crossed(**common: Any) -> list[Cell]:
    """Both precisions, each without and with dropout."""
    return [{"amp": amp, "dropout": dropout, **common} for amp in PRECISIONS for dropout in DROPOUTS]


def _sizes(**changes: Any) -> dict[str, Any]:
    return {"width": 768, "targets": "all-linear", "rank": 8, "batch": [(8, 64)], **changes}


PRESETS: dict[str, tuple[Cell, ...]] = {
    # BERT-base width first, then one change at a time.
    "peers": (
        *_crossed(**_sizes()),
        *_crossed(**_sizes(batch=[(16, 128)])),
        *_crossed(**_sizes(width=384)),
        *_crossed(**_sizes(targets="qv")),
    ),
    # How cost grows with rank, batch and sequence, and the corners between the changes above.
    "scaling": (
        *({"amp": amp, "dropout": 0.0, **_sizes(rank=rank)} for rank in (1, 64, 384) for amp in PRECISIONS),
        *({"amp": amp, "dropout": 0.0, **_sizes(batch=[(64, 64), (8, 256)])} for amp in PRECISIONS),
        *_crossed(**_sizes(width=384, batch=[(16, 128)])),
        *_crossed(**_sizes(width=384, targets="qv")),
    ),
    # A minute or two: whether everything runs, and a first look.
    "quick": tuple(_crossed(**_sizes(width=384, batch=[(4, 32)]), layers=1, rounds=3, warmup=1)),
}

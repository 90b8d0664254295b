"""Ratios of the step suite: who is compared with whom, and the better of several where a side may choose.

A library may run in several precisions, ours also with its layers grouped. Each side of a contest puts up the best that
it has, the fastest for time, the leanest for bytes, and the contest says which that was.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.candidates import BASELINE, of_library
from benchmarks.harness import ratios
from benchmarks.peers import LIBRARIES, PEERS

TIMES = ("step", "cpu")
COUNTS = ("gflop", "saved_mib", "forward_peak_mib", "step_peak_mib")  # without a clock; a suite has some of them
LABELS = {"lora": "LoRA", "dora": "DoRA"}


class Contest(NamedTuple):
    """A ratio by name; the best of `over` is divided by the best of `under`. `peer` is the library of `over`, if not ours."""

    title: str
    over: tuple[str, ...]
    under: tuple[str, ...]
    peer: str | None = None


def contests(names: Sequence[str], autocast: bool) -> list[Contest]:
    """The contests that can be held among the candidates `names`, in a cell with or without autocast."""
    own = {method: of_library(names, "ours", method) for method in LABELS}
    found = []
    for peer in PEERS:
        for method in LIBRARIES[peer].methods:
            of_peer, label = of_library(names, peer, method), LABELS[method]
            found.append(Contest(f"{peer} {label} / ours", tuple(of_peer), tuple(own[method]), peer))
            # Adapters in 16 bits are another way to train than ours are in; without them the two do the same.
            mixed = [name for name in of_peer if not name.endswith("@bf16-all")]
            if mixed != of_peer:
                found.append(Contest(f"{peer} mixed-precision {label} / ours", tuple(mixed), tuple(own[method]), peer))
    for library in LIBRARIES:
        lora, dora = (of_library(names, library, method) for method in ("lora", "dora"))
        found.append(Contest(f"{library} DoRA / {library} LoRA", tuple(dora), tuple(lora)))
    for method, candidates in own.items():
        found.append(Contest(f"ours {LABELS[method]} / full", tuple(candidates), (BASELINE,)))
        if autocast:
            found.append(Contest(f"ours {LABELS[method]} / full fp32", tuple(candidates), (f"{BASELINE}@fp32",)))
            found.append(Contest(f"ours {LABELS[method]} / full fp32 with embeddings", tuple(candidates), ("full@fp32",)))
        found.append(Contest(f"grouped {LABELS[method]} / one by one", (f"{method}-grouped",), (method,)))
    found.append(Contest("DoRA one by one / LoRA one by one", ("dora",), ("lora",)))
    if autocast:
        found.append(Contest("full / full fp32", (BASELINE,), (f"{BASELINE}@fp32",)))
    known = set(names)
    sides = ((c, [n for n in c.over if n in known], [n for n in c.under if n in known]) for c in found)
    return [Contest(c.title, tuple(over), tuple(under), c.peer) for c, over, under in sides if over and under]


def best(names: Sequence[str], figures: Mapping[str, Any], measure: str) -> str:
    """The candidate with the smallest figure, by the median where it is a time; the first of equals.

    Args:
        names: candidates.
        figures: the figures of each, as a cell holds them.
        measure: one of `TIMES` or `COUNTS`.
    """
    return min(names, key=lambda name: figures[name]["ms"][measure][0] if measure in TIMES else figures[name][measure])


def hold(contest: Contest, figures: Mapping[str, Any], samples: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    """The ratio for each measure, as median and 20/80 quantiles over pairs of a round or as one number, and the two sides.

    Args:
        contest: who with whom.
        figures: the figures of each candidate.
        samples: its samples, round by round; empty where nothing was timed.
    """
    result: dict[str, Any] = {"peer": contest.peer, "sides": {}}
    measures = [measure for measure in TIMES if samples] + [m for m in COUNTS if m in figures[contest.over[0]]]
    for measure in measures:
        over, under = (best(side, figures, measure) for side in (contest.over, contest.under))
        result["sides"][measure] = [over, under]
        if measure in TIMES:
            result[measure] = ratios([s[measure] for s in samples[over]], [s[measure] for s in samples[under]])
        else:
            result[measure] = figures[over][measure] / figures[under][measure]
    return result


def verdict(row: Mapping[str, Any], measure: str) -> str:
    """A mark where a peer is ahead in `measure`: how surely, by the quantiles; empty where it is not, or none is in it."""
    if row["peer"] is None or measure not in row:
        return ""
    median, _, high = row[measure] if measure in TIMES else [row[measure]] * 3
    if median >= 1:
        return ""
    return f"{row['peer']} is ahead" if high < 1 else f"{row['peer']} is ahead, within noise"

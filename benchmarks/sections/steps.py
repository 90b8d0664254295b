"""Training steps: beside the peers, against full fine-tuning, over size, and one large layer."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.claims import CLAIMS, judge
from benchmarks.contests import verdict
from benchmarks.page import Section, blocks, folded, picture, table
from benchmarks.plots import steps as plots
from benchmarks.sections.results import Results, cells, counted, where
from docs import step_tables

PRECISIONS = {"off": "fp32", "bf16": "bf16 autocast"}
AS_MUCH = 0.005  # counted bytes that differ by less are called as many


def standing(row: Mapping[str, Any], measure: str) -> str:
    """Whose is less, surely: by the quantiles where it is a time, by the count where it is bytes."""
    if isinstance(row[measure], list):
        _, low, high = row[measure]
    else:
        low = high = row[measure]
        if abs(low - 1) < AS_MUCH:
            return "equal"
    return "ours" if low > 1 else "theirs" if high < 1 else "equal"


def _spread(value: Any) -> str:
    if isinstance(value, list):
        return f"{value[0]:.2f} ({value[1]:.2f}..{value[2]:.2f})"
    return f"{value:.2f}"


def peer_rows(found: Mapping[str, Any]) -> list[tuple[str, str, Mapping[str, Any]]]:
    """Every contest with a peer: its cell in words, its title, its ratios."""
    return [
        (plots.cell_label(cell["settings"]), title, row)
        for cell in found.values()
        for title, row in cell["figures"]["ratios"].items()
        if row["peer"]
    ]


def closing_note(rows: list[tuple[str, str, Mapping[str, Any]]]) -> str:
    """Where a peer is ahead in time, and what the counted figures of that row say about why."""
    lines = []
    for where_, title, row in rows:
        if mark := verdict(row, "step"):
            why = (
                "both compute the same products, so that what is left between them is overhead outside the products, and noise"
                if abs(row["gflop"] - 1) < 0.02
                else "it computes less"
                if row["gflop"] < 1
                else "though it computes more"
            )
            flops, saved = f"{row['gflop']:.2f} of our FLOPs", f"{row['saved_mib']:.2f} of our saved bytes"
            lines.append(f"{where_}: **{mark}** in time ({title} {_spread(row['step'])}), with {flops} and {saved}: {why}.")
    if not lines:
        return "No peer is ahead in time in any cell, by the medians."
    return f"Where a peer is ahead in time: {counted(len(lines), 'row')}.\n\n" + "\n\n".join(lines)


def peers(results: Results) -> Section:
    """Our layers beside PEFT's and loralib's."""
    found = cells(results, "steps")
    claim = (
        "A training step with our LoRA and DoRA layers takes no longer than with those of Hugging Face PEFT and loralib, and "
        "keeps no more bytes for the backward pass: same model, same batch, same optimizer, in turns in one process."
    )
    command = "python -m benchmarks.steps --preset peers"
    title = "Training steps beside the peers"
    rows = peer_rows(found)
    if not rows:
        return Section("peers", title, claim, command)
    time, saved = (Counter(standing(row, measure) for _, _, row in rows) for measure in ("step", "saved_mib"))
    outcome = (
        f"{counted(len(rows), 'comparison')}: ours is quicker in {time['ours']}, level within the quantiles in "
        f"{time['equal']}, slower in {time['theirs']}; it saves fewer bytes in {saved['ours']}, as many in {saved['equal']}, "
        f"more in {saved['theirs']}."
    )
    listed = [
        [cell, title, _spread(row["step"]), _spread(row["saved_mib"]), _spread(row["gflop"]), " / ".join(row["sides"]["step"]),
         "; ".join(f"{label}: {mark}" for m, label in (("step", "time"), ("saved_mib", "bytes")) if (mark := verdict(row, m)))]
        for cell, title, row in rows
    ]  # fmt: skip
    header = ["cell", "ratio", "time", "saved bytes", "FLOPs", "candidates by time", "ahead"]
    judged = [judge(claim_, results) for claim_ in CLAIMS]
    met = Counter(one.met for one in judged)
    promised = f"What was promised: {met[True]} met, {met[False]} not met, {met[None]} not measured"
    caption = (
        "The peer's figure divided by ours, each side at the best of its precisions. Right of the line the peer costs more. A "
        "hollow marker: the peer is ahead by the median."
    )
    parts = [
        picture(plots.forest(found, plots.PEERS, ahead=("peer ahead", "ours ahead")), "peers", caption),
        folded("Every ratio", table(header, listed)),
        blocks(closing_note(rows)),
        folded(promised, blocks(step_tables.claims(results, table))),
        folded("Every candidate of every cell", blocks(step_tables.cells(found, table, "`"))),
    ]
    caveat = (
        "BERT with random weights, four layers unless the row says otherwise, no dropout but the adapters'. Each side puts up "
        "the best of its candidates, chosen by the same rounds, which flatters the side with more of them, ours, a little. "
        "torchtune is left out: its layers do not import beside this torch. CPU times say little about a GPU."
    )
    return Section("peers", title, claim, command, outcome, parts, caveat, where(found.values()))


def whole_share(cell: Mapping[str, Any], row: Mapping[str, Any]) -> float | None:
    """Our saved bytes as a share of those of full fine-tuning that trains the embeddings as well, where it was measured."""
    candidates = cell["figures"]["candidates"]
    ours, whole = candidates[row["sides"]["saved_mib"][0]], candidates.get("full")
    return None if whole is None else ours["saved_mib"] / whole["saved_mib"]


def full_verdict(found: Mapping[str, Any]) -> str:
    """In how many cells LoRA and DoRA on all linear layers are surely faster than full fine-tuning, and in how many leaner."""
    words = []
    for method in ("LoRA", "DoRA"):
        for amp, name in PRECISIONS.items():
            rows = [
                (cell, cell["figures"]["ratios"][f"ours {method} / full"])
                for cell in found.values()
                if cell["settings"]["amp"] == amp and cell["settings"]["targets"] == "all-linear"
                and f"ours {method} / full" in cell["figures"]["ratios"]
            ]  # fmt: skip
            if rows:
                faster, leaner = (sum(standing(row, m) == "theirs" for _, row in rows) for m in ("step", "saved_mib"))
                words.append(f"{method} in {name}: faster in {faster} of {counted(len(rows), 'cell')}, leaner in {leaner}")
                whole = [share for cell, row in rows if (share := whole_share(cell, row)) is not None]
                if whole:
                    words[-1] += f" ({sum(share < 1 for share in whole)} where the embeddings train too)"
    return "; ".join(words) + "." if words else "Other targets than all linear layers were measured."


def full(results: Results) -> Section:
    """LoRA and DoRA against full fine-tuning, in both precisions, and autocast alone."""
    found = cells(results, "steps")
    claim = (
        "Claim A, efficiency: LoRA and DoRA on all linear layers are each faster per step than full fine-tuning and keep fewer "
        "bytes for backward, in both precisions. Comparing fp32 full fine-tuning with LoRA under autocast mixes two effects; "
        "here autocast, LoRA and DoRA stand alone and together."
    )
    command, title = "python -m benchmarks.steps --preset peers", "Against full fine-tuning, per step"
    rows = []
    for method in ("LoRA", "DoRA"):
        for cell in found.values():
            row = cell["figures"]["ratios"].get(f"ours {method} / full")
            if cell["settings"]["targets"] != "all-linear" or row is None:
                continue
            share = whole_share(cell, row)
            if standing(row, "step") == standing(row, "saved_mib") == "theirs":
                both = "yes"
            else:
                both = "where the embeddings train too" if standing(row, "step") == "theirs" and (share or 1) < 1 else "**no**"
            label = f"{method}, {plots.cell_label(cell['settings'])}"
            rows.append([label, _spread(row["step"]), _spread(row["saved_mib"]), f"{share:.3f}" if share else "", both])
    shown = {key: cell for key, cell in found.items() if plots.FULL.keys() & cell["figures"]["ratios"].keys()}
    if not shown:
        return Section("full", title, claim, command)
    outcome = full_verdict(found)
    caption = (
        "Ours divided by full fine-tuning with frozen embeddings, which is what adapters compete with: with the embeddings "
        "trained too, full fine-tuning is dearer in both. The last three compare with fp32."
    )
    header = [
        "all-linear, beside full fine-tuning", "step time (20..80 %)", "saved bytes", "saved bytes, embeddings trained too",
        "less of both",
    ]  # fmt: skip
    parts = [picture(plots.forest(shown, plots.FULL, ahead=("ours cheaper", "ours dearer")), "full", caption)]
    parts += [table(header, rows)] if rows else []
    caveat = (
        "Saved bytes are those of activations; gradients and optimizer state, which adapters spare as well, come on top. A "
        "layer with an adapter keeps its input for the gradient of A as full fine-tuning keeps it for that of W: what LoRA "
        "spares in fp32 is gradients and optimizer state."
    )
    return Section("full", title, claim, command, outcome, parts, caveat, where(shown.values()))


def growth(along: Sequence[Mapping[str, Any]]) -> str:
    """By how much the steps of full fine-tuning and of our adapters grow from the first cell to the last, in words."""
    words = []
    for (library, method), drawn in plots.KINDS.items():
        if library in (None, "ours"):
            ends = [plots.leading(cell, library, method, "step") for cell in (along[0], along[-1])]
            if None not in ends:
                words.append(f"{drawn.label} ×{ends[1]['ms']['step'][0] / ends[0]['ms']['step'][0]:.1f}")
    return "step of " + ", ".join(words)


def scaling(results: Results) -> Section:
    """How cost grows with batch, sequence, width and rank."""
    found = cells(results, "steps")
    claim = "How time and memory of a step grow with batch, sequence, width and rank, one of them at a time."
    command, title = "python -m benchmarks.steps --preset scaling", "Cost against size"
    parts, varied, used = [], [], []
    for amp, name in PRECISIONS.items():
        drawn = plots.scaling(found, amp)
        if drawn is not None:
            caption = f"{name}: medians, shaded from the 20 to the 80 % quantile; everything else as in the claim's cell."
            parts.append(picture(drawn, f"scaling-{amp}", caption))
            for axis in plots.AXES:
                along = plots.along(found, axis, amp)
                if len(along) > 1:
                    used += along
                    grown = along[-1]["settings"][axis] / along[0]["settings"][axis]
                    varied.append(f"{plots.AXES[axis].split(',')[0]} ×{grown:g}: {growth(along)} ({name})")
    if not parts:
        return Section("scaling", title, claim, command)
    caveat = "Both axes are logarithmic: a slope of one means that cost grows in proportion."
    return Section("scaling", title, claim, command, f"{'; '.join(varied)}.", parts, caveat, where(used))


def layer(results: Results) -> Section:
    """One large layer."""
    found = cells(results, "layer")
    claim = "DoRA's forward holds little more at once than LoRA's; PEFT's makes matrices of W's size."
    command, title = "python -m benchmarks.layer", "One large layer"
    if not found:
        return Section("layer", title, claim, command)
    sentences = []
    for key, cell in found.items():
        rows, words = cell["figures"]["ratios"], []
        if "ours DoRA / ours LoRA" in rows:
            words.append(f"our DoRA holds {rows['ours DoRA / ours LoRA']['forward_peak_mib']:.2f}× what our LoRA does")
        if "peft DoRA / ours" in rows:
            words.append(f"PEFT's DoRA {rows['peft DoRA / ours']['forward_peak_mib']:.1f}× what ours does")
        sentences.append(f"{key}: {', '.join(words)}")
    parts = [
        picture(plots.layer(found), "layer", "Bytes alive at once in the forward beyond input and weights; exact."),
        folded("All figures", blocks(step_tables.layers(found, table, "`"))),
    ]
    caveat = "Everything is bf16 but the adapters, which are fp32. No clock enters."
    return Section("layer", title, claim, command, "; ".join(sentences) + ".", parts, caveat, where(found.values()))

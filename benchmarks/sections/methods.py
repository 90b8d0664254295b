"""The methods beside one another: accuracy, cost, intruder dimensions, quantised bases; and the example's runs."""

from benchmarks.page import Section, blocks, folded, picture, table
from benchmarks.plots import methods as plots
from benchmarks.plots import steps as step_plots
from benchmarks.sections.results import Results, cells, counted, where
from docs import generate, method_tables

COMMAND = "python -m benchmarks.methods --suite {} --data DIR --output DIR"
ONE_SEED = (
    "One seed each, and what another seed would move comes on top of the bars. The learning rate was searched for every method "
    "with the same budget. The encoder is MiniLM, tuned on sentences before."
)


def accuracy(results: Results) -> Section:
    """Every recipe on SST, against what it trains and what it leaves to be kept."""
    found = cells(results, "methods_accuracy")
    claim = "What accuracy each method reaches under one protocol, against the parameters it trains and the file it leaves."
    command, title = COMMAND.format("accuracy"), "Accuracy of every method"
    if not found:
        return Section("accuracy", title, claim, command)
    best = max(found, key=lambda name: found[name]["figures"]["dev"])
    named = [name for name in dict.fromkeys((best, "full", "lora", "dora", "lora-r1")) if name in found]
    scores = ", ".join(f"{name} {100 * found[name]['figures']['dev']:.1f} %" for name in named)
    caption = (
        "Up is better, left is smaller. What lies within a bar of another is not told apart from it by this dev set. An arrow: "
        "far below the rest, at the value given."
    )
    parts = [
        picture(plots.accuracy_by_trained(found), "trained", caption),
        picture(plots.accuracy_by_bytes(found), "bytes", "The same, against the size of the file that serves one task."),
        folded("Every method", blocks(method_tables.accuracy(results["methods_accuracy"], table))),
    ]
    if "dylora" in found:
        ranks = blocks(method_tables.ranks(results["methods_accuracy"], table))
        parts.append(folded("DyLoRA's one training beside one training for each rank", ranks))
    outcome = f"{counted(len(found), 'recipe')} on SST-5's dev set; best and named ones: {scores}."
    return Section("accuracy", title, claim, command, outcome, parts, ONE_SEED, where(found.values()))


def cost(results: Results) -> Section:
    """What a step of every recipe takes."""
    found = cells(results, "methods_cost")
    claim = "What a training step of each method takes beside LoRA's, in time, in saved bytes, and in the file it leaves."
    command, title = "python -m benchmarks.methods", "Cost of every method"
    if not found:
        return Section("cost", title, claim, command)
    parts, sentences = [], []
    for index, (key, cell) in enumerate(found.items()):
        rows = cell["figures"]["candidates"]
        own = {name: row["relative"]["step"][0] for name, row in rows.items() if name not in plots.NOT_ADAPTERS}
        quick, slow = min(own, key=own.__getitem__), max(own, key=own.__getitem__)
        sentences.append(f"{key}: from {quick} at {own[quick]:.2f} to {slow} at {own[slow]:.2f} of LoRA's time")
        settings = cell["settings"]
        caption = f"{key}, batch {settings['rows']} × {settings['length']}, fp32, random weights, quickest first."
        parts.append(picture(plots.cost(cell), f"cost-{index}", caption))
    parts.append(folded("All figures", blocks(method_tables.cost(results["methods_cost"], table))))
    caveat = "Times of a CPU, where small operations cost less beside large ones than on a GPU. Bytes and FLOPs are counted."
    return Section("cost", title, claim, command, "; ".join(sentences) + ".", parts, caveat, where(found.values()))


def intruders(results: Results) -> Section:
    """New singular directions in the tuned weights."""
    found = cells(results, "methods_intruders")
    claim = (
        "Shuttleworth et al. 2024 (arXiv:2410.21228): weights tuned by LoRA hold leading singular directions that are like "
        "none of the base's, fewer at higher rank and hardly any after full fine-tuning."
    )
    command, title = "python -m benchmarks.methods --suite intruders --output DIR", "Intruder dimensions"
    if not found:
        return Section("intruders", title, claim, command)
    threshold = list(next(iter(found.values()))["figures"]["intruders"])[-1]
    counts = ", ".join(f"{name} {cell['figures']['intruders'][threshold]}" for name, cell in found.items())
    parts = [
        picture(plots.intruders(found), "intruders", "Fewer are nearer to the base. The numbers stand at the bars."),
        folded("All figures", blocks(method_tables.intruders(results["methods_intruders"], table))),
    ]
    caveat = "A rotation within the base's neighbouring directions counts as an intruder here; the table tells them apart."
    outcome = f"Directions with a cosine below {threshold}: {counts}."
    return Section("intruders", title, claim, command, outcome, parts, caveat, where(found.values()))


def qlora(results: Results) -> Section:
    """A base in NF4, and two processes beside one."""
    found = cells(results, "methods_qlora")
    claim = "A base in NF4 takes an eighth of fp32's bytes, and two processes train on it what one does."
    command, title = COMMAND.format("qlora"), "QLoRA"
    if not found:
        return Section("qlora", title, claim, command)
    figures = found["qlora"]["figures"]
    share = figures["base"]["bytes_per_number"] / figures["dense_bytes_per_number"]
    equal = "are equal bit for bit" if figures["ranks_equal"] else "differ"
    outcome = f"The base takes {share:.3f} of its dense bytes; the processes' trained tensors {equal}."
    parts = [blocks(method_tables.qlora(results["methods_qlora"], table))]
    caveat = "The processes sum gradients in another order than one alone does, which Adam's quotients magnify."
    return Section("qlora", title, claim, command, outcome, parts, caveat, where(found.values()))


def minbert(results: Results) -> Section:
    """The example's runs on three tasks at once."""
    runs = results.get("minbert", {}).get("runs", [])
    claim = "The example: minBERT on sentiment, paraphrase and similarity at once, with the adapters of one task set."
    command, title = "python -m benchmarks.minbert RUN ...", "minBERT on three tasks"
    if not runs:
        return Section("minbert", title, claim, command)
    best = max(runs, key=lambda run: run["dev"]["overall"])
    score = f"Best overall dev score: {best['dev']['overall']:.3f} by {best['name']}"
    outcome = f"{score}, which trains {best['share']:.2%} of the backbone."
    parts = [
        picture(step_plots.curves(runs), "curves", "On a part of the dev set while training; the table is of all of it."),
        blocks(generate.minbert(results["minbert"], table)),
    ]
    facts = sorted({f"{run['environment']['cpu']}, commit {(run['environment']['commit'] or 'none')[:10]}" for run in runs})
    return Section("minbert", title, claim, command, outcome, parts, results["minbert"]["note"] or ONE_SEED, "; ".join(facts))

"""What must agree: the memory estimate with the measurement, and our training with the peer's."""

from benchmarks.page import Section, folded, picture, table
from benchmarks.plots import quality as plots
from benchmarks.sections.results import Results, cells, counted, where

MEMORY_LIMIT = 0.1  # what the suite itself judges by


def memory(results: Results) -> Section:
    """`estimate_memory` beside the measured peak."""
    found = cells(results, "memory")
    claim = "`peftlite.estimate_memory` foretells the peak of a training step before it is taken, to within 10 %."
    command, title = "python -m benchmarks.memory", "Memory, foretold"
    if not found:
        return Section("memory", title, claim, command)
    rows = {key: (cell["figures"]["estimate_mib"], cell["figures"]["measured_mib"]) for key, cell in found.items()}
    worst = max(max(abs(c["figures"]["error"]), abs(c["figures"]["added_error"])) for c in found.values())
    inside = sum(max(abs(c["figures"]["error"]), abs(c["figures"]["added_error"])) < MEMORY_LIMIT for c in found.values())
    header = ["cell", "estimate, MiB", "measured, MiB", "off by", "of what the step adds, off by", "within 10 %"]
    listed = []
    for key, cell in found.items():
        figures = cell["figures"]
        met = max(abs(figures["error"]), abs(figures["added_error"])) < MEMORY_LIMIT
        listed.append(
            [key, f"{figures['estimate_mib']:.1f}", f"{figures['measured_mib']:.1f}", f"{figures['error']:+.2%}",
             f"{figures['added_error']:+.2%}", "yes" if met else "**no**"]
        )  # fmt: skip
    caption = "Deviation of the whole peak; the table also has that of what the step adds to what is there between two steps."
    parts = [picture(plots.estimates(rows, MEMORY_LIMIT), "memory", caption), folded("All figures", table(header, listed))]
    outcome = f"{inside} of {counted(len(found), 'estimate')} within 10 %, the worst off by {worst:.1%}."
    caveat = "Bytes of tensors: what operations take inside themselves, and the allocator's fragments, are not in it."
    return Section("memory", title, claim, command, outcome, parts, caveat, where(found.values()))

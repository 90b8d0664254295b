"""The report of all suites, one HTML file that needs nothing else, and the tables of README and docs, from the JSON alone.

    python -m benchmarks.report                              # committed results -> benchmarks/report.html, README, docs
    python -m benchmarks.report --results runs/bench         # of another folder -> runs/bench/report.html

No figure is typed. A suite without a result file has a section that says which command makes it.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import RESULTS
from benchmarks.page import render
from benchmarks.sections import checks, code, methods, quality, steps
from benchmarks.sections.results import Results, digests, read
from docs import generate

REPORT = RESULTS.parent / "report.html"
SECTIONS = (
    steps.peers,
    steps.full,
    steps.scaling,
    steps.layer,
    quality.efficiency,
    quality.ranks,
    quality.ensembles,
    quality.targets,
    methods.accuracy,
    methods.cost,
    methods.intruders,
    methods.qlora,
    methods.minbert,
    checks.parity,
    checks.memory,
    checks.kernels,
    code.machine_code,
)
LEAD = (
    "Does parameter-efficient fine-tuning keep its promises, and does this library keep its own? Each section states a claim, "
    "what came of it, the figures, and what they do not say. Every number comes from a result file with machine, versions and "
    "commit; rows in which a peer is ahead, or a promise is not kept, are marked."
)
ELSEWHERE = (
    "These are not the committed results but those of a folder of its own, which may be of small sizes and few rounds: they "
    "show that everything runs, and are no measurement to quote."
)


def page(results: Results, sources: str, *, committed: bool) -> str:
    """The report.

    Args:
        results: content of the result files by name.
        sources: names and digests of these files.
        committed: whether they are those of the repository.
    """
    lead = LEAD if committed else f"**{ELSEWHERE}** {LEAD}"
    sections = [section(results) for section in SECTIONS]
    return render("peftlite: claims and measurements", lead, sections, f"Made from {sources} by `python -m benchmarks.report`.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report, and for the committed results the tables of README and docs; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description="Write the report of all suites from their result files."
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of result files (default: the committed ones)")
    parser.add_argument("--output", type=Path, help="the page (default: benchmarks/report.html, or report.html in --results)")
    options = parser.parse_args(arguments)
    committed = options.results.resolve() == RESULTS.resolve()
    output = options.output or (REPORT if committed else options.results / REPORT.name)
    try:
        text = page(read(options.results), digests(options.results), committed=committed)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text, encoding="utf-8")
    if committed:
        generate.main()
    print(f"written to {output}, {len(text.encode()) / 1024:.0f} KiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())

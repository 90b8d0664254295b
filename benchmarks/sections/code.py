"""Machine code of the kernels, for GPUs that are not there."""

from collections import defaultdict
from typing import Any

from benchmarks.page import Section, blocks, folded, table
from benchmarks.sections.results import Results, counted
from docs import kernel_tables
from docs.method_tables import place


def machine_code(results: Results) -> Section:
    """What the gate of compiled kernels found."""
    claim = (
        "Every Triton kernel compiles for each architecture: no spills, within its limits, with tensor cores and wide loads."
    )
    command, title = "python -m benchmarks.aot", "Machine code of the kernels"
    entries = list(results.get("aot", {}).get("variants", {}).values())
    if not entries:
        return Section("code", title, claim, command)
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for entry in entries:
        groups[entry["architecture"]].append(entry)
    rows = []
    for architecture, found in sorted(groups.items()):
        compiled = [entry for entry in found if "error" not in entry]
        measures = ("registers", "shared", "spills", "stack")
        most = {name: max((entry[name] for entry in compiled), default=0) for name in measures}
        cores = sum(bool(entry["hmma"] + entry["hgmma"] + entry["tcgen05"]) for entry in compiled)
        fits = len(compiled) == len(found) and not most["spills"] + most["stack"]
        rows.append(
            [architecture, str(len({entry["kernel"] for entry in found})), str(len(found)), str(len(found) - len(compiled)),
             str(most["registers"]), f"{most['shared'] / 1024:.0f} KiB", str(most["spills"]), f"{most['stack']} B", str(cores),
             "not asked" if not architecture.startswith("sm_") else "yes" if fits else "**no**"]
        )  # fmt: skip
    header = ["architecture", "kernels", "variants", "do not compile", "most registers", "most shared memory", "spills",
              "stack", "with tensor cores", "no spills"]  # fmt: skip
    spilling = [entry["architecture"] for entry in entries if entry.get("spills", 0)]
    broken = sum("error" in entry for entry in entries)
    spills = f"{len(spilling)} with spills ({', '.join(sorted(set(spilling)))})" if spilling else "none with spills"
    failed = f"; {broken} do not compile" if broken else ""
    outcome = f"{counted(len(entries), 'variant')} compiled for {counted(len(groups), 'architecture')}, {spills}{failed}."
    every = folded("Every kernel", blocks(kernel_tables.machine_code(results["aot"], table)))
    parts = [table(header, rows), every]
    caveat = "Compiled and judged, not run: no time of a GPU follows from it. gfx942 is for information."
    return Section("code", title, claim, command, outcome, parts, caveat, place(results["aot"]["machine"]))

"""The table of `benchmarks.aot`, from its result file; for `docs.generate`."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Table = Callable[[Sequence[str], Sequence[Sequence[str]]], str]
CORES = {"hgmma": "HGMMA", "hmma": "HMMA", "tcgen05": "tcgen05"}


def machine_code(found: Mapping[str, Any], table: Table) -> str:
    """A row for each kernel and dtype, a column for each architecture, and in words what was asserted over all of them."""
    groups: dict[tuple[str, str], dict[str, list[Mapping[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for entry in found["variants"].values():
        groups[entry["kernel"], entry["dtype"]][entry["architecture"]].append(entry)
    architectures = list(dict.fromkeys(entry["architecture"] for entry in found["variants"].values()))
    rows = [
        [kernel.strip("_").removesuffix("_kernel"), dtype, *(_cell(by[name]) if name in by else "–" for name in architectures)]
        for (kernel, dtype), by in sorted(groups.items())
    ]
    compiled = [entry for entry in found["variants"].values() if "error" not in entry]
    spills = max(entry["spills"] for entry in compiled if entry["architecture"].startswith("sm_"))
    facts = found["machine"]
    note = (
        f"{len(found['variants'])} variants, {found['failed']} failed assertions; most spills of a variant for an NVIDIA "
        f"target: {spills}. Triton {facts['triton']}, torch {facts['torch']}; commit {(facts['commit'] or 'none')[:10]}. In a "
        "cell: variants, most registers of a thread, most shared memory of a block, and the fewest instructions on tensor "
        "cores and loads of 128 bits among the variants that have any."
    )
    return f"{note}\n\n{table(['kernel', 'dtype', *architectures], rows)}"


def _cell(entries: Sequence[Mapping[str, Any]]) -> str:
    compiled = [entry for entry in entries if "error" not in entry]
    if not compiled:
        return f"{len(entries)} do not compile"
    parts = [
        f"{len(compiled)} of {len(entries)}" if len(compiled) < len(entries) else f"{len(entries)} v.",
        f"{max(entry['registers'] for entry in compiled)} reg.",
        f"{max(entry['shared'] for entry in compiled) / 1024:.0f} KiB",
    ]
    cores = CORES if entries[0]["architecture"].startswith("sm_") else {"hmma": "MFMA"}
    for key, name in {**cores, "wide_loads": "× 128 bit"}.items():
        if some := [entry[key] for entry in compiled if entry[key]]:
            parts.append(f"{min(some)} {name}")
    return ", ".join(parts)

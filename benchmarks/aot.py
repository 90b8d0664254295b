"""Compiles every kernel variant ahead of time and judges the machine code: a gate for GPUs that are not there.

    python -m benchmarks.aot                            # all architectures, minutes; what is compiled already is kept
    python -m benchmarks.aot --arch sm_90 --long        # one of them, a line per variant
    python -m benchmarks.aot --sample 40                # every n-th variant, as continuous integration does

The operations themselves say what they would launch, for every entry of the table of configurations and every option that
changes a kernel, so that nothing is listed twice. Asserted: no spills, no stack, no local memory; shared memory and
registers within the architecture's limits; tensor cores wherever 16-bit matrices are multiplied, and Hopper's own in bf16;
128-bit loads and no narrower ones than 32 bits where all is aligned; no atomics; square roots and quotients that round to
nearest. Bytes are loaded singly where they are dropout bits, eight columns each, and where a last kernel reads one value
per column, which is no stream. gfx942 is for information. The exit status is 1 where an assertion fails.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import triton
from tqdm import tqdm

from benchmarks.harness import RESULTS, machine, write_result
from benchmarks.launches import Record, Variant, record
from benchmarks.machine_code import ARCHITECTURES, REGISTER_FILE, Job, compile_job, count_instructions, specialise
from benchmarks.tables import aot_table

VALUE_PER_COLUMN = ("_finish_columns_kernel",)  # reads vectors of 16-bit numbers, one per column, beside its streams
# They must use Hopper's own tensor cores in bf16.
HOPPER = ("_row_norm_kernel", "_row_norm_grouped_kernel", "_row_shrink_kernel", "_col_shrink_kernel")
BATCH = 16  # compilations that are disassembled together, and written together


class Planned(NamedTuple):
    """One compilation to do: what is compiled, and where it came from."""

    job: Job
    variant: Variant


def plan(records: Mapping[str, Record]) -> list[Planned]:
    """Everything that the operations launch, by architecture; each distinct compilation once."""
    planned: dict[str, Planned] = {}
    for architecture, found in records.items():
        for variant in found.variants:
            launch = variant.launch
            options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": True}
            job = specialise(launch.kernel, architecture, launch.args, launch.constexprs, options)
            planned.setdefault(job.identity, Planned(job, variant))
    return list(planned.values())


def describe(planned: Planned) -> dict[str, Any]:
    """What the result file says of a compilation besides its figures."""
    job, variant = planned
    constants = {name: value for name, value in job.constants().items() if isinstance(value, (bool, int, float, str))}
    return {
        "kernel": variant.launch.name,
        "architecture": job.architecture,
        "dtype": variant.dtype,
        "aligned": variant.aligned,
        "why": variant.why,
        "reads_floats": any(kind.startswith(("*fp", "*bf")) for kind in job.signature.values()),
        "reads_bits": "*u8" in job.signature.values(),
        "constants": constants,
        "warps": job.options["num_warps"],
        "stages": job.options["num_stages"],
    }


def failures(entry: dict[str, Any]) -> list[str]:
    """The assertions that `entry`, a description with its figures, does not meet, in words; none off the sm_ targets."""
    architecture = ARCHITECTURES[entry["architecture"]]
    if "error" in entry:
        return [f"does not compile: {entry['error']}"] if architecture.asserted else []
    if not architecture.asserted:
        return []
    found = []
    for name in ("spills", "stack", "local", "local_loads", "atomics"):
        if entry[name]:
            found.append(f"{name} = {entry[name]}, must be 0")
    if entry["shared"] > architecture.shared_limit:
        found.append(f"shared memory {entry['shared']} bytes, the limit is {architecture.shared_limit}")
    if entry["registers"] * entry["threads"] > REGISTER_FILE:
        found.append(f"{entry['registers']} registers x {entry['threads']} threads exceed {REGISTER_FILE}")
    if entry["dots"] and entry["dtype"] != "float32":
        if not entry["hmma"] + entry["hgmma"] + entry["tcgen05"]:
            found.append("multiplies 16-bit matrices without tensor cores")
        hopper = entry["kernel"] in HOPPER and entry["dtype"] == "bfloat16" and entry["architecture"] == "sm_90"
        if hopper and not entry["hgmma"]:
            found.append("no HGMMA on sm_90")
    if entry["aligned"]:
        if entry["reads_floats"] and not entry["wide_loads"]:
            found.append("no 128-bit load, though all is aligned")
        if entry["loads_16"] and entry["kernel"] not in VALUE_PER_COLUMN:
            found.append(f"{entry['loads_16']} loads of 16 bits, though all is aligned")
        if entry["loads_8"] and not entry["reads_bits"]:
            found.append(f"{entry['loads_8']} loads of 8 bits, though all is aligned and there is no mask")
    found += [f"{form} is not rounded to nearest" for form in entry["sqrt"] + entry["div"] if ".rn." not in form]
    return found


_planned: list[Planned] = []  # set before the workers are forked, since kernels cannot be pickled


def _compile(batch: Sequence[int]) -> list[dict[str, Any]]:
    """The entries of a batch, which is for one architecture."""
    entries, codes = [], []
    for index in batch:
        planned = _planned[index]
        try:
            figures, code = compile_job(planned.job)
        except Exception as error:  # a failed compilation is a finding, and the others should still be made
            figures, code = {"error": f"{type(error).__name__}: {error}"[:400]}, b""
        entries.append(describe(planned) | figures)
        codes.append(code)
    counts = count_instructions(_planned[batch[0]].job.architecture, codes)
    return [entry if "error" in entry else entry | found for entry, found in zip(entries, counts, strict=True)]


def _batches() -> list[list[int]]:
    """The indices of `_planned`, a few of one architecture at a time."""
    by_architecture = itertools.groupby(range(len(_planned)), key=lambda index: _planned[index].job.architecture)
    whole = [list(indices) for _, indices in by_architecture]
    return [indices[start : start + BATCH] for indices in whole for start in range(0, len(indices), BATCH)]


def read_finished(path: Path) -> dict[str, dict[str, Any]]:
    """Finished compilations of an earlier run by their identity; one that failed to compile is tried again.

    Raises:
        ValueError: the file is not a result file of this suite.
    """
    if not path.exists():
        return {}
    try:
        payload = json.loads(path.read_text(encoding="utf-8"))
        if payload["suite"] != "aot":
            raise ValueError(f"it holds results of suite {payload['suite']!r}")
        return {key: entry for key, entry in payload["variants"].items() if "error" not in entry}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a result file of benchmarks.aot ({error}); move it away or choose another") from error


def compile_all(planned: Sequence[Planned], *, path: Path, fresh: bool, workers: int) -> dict[str, dict[str, Any]]:
    """Compile what `path` does not hold yet and write it there, all along; entries of `planned` by identity."""
    finished = {} if fresh else read_finished(path)
    wanted = [item.job.identity for item in planned]
    entries = {key: finished[key] for key in wanted if key in finished}
    _planned[:] = [item for item in planned if item.job.identity not in entries]
    facts = machine() | {"triton": triton.__version__}

    def write() -> None:
        variants = {key: entries[key] for key in wanted if key in entries}
        failed = sum(len(failures(entry)) for entry in variants.values())
        write_result(path, {"suite": "aot", "machine": facts, "failed": failed, "variants": variants})

    with tqdm(total=len(planned), initial=len(entries), unit="variant", desc="compile") as bar:
        if _planned:
            with multiprocessing.get_context("fork").Pool(workers) as pool:
                batches = _batches()
                for batch, made in zip(batches, pool.imap(_compile, batches), strict=True):
                    entries |= {_planned[index].job.identity: entry for index, entry in zip(batch, made, strict=True)}
                    bar.update(len(made))
                    write()
    write()  # all may have been finished before
    return entries


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = argparse.ArgumentParser(
        prog="python -m benchmarks.aot",
        description="Compile every kernel variant for GPUs that are not there, and judge the machine code.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = options.add_argument
    add("--arch", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES), help="what to compile for")
    add("--sample", type=int, default=0, metavar="N", help="about N variants, spread over all; 0 means all")
    add("--workers", type=int, default=min(2, os.cpu_count() or 1), help="processes that compile")
    add("--long", action="store_true", help="a line per variant, not per kernel")
    add("--output", type=Path, default=RESULTS / "aot.json", help="result file; finished compilations are kept")
    add("--fresh", action="store_true", help="compile finished ones again")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the gate; the exit status."""
    options = parser().parse_args(arguments)
    records = {name: record(name) for name in options.arch}
    planned = plan(records)
    whole = set(options.arch) == set(ARCHITECTURES)  # an entry may be for one architecture alone
    if options.sample:
        planned = planned[:: max(1, len(planned) // options.sample)]
    try:
        entries = compile_all(planned, path=options.output, fresh=options.fresh, workers=options.workers)
    except KeyboardInterrupt:
        print(f"\ninterrupted: what is finished is in {options.output}; run again to go on", file=sys.stderr)
        return 130
    print(aot_table(list(entries.values()), long=options.long))
    red = [(entry, failure) for entry in entries.values() for failure in failures(entry)]
    for entry, failure in red:
        constants = ", ".join(f"{key}={value}" for key, value in entry["constants"].items())
        print(f"FAILED {entry['kernel']} {entry['architecture']} {entry['dtype']} ({entry['why']}): {failure}\n    {constants}")
    missed = sorted(set.intersection(*(found.uncovered for found in records.values()))) if whole else []
    for line in missed:
        print(f"FAILED the table of configurations has an entry that nothing launches: {line}")
    print(f"\n{len(entries)} variants, {len(red) + len(missed)} failed assertions; written to {options.output}")
    return 1 if red or missed else 0


if __name__ == "__main__":
    sys.exit(main())

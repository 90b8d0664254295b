"""QLoRA on MiniLM: bytes of the base, and two processes beside one: `python -m benchmarks.methods --suite qlora`.

Its accuracy is that of recipe ``qlora`` in the accuracy suite, beside ``lora-fp32``. Here a short run of the same training
is made by one process, and again by two `gloo` processes under `torchrun`, each with half of every batch, their gradients
averaged by ``DistributedDataParallel``. Dropout is off: its masks would differ.
"""

import argparse
import functools
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import peftlite
from benchmarks.accuracy import train
from benchmarks.cells import Cell, measure_cells
from benchmarks.harness import RESULTS, ROOT, ResultFile, machine
from benchmarks.protocol import Protocol, load_splits
from benchmarks.recipes import RECIPES
from examples.minbert_multitask.evaluate import task_outputs
from examples.minbert_multitask.network import build_network
from examples.minbert_multitask.settings import Settings
from peftlite.quantization.blockwise import Format

RESULT = RESULTS / "methods_qlora.json"
PROCESSES = 2
RECIPE = RECIPES["qlora"]


@dataclass(frozen=True)
class Short:
    """The short run."""

    examples: int = 320
    batch_size: int = 32
    lr: float = 1e-3
    weights: str = "minilm"


def protocol_of(short: Short) -> Protocol:
    """One epoch in fp32, on examples drawn from train."""
    return Protocol(
        amp="off",
        epochs=1,
        batch_size=short.batch_size,
        search_examples=short.examples,
        held_examples=1,
        weights=short.weights,
    )


def settings_of(short: Short, data: str) -> Settings:
    """The example's settings for the short run."""
    return RECIPE.resolved(protocol_of(short).settings(data), lr=short.lr, head_dropout=0.0)


def short_run(short: Short, data: str, cache: Path, file: Path) -> None:
    """Train, in one process or as one of several, and write what was trained, each process to a file of its own.

    Raises:
        ValueError: the examples do not go evenly into the processes.
    """
    settings = settings_of(short, data)
    examples = load_splits(protocol_of(short), data, cache).search
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if len(examples) % short.batch_size or short.batch_size % world:
        raise ValueError(
            f"{short.examples} examples in batches of {short.batch_size} do not go evenly into {world} processes; "
            "the mean of the processes' gradients would not be that of the batch"
        )
    own = file if world == 1 else file.with_suffix(f".{rank}")
    train(
        RECIPE,
        settings,
        examples,
        save=own,
        quiet=True,
        wrap=(lambda network: network) if world == 1 else DistributedDataParallel,
        share=lambda index: index[rank::world],
    )


def base_bytes(network: nn.Module) -> dict[str, float]:
    """Numbers in the adapted frozen matrices, the bytes that hold them, and bytes per number."""
    weights = [layer.weight for layer in peftlite.adapters(network).values()]
    numbers, held = sum(w.numel() for w in weights), sum(w.nbytes for w in weights)
    return {"numbers": numbers, "bytes": held, "bytes_per_number": held / numbers}


def launch(short: Short, data: str, output: Path, file: Path) -> None:
    """Make the short run with `PROCESSES` processes under torchrun.

    Raises:
        RuntimeError: it failed; the message ends with what it wrote.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"]
    command += ["-m", "benchmarks.qlora", str(file), "--data", data, "--output", str(output)]
    for name, value in asdict(short).items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"the run of {PROCESSES} processes failed with status {done.returncode}:\n{done.stderr[-2000:]}")


def measure(short: Short, data: str, output: Path) -> dict[str, Any]:
    """The base's bytes, and how far the two runs' trained tensors lie apart.

    ``difference`` is the norm of their difference over the norm of what training changed: fp32 sums in another order, which
    Adam's quotients magnify. ``agreement`` is the share of dev sentences that both answer alike.
    """
    settings = settings_of(short, data)
    network = RECIPE.build(settings)
    figures: dict[str, Any] = {"base": base_bytes(network), "format_bits": Format().bits}
    figures["dense_bytes_per_number"] = base_bytes(RECIPES["lora-fp32"].build(settings))["bytes_per_number"]
    with tempfile.TemporaryDirectory() as folder:
        start, one, two = (Path(folder) / f"{name}.safetensors" for name in ("start", "one", "two"))
        peftlite.save_adapters(network, start)
        began = time.perf_counter()
        short_run(short, data, output / "token-cache", one)
        figures["seconds"] = {"1": time.perf_counter() - began}
        began = time.perf_counter()
        launch(short, data, output, two)
        figures["seconds"][str(PROCESSES)] = time.perf_counter() - began  # with the start of the processes
        before, alone = load_file(start), load_file(one)
        ranks = [load_file(two.with_suffix(f".{rank}")) for rank in range(PROCESSES)]
        figures["ranks_equal"] = all(torch.equal(own[key], ranks[0][key]) for own in ranks for key in alone)
        figures["difference"] = _distance(alone, ranks[0]) / _distance(alone, before)
        dev = load_splits(protocol_of(short), data, output / "token-cache").dev
        answers = []
        for path in (one, two.with_suffix(".0")):
            trained, _ = build_network(settings)
            peftlite.quantize_base(trained.backbones, settings.target_names(), "nf4")
            peftlite.load_adapters(trained, path)
            answers.append(task_outputs(trained, dev, settings).argmax(-1))
        figures["agreement"] = float((answers[0] == answers[1]).double().mean())
    return figures


def _distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float((a[key].double() - b[key].double()).square().sum()) for key in a))


def lines(cell: Mapping[str, Any]) -> str:
    """A cell as text."""
    figures = cell["figures"]
    same = "the same bit for bit" if figures["ranks_equal"] else "DIFFERENT"
    return (
        f"base: {figures['base']['bytes_per_number']:.4f} bytes per number, dense {figures['dense_bytes_per_number']:.0f}\n"
        f"{PROCESSES} processes: {same} on all ranks; beside one process {figures['difference']:.2e} of what training changed, "
        f"{figures['agreement']:.1%} of the answers alike"
    )


def run(short: Short, data: str, output: Path, result: Path, *, fresh: bool = False) -> None:
    """Measure, unless it has been with these settings on this machine and commit."""
    torch.set_num_threads(1)
    record = {**asdict(short), "weights": Path(short.weights).name}
    planned = [Cell("qlora", record, functools.partial(measure, short, data, output))]
    measure_cells(planned, ResultFile(result, "qlora"), machine(), lines, fresh=fresh)


def main(arguments: Sequence[str] | None = None) -> None:
    """One process of the short run, started by torchrun."""
    options = argparse.ArgumentParser(description="One process of the short run; see `launch`.")
    options.add_argument("file", type=Path)
    options.add_argument("--data", required=True)
    options.add_argument("--output", type=Path, required=True)
    for spec in fields(Short):
        options.add_argument(f"--{spec.name.replace('_', '-')}", type=type(spec.default), required=True)
    given = options.parse_args(arguments)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        short = Short(**{spec.name: getattr(given, spec.name) for spec in fields(Short)})
        short_run(short, given.data, given.output / "token-cache", given.file)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""Measure tiles for the Triton kernels on this GPU, and write the fastest to a table of configurations.

    python -m peftlite.tune --output mine.json        # then set PEFTLITE_CONFIGS=mine.json
    TRITON_INTERPRET=1 python -m peftlite.tune --rehearse    # the same steps on CPU with tiny sizes; its choice means nothing

For each kernel, dtype, rank and shape the tiles of the built-in table and their neighbours (blocks halved and doubled, other
numbers of warps and stages) are launched on copies of the arguments, since some kernels work in place. A tile that does
not fit the machine is passed over.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftlite.kernels import configs
from peftlite.kernels.dora_linear import dora_linear

KERNELS = ("row_norm", "row_shrink", "col_shrink", "expand")
DTYPES = (torch.bfloat16, torch.float32)
SHAPES = ((1024, 768, 768), (4096, 768, 3072), (8192, 4096, 4096))  # rows, in, out
RANKS = (16, 64)
SCALE = 2.0


def neighbours(tile: dict[str, int]) -> Iterator[dict[str, int]]:
    """`tile` first, then those that differ from it in one or two numbers, by a factor of 2, stages by 1.

    Example:
        >>> list(neighbours({"BLOCK": 16, "num_warps": 1, "num_stages": 1}))[:3]
        [{'BLOCK': 16, 'num_warps': 1, 'num_stages': 1}, {'BLOCK': 32, 'num_warps': 1, 'num_stages': 1}, \
{'BLOCK': 16, 'num_warps': 2, 'num_stages': 1}]
    """
    yield tile
    choices = {}
    for name, value in tile.items():
        near = [value - 1, value + 1] if name == "num_stages" else [value // 2, value * 2]
        least = 16 if name.startswith("BLOCK") else 1
        choices[name] = [other for other in near if other >= least and not (name == "num_warps" and other > 8)]
    for size in (1, 2):
        for names in itertools.combinations(choices, size):
            for values in itertools.product(*(choices[name] for name in names)):
                yield {**tile, **dict(zip(names, values, strict=True))}


def best(
    tiles: Sequence[dict[str, int]], measure: Callable[[dict[str, int]], float | None]
) -> tuple[dict[str, int], float] | None:
    """The tile of least `measure` and that measure; those measured as None are passed over, and None is left of nothing."""
    measured = [(tile, value) for tile in tiles if (value := measure(tile)) is not None]
    return min(measured, key=lambda pair: pair[1], default=None)


def _clock(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median milliseconds of `work`."""
    taken = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(1e3 * (time.perf_counter() - start))
    return sorted(taken)[len(taken) // 2]


def _pass(rows: int, in_features: int, out_features: int, rank: int, dtype: torch.dtype, device: torch.device) -> None:
    """A forward and backward pass of DoRA, which launches every kernel."""

    def noise(*shape: int, kind: torch.dtype = dtype, grad: bool = False) -> Tensor:
        return torch.randn(shape, device=device).to(kind).requires_grad_(grad)

    x, weight, bias = noise(rows, in_features, grad=True), noise(out_features, in_features), noise(out_features)
    a, b = noise(rank, in_features, kind=torch.float32, grad=True), noise(out_features, rank, kind=torch.float32, grad=True)
    magnitude = noise(out_features, kind=torch.float32, grad=True)
    y = dora_linear(x, weight, bias, a, b, magnitude, SCALE, impl="triton")
    y.backward(noise(*y.shape))


def tune(
    shapes: Sequence[tuple[int, int, int]],
    ranks: Sequence[int],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
    *,
    limit: int,
    repeats: int,
    say: Callable[[str], object],
) -> configs.Table:
    """The fastest tiles as a table of configurations, narrow entries first.

    Args:
        shapes: rows, in and out features.
        ranks: multiples of 16.
        dtypes: of the computation.
        device: where.
        limit: tiles that are tried per kernel and case.
        repeats: runs per tile.
        say: is told what is measured.
    """
    look_up = configs._config
    table: configs.Table = {name: [] for name in KERNELS}
    for kernel, dtype, rank, shape in itertools.product(KERNELS, dtypes, ranks, sorted(shapes)):
        asked: list[tuple[Any, ...]] = []

        def noted(*arguments: Any, kernel: str = kernel, asked: list[tuple[Any, ...]] = asked) -> dict[str, int]:
            asked.extend([arguments] if arguments[0] == kernel else [])
            return look_up(*arguments)

        def timed(
            tile: dict[str, int],
            kernel: str = kernel,
            case: tuple[Any, ...] = (*shape, rank, dtype, device),
        ) -> float | None:
            configs._config = lambda *a: tile if a[0] == kernel else look_up(*a)  # type: ignore[assignment]
            try:
                _pass(*case)  # compiles
                return _clock(lambda: _pass(*case), device, repeats)
            except Exception as error:  # what does not fit the machine fails in as many ways as there are limits
                say(f"    passed over {tile}: {type(error).__name__}")
                return None

        configs._config = noted  # type: ignore[assignment]
        try:
            _pass(*shape, rank, dtype, device)
            name, arch, spelled, padded, columns, rows, _ = asked[0]
            found = best(list(itertools.islice(neighbours(look_up(*asked[0])), limit)), timed)
        finally:
            configs._config = look_up
        if found is not None:
            tile, ms = found
            when = {"arch": arch, "dtype": spelled, "rank": padded, "columns": columns, "rows": rows}
            table[name].append({"when": when, "use": tile})
            say(f"{kernel} {spelled} r={padded} {shape}: {tile}, {ms:.3f} ms a pass")
    return table


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = argparse.ArgumentParser(prog="python -m peftlite.tune", description="Measure tiles for the Triton kernels.")
    options.add_argument("--output", type=Path, default=Path("peftlite-configs.json"), help="table to write")
    options.add_argument("--limit", type=int, default=40, help="tiles to try per kernel and case")
    options.add_argument("--rehearse", action="store_true", help="run it in the interpreter on CPU, with tiny sizes")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write; the exit status."""
    options = parser().parse_args(arguments)
    if not options.rehearse and not torch.cuda.is_available():
        print("tuning measures on a CUDA device, and there is none; --rehearse goes through the steps on CPU", file=sys.stderr)
        return 2
    if options.rehearse:
        table = tune([(8, 24, 40)], [16], [torch.float32], torch.device("cpu"), limit=2, repeats=1, say=print)
    else:
        table = tune(SHAPES, RANKS, DTYPES, torch.device("cuda"), limit=options.limit, repeats=20, say=print)
    options.output.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    configs.read(options.output)  # checks the form
    print(f"written to {options.output}; use it with {configs.VARIABLE}={options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

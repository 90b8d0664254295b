"""Whether training with our adapters goes where it goes with PEFT's: same seed, data and initial factors, curve by curve.

    python -m benchmarks.parity --data FOLDER     # MiniLM on SST; LoRA and DoRA, SGD and AdamW, fp32 and bf16; minutes
    python -m benchmarks.parity --small           # the embedded sample, batches of 4: whether it holds

The network is the example's, without dropout: PEFT's DoRA drops another path than ours. Adapters go into all linears of the
encoder, the head trains too, and both libraries get the same batches. In both the norm of DoRA is a constant of the graph
(§4.3 of Liu et al. 2024, arXiv:2402.09353). In fp32 the losses of the first 50 steps have to agree within 1e-4 relative, or the
exit status is 1; in bf16 autocast, where the two round at different places, the deviation is reported and not judged.
"""

import argparse
import copy
import functools
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.cells import Cell, exit_status, measure_cells
from benchmarks.harness import RESULTS, RedGateError, ResultFile, machine
from benchmarks.peers import LIBRARIES, Plan, versions
from examples.minbert_multitask.data import TaskData, collate
from examples.minbert_multitask.evaluate import autocast, load_data
from examples.minbert_multitask.network import MultitaskBert, build_network
from examples.minbert_multitask.settings import Settings
from examples.minbert_multitask.tasks import task_loss
from examples.minbert_multitask.trainer import BatchStream

TARGETS = ("query", "key", "value", "dense")
PEER = "peft"
TASK = "sst"
LIMIT, JUDGED = 1e-4, 50  # relative, over so many of the first steps
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01),
}


@dataclass(frozen=True)
class ParitySettings:
    """Everything that a cell's figures depend on, besides the commit, the versions and the data."""

    method: str
    optimizer: str
    amp: str
    steps: int
    batch_size: int
    rank: int
    weights: str
    examples: int  # that the data has
    threads: int
    seed: int = 0

    @property
    def key(self) -> str:
        """The cell's name in the result file."""
        precision = "fp32" if self.amp == "off" else f"{self.amp} autocast"
        return f"{self.method} r={self.rank}, {self.optimizer}, {precision}, {self.steps} steps of {self.batch_size}"

    @property
    def judged(self) -> bool:
        """Whether the limit holds for it."""
        return self.amp == "off"


def adapted(library: str, network: MultitaskBert, settings: ParitySettings) -> tuple[MultitaskBert, dict[str, nn.Module]]:
    """A copy of `network` with a library's adapters in its encoder, and those layers by name."""
    twin = copy.deepcopy(network)
    plan = Plan(TARGETS, settings.rank, 0.0, seed=settings.seed)
    LIBRARIES[library].inject(settings.method, twin.backbones, plan)
    return twin.train(), LIBRARIES[library].layers(twin.backbones)


@torch.no_grad()
def copy_factors(source: dict[str, nn.Module], target: dict[str, nn.Module]) -> None:
    """Give the layers of the peer the initial values of ours.

    Raises:
        RedGateError: the two do not have the same layers and tensors, rank and scale.
    """
    if source.keys() != target.keys():
        raise RedGateError(f"adapted layers differ: {sorted(source.keys() ^ target.keys())[:3]}; nothing can be compared")
    for name, layer in source.items():
        ours, theirs = LIBRARIES["ours"].formula(layer), LIBRARIES[PEER].formula(target[name])
        shapes = [{key: tuple(tensor.shape) for key, tensor in each.tensors.items()} for each in (ours, theirs)]
        if shapes[0] != shapes[1] or (ours.rank, ours.scale) != (theirs.rank, theirs.scale):
            raise RedGateError(
                f"{name}: {shapes[0]}, rank {ours.rank}, scale {ours.scale:g} beside {PEER}'s {shapes[1]}, rank {theirs.rank}, "
                f"scale {theirs.scale:g}; nothing can be compared"
            )
        for key, tensor in theirs.tensors.items():
            tensor.copy_(ours.tensors[key])


def train(network: MultitaskBert, data: TaskData, settings: ParitySettings, tick: Callable[[], object]) -> list[float]:
    """The loss of each step."""
    how = example(batch_size=settings.batch_size, amp=settings.amp, seed=settings.seed, threads=settings.threads)
    optimizer = OPTIMIZERS[settings.optimizer]([p for p in network.parameters() if p.requires_grad])
    stream, losses = BatchStream(data, how), []
    for step in range(settings.steps):
        batch = collate(data, stream[step], max_length=how.max_length)
        with autocast(how):
            logits = network(TASK, batch)
        loss: Tensor = task_loss(TASK, logits, batch.labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        tick()
    return losses


def example(**changes: Any) -> Settings:
    """The example's settings, without any dropout, with `changes`."""
    return Settings(tasks=TASK, backbone_dropout=0.0, head_dropout=0.0, device="cpu", **changes).resolved()


@torch.no_grad()
def updates(layers: dict[str, nn.Module], library: str, base: nn.Module) -> dict[str, Tensor]:
    """What the adapters of each layer do to the base weight: effective weight less that weight."""
    formula = LIBRARIES[library].formula
    return {name: formula(layer).weight() - base.get_submodule(name).weight for name, layer in layers.items()}


def measure(settings: ParitySettings, network: MultitaskBert, data: TaskData) -> dict[str, Any]:
    """Train both and compare: curves, their deviation step by step, and that of the trained updates.

    Raises:
        RedGateError: the libraries adapt different layers, or a loss is not finite.
    """
    torch.manual_seed(settings.seed)
    models = {library: adapted(library, network, settings) for library in ("ours", PEER)}
    copy_factors(models["ours"][1], models[PEER][1])
    with tqdm(total=2 * settings.steps, unit="step", desc=settings.key) as bar:
        curves = {library: train(model, data, settings, bar.update) for library, (model, _) in models.items()}
    if not all(math.isfinite(loss) for curve in curves.values() for loss in curve):
        raise RedGateError(f"{settings.key}: a loss is not finite; lower the learning rate")
    deviation = [abs(a - b) / abs(b) for a, b in zip(curves["ours"], curves[PEER], strict=True)]
    ours, theirs = (updates(layers, library, network.backbones) for library, (_, layers) in models.items())
    return {
        "curves": curves,
        "deviation": deviation,
        "worst": max(deviation[:JUDGED]),
        "worst_all": max(deviation),
        "update_deviation": max(float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in theirs),
        "limit": LIMIT if settings.judged else None,
    }


def met(figures: Mapping[str, Any]) -> bool:
    """Whether the curves agree as they must; where nothing is judged, they do."""
    return figures["limit"] is None or figures["worst"] <= figures["limit"]


def line(cell: Mapping[str, Any]) -> str:
    """A cell in one line."""
    figures = cell["figures"]
    curve, last = figures["curves"]["ours"], len(figures["deviation"])
    verdict = "not judged" if figures["limit"] is None else f"limit {figures['limit']:.0e}"
    return (
        f"loss {curve[0]:.4f} -> {curve[-1]:.4f}; largest deviation from {PEER} {figures['worst']:.1e} in the first "
        f"{min(JUDGED, last)} steps ({verdict}), {figures['worst_all']:.1e} in all {last}; of an update "
        f"{figures['update_deviation']:.1e}" + ("" if met(figures) else " [!! apart]")
    )


def cells(options: argparse.Namespace, examples: int) -> Iterator[ParitySettings]:
    """Both methods with both optimizers, in both precisions."""
    weights = Path(options.weights).name
    for amp in ("off", "bf16"):
        for method in LIBRARIES[PEER].methods:
            for optimizer in OPTIMIZERS:
                yield ParitySettings(
                    method, optimizer, amp, options.steps, options.batch_size, options.rank, weights, examples, options.threads
                )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite; the exit status is 1 if fp32 curves part."""
    command = argparse.ArgumentParser(
        prog="python -m benchmarks.parity",
        description="Train with our adapters and with PEFT's from the same start, and compare the curves.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = command.add_argument
    add("--small", action="store_true", help="batches of 4, unless told otherwise")
    add("--data", default="sample", help="folder with the data files, or 'sample' for the embedded sample")
    add("--weights", default="minilm", help="pretrained BERT: 'minilm', a local folder or a hub name")
    add("--steps", type=int, default=60, help="optimizer steps")
    add("--batch-size", type=int, help="examples per batch; 16, or 4 with --small")
    add("--rank", type=int, default=8, help="of the adapters; alpha is twice that")
    add("--threads", type=int, default=1, help="CPU threads of torch")
    add("--output", type=Path, default=RESULTS / "peers.json", help="result file; finished cells are kept")
    add("--fresh", action="store_true", help="measure finished cells again")
    options = command.parse_args(arguments)
    if LIBRARIES[PEER].version() is None:
        command.error(f"{PEER} is not installed: pip install 'peftlite[bench]'")
    if options.steps < 1:
        command.error(f"--steps {options.steps}: a curve needs one step at least")
    options.batch_size = options.batch_size or (4 if options.small else 16)
    torch.set_num_threads(options.threads)
    how = example(data=options.data, weights=options.weights, threads=options.threads)
    network, folder = build_network(how)
    data = load_data(how, "train", folder, None)[TASK]

    def run() -> bool:
        planned = [
            Cell(settings.key, asdict(settings), functools.partial(measure, settings, network, data))
            for settings in cells(options, len(data))
        ]
        facts, results = machine() | versions(), ResultFile(options.output, "peers")
        found = measure_cells(planned, results, facts, line, fresh=options.fresh)
        good = sum(map(met, found))
        print(f"{good} of {len(found)} cells agree")
        return good == len(found)

    return exit_status(run)


if __name__ == "__main__":
    sys.exit(main())

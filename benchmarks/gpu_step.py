"""A training step of minBERT with DoRA in all linears, captured into a CUDA graph and replayed."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import peftlite
from benchmarks.harness import Check, interleaved, ratios, spread
from examples.minbert_multitask.model import BertConfig, BertModel


class Step:
    """Forward in bf16 autocast, loss, backward, AdamW, on a fixed batch; called, it does this once."""

    def __init__(self, model: BertModel, batch: tuple[Tensor, Tensor]) -> None:
        self.model, self.batch, self.device = model.train(), batch, batch[0].device.type
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.loss = torch.zeros((), device=batch[0].device)
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-3, capturable=self.device == "cuda")

    def __call__(self) -> None:
        # Gradients stay allocated: a graph replays into the same memory.
        self.optimizer.zero_grad(set_to_none=False)
        # A cast that autocast keeps would be made outside of the graph, once.
        with torch.autocast(self.device, torch.bfloat16, cache_enabled=False):
            loss = self.model(*self.batch).float().square().mean()
        loss.backward()
        self.optimizer.step()
        self.loss.copy_(loss.detach())


def captured(step: Step, *, warmup: int = 3) -> Callable[[], None]:
    """A function that replays `step` from a CUDA graph, after `warmup` steps; without CUDA, `step` itself after as many."""
    if step.device != "cuda":
        for _ in range(warmup):
            step()
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warmup):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def graph_replay(
    device: torch.device,
    *,
    width: int,
    layers: int,
    batch: tuple[int, int],
    rounds: int,
    warmup: int,
    clock: Callable[..., float],
) -> tuple[list[Check], dict[str, Any]]:
    """Losses of replayed against eager steps, bit for bit, and the milliseconds of both.

    Args:
        device: where.
        width: hidden features.
        layers: transformer layers.
        batch: rows and tokens.
        rounds: timed rounds.
        warmup: steps before a graph is captured, and rounds before the timed ones.
        clock: milliseconds of a piece of work.
    """
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(heads for heads in range(1, 13) if width % heads == 0),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    base = BertModel(config)
    with torch.no_grad():
        for module in base.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.weight.normal_(1.0, 0.1)  # at one the loss would be constant: the features' mean square is one
    ids = torch.randint(1, config.vocab_size, batch).to(device)

    def step(method: str) -> Step:
        model = copy.deepcopy(base)
        peftlite.inject_adapters(model, "all-linear", 8, method=method, seed=0).to(device)
        return Step(model, (ids, torch.ones_like(ids)))

    eager, recorded = step("dora"), step("dora")
    followed = 2
    for _ in range(warmup):
        eager()
    replay = captured(recorded, warmup=warmup)
    differences, losses = 0, []
    for _ in range(followed):
        eager()
        replay()
        differences += int(not torch.equal(eager.loss, recorded.loss))
        losses.append(eager.loss.item())
    checks = [
        Check("minBERT: losses of replayed steps that differ from eager ones", differences, 0),
        Check("minBERT: the loss falls", losses[-1] - losses[0], 0.0),
    ]
    lora, lora_recorded = step("lora"), captured(step("lora"), warmup=warmup)
    candidates = {"dora eager": eager, "dora replayed": replay, "lora eager": lora, "lora replayed": lora_recorded}
    samples = interleaved({name: (lambda w=w: clock(w)) for name, w in candidates.items()}, rounds=rounds, warmup=warmup)
    return checks, {
        "ms": {name: spread(taken) for name, taken in samples.items()},
        "eager / replayed": ratios(samples["dora eager"], samples["dora replayed"]),
    }

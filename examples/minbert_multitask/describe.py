"""LoRA-Gen on minBERT: a task's description in, an adapter out (Xiao et al. 2025, arXiv:2506.11638).

    python -m examples.minbert_multitask.describe --output runs/described
    python -m examples.minbert_multitask.describe --output runs/described --description "Is this film worth seeing?"

One frozen BERT reads the description with a meta token per layer appended; their final states choose, layer by layer, a
mix of LoRA experts; the mix adapts the feed-forward blocks of another BERT, which then does the task. Tokens, router, experts
and the tasks' heads train together on all tasks. At the end every description has become an ordinary adapter file.
With so few tasks this shows how the parts fit together, not how well they do on tasks that nobody trained.
"""

import argparse
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.func import functional_call

import peftlite
from examples.minbert_multitask.data import Batch, TaskData, batches, collate
from examples.minbert_multitask.evaluate import load_data, scores, task_outputs
from examples.minbert_multitask.model import BertModel
from examples.minbert_multitask.network import MultitaskBert, build_network
from examples.minbert_multitask.settings import Settings
from examples.minbert_multitask.tasks import task_loss
from examples.minbert_multitask.tokenizer import load_tokenizer
from examples.minbert_multitask.weights import load_bert
from peftlite.training.lora_gen import LoRAGenerator, append_meta_tokens, load_balance_loss, write_adapter

# Several wordings of each task, so that the generator learns what they have in common.
DESCRIPTIONS = {
    "sst": (
        "Say how positive this sentence about a film is, from very negative to very positive.",
        "Grade the sentiment of a movie review on five levels.",
        "Does the writer like the film, and how much?",
    ),
    "quora": (
        "Decide whether two questions ask for the same thing.",
        "Are these two questions duplicates of each other?",
        "Would one answer serve both questions?",
    ),
    "sts": (
        "Rate from 0 to 5 how similar two sentences are in meaning.",
        "How much of the meaning do the two sentences share?",
        "Score the semantic similarity of a pair of sentences.",
    ),
}
FEED_FORWARD = ("encoder.layer.*.intermediate.dense", "encoder.layer.*.output.dense")


class Describer(nn.Module):
    """A description to the LoRA of every layer: frozen encoder, trained meta tokens, trained generator.

    Args:
        bert: the encoder that reads descriptions; frozen.
        tokenizer: its tokenizer.
        network: the adapted network whose LoRA is generated.
        experts: size of the pool.
    """

    def __init__(self, bert: BertModel, tokenizer: Tokenizer, network: nn.Module, *, experts: int = 4) -> None:
        super().__init__()
        self.bert, self.tokenizer = bert.requires_grad_(False).eval(), tokenizer
        hidden = bert.config.hidden_size
        self.generator = LoRAGenerator.for_model(network, hidden, experts=experts, hidden=32)
        self.meta = nn.Parameter(torch.randn(len(self.generator.layers), hidden))  # as large as normalised embeddings

    def train(self, mode: bool = True) -> "Describer":
        super().train(mode)
        self.bert.eval()  # its dropout would make another adapter of the same words
        return self

    def forward(self, description: str) -> tuple[dict[str, Tensor], Tensor]:
        """The LoRA tensors of the network by name, and the gates `(L, n)`."""
        ids = self.tokenizer.encode(description).ids
        special = [self.tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]")]
        inner = [token for token in ids if token not in special]  # with or without the tokenizer's own template
        prompt = torch.tensor([[special[0], *inner, special[1]]], device=self.meta.device)  # (1, T)
        embedded = self.bert.embeddings(prompt, None)  # (1, T, H)
        x, mask = append_meta_tokens(embedded, torch.ones_like(prompt), self.meta)
        hidden = self.bert.encoder(x, mask.bool()[:, None, None, :])  # (1, T + L, H)
        return self.generator(hidden[0, -len(self.meta) :])


def endless(data: TaskData, settings: Settings) -> Iterator[Batch]:
    """Batches of `data`, epoch after epoch."""
    for epoch in itertools.count():
        for index in batches(data, settings.batch_size, seed=settings.seed, epoch=epoch):
            yield collate(data, index, max_length=settings.max_length).to(settings.device)


def prepare(settings: Settings, experts: int) -> tuple[MultitaskBert, Describer, Path]:
    """The network with LoRA in its feed-forward blocks, its describer, and the folder of the tokenizer."""
    network, folder = build_network(settings)
    peftlite.inject_adapters(
        network, FEED_FORWARD, settings.rank, exclude="attention.output.dense", trainable="heads", seed=settings.seed
    )
    reader, _ = load_bert(settings.weights)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        describer = Describer(reader, load_tokenizer(folder), network, experts=experts)
    return network.to(settings.device), describer.to(settings.device), folder


def train(
    network: MultitaskBert, describer: Describer, data: dict[str, TaskData], settings: Settings, steps: int
) -> list[float]:
    """Train meta tokens, router, experts and heads, the tasks and their wordings in turn; the loss of each step."""
    heads = [p for name, p in network.named_parameters() if p.requires_grad and ".lora_" not in name]
    own = [p for p in describer.parameters() if p.requires_grad]
    groups = [{"params": own, "lr": settings.lr}, {"params": heads, "lr": settings.head_lr}]
    optimizer = torch.optim.AdamW(groups, weight_decay=settings.weight_decay)
    streams = {task: endless(task_data, settings) for task, task_data in data.items()}
    network.train()
    describer.train()
    losses = []
    for step in range(steps):
        task = list(streams)[step % len(streams)]
        wordings = DESCRIPTIONS[task]
        state, gates = describer(wordings[step // len(streams) % len(wordings)])
        batch = next(streams[task])
        loss = task_loss(task, functional_call(network, state, (task, batch)), batch.labels)
        (loss + load_balance_loss(gates)).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def write(network: MultitaskBert, describer: Describer, description: str, path: Path) -> None:
    """Generate the adapter of `description`, put it into the network, and save it with the heads as an adapter file."""
    describer.eval()
    write_adapter(network, describer(description)[0])
    peftlite.save_adapters(network, path)


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Train, write an adapter for each task's first description, and print its dev scores."""
    parser = argparse.ArgumentParser(description="Generate minBERT's adapters from descriptions of the tasks.")
    parser.add_argument("--output", required=True, help="folder for the adapter files")
    parser.add_argument("--data", default="sample", help="folder with the data files (default: the embedded sample)")
    parser.add_argument("--weights", default="minilm", help="pretrained weights (default: minilm)")
    parser.add_argument("--steps", type=int, default=150, help="training steps (default: 150)")
    parser.add_argument("--rank", type=int, default=8, help="rank of the adapters (default: 8)")
    parser.add_argument("--experts", type=int, default=4, help="experts in the pool (default: 4)")
    parser.add_argument("--description", help="one more description to write an adapter for, described.safetensors")
    given = parser.parse_args(arguments)
    settings = Settings(
        output=given.output, data=given.data, weights=given.weights, rank=given.rank, tasks=",".join(DESCRIPTIONS), device="cpu"
    ).resolved()
    network, describer, folder = prepare(settings, given.experts)
    data = {split: load_data(settings, split, folder, None) for split in ("train", "dev")}
    losses = train(network, describer, data["train"], settings, given.steps)
    print(f"{given.steps} steps; loss of the first and the last three: {losses[:3]} {losses[-3:]}")
    output = Path(given.output)
    outputs = {}
    for task, examples in data["dev"].items():
        write(network, describer, DESCRIPTIONS[task][0], output / f"{task}.safetensors")
        outputs[task] = task_outputs(network, examples, settings)
    if given.description:
        write(network, describer, given.description, output / "described.safetensors")
    found = scores(outputs, {task: examples.labels for task, examples in data["dev"].items()})
    for task, score in found.items():
        print(f"{task}: dev score {score:.3f} with the adapter of {DESCRIPTIONS[task][0]!r}")
    return found


if __name__ == "__main__":
    main()

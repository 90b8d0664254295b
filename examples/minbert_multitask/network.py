"""The network: one or two BERTs with a head per task, the adapters in it, and what of it trains."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import peftlite
from examples.minbert_multitask.controllers import injected_rank
from examples.minbert_multitask.data import Batch
from examples.minbert_multitask.heads import CosineHead, OrdinalHead, make_head, pair_features
from examples.minbert_multitask.model import BertModel
from examples.minbert_multitask.settings import Settings
from examples.minbert_multitask.tasks import TASKS
from examples.minbert_multitask.weights import load_bert
from peftlite.targets import Targets

# Slope and offset of the cosine at the start. A similarity is 0..5 where the cosine is 0..1; the logit of a duplicate
# is 0 at the cosine where sentence-tuned encoders part duplicates from the rest, and about +-3 at either end of the
# usual range.
COSINE_START = {"sts": (5.0, 0.0), "quora": (10.0, -7.5)}


class MultitaskBert(nn.Module):
    """Logits of any of its tasks, `forward(task, batch) -> (B, outputs)` in fp32.

    Args:
        bert: The pretrained backbone; with `settings.backbones == 2` one for the sentiment tasks, and a copy for the
        pairs. settings: Tasks, pooling, heads. The heads' first values depend on (seed, task) alone.
    """

    def __init__(self, bert: BertModel, settings: Settings) -> None:
        super().__init__()
        self.pooling, self.cross_encoder = settings.pooling, settings.cross_encoder
        names = settings.task_names()
        if settings.backbones == 2:
            self.backbones = nn.ModuleDict({"sentiment": bert, "pairs": copy.deepcopy(bert)})
            self.backbone_of = {task: "pairs" if TASKS[task].pair else "sentiment" for task in names}
        else:
            self.backbones = nn.ModuleDict({"shared": bert})
            self.backbone_of = dict.fromkeys(names, "shared")
        self.dropout = nn.Dropout(settings.head_dropout)
        self.heads = nn.ModuleDict()
        for task in names:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(zlib.crc32(f"{settings.seed}/{task}".encode()))
                self.heads[task] = self._make_head(task, bert.config.hidden_size, settings)
        if settings.backbone_dropout is not None:
            for module in self.backbones.modules():
                if isinstance(module, nn.Dropout):
                    module.p = settings.backbone_dropout
                elif hasattr(module, "dropout_prob"):
                    module.dropout_prob = settings.backbone_dropout

    def _make_head(self, task: str, hidden: int, settings: Settings) -> nn.Module:
        if task == "sst" and settings.sst_loss == "ordinal":
            return OrdinalHead(make_head(settings.head, hidden, 1), TASKS[task].outputs)
        if not TASKS[task].pair or self.cross_encoder:
            return make_head(settings.head, hidden, TASKS[task].outputs)
        return CosineHead(make_head(settings.head, 4 * hidden + 1, 1), *COSINE_START[task])

    def encode(self, task: str, batch: Batch) -> Tensor:
        """Sentence vectors, `(B, H)`, or `(2B, H)` for the pairs of a bi-encoder: first sentences, then second ones."""
        bert = self.backbones[self.backbone_of[task]]
        hidden = bert(batch.input_ids, batch.attention_mask, batch.token_type_ids)  # (R, T, H)
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        if self.pooling == "cls":
            return hidden[:, 0]
        mask = batch.attention_mask.unsqueeze(-1).to(hidden.dtype)  # (R, T, 1)
        return (hidden * mask).sum(dim=1) / mask.sum(dim=1)

    def forward(self, task: str, batch: Batch) -> Tensor:
        pooled = self.encode(task, batch)
        # Heads stay in fp32: they are small, and a correlation or a cosine rounded to 8 bits is worth little.
        with torch.autocast(pooled.device.type, enabled=False):
            if TASKS[task].pair and not self.cross_encoder:
                u, v = pooled.chunk(2)
                pooled = pair_features(u, v)
                # Dropout would tear the cosine away, on which the whole answer starts
                pooled = torch.cat([self.dropout(pooled[:, :-1]), pooled[:, -1:]], dim=-1)
            else:
                pooled = self.dropout(pooled)
            return self.heads[task](pooled)


def layer_count(network: MultitaskBert) -> int:
    """Number of transformer layers in each backbone."""
    return next(iter(network.backbones.values())).config.num_hidden_layers


def build_network(settings: Settings, bert: BertModel | None = None) -> tuple[MultitaskBert, Path]:
    """The network before any training, without adapters, and the folder with the tokenizer's files.

    Args:
        settings: Resolved settings.
        bert: A backbone that is loaded already; it is used itself, not copied.
    """
    loaded, folder = load_bert(settings.weights)
    return MultitaskBert(bert if bert is not None else loaded, settings), folder


def prepare_training(
    network: MultitaskBert,
    settings: Settings,
    *,
    targets: Targets | None = None,
    options: Mapping[str, Any] | None = None,
) -> None:
    """Inject the adapters and freeze what the method does not train. Heads always train.

    Args:
        network: From `build_network`.
        settings: Resolved settings.
        targets: What to adapt, in place of the targets that the settings name.
        options: Further options of the adapter method, such as `{"rslora": True}`.

    Raises:
        ValueError: If a target matches nothing, the rank does not fit, ... (from `peftlite.inject_adapters`).
    """
    if settings.has_adapters():
        peftlite.inject_adapters(
            network.backbones,
            settings.target_names() if targets is None else targets,
            injected_rank(settings),
            method=settings.layer_method(),
            alpha=settings.alpha,
            dropout=settings.dropout,
            # Held in the dtype that autocast would cast them to, or it would do so anew in every forward
            base_dtype=torch.bfloat16 if settings.base_dtype == "bf16" else None,
            fuse=settings.fused_names(),
            seed=settings.seed,
            **(options or {}),
        )
    elif settings.method == "linear-probe":
        network.backbones.requires_grad_(False)
    elif settings.method == "bitfit":
        peftlite.train_only(network.backbones, "bias")


def adapted_parameters(network: MultitaskBert) -> set[int]:
    """`id`s of all parameters of the adapted layers: their adapters, and the base weights and biases below them."""
    layers = peftlite.adapters(network.backbones).values()
    return {id(parameter) for layer in layers for parameter in layer.parameters()}


def parameter_counts(network: MultitaskBert, trained: list[nn.Parameter]) -> dict[str, float]:
    """Parameters of backbone and heads, how many of the backbone's `trained`, and their share of the backbone.

    Adapters do not count as part of the backbone that they are compared with.
    """
    ids = {id(parameter) for parameter in trained}
    backbone = list(network.backbones.parameters())
    adapter_ids = {
        id(p) for a in peftlite.adapters(network.backbones).values() for p in a.adapter_parameters().values()
    }
    base = sum(p.numel() for p in backbone if id(p) not in adapter_ids)
    count = sum(p.numel() for p in backbone if id(p) in ids)
    heads = sum(p.numel() for p in network.heads.parameters())
    return {"backbone": base, "trained_backbone": count, "trained_share": count / base, "heads": heads}

"""BERT, written to be read from top to bottom.

Follows Devlin et al. (2018), "BERT: Pre-training of Deep Bidirectional Transformers", arXiv:1810.04805. Modules are
named as in Hugging Face's `BertModel`, so that its checkpoints load key by key (see weights.py), and every linear is a
plain `nn.Linear` that is called as a module, so that `peftlite.inject_adapters` can take its place.

Sizes: B sequences in the batch, T tokens, H hidden, nh heads, hs = H / nh, I intermediate.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import peftlite

# The names that BERT checkpoints use in `hidden_act`; the tanh forms are one formula under three names.
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    **dict.fromkeys(("gelu", "gelu_python"), nn.GELU),
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), partial(nn.GELU, approximate="tanh")),
    **dict.fromkeys(("silu", "swish"), nn.SiLU),
    "relu": nn.ReLU,
}


@dataclass(frozen=True)
class BertConfig:
    """The sizes of a BERT, under the names of Hugging Face's `config.json`; the defaults are BERT-base's."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            heads = f"num_attention_heads {self.num_attention_heads}"
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of {heads}: heads share it equally")
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act {self.hidden_act!r} is not one of {', '.join(sorted(ACTIVATIONS))}")

    @classmethod
    def from_json(cls, path: str | Path) -> "BertConfig":
        """Read a Hugging Face `config.json`. Keys that do not change the computation of a BERT are ignored.

        Raises:
            FileNotFoundError, ValueError: no such file; not JSON, a size is missing, or not the model computed here.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no BERT configuration at {path}; a checkpoint folder holds a config.json")
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from error
        # Other families share BERT's keys but not its computation (RoBERTa, for one, shifts the positions).
        for key, expected in (("model_type", "bert"), ("position_embedding_type", "absolute"), ("is_decoder", False)):
            if found.get(key, expected) not in (expected, None):
                raise ValueError(f"{path} has {key} {found[key]!r}; this model computes {key} {expected!r} only")
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        if missing := [key for key in sizes if key not in found]:
            raise ValueError(f"{path} lacks {', '.join(missing)}; is it the config.json of a BERT checkpoint?")
        return cls(**{f.name: found[f.name] for f in fields(cls) if found.get(f.name) is not None})


class BertEmbeddings(nn.Module):
    """`LayerNorm(word[input_ids] + position[0..T-1] + type[token_type_ids])`."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        H = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, H, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, H)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, H)
        self.LayerNorm = nn.LayerNorm(H, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
        T = input_ids.shape[1]
        positions = self.position_embeddings.num_embeddings
        if positions < T:
            raise ValueError(f"a sequence of {T} tokens is longer than the model's {positions} positions; truncate it")
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        x = self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids)  # (B, T, H)
        return self.dropout(self.LayerNorm(x + self.position_embeddings.weight[:T]))  # (B, T, H)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dropout: float) -> Tensor:
    """`dropout(softmax(q kᵀ / √hs + mask)) v`, `(B, nh, T, hs)` each (Vaswani et al. 2017, arXiv:1706.03762, §3.2)."""
    if q.device.type == "cpu" and (q.dtype in (torch.bfloat16, torch.float16) or dropout) and torch.is_grad_enabled():
        return PlainAttention.apply(q, k, v, mask, dropout)  # type: ignore[no-any-return]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


class PlainAttention(torch.autograd.Function):
    """The same in single products: torch's CPU kernel is ten times as slow backward in bf16 and knows no dropout (torch 2.13).

    It saves q, k and v as they come, in the storage of the linears' outputs; autograd would save copies.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dropout: float) -> Tensor:
        bias = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, float("-inf"))  # (B, 1, 1, T)
        p = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).add_(bias).softmax(-1)  # (B, nh, T, T)
        kept = F.dropout(torch.ones_like(p), dropout) if dropout else None  # (B, nh, T, T), 0 or 1 / (1 - dropout)
        ctx.save_for_backward(q, k, v, p, kept)
        return (p if kept is None else p * kept) @ v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, p, kept = ctx.saved_tensors
        dp = dy @ v.transpose(-2, -1)  # (B, nh, T, T)
        dv = (p if kept is None else p * kept).transpose(-2, -1) @ dy  # (B, nh, T, hs)
        ds = torch.ops.aten._softmax_backward_data(dp if kept is None else dp * kept, p, -1, p.dtype)  # (B, nh, T, T)
        ds *= q.shape[-1] ** -0.5
        return ds @ k, ds.transpose(-2, -1) @ q, dv, None, None


class BertSelfAttention(nn.Module):
    """`softmax(q kᵀ / √hs + mask) v` in each head, from queries, keys and values that are linear in the input."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        H = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.query = nn.Linear(H, H)
        self.key = nn.Linear(H, H)
        self.value = nn.Linear(H, H)
        self.dropout_prob = config.attention_probs_dropout_prob

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        B, T, H = x.shape
        q = self.query(x).view(B, T, self.num_heads, -1).transpose(1, 2)  # (B, nh, T, hs)
        k = self.key(x).view(B, T, self.num_heads, -1).transpose(1, 2)  # (B, nh, T, hs)
        v = self.value(x).view(B, T, self.num_heads, -1).transpose(1, 2)  # (B, nh, T, hs)
        y = attention(q, k, v, mask, self.dropout_prob if self.training else 0.0)  # (B, nh, T, hs)
        return y.transpose(1, 2).reshape(B, T, H)


class BertResidual(nn.Module):
    """`LayerNorm(dropout(x Wᵀ + b) + residual)`: how both halves of a layer end."""

    def __init__(self, in_features: int, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(in_features, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        dropout = self.dropout.p if self.training else 0.0
        return self.LayerNorm(peftlite.residual_sum(self.dense, x, residual, dropout))  # (B, T, H)


class BertAttention(nn.Module):
    """`LayerNorm(Linear(attention(x)) + x)`."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.self = BertSelfAttention(config)
        self.output = BertResidual(config.hidden_size, config)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.output(self.self(x, mask), x)  # (B, T, H)


class BertIntermediate(nn.Module):
    """`act(x Wᵀ + b)`: the widening half of the feed-forward block."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACTIVATIONS[config.hidden_act]()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.dense(x))  # (B, T, I)


class BertLayer(nn.Module):
    """One transformer layer, normalised after each residual sum: attention, then the feed-forward block."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attention = BertAttention(config)
        self.intermediate = BertIntermediate(config)
        self.output = BertResidual(config.intermediate_size, config)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.attention(x, mask)  # (B, T, H)
        return self.output(self.intermediate(x), x)  # (B, T, H)


class BertEncoder(nn.Module):
    """The layers, one after the other."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layer:
            x = layer(x, mask)  # (B, T, H)
        return x


class BertPooler(nn.Module):
    """`tanh(W h_cls + b)`: BERT's own summary of a sequence, trained on next-sentence prediction."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.tanh(self.dense(hidden[:, 0]))  # (B, H)


class BertModel(nn.Module):
    """Token ids to contextual features `(B, T, H)`.

    Args:
        config: the sizes.
        pooler: also hold BERT's pooler, which `pooled` applies. Off by default: the default weights never trained it.
    """

    def __init__(self, config: BertConfig, *, pooler: bool = False) -> None:
        super().__init__()
        self.config = config
        self.embeddings = BertEmbeddings(config)
        self.encoder = BertEncoder(config)
        self.pooler = BertPooler(config) if pooler else None
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=config.initializer_range)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        with torch.no_grad():
            self.embeddings.word_embeddings.weight[config.pad_token_id] = 0.0

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """Contextual features `(B, T, H)`; features at padded positions mean nothing.

        Args:
            input_ids: token ids `(B, T)`, with [CLS] first and [SEP] last.
            attention_mask: `(B, T)`, true or 1 where there is a token, false or 0 where there is padding.
            token_type_ids: `(B, T)`, 0 in the first sentence and 1 in the second. Default: all 0.
        """
        # Boolean, so that attention keeps the dtype of the queries (bf16 under autocast); every query sees this row.
        mask = attention_mask.bool()[:, None, None, :]  # (B, 1, 1, T)
        return self.encoder(self.embeddings(input_ids, token_type_ids), mask)  # (B, T, H)

    def pooled(self, hidden: Tensor) -> Tensor:
        """`tanh(W hidden[:, 0] + b)`, `(B, T, H)` -> `(B, H)`.

        Raises:
            RuntimeError: the model was built without its pooler.
        """
        if self.pooler is None:
            raise RuntimeError("this BertModel has no pooler; build or load it with pooler=True, or pool by the mean")
        return self.pooler(hidden)

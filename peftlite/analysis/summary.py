"""What was adapted, how, and how many parameters train."""

import html
from dataclasses import dataclass

from torch import nn

from peftlite.inject import adapters
from peftlite.quantization.linear import packed_weights

COLUMNS = ("layer", "method", "shape", "rank", "scale", "dtype", "trained")


@dataclass(frozen=True)
class Summary:
    """A table of the adapted layers and of what else trains: text by ``str()``, HTML in a notebook.

    Attributes:
        rows: one tuple per layer, in the order of `COLUMNS`; what several layers share counts in the first of them.
        trained: number of parameters that train, shared ones counted once.
        total: number of parameters in all, likewise; a quantised weight counts as the matrix that it stands for.
    """

    rows: tuple[tuple[str, ...], ...]
    trained: int
    total: int

    @property
    def share(self) -> float:
        """Trained parameters over all parameters."""
        return self.trained / self.total if self.total else 0.0

    def _footer(self) -> str:
        return f"{self.trained:,} of {self.total:,} parameters train ({self.share:.3%})"

    def __str__(self) -> str:
        widths = [max(len(row[i]) for row in (COLUMNS, *self.rows)) for i in range(len(COLUMNS))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in self.rows]
        header = "  ".join(cell.ljust(width) for cell, width in zip(COLUMNS, widths, strict=True)).rstrip()
        return "\n".join([header, "-" * (sum(widths) + 2 * (len(widths) - 1)), *lines, self._footer()])

    def _repr_html_(self) -> str:
        def line(cells: tuple[str, ...], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        body = "".join(line(row, "td") for row in self.rows)
        return f"<table><thead>{line(COLUMNS, 'th')}</thead><tbody>{body}</tbody></table><p>{self._footer()}</p>"


def summary(model: nn.Module) -> Summary:
    """Tabulate the adapted layers of `model` and whatever else of it trains.

    Example:
        >>> from peftlite import inject_adapters
        >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 2))
        >>> print(summary(inject_adapters(model, "0", rank=4, alpha=8, trainable="2")))
        layer     method  shape     rank  scale  dtype    trained
        ---------------------------------------------------------
        0         lora    16 -> 32  4     2      float32  192
        2.weight  -       32 -> 2   -     -      float32  64
        2.bias    -       2         -     -      float32  2
        258 of 802 parameters train (32.170%)
    """
    rows: list[tuple[str, ...]] = []
    counted: set[int] = set()
    for name, layer in adapters(model).items():
        own = layer.adapter_parameters().values()
        dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in own})
        trained = sum(p.numel() for p in own if p.requires_grad and id(p) not in counted)
        counted.update(id(p) for p in own)
        shape = f"{layer.in_features} -> {layer.out_features}"
        rows.append((name, layer.method, shape, str(layer.rank), f"{layer.scale:.4g}", "/".join(dtypes), f"{trained:,}"))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in counted:
            shape = " -> ".join(str(size) for size in reversed(parameter.shape))
            dtype = str(parameter.dtype).removeprefix("torch.")
            rows.append((name, "-", shape, "-", "-", dtype, f"{parameter.numel():,}"))
    parameters = list(model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    packed = list(packed_weights(model))  # counts the numbers that they stand for, and not the bytes that hold them
    total = sum(p.numel() for p in parameters) + sum(w.numel() - sum(p.numel() for p in w.parameters()) for w in packed)
    return Summary(tuple(rows), trained, total)

"""The report of a run, one HTML file that needs nothing else: `python -m examples.minbert_multitask.report RUN`."""

from __future__ import annotations

import argparse
import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from examples.minbert_multitask.plots import figures
from examples.minbert_multitask.run_folder import OUTPUTS, REPORT, RESULT, RunFolder, read_tensors, write_text
from examples.minbert_multitask.settings import PLAIN_METHODS
from examples.minbert_multitask.tasks import TASKS

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; color: #2b2f36; background: #f6f7f9;
  margin: 0; }
main { max-width: 1080px; margin: 0 auto; padding: 32px 20px 60px; }
h1 { font-size: 24px; margin: 0 0 4px; } h2 { font-size: 17px; margin: 34px 0 10px; }
.lead { color: #66707d; margin: 0 0 22px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; }
.card, .figure, .table { background: white; border: 1px solid #e3e6ea; border-radius: 8px; }
.card { padding: 12px 16px; } .card b { display: block; font-size: 24px; font-variant-numeric: tabular-nums; }
.card span { color: #66707d; font-size: 13px; }
.figures { display: grid; grid-template-columns: repeat(2, 1fr); gap: 14px; }
.figure { padding: 10px; margin: 0; text-align: center; } .figure.wide { grid-column: 1 / -1; }
.figure img { max-width: 100%; height: auto; }
.table { padding: 4px 16px; overflow-x: auto; } table { border-collapse: collapse; width: 100%; }
td { padding: 5px 12px 5px 0; border-top: 1px solid #eef0f2; vertical-align: top; } tr:first-child td { border-top: 0; }
td:first-child { color: #66707d; white-space: nowrap; width: 34%; }
td:last-child { font-variant-numeric: tabular-nums; }
.columns { display: grid; grid-template-columns: 1fr 1fr; gap: 14px; align-items: start; }
@media (max-width: 760px) { .columns, .figures { grid-template-columns: 1fr; } }
"""


def png(figure: Figure) -> bytes:
    """The figure as PNG, 130 dots per inch."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def _table(rows: Mapping[str, Any]) -> str:
    cells = "".join(f"<tr><td>{html.escape(str(k))}</td><td>{html.escape(str(v))}</td></tr>" for k, v in rows.items())
    return f'<div class="table"><table>{cells}</table></div>'


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 90 else f"{int(seconds // 60)} min {seconds % 60:02.0f} s"


def _cost(result: dict[str, Any]) -> dict[str, str]:
    """Rows of the table of parameters, time and memory."""
    count = result["parameters"]
    rows = {
        "backbone": f"{count['backbone']:,} parameters",
        "trained in it": f"{count['trained_backbone']:,} ({count['trained_share']:.2%} of the backbone)",
        "heads": f"{count['heads']:,} parameters, all trained",
        "steps": f"{result['steps']:,}, best at {result['best_step']:,}",
        "training": f"{_duration(result['train_seconds'])} without evaluation",
    }
    for task, seconds in result["train_seconds_per_task"].items():
        rows[f"  of it {TASKS[task].title}"] = _duration(seconds)
    if "peak_rss_mb" in result["memory"]:
        rows["peak memory"] = f"{result['memory']['peak_rss_mb']:,.0f} MiB resident"
    if "peak_cuda_mb" in result["memory"]:
        rows["peak GPU memory"] = f"{result['memory']['peak_cuda_mb']:,.0f} MiB"
    return rows


def render(name: str, result: dict[str, Any], pictures: Mapping[str, bytes]) -> str:
    """The page, from a run's name, its result and its figures as PNG."""
    settings, machine = result["settings"], result["environment"]
    cards = [f"<b>{result['leaderboard']:.4f}</b><span>leaderboard score</span>"]
    for task, value in result["scores"].items():
        metric = "Pearson r" if TASKS[task].metric == "pearson" else "accuracy"
        cards.append(f"<b>{value:.4f}</b><span>{TASKS[task].title} {metric}</span>")
    cards.append(f"<b>{result['parameters']['trained_share']:.2%}</b><span>of the backbone trained</span>")
    images = "".join(
        f'<figure class="figure{" wide" if i == 0 else ""}"><img alt="{html.escape(caption)}" '
        f'src="data:image/png;base64,{base64.b64encode(data).decode()}"></figure>'
        for i, (caption, data) in enumerate(pictures.items())
    )
    adapters = (
        f", rank {settings['rank']}, {settings['targets']}"
        if settings["method"] not in PLAIN_METHODS
        else ""
    )
    title = html.escape(name)
    lead = html.escape(
        f"{settings['method']}{adapters}, weights {settings['weights']}, on {', '.join(result['scores'])}"
    )
    boxes = "".join(f'<div class="card">{card}</div>' for card in cards)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{STYLE}</style></head><body><main>
<h1>{title}</h1><p class="lead">{lead}. All scores are on the dev examples.</p>
<div class="cards">{boxes}</div>
<h2>Learning</h2><div class="figures">{images}</div>
<div class="columns"><div><h2>Parameters, time, memory</h2>{_table(_cost(result))}
<h2>Machine</h2>{_table({k: v for k, v in machine.items() if v is not None})}</div>
<div><h2>Settings</h2>{_table({k.replace("_", "-"): v for k, v in settings.items() if v not in (None, "")})}</div>
</div>
</main></body></html>
"""


def write_report(folder: RunFolder, result: dict[str, Any]) -> Path:
    """Write `report.html` from the run's metrics, its dev outputs and `result`; return its path."""
    tensors, _ = read_tensors(folder / OUTPUTS)
    tasks = list(result["scores"])
    outputs = {task: tensors[f"logits.{task}"] for task in tasks}
    drawn = figures(folder.read_metrics(), outputs, {task: tensors[f"labels.{task}"] for task in tasks})
    name = folder.path.resolve().name
    write_text(folder / REPORT, render(name, result, {caption: png(figure) for caption, figure in drawn.items()}))
    return folder / REPORT


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the report of a finished run again."""
    parser = argparse.ArgumentParser(description="Write the report of a finished run again.")
    parser.add_argument("run", help="folder of the run")
    options = parser.parse_args(arguments)
    folder = RunFolder(options.run)
    try:
        print(write_report(folder, folder.read_json(RESULT)))
    except OSError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()

"""An HTML page that needs nothing else: its style, tables, figures and sections."""

import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from matplotlib.figure import Figure

from benchmarks.plots.style import COLOURS, svg

NUMBER = re.compile(r"[-+−]?[\d.,]+( ?(%|×|MiB|KiB|ms|s))?( [(±].*)?")


def _variables(dark: bool) -> str:
    return " ".join(f"--{name}: {pair[dark]};" for name, pair in COLOURS.items())


STYLE = f"""
:root {{ color-scheme: light dark; {_variables(False)} --back: #f3f4f6; --mark: #fdf0e6; }}
@media (prefers-color-scheme: dark) {{ :root {{ {_variables(True)} --back: #121519; --mark: #3a2a1d; }} }}
* {{ box-sizing: border-box; }}
body {{ font: 16px/1.55 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; color: var(--ink); margin: 0;
  background: var(--back); }}
main {{ max-width: 1060px; margin: 0 auto; padding: 36px 20px 64px; }}
h1 {{ font-size: 30px; line-height: 1.2; margin: 0 0 8px; }}
h2 {{ font-size: 22px; margin: 0 0 6px; line-height: 1.3; }}
.lead, .place, figcaption, .caveat, .note {{ color: var(--muted); }}
.lead {{ font-size: 17px; margin: 0 0 22px; max-width: 76ch; }}
section, nav {{ background: var(--page); border: 1px solid var(--grid); border-radius: 10px; padding: 22px 26px;
  margin: 18px 0; }}
.claim {{ max-width: 80ch; margin: 4px 0 12px; }}
.found {{ font-size: 18px; font-weight: 600; margin: 0 0 14px; max-width: 76ch; }}
.missing {{ border-left: 4px solid var(--faint); padding: 2px 0 2px 14px; color: var(--muted); }}
figure {{ margin: 18px 0; overflow-x: auto; }} figcaption {{ font-size: 14px; max-width: 84ch; }}
svg {{ display: block; max-width: 100%; height: auto; min-width: 560px; }}
svg text {{ font-family: inherit !important; }}
.table {{ overflow-x: auto; margin: 12px 0; }}
table {{ border-collapse: collapse; font-size: 13.5px; line-height: 1.4; min-width: 100%; }}
th {{ text-align: left; font-weight: 600; color: var(--muted); vertical-align: bottom; }}
th, td {{ padding: 5px 14px 5px 0; border-bottom: 1px solid var(--grid); }}
td {{ vertical-align: top; font-variant-numeric: tabular-nums; }}
td.number {{ white-space: nowrap; }}
tr.marked td {{ background: var(--mark); }}
tr.marked td:first-child {{ box-shadow: inset 3px 0 var(--orange); padding-left: 9px; }}
code {{ font: 0.88em/1.4 ui-monospace, "SF Mono", "DejaVu Sans Mono", monospace; background: var(--back); padding: 1px 5px;
  border-radius: 4px; overflow-wrap: anywhere; }}
details {{ margin: 12px 0; }} summary {{ cursor: pointer; color: var(--blue); }}
.note, .place, .caveat {{ font-size: 14px; max-width: 92ch; }}
.caveat {{ border-left: 4px solid var(--amber); padding-left: 14px; margin: 16px 0 10px; }}
.place {{ margin: 12px 0 0; }}
a {{ color: var(--blue); }} nav td:first-child {{ white-space: nowrap; }}
@media (max-width: 640px) {{ section, nav {{ padding: 16px 14px; }} h1 {{ font-size: 24px; }} }}
"""


def inline(text: str) -> str:
    """Text as HTML, with ``**strong**`` words and literals between backquotes."""
    text = html.escape(text, quote=False)
    text = re.sub(r"(`{1,2})(.+?)\1", r"<code>\2</code>", text)
    return re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in one line of HTML; a row that says no, or that a peer is ahead, is marked."""
    head = "".join(f"<th>{inline(cell)}</th>" for cell in header)
    lines = []
    for row in rows:
        marked = any(cell == "no" or cell.startswith("**no**") or "is ahead" in cell for cell in row)
        cells = (f"<td{' class=number' if NUMBER.fullmatch(cell) else ''}>{inline(cell)}</td>" for cell in row)
        lines.append(f"<tr{' class=marked' if marked else ''}>{''.join(cells)}</tr>")
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def blocks(text: str) -> str:
    """What the functions of tables return, notes, lists and tables of `table` with empty lines between them, as HTML."""
    return "\n".join(map(_block, filter(None, (part.strip() for part in text.split("\n\n")))))


def _block(part: str) -> str:
    if part.startswith("<"):
        return part
    if part.startswith("* "):
        items = "".join(f"<li>{inline(line.removeprefix('* '))}</li>" for line in part.split("\n"))
        return f'<ul class="note">{items}</ul>'
    return f'<p class="note">{inline(part)}</p>'


def picture(figure: Figure, name: str, caption: str) -> str:
    """A figure with what one should see in it.

    Args:
        figure: to draw.
        name: unlike that of any other picture of the page.
        caption: plain text.
    """
    drawn = svg(figure, name).replace("<svg ", f'<svg role="img" aria-label="{html.escape(caption)}" ', 1)
    return f"<figure>{drawn}<figcaption>{inline(caption)}</figcaption></figure>"


def folded(title: str, content: str) -> str:
    """Content that opens on a click."""
    return f"<details><summary>{inline(title)}</summary>\n{content}\n</details>"


@dataclass(frozen=True)
class Section:
    """One claim of the page with what came of it.

    Attributes:
        name: anchor.
        title: heading.
        claim: what is claimed or asked.
        command: what measures it.
        found: the outcome in a sentence; empty where nothing is measured.
        parts: HTML of figures and tables.
        caveat: what the figures do not say.
        place: machines, versions and commits.
    """

    name: str
    title: str
    claim: str
    command: str
    found: str = ""
    parts: Sequence[str] = field(default_factory=list)
    caveat: str = ""
    place: str = ""

    def html(self) -> str:
        """The section; where nothing is measured it says which command would."""
        lines = [f'<section id="{self.name}"><h2>{inline(self.title)}</h2>', f'<p class="claim">{inline(self.claim)}</p>']
        if self.found:
            lines += [f'<p class="found">{inline(self.found)}</p>', *self.parts]
            lines += [f'<p class="caveat">{inline(self.caveat)}</p>'] if self.caveat else []
            lines.append(f'<p class="place">{inline(self.place)}. Made by <code>{html.escape(self.command)}</code>.</p>')
        else:
            lines.append(f'<p class="missing">Not measured here yet: <code>{html.escape(self.command)}</code> does.</p>')
        return "\n".join([*lines, "</section>"])


def render(title: str, lead: str, sections: Iterable[Section], sources: str) -> str:
    """The whole page.

    Args:
        title: of the page.
        lead: a paragraph below it.
        sections: in their order; the table at the top is made of them.
        sources: the last line: what the page was made from.
    """
    listed = list(sections)
    rows = "".join(
        f'<tr><td><a href="#{s.name}">{inline(s.title)}</a></td><td>{inline(s.found) or "not measured here yet"}</td></tr>'
        for s in listed
    )
    body = "\n".join(section.html() for section in listed)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{STYLE}</style></head><body><main>
<h1>{html.escape(title)}</h1>
<p class="lead">{inline(lead)}</p>
<nav><h2>In short</h2><div class="table"><table><tbody>{rows}</tbody></table></div></nav>
{body}
<p class="note">{inline(sources)}</p>
</main></body></html>
"""

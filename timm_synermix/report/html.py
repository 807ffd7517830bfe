"""The HTML of a report: its page, tables, numbers and pictures."""

from __future__ import annotations

import base64
import io
import math
import os
import re
from collections.abc import Iterable, Mapping
from html import escape

from matplotlib.figure import Figure

from timm_synermix.report.plots import unknown_glyphs

# The Content-Security-Policy lets the page load nothing and run nothing, whatever a class is called.
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
:root {{ --ground: #fff; --text: #1c2024; --soft: #5b6470; --line: #d8dde3; --card: #fff; --best: #dcf3e2;
  --link: #0b5cad; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ground: #14171a; --text: #e4e7ea; --soft: #9aa4af; --line: #343a41; --card: #1a1d20; --best: #1d4a2c;
    --link: #7ab8f5; }}
  img.chart {{ filter: invert(0.9) hue-rotate(180deg); }}
}}
* {{ box-sizing: border-box; }}
body {{ max-width: 70rem; margin: 0 auto; padding: 1rem; background: var(--ground); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }}
h1 {{ margin: 0.5rem 0; line-height: 1.2; }}
h2 {{ margin: 2.5rem 0 0.5rem; padding-bottom: 0.2rem; border-bottom: 1px solid var(--line); }}
h3 {{ margin: 1.2rem 0 0.4rem; font-size: 1rem; }}
p, figcaption {{ max-width: 46rem; color: var(--soft); margin: 0.4rem 0; }}
a, summary {{ color: var(--link); }}
nav {{ display: flex; flex-wrap: wrap; gap: 0.2rem 1rem; }}
.scroll {{ overflow: auto; }}
details .scroll {{ max-height: 30rem; }}
.grid {{ display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); }}
.wide {{ grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)); }}
figure {{ margin: 0 0 1rem; min-width: 0; }}
img {{ display: block; width: 100%; height: auto; }}
img.chart {{ border: 1px solid #d8dde3; border-radius: 0.4rem; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; overflow-wrap: normal; }}
th, td {{ padding: 0.25rem 0.8rem; border-bottom: 1px solid var(--line); text-align: right; max-width: 18rem; }}
th {{ font-weight: 600; }}
th:first-child {{ position: sticky; left: 0; background: var(--ground); text-align: left; padding-left: 0; }}
.text th {{ text-align: left; }}
.text td {{ text-align: left; overflow-wrap: anywhere; min-width: 5rem; }}
.best {{ background: var(--best); font-weight: 700; }}
@media (max-width: 600px) {{
  th, td {{ padding: 0.25rem 0.4rem; }}
  th:first-child {{ max-width: 8.5rem; }}
}}
summary {{ cursor: pointer; padding: 0.4rem 0; }}
</style>
</head>
<body>
<header>
<h1>{title}</h1>
<nav aria-label="Sections">{links}</nav>
</header>
<main>
{sections}
</main>
</body>
</html>
"""


def render(title: str, sections: Mapping[str, str]) -> str:
    """The page of these sections, HTML by heading; those that are empty are left out."""
    ids = {name: name.lower().replace(' ', '-') for name, content in sections.items() if content}
    return _PAGE.format(
        title=escape(title),
        links='\n'.join(f'<a href="#{ids[name]}">{name}</a>' for name in ids),
        sections='\n'.join(
            f'<section id="{ids[name]}">\n<h2>{name}</h2>\n{sections[name]}\n</section>' for name in ids
        ),
    )


class Pictures:
    """Writes figures as PNG files into a folder, and gives the HTML that holds them."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def add(self, figure: Figure, name: str, alt: str, *, kind: str = 'chart', min_width: float = 0) -> str:
        """A `<figure>` of the picture; narrower than min_width (in rem) it scrolls in its own box.

        A chart turns dark on dark pages, another kind of picture is left as it is.
        """
        buffer = io.BytesIO()
        with unknown_glyphs():
            figure.savefig(buffer, format='png', dpi=130, metadata={'Software': None})
        with open(os.path.join(self.folder, re.sub(r'[^\w-]+', '_', name) + '.png'), 'wb') as file:
            file.write(buffer.getvalue())
        data = base64.b64encode(buffer.getvalue()).decode()
        widest = 7 * figure.get_figwidth()  # no larger than its text reads well
        style = f' style="min-width: {min(min_width, widest):g}rem; max-width: {widest:g}rem"'
        image = f'<img class="{kind}" alt="{escape(alt)}"{style} src="data:image/png;base64,{data}">'
        return f'<figure>{scroll(image, alt) if min_width else image}</figure>'


def scroll(content: str, label: str) -> str:
    """A box that scrolls by itself, with the keyboard too."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">{content}</div>'


def html_table(header: Iterable[str], rows: Iterable[Iterable[str]], label: str, kind: str = '') -> str:
    """A table in a box that scrolls. Cells are HTML; those of the body may start with a `<td>` of their own."""
    head = ''.join(f'<th scope="col">{cell}</th>' for cell in header)
    lines = []
    for first, *cells in rows:
        line = ''.join(cell if cell.startswith('<td') else f'<td>{cell}</td>' for cell in cells)
        lines.append(f'<tr><th scope="row">{first}</th>{line}</tr>')
    body = '\n'.join(lines)
    return scroll(f'<table class="{kind}">\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>', label)


def format_number(value: float | None) -> str:
    """A number to read: four digits, no more than it takes; a dash for none."""
    if value is None or math.isnan(value):
        return '–'
    if math.isinf(value):
        return '∞' if value > 0 else '−∞'
    if value and not 1e-4 <= abs(value) < 1e6:
        text = f'{value:.2e}'
    else:
        text = f'{value:,.0f}' if value == 0 or abs(value) >= 999.95 else f'{value:#.4g}'
    return text.replace('-', '−')


def html_grid(items: Iterable[str], kind: str = '') -> str:
    content = '\n'.join(items)
    return f'<div class="grid {kind}">\n{content}\n</div>'

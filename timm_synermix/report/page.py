"""The page of a report: what its template is given, its numbers and its pictures."""

from __future__ import annotations

import base64
import io
import math
import os
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from timm_synermix.report.plots import unknown_glyphs


def render(**content: Any) -> str:
    """The page of a content, by the names that templates/report.html has for it; text is escaped there."""
    environment = Environment(
        loader=PackageLoader('timm_synermix.report'),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template('report.html').render(content)


class Cell(NamedTuple):
    """A cell of a table."""

    text: str
    best: bool = False


class Table(NamedTuple):
    """A table.

    Attributes:
        label: What it is, for those who do not see it.
        header: Headings of the columns.
        rows: The first cell of each is its heading.
        is_text: The cells are words, not numbers.
    """

    label: str
    header: list[str]
    rows: list[list[Cell]]
    is_text: bool = False


def cells(texts: Iterable[str]) -> list[Cell]:
    return [Cell(text) for text in texts]


class Picture(NamedTuple):
    """A picture on the page.

    Attributes:
        alt: What it shows, in words.
        data: The PNG file in base64.
        min_width, max_width: In rem; narrower than min_width it scrolls in its own box.
        is_chart: It turns dark on dark pages; another kind of picture is left as it is.
    """

    alt: str
    data: str
    min_width: float
    max_width: float
    is_chart: bool


class Pictures:
    """Makes figures into pictures of the page, and writes each as a PNG file into a folder."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def add(self, figure: Figure, name: str, alt: str, *, is_chart: bool = True, min_width: float = 0) -> Picture:
        buffer = io.BytesIO()
        with unknown_glyphs():
            figure.savefig(buffer, format='png', dpi=130, metadata={'Software': None})
        with open(os.path.join(self.folder, re.sub(r'[^\w-]+', '_', name) + '.png'), 'wb') as file:
            file.write(buffer.getvalue())
        widest = 8.5 * figure.get_figwidth()  # no larger than its text reads well
        data = base64.b64encode(buffer.getvalue()).decode()
        return Picture(alt, data, min(min_width, widest), widest, is_chart)


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

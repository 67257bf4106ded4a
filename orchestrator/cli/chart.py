"""A bar chart of text: a value for each span of time, against a line."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text

_EIGHTHS = ("", "▁", "▂", "▃", "▄", "▅", "▆", "▇", "█")
_LABEL_CHARS = 9


def columns_for(width: int) -> int:
    """How many bars fit into a line of `width` characters."""
    return max(10, width - _LABEL_CHARS - 2)


def bars(values: Sequence[float], line: float | None, height: int) -> list[Text]:
    """Lines of text, top first: a bar for each value, red above `line`, which is drawn where no bar is."""
    from rich.text import Text

    top = max(max(values, default=0), line or 0) or 1
    drawn = []
    for row in reversed(range(height)):
        floor, ceiling = row * top / height, (row + 1) * top / height
        has_line = line is not None and floor <= line and (line < ceiling or row == height - 1)
        label = _short(top) if row == height - 1 else _short(line) if has_line and line is not None else ""
        text = Text(f"{label:>{_LABEL_CHARS}} ", style="yellow" if has_line else "dim")
        style = "red" if line is not None and floor >= line else "cyan"
        for is_bar, cells in groupby((_cell(value, floor, top / height) for value in values), key=bool):
            drawn_cells = "".join(cell or ("┄" if has_line else " ") for cell in cells)
            text.append(drawn_cells, style=style if is_bar else "yellow")
        drawn.append(text)
    return drawn


def _cell(value: float, floor: float, size: float) -> str:
    """The part of a bar in a row; in the lowest row, every value above zero is visible."""
    eighths = round(8 * min(1.0, max(0.0, (value - floor) / size)))
    return _EIGHTHS[max(eighths, int(floor == 0 and value > 0))]


def axis(first: datetime, each: timedelta, count: int) -> Text:
    """The times below the bars, as many as fit."""
    from rich.text import Text

    form = "%H:%M" if each * count <= timedelta(hours=36) else "%d. %H:%M"
    if each < timedelta(minutes=1):
        form = "%H:%M:%S"
    size = len(first.strftime(form))
    marks = " " * (_LABEL_CHARS + 1)
    for column in range(0, count, max(size + 3, 10)):
        if column + size <= max(count, size):
            marks = marks.ljust(_LABEL_CHARS + 1 + column) + (first + column * each).strftime(form)
    return Text(marks, style="dim")


def _short(value: float) -> str:
    """``0.125``, ``9,999``, ``12.3k``, ``1.5M``: at most six characters."""
    if value < 10_000:
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    size, unit = next((size, unit) for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if value >= 0.9995 * size)
    return f"{value / size:.3g}{unit}"

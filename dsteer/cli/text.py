"""How texts of models and tables are shown in a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

_CONTROLS = {
    code: 0x2400 + code if code < 0x20 else 0xFFFD
    for code in (*range(0x20), *range(0x7F, 0xA0))
    if chr(code) not in "\n\t"
}


def printable(text: str) -> str:
    """A model's text, without what a terminal would obey: control characters get a picture.

    What goes to a file or a pipe stays as it is.
    """
    return text.translate(_CONTROLS) if sys.stdout.isatty() else text


def columns(plain: str, steered: str) -> Table:
    """Two texts side by side."""
    side = Table(box=SIMPLE_HEAD, expand=True, pad_edge=False)
    for name in ("plain", "steered"):
        side.add_column(name, ratio=1, overflow="fold")
    side.add_row(Text(plain), Text(steered))
    return side


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = False) -> Table:
    """A table whose first column names its rows; cells wrap where a terminal is narrow.

    Args:
        head: names of the columns.
        rows: cells.
        numbers: the other columns hold numbers, which stand on the right and never wrap.
    """
    made = Table(box=SIMPLE_HEAD, pad_edge=False)
    for number, name in enumerate(head):
        right = numbers and number > 0
        made.add_column(
            Text(printable(name)),
            justify="right" if right else "left",
            no_wrap=right,
            overflow="fold",
        )
    for row in rows:
        made.add_row(*(Text(printable(cell)) for cell in row))
    return made


def number_tables(
    console: Console, head: Sequence[str], rows: Sequence[Sequence[str]]
) -> Iterator[Table]:
    """A table of numbers, or several below each other where it is wider than the terminal.

    A number that is cut off reads as another one, so columns go whole to the next table.
    """
    first = 1
    while first < len(head):
        for stop in range(len(head), first, -1):
            chosen = [0, *range(first, stop)]
            made = table(
                [head[i] for i in chosen], [[row[i] for i in chosen] for row in rows], numbers=True
            )
            if (
                console.measure(made, options=console.options.update(max_width=10**4)).maximum
                <= console.width
            ):
                break
        yield made
        first = stop

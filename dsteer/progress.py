"""Progress of long work: bars in a terminal, plain lines elsewhere, nothing when quiet."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, TextIO

Advance = Callable[[int], None]
Mode = Literal["auto", "lines", "bars", "quiet"]


class Reporter:
    """Tells a person how far the work is.

    Args:
        mode: ``bars`` (rich), ``lines`` (one line every few seconds), ``quiet``, or ``auto``:
            bars in a terminal, lines elsewhere.
        stream: where to write; default: standard error.
        every: seconds between two lines of one task in ``lines`` mode.
    """

    def __init__(
        self, mode: Mode = "auto", *, stream: TextIO | None = None, every: float = 10.0
    ) -> None:
        self._stream = stream if stream is not None else sys.stderr
        if mode == "auto":
            mode = "bars" if self._stream.isatty() else "lines"
        self.mode: Mode = mode
        self._every = every

    def line(self, text: str) -> None:
        """Print one line, unless quiet."""
        if self.mode != "quiet":
            print(text, file=self._stream, flush=True)

    @contextmanager
    def bar(self, label: str, total: int, *, unit: str, done: int = 0) -> Iterator[Advance]:
        """Show progress of ``total`` units, ``done`` of which an earlier run had finished.

        Yields a function that is called with the number of units just finished.
        """
        if self.mode == "quiet" or total <= 0:
            yield lambda _n: None
        elif self.mode == "bars":
            with self._rich(label, total, unit, done) as advance:
                yield advance
        else:
            yield self._lines(label, total, unit, done)

    @contextmanager
    def _rich(self, label: str, total: int, unit: str, done: int) -> Iterator[Advance]:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            ProgressColumn,
            Task,
            TextColumn,
            TimeRemainingColumn,
        )
        from rich.text import Text

        class Rate(ProgressColumn):
            def render(self, task: Task) -> Text:
                return Text(f"{task.speed:.1f} {unit}/s" if task.speed else f"– {unit}/s")

        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            Rate(),
            TimeRemainingColumn(),
            console=Console(file=self._stream),
            transient=False,
        ) as progress:
            task = progress.add_task(label, total=total, completed=done)
            yield lambda n: progress.advance(task, n)

    def _lines(self, label: str, total: int, unit: str, done: int) -> Advance:
        start = last = time.monotonic()
        count = done

        def advance(n: int) -> None:
            nonlocal count, last
            count += n
            now = time.monotonic()
            if now - last < self._every and count < total:
                return
            last = now
            rate = (count - done) / max(now - start, 1e-9)
            left = (total - count) / rate if rate else float("inf")
            self.line(f"  {label}: {count}/{total} {unit} · {rate:.1f}/s · {_clock(left)} left")

        return advance


def _clock(seconds: float) -> str:
    if seconds == float("inf"):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


SILENT = Reporter("quiet")

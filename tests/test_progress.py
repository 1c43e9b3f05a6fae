"""Progress: plain lines with rate and time left, nothing when quiet, a bar in a terminal."""

from __future__ import annotations

import io

from dsteer.progress import Reporter, _clock


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_carry_count_rate_and_time_left() -> None:
    stream = io.StringIO()
    reporter = Reporter(stream=stream, every=0.0)
    assert reporter.mode == "lines", "a stream that is no terminal gets lines"
    with reporter.bar("read", 10, unit="row", done=4) as advance:
        advance(3)
        advance(3)
    first, last = stream.getvalue().splitlines()
    assert first.startswith("  read: 7/10 row · ")
    assert first.endswith(" left")
    assert last.startswith("  read: 10/10 row · ")
    assert last.endswith("0:00 left")


def test_lines_are_not_many() -> None:
    stream = io.StringIO()
    with Reporter("lines", stream=stream, every=3600.0).bar("read", 1000, unit="row") as advance:
        for _ in range(1000):
            advance(1)
    assert len(stream.getvalue().splitlines()) == 1, "only the last line, within the interval"


def test_quiet_says_nothing() -> None:
    stream = io.StringIO()
    reporter = Reporter("quiet", stream=stream)
    reporter.line("hello")
    with reporter.bar("read", 2, unit="row") as advance:
        advance(2)
    assert stream.getvalue() == ""


def test_bar_in_a_terminal() -> None:
    stream = Terminal()
    reporter = Reporter(stream=stream)
    assert reporter.mode == "bars"
    with reporter.bar("read", 4, unit="row", done=1) as advance:
        advance(3)
    assert "read" in stream.getvalue()
    assert "4/4" in stream.getvalue()


def test_clock() -> None:
    assert [_clock(5), _clock(65), _clock(3661), _clock(float("inf"))] == [
        "0:05",
        "1:05",
        "1:01:01",
        "?",
    ]

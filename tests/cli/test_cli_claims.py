"""What a run prints of its claims at its end."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest

from dsteer.cli import _print_summary
from dsteer.store import write_json

GRADED: dict[str, Any] = {
    "claims": [
        {"name": "shared_shift", "verdict": "supported", "why": "",
         "number": {"words": "mean held-out cosine", "value": 0.9, "low": 0.85, "high": 0.95},
         "null": {"words": "random signs", "value": 0.1}},
        {"name": "reversible", "verdict": "not tested", "why": "", "number": None, "null": None},
    ],
    "self_check": {"passed": True, "checks": [{"what": "v* is b", "passed": True}]},
}  # fmt: skip


class Terminal(io.StringIO):
    """Text that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def printed(folder: Path, result: dict[str, Any]) -> None:
    write_json(folder / "claims" / "result.json", result)
    _print_summary(
        {"run": "made-up", "stages": {"claims": {"reversible": "x"}}, "notes": []}, folder
    )


def test_each_claim_has_a_line_where_no_one_looks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    printed(tmp_path, GRADED)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:4] == [
        "  shared shift: supported; mean held-out cosine: 0.900 [0.850, 0.950]; "
        "null: random signs: 0.100",
        "  reversible: not tested; –; null: –",
        "  self-check on planted truth: passed, 1 of 1 checks",
    ]


def test_a_terminal_gets_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "120")
    printed(tmp_path, GRADED)
    shown = terminal.getvalue()
    head = next(line for line in shown.splitlines() if "verdict" in line)
    assert all(word in head for word in ("claim", "verdict", "number", "null"))
    assert "─" in shown
    assert "shared shift" in shown


def test_a_failed_self_check_is_shouted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check = {"passed": False, "checks": [{"what": "v* is b", "passed": False}]}
    printed(tmp_path, GRADED | {"self_check": check})
    out = capsys.readouterr().out
    assert out.splitlines()[1].startswith("WARNING: The self-check failed (v* is b)")
    assert "FAILED, 0 of 1 checks" in out

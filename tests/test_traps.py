"""docs/traps.md names, for each trap, a guard and a test that exist."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in (ROOT / "docs" / "traps.md").read_text().splitlines()
    if re.match(r"\| \d+\. ", line)
]
NAMED = re.compile(r"`((?:dsteer|tests)/[\w/]+\.py)::([\w.]+)`")


@cache
def defined(path: str) -> frozenset[str]:
    """Functions and classes of a module, and methods as Class.method."""
    names: list[str] = []
    for node in ast.parse((ROOT / path).read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        if isinstance(node, ast.ClassDef):
            names += [f"{node.name}.{f.name}" for f in node.body if isinstance(f, ast.FunctionDef)]
    return frozenset(names)


def test_all_twenty_one_are_there() -> None:
    assert [int(row[0].split(".")[0]) for row in ROWS] == list(range(1, 22))
    assert {len(row) for row in ROWS} == {3}


@pytest.mark.parametrize("row", ROWS, ids=[row[0].split(".")[0] for row in ROWS])
def test_guards_and_tests_exist(row: list[str]) -> None:
    _, guard, tests = row
    guards, tested = NAMED.findall(guard), NAMED.findall(tests)
    assert guards
    assert tested
    assert "::" not in NAMED.sub("", guard + tests), "a name that is not written as path::name"
    for path, name in [*guards, *tested]:
        assert (ROOT / path).is_file(), path
        assert name in defined(path), f"{path} has no {name}"
    for path, name in tested:
        assert path.startswith("tests/"), path
        assert name.startswith("test_"), name
    assert all(path.startswith("dsteer/") for path, _ in guards)

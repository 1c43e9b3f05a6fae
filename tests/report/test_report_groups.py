"""The figures of groups whose names are long."""

from __future__ import annotations

import warnings
from pathlib import Path

from dsteer.report.groups_figures import group_removal
from dsteer.report.style import styled
from dsteer.store import Json

AXES = "polite=1 asking=1 hedged=1 numbered=1 enthusiastic=1 personal=1 sourced=1 brief=1"


def removal(*names: str) -> dict[str, Json]:
    taken = {
        a: {b: {"margin_taken": {"value": 0.2, "low": 0.1, "high": 0.3}} for b in names}
        for a in names
    }
    return {
        "groups": [{"name": name} for name in names],
        "sites": {"final_norm": {"removal": {"removed": taken}}},
    }


def test_groups_of_many_axes_are_named_short_where_that_tells_them_apart() -> None:
    for names, shown in (
        ((AXES,), ["polite=1 +7"]),
        (("polite=1", "polite=1 asking=1"), ["polite=1", "polite=1 +1"]),
        (("a=1 b=1", "a=1 c=1"), ["a=1 b=1", "a=1 c=1"]),
    ):
        with styled(), warnings.catch_warnings():
            warnings.simplefilter("error")  # a layout that collapses warns
            drawing = group_removal(removal(*names), Path())
            assert drawing is not None
            drawing.figure.draw_without_rendering()
        ticks = [label.get_text() for label in drawing.figure.axes[0].get_yticklabels()]
        assert ticks == shown
        assert drawing.data["groups"] == list(names)

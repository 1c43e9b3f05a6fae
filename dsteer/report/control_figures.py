"""The figures of the ``control`` stage: vector → oracle, and two axes at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from dsteer.report.control_tables import LEVELS, bounds
from dsteer.report.style import BLUE, GREY, INK, ORANGE, SHADES, VERMILLION, WIDE, Drawing
from dsteer.report.values import at, items, mapping, number, plural, point
from dsteer.store import Json

_LINES = ((ORANGE, ":", "s"), (BLUE, "-", "o"), (VERMILLION, "--", "^"))
"""Colour, line and marker of each level of the other vector."""


def control_matrix(result: dict[str, Json], _folder: Path) -> Drawing | None:
    """A row a vector, a column an oracle: the size of the move as a shade, its value in words."""
    measured = mapping(result.get("measured"))
    oracles = [str(name) for name in items(result.get("oracles"))]
    if not measured:
        return None
    moves = np.array(
        [
            [point(at(row, "oracles", name, "move")) for name in oracles]
            for row in measured.values()
        ],
        dtype=float,
    )
    figure = Figure(figsize=(WIDE, 1.5 + 0.42 * len(measured)))
    axes = figure.subplots()
    image = axes.imshow(np.abs(moves), cmap=SHADES, vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(oracles)), oracles, rotation=35, ha="right")
    axes.set_yticks(range(len(measured)), list(measured))
    axes.set_xlabel("oracle")
    axes.set_ylabel("vector of")
    axes.grid(False)
    for i, (axis, row) in enumerate(measured.items()):
        for j, name in enumerate(oracles):
            out = at(row, "oracles", name, "stands_out") is True
            axes.text(
                j,
                i,
                f"{moves[i, j]:.2f}".replace("-", "−") + ("*" if out else ""),
                ha="center",
                va="center",
                color="white" if abs(moves[i, j]) > 0.6 else INK,
                weight="bold" if out else "normal",
                size="small",
            )
            if name == axis:
                axes.add_patch(_frame(j, i))
    figure.colorbar(image, ax=axes, label="|move|", shrink=0.9)
    data: dict[str, Json] = {
        "vectors": list(measured),
        "oracles": oracles,
        "moves": {
            axis: {
                name: {key: at(row, "oracles", name, key) for key in ("move", "stands_out")}
                for name in oracles
            }
            for axis, row in measured.items()
        },
    }
    draws = at(next(iter(measured.values())), "oracles", oracles[0], "random", "draws")
    data["caption"] = (
        "What the contrast vector of each axis (row) does to every oracle (column): mean of (score "
        f"at +λ − score at −λ) / 2 on {plural(at(result, 'prompts', 'test'), 'test prompt')}; 1 is "
        "the whole way between the poles. Framed: the axis's own oracle. A star: the interval "
        f"excludes 0 and lies beyond all {draws} random directions of the same norm."
    )
    return Drawing("control_matrix", figure, data)


def _frame(x: float, y: float) -> Rectangle:
    return Rectangle((x - 0.49, y - 0.47), 0.98, 0.94, fill=False, ec=INK, lw=1.4)


def control_grid(result: dict[str, Json], _folder: Path) -> Drawing | None:
    """One panel an oracle: its score over its own vector's level, a line a level of the other."""
    grid = mapping(result.get("grid"))
    oracles = mapping(grid.get("oracles"))
    if not oracles:
        return None
    figure = Figure(figsize=(WIDE, 2.9))
    panels = figure.subplots(1, len(oracles), sharey=True)
    for panel, axis in zip(panels, oracles, strict=True):
        other = next(name for name in oracles if name != axis)
        _panel(panel, mapping(oracles[axis]), axis, other)
    panels[0].set_ylabel("mean oracle score")
    data: dict[str, Json] = {
        "axes": list(oracles),
        "levels": list(LEVELS),
        "cells": {axis: at(row, "cells") for axis, row in oracles.items()},
    }
    r2 = "; ".join(
        f"{axis} {number(point(at(row, 'additive_r2')))}" for axis, row in oracles.items()
    )
    data["caption"] = (
        "Two axes at once: each oracle over the level of its own vector, one line a level of the "
        f"other vector, on {plural(at(result, 'prompts', 'test'), 'test prompt')}, with intervals. "
        "Parallel lines are additive, lines that coincide are independent. R² of the additive "
        f"model: {r2}."
    )
    return Drawing("control_grid", figure, data)


def _panel(axes: Axes, row: dict[str, Json], axis: str, other: str) -> None:
    for j, (level, (colour, line, marker)) in enumerate(zip(LEVELS, _LINES, strict=True)):
        shift = 0.06 * (j - 1)
        found = [bounds(at(row, "cells", i, j)) for i in range(len(LEVELS))]
        points = [(i + shift, *cell) for i, cell in enumerate(found) if cell is not None]
        if not points:
            continue
        x, y, low, high = np.array(points).T
        axes.errorbar(
            x,
            y,
            yerr=np.maximum([y - low, high - y], 0),
            color=colour,
            ls=line,
            marker=marker,
            ms=4.5,
            lw=1.3,
            capsize=2,
            label=f"{other} at {level}",
        )
    axes.axhline(0, color=GREY, ls=":", lw=0.8)
    axes.set_ylim(-1.08, 1.08)
    axes.set_xticks(range(len(LEVELS)), LEVELS)
    axes.set_xlabel(f"vector of {axis}")
    axes.set_title(f"Oracle {axis}")
    axes.legend(loc="lower right")

"""The figures of the ``groups`` stage: cosines between groups, and what each removal takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from dsteer.report.style import INK, SHADES, WIDE, Drawing
from dsteer.report.values import at, items, mapping, point
from dsteer.store import Json


def group_cosines(result: dict[str, Json], _folder: Path) -> Drawing | None:
    """A heat map a site: the cosine of each pair of groups' vectors, in numbers."""
    names = [str(at(group, "name")) for group in items(result.get("groups"))]
    sites = mapping(result.get("sites"))
    if len(names) < 2 or not sites:
        return None
    matrices = {}
    for site, row in sites.items():
        matrix = np.eye(len(names))
        for cell in items(at(row, "cosines")):
            a, b = (names.index(str(at(cell, "groups", side))) for side in (0, 1))
            value = point(at(cell, "cosine"))
            matrix[a, b] = matrix[b, a] = np.nan if value is None else value
        matrices[site] = matrix
    figure = _maps(matrices, names, "group", "group", "|cos|")
    data: dict[str, Json] = {
        "groups": list(names),
        "cosines": {site: at(row, "cosines") for site, row in sites.items()},
        "caption": "Cosines of the groups' vectors, as fitted. Vectors of groups that prefer "
        "different axes would be orthogonal, those of conflicting groups opposite.",
    }
    return Drawing("group_cosines", figure, data)


def group_removal(result: dict[str, Json], _folder: Path) -> Drawing | None:
    """A heat map a site: what removing a group's vector (row) takes of each group (column)."""
    names = [str(at(group, "name")) for group in items(result.get("groups"))]
    sites = mapping(result.get("sites"))
    if not names or not sites:
        return None
    matrices = {
        site: np.array(
            [
                [point(at(row, "removal", "removed", a, b, "margin_taken")) for b in names]
                for a in names
            ],
            dtype=float,
        )
        for site, row in sites.items()
    }
    if all(np.isnan(matrix).all() for matrix in matrices.values()):
        return None
    figure = _maps(matrices, names, "measured on group", "removed vector of", "|share|")
    data: dict[str, Json] = {
        "groups": list(names),
        "removal": {site: at(row, "removal") for site, row in sites.items()},
        "caption": "Share of a group's reward margin (column) that is taken when the vector of a "
        "group (row) is removed from the tuned model, on test pairs. On the diagonal: the group's "
        "own vector. Hatched: the tuning gained no margin told from zero there. Intervals, KL and "
        "the null of random directions that move states as far are in the table and in the JSON.",
    }
    return Drawing("group_removal", figure, data)


def _maps(
    matrices: dict[str, np.ndarray],
    names: list[str],
    across: str,
    down: str,
    words: str,
) -> Figure:
    shown = _short(names)
    figure = Figure(figsize=(WIDE, 1.7 + 0.36 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(matrices), squeeze=False)[0]
    for panel, (site, matrix) in zip(panels, matrices.items(), strict=True):
        image = _map(panel, matrix, shown)
        panel.set_title(site)
        panel.set_xlabel(across)
    panels[0].set_yticks(range(len(names)), shown)
    panels[0].set_ylabel(down)
    for panel in panels[1:]:
        panel.set_yticks([])
    figure.colorbar(image, ax=list(panels), label=words, shrink=0.9)
    return figure


def _short(names: list[str]) -> list[str]:
    """``polite=1 +7`` for a group of eight axes, where this still tells the groups apart."""
    parts = [name.split() for name in names]
    short = [one[0] + (f" +{len(one) - 1}" if len(one) > 1 else "") for one in parts if one]
    return short if len(set(short)) == len(names) else names


def _map(axes: Axes, matrix: np.ndarray, columns: list[str]) -> AxesImage:
    image = axes.imshow(np.abs(matrix), cmap=SHADES, vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=35, ha="right")
    axes.grid(False)
    for (i, j), value in np.ndenumerate(matrix):
        if np.isnan(value):
            axes.fill_between(
                [j - 0.5, j + 0.5], i - 0.5, i + 0.5, hatch="///", facecolor="none", edgecolor=INK,
                lw=0,
            )  # fmt: skip
            continue
        axes.text(
            j, i, f"{value:.2f}".replace("-", "−"), ha="center", va="center", size="x-small",
            color="white" if abs(value) > 0.6 else INK,
        )  # fmt: skip
    return image

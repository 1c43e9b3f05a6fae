"""Figures of what a study's variants measured by changing states: a forest, and their claims."""

from __future__ import annotations

import math
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from dsteer.report.comparison_causal import CLAIMS, PANELS, panel_values
from dsteer.report.style import BLUE, GREY, INK, PALE, VERMILLION, WIDE, Drawing
from dsteer.report.values import Estimate, at, mapping
from dsteer.store import Json

_COLUMNS = 4
"""Panels side by side."""

_SHARES = ("profile", "efficiency", "r2", "maps_kl", "removal")
"""Panels of shares: 0 and 1 are drawn as lines."""

_COUNTS = ("k90", "k50")
"""Panels of numbers of directions: ticks are whole."""

_VERDICT = {
    "supported": (BLUE, "yes", "white"),
    "not supported": (PALE, "no", INK),
    "not tested": ("white", "?", GREY),
}
"""Fill, word and colour of the word; the word tells them apart without colour."""


def variants_causal(result: dict[str, Json]) -> Drawing | None:
    """Small multiples: each quantity of each variant, with intervals."""
    variants = _compared(result)
    found = {key: panel_values(variants, key) for key in PANELS}
    found = {
        key: series
        for key, series in found.items()
        if any(each.value is not None for values in series.values() for each in values)
    }
    if not found or not any(at(v, "causal", "profile") for v in variants.values()):
        return None
    names = list(variants)
    columns = min(_COLUMNS, len(found))
    rows = math.ceil(len(found) / columns)
    figure = Figure(figsize=(WIDE, rows * (0.95 + 0.26 * len(names))))
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for place, axes in enumerate(grid.flat):
        if place >= len(found):
            axes.set_axis_off()
            continue
        key = list(found)[place]
        _panel(axes, found[key], shares=key in _SHARES)
        axes.set_title(PANELS[key][0])
        axes.set_xlabel(
            "  ".join(f"{mark} {words}" for mark, words in zip("●□", found[key], strict=False)),
            fontsize="small",
        )
        counts = key in _COUNTS
        axes.xaxis.set_major_locator(MaxNLocator(integer=counts, nbins=5 if counts else 3))
    for axes in grid[:, 0]:
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
    data: dict[str, Json] = {
        "variants": names,
        "panels": {
            key: {words: [each._asdict() for each in values] for words, values in series.items()}
            for key, series in found.items()
        },
        "caption": (
            "What each variant measured by changing states, on its test pairs, with intervals: "
            "the words below a panel name the filled and the hollow mark. Shares have lines at 0 "
            "and 1. The chosen place is the variant's own, chosen on tune. A value that is "
            "undefined, was not measured or was never reached is left out."
        ),
    }
    return Drawing("variants_causal", figure, data)


def _panel(axes: Axes, series: dict[str, list[Estimate]], *, shares: bool) -> None:
    if shares:
        for x in (0.0, 1.0):
            axes.axvline(x, color=PALE, lw=1, zorder=0)
    marks: tuple[tuple[str, str, str, float], ...] = (
        (BLUE, "o", BLUE, -0.14), (VERMILLION, "s", "white", 0.14),
    )  # fmt: skip
    for (colour, marker, fill, shift), values in zip(marks, series.values(), strict=False):
        for row, each in enumerate(values):
            if each.value is None:
                continue
            if each.low is not None and each.high is not None:
                axes.plot([each.low, each.high], [row + shift] * 2, color=colour, lw=1.2)
            axes.plot(each.value, row + shift, ls="", marker=marker, color=colour, mfc=fill)
    axes.margins(x=0.1)
    axes.tick_params(axis="y", length=0)


def claims_matrix(result: dict[str, Json]) -> Drawing | None:
    """Variants × claims: each verdict as a word in a cell."""
    told = {name: mapping(at(v, "causal", "claims")) for name, v in _compared(result).items()}
    told = {name: verdicts for name, verdicts in told.items() if verdicts}
    if not told:
        return None
    figure = Figure(figsize=(WIDE, 1.0 + 0.3 * len(told)))
    axes = figure.subplots()
    for row, verdicts in enumerate(told.values()):
        for column, claim in enumerate(CLAIMS):
            fill, word, ink = _VERDICT.get(str(verdicts.get(claim)), ("white", "–", GREY))
            axes.add_patch(Rectangle((column, row), 1, 1, fc=fill, ec="white", lw=2))
            axes.text(column + 0.5, row + 0.5, word, ha="center", va="center", color=ink)
    axes.set_xlim(0, len(CLAIMS))
    axes.set_ylim(len(told), 0)
    axes.set_xticks([c + 0.5 for c in range(len(CLAIMS))], [c.replace("_", " ") for c in CLAIMS])
    axes.set_yticks([r + 0.5 for r in range(len(told))], list(told))
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    data: dict[str, Any] = {
        "claims": list(CLAIMS),
        "verdicts": told,
        "caption": (
            "The verdict on each claim in each variant, by rule: yes is supported, no is not "
            "supported, ? is not tested. Each variant's own report gives the numbers and the nulls."
        ),
    }
    return Drawing("claims_matrix", figure, data)


def _compared(result: dict[str, Json]) -> dict[str, Json]:
    return {
        name: v for name, v in mapping(result.get("variants")).items() if at(v, "failed") is None
    }

"""The figure of the ``template`` stage: shares of template, training and interaction, and norms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from dsteer.report.four_way_tables import WHY, why_undefined, within_rounding
from dsteer.report.style import BLUE, GREY, ORANGE, PALE, VERMILLION, WIDE, Drawing
from dsteer.report.values import (
    FINAL_NORM,
    Estimate,
    at,
    block,
    estimate,
    is_undefined,
    mapping,
    number,
    percent,
    plural,
    point,
    site_order,
)
from dsteer.store import Json

_SHARES = (
    ("training_raw", "training, raw text", BLUE, "o", True),
    ("template_base", "template, base", ORANGE, "s", True),
    ("interaction", "interaction", VERMILLION, "^", True),
)
_NORMS = (
    _SHARES[0],
    ("training_templated", "training, in the template", BLUE, "o", False),
    _SHARES[1],
    ("template_tuned", "template, tuned", ORANGE, "s", False),
    _SHARES[2],
)
"""Part, label, colour, marker, whether the marker is filled."""

_LABELLED = 14
"""Up to so many sites, each has its tick."""

_DECADES = 1.5
"""Norms that span more powers of ten are drawn on a logarithmic axis."""

_SPREAD = 0.6
"""The marks of one site take so much of the space to the next."""


def four_way(result: dict[str, Json], _folder: Path) -> Drawing | None:
    """Shares of the displacement at each site, over the norms of the parts."""
    results = mapping(result.get("sites"))
    sites = site_order(results)
    if not sites:
        return None
    where = _positions(sites)
    figure = Figure(figsize=(WIDE, 5.4))
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(1.1, 1))
    shares = _lollipops(upper, where, results, sites, _SHARES, "share")
    upper.axhline(0, color=GREY, lw=0.8, zorder=1)
    upper.axhline(1, color=GREY, lw=0.8, ls=":", zorder=1)
    upper.set_ylabel("share of the displacement")
    upper.set_title("Projection of each mean part on the mean displacement (sum: 1)")
    norms = _dots(lower, where, results, sites)
    lower.set_ylabel("norm / mean ‖h_base‖ on raw text")
    lower.set_title("Norm of each mean part")
    undefined = [site for site in sites if is_undefined(results[site])]
    for site in undefined:
        for axes in (upper, lower):
            axes.axvspan(where[site] - 0.5, where[site] + 0.5, facecolor="none", edgecolor=PALE,
                         hatch="////", lw=0, zorder=0)  # fmt: skip
        upper.text(where[site], 0.5, "undefined", rotation=90, ha="center", va="center", color=GREY,
                   transform=upper.get_xaxis_transform(),
                   bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5})  # fmt: skip
    _site_ticks(lower, sites, where)
    for axes in (upper, lower):
        if FINAL_NORM in sites and len(sites) > 1:
            axes.axvline(where[FINAL_NORM] - 0.75, color=GREY, lw=0.8, ls=(0, (1, 2)))
    figure.legend(handles=[_handle(*look) for look in _NORMS], loc="outside upper center", ncols=3)
    shown = FINAL_NORM if FINAL_NORM in sites else sites[-1]

    def listed(holds: Callable[[Json], bool]) -> str:
        """Label and sites of the parts for which something holds; empty where there are none."""
        found = {
            label: [site for site in sites if holds(at(results[site], "parts", part))]
            for part, label, *_ in _NORMS
        }
        return "; ".join(
            f"{label} at {', '.join(where)}" for label, where in found.items() if where
        )

    zero = listed(lambda part: at(part, "zero") is True)
    rounding = listed(within_rounding)
    untold = listed(lambda part: at(part, "relative_norm") is None and not within_rounding(part))
    hatched = [
        f"{', '.join(found)} ({words})"
        for why, words in WHY.items()
        if (found := [site for site in undefined if at(results[site], "why") == why])
    ]
    data: dict[str, Json] = {
        "n_fit": result.get("n_fit"),
        "n_test": result.get("n_test"),
        "sites": {
            site: {
                "shares": {part: values[site]._asdict() for part, values in shares.items()},
                "relative_norms": {part: values[site]._asdict() for part, values in norms.items()},
                "undefined": site in undefined,
                "why": at(results[site], "why"),
            }
            for site in sites
        },
    }
    data["caption"] = (
        "The displacement from the base on raw text to the tuned model in its chat template, "
        f"divided into three on {plural(result.get('n_test'), 'test prompt')}: training on raw "
        "text, the template in the base, and their interaction (what only both together do). "
        f"{_said(results[shown], shown)} Top: shares of the mean displacement, with intervals; a "
        "share below 0 or above 1 means that parts pull against each other. Bottom: norms of the "
        "mean parts. Both are of products between different conversations, free of the prompts' "
        "scatter; bars: jackknife over conversations. Hollow: training as it acts inside the "
        "template, and the template as it acts in the tuned model. "
        "Without interaction hollow and filled marks agree."
        + (f" Exactly zero and not drawn: {zero}." if zero else "")
        + (f" Within rounding, so without a norm: {rounding}." if rounding else "")
        + (f" Not told from 0, so without a norm: {untold}." if untold else "")
        + (
            " A bar that goes to the bottom of the logarithmic axis reaches 0."
            if lower.get_yscale() == "log"
            else ""
        )
        + (f" Hatched, undefined: {'; '.join(hatched)}." if hatched else "")
        + (
            " final_norm stands apart: it is another quantity than the blocks' outputs."
            if FINAL_NORM in sites
            else ""
        )
    )
    return Drawing("four_way", figure, data)


def _said(row: Json, site: str) -> str:
    if is_undefined(row):
        return f"At {site} shares are undefined: {why_undefined(row)}."
    told = ", ".join(
        f"{label} {percent(point(at(row, 'parts', part, 'share')))}" for part, label, *_ in _SHARES
    )
    total = number(point(at(row, "parts", "total", "relative_norm")))
    return f"At {site}: {told} of a displacement of {total} mean lengths of the base's states."


# ---------------------------------------------------------------------------------- panels


def _positions(sites: Sequence[str]) -> dict[str, float]:
    """x of each site: k of a block; the other sites stand apart on the right."""
    found = {site: float(k) for site in sites if (k := block(site)) is not None}
    right = max(found.values(), default=-1.5) + 1.5
    others = [site for site in sites if site not in found]
    return found | {site: right + i for i, site in enumerate(others)}


def _lollipops(
    axes: Axes,
    where: dict[str, float],
    results: dict[str, Json],
    sites: Sequence[str],
    looks: Sequence[tuple[str, str, str, str, bool]],
    key: str,
) -> dict[str, dict[str, Estimate]]:
    """A stem from 0, a mark and an interval for each part and site; returns what was drawn."""
    drawn = {}
    for i, look in enumerate(looks):
        drawn[look[0]] = _column(results, sites, look[0], key)
        x, values = _dodged(where, sites, drawn[look[0]], i, len(looks))
        axes.vlines(x, 0, [v.value or 0.0 for v in values], color=look[2], lw=1.1, zorder=2)
        _marks(axes, x, values, look)
    return drawn


def _dots(
    axes: Axes, where: dict[str, float], results: dict[str, Json], sites: Sequence[str]
) -> dict[str, dict[str, Estimate]]:
    """A mark and an interval for each part and site; an axis that shows the small ones too.

    What is within rounding has neither.
    """
    drawn = {part: _column(results, sites, part, "relative_norm") for part, *_ in _NORMS}
    for part, column in drawn.items():
        rounding = [site for site in sites if within_rounding(at(results[site], "parts", part))]
        column |= dict.fromkeys(rounding, Estimate(None, None, None))
    found = [v.value for column in drawn.values() for v in column.values() if v.value]
    logarithmic = bool(found) and np.log10(max(found) / min(found)) > _DECADES
    for i, look in enumerate(_NORMS):
        x, values = _dodged(where, sites, drawn[look[0]], i, len(_NORMS))
        shown = [(a, v) for a, v in zip(x, values, strict=True) if v.value]
        _marks(axes, [a for a, _ in shown], [v for _, v in shown], look)
    if logarithmic:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    return drawn


def _column(
    results: dict[str, Json], sites: Sequence[str], part: str, key: str
) -> dict[str, Estimate]:
    return {site: estimate(at(results[site], "parts", part, key)) for site in sites}


def _dodged(
    where: dict[str, float],
    sites: Sequence[str],
    values: dict[str, Estimate],
    i: int,
    count: int,
) -> tuple[list[float], list[Estimate]]:
    """x and value of the sites where a value is defined, the i-th of ``count`` side by side."""
    kept = [site for site in sites if values[site].value is not None]
    shift = _SPREAD * (i / (count - 1) - 0.5)
    return [where[site] + shift for site in kept], [values[site] for site in kept]


def _marks(
    axes: Axes,
    x: Sequence[float],
    values: Sequence[Estimate],
    look: tuple[str, str, str, str, bool],
) -> None:
    _, _, colour, marker, filled = look
    for a, v in zip(x, values, strict=True):
        if v.low is not None and v.high is not None:
            axes.vlines(a, v.low, v.high, color=colour, lw=2.6, alpha=0.35, zorder=2)
    axes.plot(
        x,
        np.array([v.value for v in values], dtype=np.float64),
        color=colour,
        ls="",
        marker=marker,
        ms=4.2 if len(x) <= _LABELLED else 3.0,
        mfc=colour if filled else "white",
        zorder=3,
    )


def _site_ticks(axes: Axes, sites: Sequence[str], where: dict[str, float]) -> None:
    """Ticks at the blocks, by number, and at the other sites, by name."""
    blocks = [site for site in sites if block(site) is not None]
    others = [site for site in sites if block(site) is None]
    ticks = [where[site] for site in blocks]
    if len(blocks) > _LABELLED:
        known = MaxNLocator(9, integer=True).tick_values(ticks[0], ticks[-1])
        ticks = [float(tick) for tick in known if ticks[0] <= tick <= ticks[-1]]
    axes.set_xticks(
        [*ticks, *(where[site] for site in others)], [*(f"{tick:g}" for tick in ticks), *others]
    )
    places = list(where.values())
    axes.set_xlim(min(places) - 0.6, max(places) + 0.6)
    axes.set_xlabel("block k (resid_post.k)" if blocks else "site")


def _handle(_part: str, label: str, colour: str, marker: str, filled: bool) -> Any:
    return Line2D([], [], color=colour, ls="", marker=marker, label=label,
                  mfc=colour if filled else "white")  # fmt: skip

"""Figures 2a and 2b: every metric over the strength λ, one panel a metric.

Both sweeps are drawn by one function from ``result.json`` alone. An undefined point is a gap, an
absent metric is named in the caption with its reason, and a point beyond the scale is marked at
the edge. λ counts each arm's own vector.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import (
    FixedLocator,
    LogFormatterSciNotation,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
    StrMethodFormatter,
)

from dsteer.report.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    WIDE,
    Drawing,
    Line,
    Mark,
)
from dsteer.report.sweep_values import MAIN, baselines, collapse, main_metrics
from dsteer.report.values import (
    at,
    estimate,
    items,
    mapping,
    number,
    plain,
    plural,
    point,
    real,
)
from dsteer.store import Json

_MARKS: dict[str, tuple[str, Line, str]] = {
    "v": (BLUE, "-", "o"),
    "final_norm": (ORANGE, "--", "s"),
    "preference": (VERMILLION, "-.", "^"),
    "amplify": (SKY, (0, (4, 1, 1, 1, 1, 1)), "P"),
    "noise": (PURPLE, (0, (2, 1)), "X"),
}
_OTHER_ARM: tuple[str, Line, str] = (PURPLE, ":", "v")
_RANDOM = "#bdbdbd"
_HATCH = "#c2c2c2"
_WORST = (0, (1, 1))

_ARROWS = {"up": "\u00a0↑", "down": "\u00a0↓"}


_WIDE = 4.0
"""Strengths that go beyond it get an axis that is linear to ±1 and logarithmic from there."""


def fig2a_interpolation(result: dict[str, Json], _folder: Path) -> Drawing | None:
    """Figure 2a: the most telling metrics of the base plus λv*."""
    return _sweep("fig2a_interpolation", result, main_metrics(result), 3)


def fig2a_all_metrics(result: dict[str, Json], _folder: Path) -> Drawing | None:
    """Figure 2a with every metric, where the main figure has not room for all."""
    return _all("fig2a_all_metrics", result)


def fig2b_inversion(result: dict[str, Json], _folder: Path) -> Drawing | None:
    """Figure 2b: the most telling metrics of the tuned model minus λv*."""
    return _sweep("fig2b_inversion", result, main_metrics(result), 3)


def fig2b_all_metrics(result: dict[str, Json], _folder: Path) -> Drawing | None:
    """Figure 2b with every metric, where the main figure has not room for all."""
    return _all("fig2b_all_metrics", result)


def _all(name: str, result: dict[str, Json]) -> Drawing | None:
    metrics = list(mapping(result.get("metrics")))
    return _sweep(name, result, metrics, 4) if len(metrics) > MAIN else None


def _sweep(
    name: str, result: dict[str, Json], names: Sequence[str], columns: int
) -> Drawing | None:
    """Draw one panel a metric: arms with intervals, random band, levels, collapse, crossing."""
    strengths = [float(s) for s in items(result.get("strengths"))]
    if not names or not strengths:
        return None
    rows = math.ceil(len(names) / columns)
    columns = min(columns, len(names))
    wide = columns <= 3
    figure = Figure(figsize=(max(WIDE * columns / 3 if wide else WIDE, 3.4), 1.95 * rows + 0.85))
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
    fallen = collapse(result)
    marks = _arm_marks(result)
    panels: dict[str, Json] = {}
    flags: set[str] = set()
    for i, axes in enumerate(grid.flat):
        if i >= len(names):
            axes.set_visible(False)
            continue
        metric = mapping(at(result, "metrics", names[i]))
        panels[names[i]] = _panel(axes, metric, strengths, fallen, marks, flags)
        arrow = _ARROWS.get(metric.get("better") or "", "")
        words = wrap(f"{metric.get('label') or names[i]}{arrow}", 30 if wide else 24)
        axes.set_title("\n".join(words), size=8.5 if wide else 7.5)
        axes.set_ylabel(str(metric.get("unit") or "no unit"), size=7.5)
        axes.tick_params(labelsize=7)
        if i + columns >= len(names):  # the lowest panel of its column
            axes.tick_params(labelbottom=True)
            axes.set_xlabel("λ (units of v*)" + ("; log beyond ±1" if _is_wide(strengths) else ""))
    handles = _legend(result, marks, flags)
    figure.legend(
        handles=handles,
        loc="outside upper center",
        ncols=min(len(handles), 3 if figure.get_figwidth() > 5 else 2),
        columnspacing=1.4,
    )
    return Drawing(
        name,
        figure,
        {
            "caption": _caption(name, result, names, flags),
            "strengths": strengths,
            "collapse_negative": fallen[0],
            "collapse": fallen[1],
            "arms": result.get("arms"),
            "metrics": panels,
            "absent": result.get("absent") or [],
        },
    )


def _arm_marks(result: dict[str, Json]) -> dict[str, Mark]:
    marks = {}
    for key, arm in mapping(result.get("arms")).items():
        colour, line, marker = _MARKS.get(key, _OTHER_ARM)
        marks[key] = Mark(str(at(arm, "label") or key), colour, line, marker)
    return marks


def _is_wide(strengths: Sequence[float]) -> bool:
    """Whether a linear axis would squeeze the strengths near 1."""
    return strengths[-1] > _WIDE


def _powers(strengths: Sequence[float]) -> list[float]:
    """Ticks: 0, and on both sides 1, 4, 16, … within the strengths."""
    most = max(abs(strengths[0]), strengths[-1])
    ticks = [4.0**k for k in range(10) if 4.0**k <= most]
    both = [*(-tick for tick in reversed(ticks)), 0.0, *ticks]
    return [tick for tick in both if strengths[0] <= tick <= strengths[-1]]


def _panel(
    axes: Axes,
    metric: dict[str, Json],
    strengths: Sequence[float],
    fallen: tuple[float | None, float | None],
    marks: dict[str, Mark],
    flags: set[str],
) -> dict[str, Json]:
    """Draw one metric, noting in ``flags`` what the legend must name; return what was drawn."""
    if _is_wide(strengths):
        axes.set_xscale("symlog", linthresh=1, linscale=1)
        axes.set_xlim(strengths[0] * 1.15, strengths[-1] * 1.15)
        axes.xaxis.set_major_locator(FixedLocator(_powers(strengths)))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        pad = 0.03 * (strengths[-1] - strengths[0]) or 0.5
        axes.set_xlim(strengths[0] - pad, strengths[-1] + pad)
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    curves = {
        arm: [estimate(v) for v in values]
        for arm, values in mapping(metric.get("curves")).items()
        if arm in marks
    }
    start, target = estimate(metric.get("start")), estimate(metric.get("target"))
    crossing = estimate(at(metric, "crossing", "strength"))
    random = mapping(metric.get("random"))
    band = {key: [real(v) for v in items(random.get(key))] for key in ("low", "high", "mean")}
    worst = [real(v) for v in items(metric.get("worst"))]
    shown: dict[str, Json] = {
        **{key: metric.get(key) for key in ("label", "unit", "better", "source", "split", "n")},
        "curves": {arm: [value._asdict() for value in values] for arm, values in curves.items()},
        "random": {**band, "draws": random.get("draws")} if random else None,
        "start": start._asdict(),
        "target": target._asdict(),
        "crossing": {**crossing._asdict(), "why": at(metric, "crossing", "why")},
        "worst": worst or None,
    }
    x = np.asarray(strengths)
    if random:
        flags.add("random")
        axes.fill_between(x, _floats(band["low"]), _floats(band["high"]), color=_RANDOM, lw=0,
                          alpha=0.6, zorder=1)  # fmt: skip
        axes.plot(x, _floats(band["mean"]), color=GREY, lw=0.7, zorder=1.5)
    for level, line, words in ((target, "--", "target"), (start, ":", "start")):
        if level.value is not None:
            flags.add(words)
            axes.axhline(level.value, color=INK, ls=line, lw=0.9, zorder=2)
    if any(value is not None for value in worst):
        flags.add("worst")
        axes.plot(x, _floats(worst), color=BLUE, ls=_WORST, lw=0.8, zorder=2.5)
    for arm, values in reversed(curves.items()):
        mark, first = marks[arm], arm == "v"
        low, middle, high = (
            _floats([getattr(value, key) for value in values]) for key in ("low", "value", "high")
        )
        axes.fill_between(x, low, high, color=mark.colour, alpha=0.2, lw=0, zorder=2)
        axes.plot(
            x,
            middle,
            color=mark.colour,
            ls=mark.line,
            marker=mark.marker,
            ms=3.2 if first else 2.4,
            lw=1.6 if first else 1.0,
            mfc=mark.colour if first else "white",
            zorder=4 if first else 3,
        )
    shown["beyond_scale"] = _scale(axes, metric, strengths, fallen, curves, worst, marks, flags)
    _shade_collapse(axes, fallen, flags)
    if crossing.value is not None and target.value is not None:
        flags.add("crossing")
        reach = None
        if crossing.low is not None and crossing.high is not None:
            sides = (crossing.value - crossing.low, crossing.high - crossing.value)
            reach = np.maximum(sides, 0.0)[:, None]
        axes.errorbar(
            [crossing.value],
            [target.value],
            xerr=reach,
            fmt="D",
            ms=5,
            mfc="white",
            color=GREEN,
            capsize=2.5,
            elinewidth=1.2,
            zorder=6,
        )
    if not any(value.value is not None for values in curves.values() for value in values):
        axes.text(
            0.5,
            0.5,
            "undefined at every λ",
            transform=axes.transAxes,
            ha="center",
            va="center",
            bbox={"facecolor": "white", "edgecolor": "none"},
        )
    return shown


def _scale(
    axes: Axes,
    metric: dict[str, Json],
    strengths: Sequence[float],
    fallen: tuple[float | None, float | None],
    curves: dict[str, list[Any]],
    worst: list[float | None],
    marks: dict[str, Mark],
    flags: set[str],
) -> dict[str, list[float]]:
    """Fit the y axis, and mark the points that it leaves out.

    Shares and points are bounded: all of them are shown (of a share recovered, down to −1). Other
    metrics may go anywhere past collapse: their axis fits the strengths short of it, and is
    logarithmic where their values there span more than a factor of 50. Returns, for each arm, the
    strengths whose point lies beyond the scale.
    """
    bounded = metric.get("unit") in ("share", "points")
    below = -math.inf if fallen[0] is None else fallen[0]
    above = math.inf if fallen[1] is None else fallen[1]
    live = [below < strength < above for strength in strengths]
    values = [point(metric.get("start")), point(metric.get("target"))]
    for curve in curves.values():
        values += [v.value for v, alive in zip(curve, live, strict=True) if alive or bounded]
    values += [v for v, alive in zip(worst, live, strict=False) if alive]
    seen = [value for value in values if value is not None]
    if not seen:
        return {}
    low, high = min(seen), max(seen)
    if not bounded and low > 0 and high / low > 50:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(numticks=5))
        axes.yaxis.set_major_formatter(LogFormatterSciNotation())
        axes.yaxis.set_minor_formatter(NullFormatter())
        low, high = low / 1.6, high * 1.6
    else:
        if bounded:
            low = max(low, -1.0)
        margin = 0.1 * (high - low) or 0.1 * abs(high) or 0.1
        low, high = low - margin, high + margin
        axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.set_ylim(low, high)
    beyond: dict[str, list[float]] = {}
    for arm, curve in reversed(curves.items()):
        known = [(x, v.value) for x, v in zip(strengths, curve, strict=True) if v.value is not None]
        below_scale = [x for x, value in known if value < low]
        above_scale = [x for x, value in known if value > high]
        for edge, marker, out in ((low, "v", below_scale), (high, "^", above_scale)):
            if out:
                flags.add("beyond")
                axes.plot(
                    out,
                    [edge] * len(out),
                    ls="",
                    marker=marker,
                    color=marks[arm].colour,
                    mfc="white",
                    ms=4.5,
                    clip_on=False,
                    zorder=5,
                )
        if below_scale or above_scale:
            beyond[arm] = sorted(below_scale + above_scale)
    return beyond


def _shade_collapse(axes: Axes, fallen: tuple[float | None, float | None], flags: set[str]) -> None:
    """Hatch the strengths at which at least half of v*'s outputs are degenerate."""
    left, right = axes.get_xlim()
    for edge, end in ((fallen[0], left), (fallen[1], right)):
        if edge is None or not left <= edge <= right:
            continue
        flags.add("collapse")
        axes.axvspan(
            min(edge, end), max(edge, end), facecolor="none", edgecolor=_HATCH, hatch="////", lw=0,
            zorder=0,
        )  # fmt: skip
        axes.annotate(
            "collapse",
            (edge, 0.03),
            xycoords=axes.get_xaxis_transform(),
            xytext=(2 if end > edge else -2, 0),
            textcoords="offset points",
            rotation=90,
            ha="left" if end > edge else "right",
            va="bottom",
            size=6.5,
            color=GREY,
            zorder=3.5,
            path_effects=[withStroke(linewidth=2, foreground="white")],
        )


def _legend(result: dict[str, Json], marks: dict[str, Mark], flags: set[str]) -> list[Any]:
    """Legend handles of everything that some panel shows."""
    handles: list[Any] = [
        Line2D([], [], color=mark.colour, ls=mark.line, marker=mark.marker, ms=3.6,
               mfc=mark.colour if arm == "v" else "white", lw=1.6 if arm == "v" else 1.0,
               label=mark.label)
        for arm, mark in marks.items()
    ]  # fmt: skip
    start, target = (result.get(key) or key for key in ("start", "target"))
    known: dict[str, Any] = {
        "worst": Line2D([], [], color=BLUE, ls=_WORST, lw=0.8, label="v*, degenerate as worst"),
        "random": Patch(facecolor=_RANDOM, alpha=0.6, label="random directions, same norm"),
        "target": Line2D([], [], color=INK, ls="--", lw=0.9, label=f"target: {target} model"),
        "start": Line2D([], [], color=INK, ls=":", lw=0.9, label=f"start: {start} model"),
        "crossing": Line2D([], [], color=GREEN, ls="-", marker="D", ms=5, mfc="white",
                           label="v* meets the target"),
        "collapse": Patch(facecolor="none", edgecolor=_HATCH, hatch="////",
                          label="≥ half of outputs degenerate"),
        "beyond": Line2D([], [], color=INK, ls="", marker="v", mfc="white", ms=4.5,
                         label="beyond the scale"),
    }  # fmt: skip
    return handles + [handle for key, handle in known.items() if key in flags]


def _caption(name: str, result: dict[str, Json], names: Sequence[str], flags: set[str]) -> str:
    """What was drawn, from what, and what is absent."""
    start, target = (str(result.get(key) or f"{key} model") for key in ("start", "target"))
    sign = "−" if result.get("sign") == -1 else "+"
    every = list(mapping(result.get("metrics")))
    others = baselines(result)
    norms = ", ".join(
        f"{at(arm, 'label') or key} {number(point(at(arm, 'norm')))}"
        + ("" if at(arm, "generated") is not False else " (no texts generated)")
        for key, arm in mapping(result.get("arms")).items()
        if key not in others
    )
    said = [
        f"Figure {name[3:5]}. Metrics of the {start} model {sign} λv at {result.get('site')} on "
        "test prompts, over the strength λ, "
        + (
            "all of them."
            if len(names) == len(every)
            else f"the {len(names)} most telling of {len(every)}."
        ),
        "Bands around curves are intervals over conversations (bootstrap; of shares of yes and no, "
        "Wilson's). λ = 1 adds an arm's "
        f"own vector, of norm: {norms}.",
        f"Dashed: the {target} model's own level; dotted: the {start} model's.",
    ]
    if others:
        said.append(f"Baselines at v*'s site: {'; '.join(others.values())}.")
    if "random" in flags:
        draws = {
            str(at(metric, "source")): at(metric, "random", "draws")
            for metric in mapping(result.get("metrics")).values()
            if at(metric, "random")
        }
        counted = ", ".join(
            f"{plural(n, 'draw')} on {source.replace('_', '-')} metrics"
            for source, n in draws.items()
        )
        said.append(f"Grey: range and mean of random directions of v*'s norm ({counted}).")
    if "worst" in flags:
        said.append(
            "Curves of generated texts leave degenerate outputs out; the thin line scores them as "
            "the worst value."
        )
    if "crossing" in flags:
        said.append(
            "Diamond: the first λ at which v*'s curve meets the target's level, with interval."
        )
    below, above = collapse(result)
    if "collapse" in flags:
        edges = [f"λ {s} {plain(v)}" for s, v in (("≤", below), ("≥", above)) if v is not None]
        said.append(
            f"Hatched: at least half of v*'s outputs are degenerate (from {' and '.join(edges)})."
        )
    if "beyond" in flags:
        said.append("Open triangles at an edge: the point lies beyond the scale.")
    said.append("↑, ↓: that way is better. Gaps are undefined points.")
    absent = [f"{at(a, 'metric')} ({at(a, 'reason')})" for a in items(result.get("absent"))]
    if absent:
        said.append(f"Absent: {'; '.join(absent)}.")
    return " ".join(said)


def _floats(values: Sequence[float | None]) -> np.ndarray:
    """Floats, with NaN, which is not drawn, where a value is undefined."""
    return np.array(values, dtype=np.float64)

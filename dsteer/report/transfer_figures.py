"""The figure of the ``transfer`` stage: share of the native vector's effect, above the nulls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from dsteer.report.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PALE,
    PURPLE,
    VERMILLION,
    WIDE,
    Drawing,
)
from dsteer.report.transfer_tables import LEVELS
from dsteer.report.values import at, estimate, interval, mapping, number, plural, real
from dsteer.store import Json

_NULLS = {
    "shuffled": (ORANGE, "s", "shuffled map"),
    "mapped_random": (VERMILLION, "^", "random of A, mapped"),
    "mean_carried": (PURPLE, "D", "mean of A, mapped"),
    "mean_state": (GREEN, "v", "mean state of B"),
    "random": (GREY, "x", "random of B"),
}
"""Colour, marker and short name of each null."""

_SHORT = {
    "kl_recovered": "KL\nrecovered",
    "first_token": "KL, first\ntoken",
    "reward_margin": "reward\nmargin",
    "reward_accuracy": "reward\naccuracy",
}

_FLOOR = -1.5
_TOP = 2.0
"""What lies beyond these shares is an arrow at the edge; the numbers stand in the tables."""


def share_of_native(result: dict[str, Json], _folder: Path) -> Drawing | None:
    """Cosines, then one panel a level: the share of the native vector's effect, and the nulls."""
    measured = {
        name: metric for name, metric in mapping(result.get("metrics")).items() if mapping(metric)
    }
    if not measured:
        return None
    figure = Figure(figsize=(WIDE, 3.3))
    axes = figure.subplots(1, 1 + len(LEVELS), width_ratios=(0.62, 1.2, 1.2))
    data: dict[str, Json] = {
        "sender_site": at(result, "chosen", "sender_site"),
        "receiver_site": at(result, "chosen", "receiver_site"),
        "map": at(result, "chosen", "map"),
        "pairs": at(result, "pairs", "test"),
        "cosine": _cosines(axes[0], mapping(result.get("cosine"))),
        "levels": {},
    }
    for panel, (level, words) in zip(axes[1:], LEVELS.items(), strict=True):
        data["levels"][level] = _shares(panel, measured, level)
        panel.set_title(words)
    highest, lowest = (
        max(panel.dataLim.y1 for panel in axes[1:]), min(panel.dataLim.y0 for panel in axes[1:])
    )  # fmt: skip
    for panel in axes[1:]:
        panel.set_ylim(lowest - 0.1, highest + 0.1)
    axes[1].set_ylabel("share of the native best")
    handles: list[Line2D] = [
        Line2D([], [], color=BLUE, marker="o", ls="-", lw=1.6, label="carried vector, interval"),
        Line2D([], [], color=INK, ls="--", lw=1, label="native best: the ceiling"),
        *(
            Line2D([], [], color=colour, marker=marker, ls="-", lw=1, label=label)
            for colour, marker, label in _NULLS.values()
        ),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, columnspacing=1.2)
    data["caption"] = _caption(result, data)
    return Drawing("share_of_native", figure, data)


def _cosines(axes: Axes, cosine: dict[str, Json]) -> dict[str, Json]:
    """Cosine with the native vector, of the carried vector and of each null."""
    carried = real(cosine.get("carried"))
    shown: dict[str, Json] = {"carried": carried, "nulls": {}}
    axes.axhline(1, color=INK, ls="--", lw=1)
    axes.axhline(0, color=GREY, ls=":", lw=0.8)
    if carried is not None:
        axes.plot([0], [carried], color=BLUE, marker="o", ms=6, ls="")
    places = _places(mapping(cosine.get("nulls")), 1.0)
    for name, (x, row) in places.items():
        shown["nulls"][name] = row
        _bar(axes, x, row, *_NULLS[name][:2], floor=-1.05, top=1.05)
    axes.set_ylim(-1.05, 1.12)
    axes.set_xlim(-0.6, 2.0)
    axes.set_xticks([0, 1.25], ["carried", "nulls"])
    axes.set_title("Cosine with native v*")
    return shown


def _shares(axes: Axes, measured: dict[str, Json], level: str) -> dict[str, Json]:
    """One panel: for each metric the carried vector's share with its interval, and the nulls."""
    shown: dict[str, Json] = {}
    axes.axhline(1, color=INK, ls="--", lw=1)
    axes.axhline(0, color=GREY, ls=":", lw=0.8)
    for place, (name, metric) in enumerate(measured.items()):
        found = at(metric, level)
        share = estimate(at(found, "share"))
        if share.value is None:
            shown[name] = None
            axes.axvspan(
                place - 0.36, place + 0.5, facecolor="white", edgecolor=PALE, hatch="////", lw=0
            )
            axes.text(
                place + 0.07,
                0.5,
                "undefined",
                rotation=90,
                ha="center",
                va="center",
                color=GREY,
                transform=axes.get_xaxis_transform(),
                bbox={"fc": "white", "ec": "none", "pad": 1.5},
            )
            continue
        low, high = share.low, share.high
        if low is not None and high is not None and low < _TOP and high > _FLOOR:
            ends = [max(low, _FLOOR), min(high, _TOP)]
            axes.plot([place - 0.2] * 2, ends, color=BLUE, lw=1.6)
        if _FLOOR <= share.value <= _TOP:
            axes.plot([place - 0.2], [share.value], color=BLUE, marker="o", ms=5.5)
        else:
            edge, way = (_TOP, 1) if share.value > _TOP else (_FLOOR, -1)
            _arrow(axes, place - 0.2, edge, way, color=BLUE, lw=1.6)
            axes.text(
                place - 0.26,
                edge,
                number(share.value),
                color=BLUE,
                size="x-small",
                rotation=90,
                ha="right",
                va="top" if way > 0 else "bottom",
            )
        nulls = {key: at(row, "share") for key, row in mapping(at(found, "nulls")).items()}
        for key, (x, row) in _places(nulls, float(place)).items():
            _bar(axes, x, row, *_NULLS[key][:2], floor=_FLOOR, top=_TOP)
        shown[name] = {"share": share._asdict(), "nulls": nulls}
    axes.set_xlim(-0.55, len(measured) - 0.4)
    axes.set_xticks(range(len(measured)), [_SHORT[name] for name in measured])
    return shown


def _places(nulls: dict[str, Json], start: float) -> dict[str, tuple[float, Json]]:
    """Where each null that was measured stands on the x axis, side by side."""
    known = [name for name in _NULLS if mapping(nulls.get(name))]
    return {name: (start + 0.02 + 0.115 * i, nulls[name]) for i, name in enumerate(known)}


def _arrow(axes: Axes, x: float, edge: float, way: int, **style: Any) -> None:
    """At an edge of the panel, out of it: up (way 1) or down (−1)."""
    axes.update_datalim([(x, edge)])
    axes.annotate(
        "",
        (x, edge + 0.06 * way),
        (x, edge - 0.14 * way),
        arrowprops={"arrowstyle": "->", **style},
    )


def _bar(
    axes: Axes, x: float, row: Json, colour: str, marker: str, *, floor: float, top: float
) -> None:
    """A null's mean and range; an arrow at the edge where all of it lies beyond the panel."""
    mean, low, high = (real(at(row, key)) for key in ("mean", "low", "high"))
    if mean is None or low is None or high is None:
        return
    style: dict[str, Any] = {"color": colour, "lw": 1}
    if high < floor or low > top:
        _arrow(axes, x, *((floor, -1) if high < floor else (top, 1)), **style)
        return
    if high > low:
        axes.plot([x, x], [max(low, floor), min(high, top)], **style)
    if floor <= mean <= top:
        axes.plot([x], [mean], color=colour, marker=marker, ms=3.6, ls="")


def _caption(result: dict[str, Json], data: dict[str, Json]) -> str:
    n = data["pairs"]
    kl = interval(at(result, "metrics", "kl_recovered", "one", "share"))
    return (
        f"What the sender's vector does in the receiver, carried from its {data['sender_site']} to "
        f"{data['receiver_site']} by the linear part of a {data['map']} map and scaled to the norm "
        f"of the receiver's own v* there. Left: cosine with that v*, "
        f"{number(data['cosine']['carried'])}. Middle and right: its effect on "
        f"{plural(n, 'test pair')} as a share of the effect of the receiver's own v* at the site "
        "and tokens that suit that one best on tune pairs (dashed: the ceiling), KL recovered at "
        f"λ = 1: {kl}. Nulls have the norm of v* where they act, and each draw went through the "
        "choice of sites, map and tokens that the carried vector went through: v_A through maps "
        "learned on shuffled positions, random directions of the sender through the same map, the "
        "sender's mean state through it, the receiver's mean state, and random directions of the "
        "receiver; bars are the middle 95 % of 20 draws or more, else the range. On the right each "
        "vector, nulls too, has the λ of most KL recovered on tune pairs. Arrows: below "
        f"{number(_FLOOR)} (a vector that does harm) or above {number(_TOP)}, with the value where "
        "it is the carried vector's. A share is undefined unless the interval of the native effect "
        "lies above 0."
    )

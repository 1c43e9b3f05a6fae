"""The figure of the ``learned`` stage: reward against its cost in KL, and the learning curves."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from dsteer.report.learned_tables import curve
from dsteer.report.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PALE,
    PURPLE,
    SKY,
    VERMILLION,
    WIDE,
    Drawing,
)
from dsteer.report.values import at, estimate, interval, mapping, number, plain, plural, point
from dsteer.store import Json

_ARMS = {
    "vector": (VERMILLION, "s", "--"),
    "vector_least_loss": (ORANGE, "D", "--"),
    "vector_least_kl": (PURPLE, "v", "--"),
    "learned_zero": (BLUE, "o", "-"),
    "learned_zero_bounded": (SKY, "P", "-."),
    "learned_vector": (GREEN, "^", (0, (5, 1))),
    "learned_vector_bounded": (INK, "X", ":"),
}
"""Colour, marker and line of each vector."""

_TUNED = (INK, "*")


def reward_and_kl(result: dict[str, Json], _folder: Path) -> Drawing | None:
    """One row a site: reward margin over KL to the base, and the loss over the steps."""
    sites = {name: found for name, found in mapping(result.get("sites")).items() if mapping(found)}
    if not sites:
        return None
    figure = Figure(figsize=(WIDE, 2.75 * len(sites) + 0.75))
    grid = figure.subplots(len(sites), 2, squeeze=False, width_ratios=(1.15, 1))
    data: dict[str, Json] = {"n_test": result.get("n_test"), "sites": {}}
    labels: dict[str, str] = {}
    for axes, (site, found) in zip(grid, sites.items(), strict=True):
        data["sites"][site] = {
            "positions": at(found, "positions"),
            "points": _points(axes[0], found),
            "curves": _curves(axes[1], found),
        }
        axes[0].set_title(f"{site}, {plain(at(found, 'positions'))} tokens")
        axes[1].set_title("Learning")
        labels |= {name: str(at(arm, "label")) for name, arm in mapping(at(found, "arms")).items()}
    handles = [
        Line2D([], [], color=colour, marker=marker, ls="", ms=5, label=labels[name])
        for name, (colour, marker, _) in _ARMS.items()
        if name in labels
    ]
    handles += [
        Line2D([], [], color=_TUNED[0], marker=_TUNED[1], ls="", ms=8, mfc="white",
               label="tuned model"),
        Line2D([], [], color=PALE, lw=6, label="random, norm of v*"),
        Line2D([], [], color=GREY, ls="--", lw=0.8, label="random, norm of learned"),
        Line2D([], [], color=GREY, lw=1, label="curves: train (thin), tune (thick)"),
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=3, columnspacing=1.4)
    data["caption"] = _caption(result, sites)
    return Drawing("reward_and_kl", figure, data)


def _points(axes: Axes, found: Json) -> dict[str, Json]:
    """Reward margins with intervals over the KL that they cost."""
    shown: dict[str, Json] = {}
    learned = str(at(found, "learned"))
    for name, key in (("vector", "random"), (learned, "random_learned")):
        low, high = (point(at(found, "random", name, "metrics", "reward_margin", end))
                     for end in ("low", "high"))  # fmt: skip
        if low is None or high is None:
            continue
        shown[key] = {"reward_margin": [low, high]}
        if name == "vector":
            axes.axhspan(low, high, color=PALE, lw=0, zorder=0)
        else:
            for end in (low, high):
                axes.axhline(end, color=GREY, ls="--", lw=0.8, zorder=1)
    axes.axhline(0, color=GREY, ls=":", lw=0.8)
    drawn = {name: (*_ARMS[name][:2], at(arm, "metrics"))
             for name, arm in mapping(at(found, "arms")).items() if name in _ARMS}  # fmt: skip
    drawn["tuned"] = (*_TUNED, at(found, "tuned"))
    for name, (colour, marker, metrics) in drawn.items():
        margin, cost = (estimate(at(metrics, key)) for key in ("reward_margin", "kl_to_base"))
        shown[name] = {"reward_margin": margin._asdict(), "kl_to_base": cost._asdict()}
        if margin.value is None or not cost.value:
            continue
        star = name == "tuned"
        axes.plot([cost.value], [margin.value], color=colour, marker=marker, ls="", zorder=4,
                  ms=9 if star else 5, mfc="white" if star else colour)  # fmt: skip
        if margin.low is not None and margin.high is not None:
            axes.plot([cost.value] * 2, [margin.low, margin.high], color=colour, lw=1.1)
        if cost.low is not None and cost.high is not None and cost.low > 0:
            axes.plot([cost.low, cost.high], [margin.value] * 2, color=colour, lw=1.1)
    axes.set_xscale("log")
    axes.set_xlabel("KL(steered‖base), nats a token")
    axes.set_ylabel("reward margin, test pairs")
    return shown


def _curves(axes: Axes, found: Json) -> dict[str, Json]:
    """Loss over the steps: train, tune, and the chosen step; and that of v* on test pairs."""
    shown: dict[str, Json] = {}
    axes.axhline(math.log(2), color=GREY, ls=":", lw=0.8)
    axes.annotate("ln 2: no preference", (0.99, math.log(2)), ha="right", va="bottom", size=7.5,
                  color=GREY, xycoords=axes.get_yaxis_transform(), xytext=(0, 1.5),
                  textcoords="offset points")  # fmt: skip
    for name, arm in mapping(at(found, "arms")).items():
        if name not in _ARMS or at(arm, "curve") is None:
            continue
        colour, marker, line = _ARMS[name]
        train, tune = curve(arm, "loss"), curve(arm, "heldout", "loss")
        axes.plot(*train, color=colour, ls=line, lw=0.7)
        axes.plot(*tune, color=colour, ls=line, lw=1.5)
        step = point(at(arm, "chosen_step"))
        at_step = dict(zip(*tune, strict=True)).get(step) if step is not None else None
        if step is not None and at_step is not None:
            axes.plot([step], [at_step], color=colour, marker=marker, ms=6, ls="", zorder=4)
        shown[name] = {
            "train": {"steps": train[0], "loss": train[1]},
            "tune": {"steps": tune[0], "loss": tune[1]},
            "chosen_step": step,
        }
    axes.set_xlabel("step (marked: chosen on tune pairs)")
    axes.set_ylabel("DPO loss, nats")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    return shown


def _caption(result: dict[str, Json], sites: dict[str, Json]) -> str:
    said = []
    for site, found in sites.items():
        arms = mapping(at(found, "arms"))
        learned = arms.get(str(at(found, "learned")))
        said.append(
            f"at {site} the vector {plain(at(learned, 'label'))} has a margin of "
            f"{interval(at(learned, 'metrics', 'reward_margin'))}, v* "
            f"{interval(at(arms.get('vector'), 'metrics', 'reward_margin'))}"
        )
    return (
        "Left: mean margin of the implicit reward on "
        f"{plural(result.get('n_test'), 'test pair')} (β = {number(point(result.get('beta')))}) "
        "over its cost, KL(steered‖base) on the tokens of the chosen answers, of v* at λ = 1 and "
        "at the λ chosen on tune pairs, of vectors learned under the DPO loss, and of the tuned "
        "model; bars are intervals, the grey band is the middle 95 % of random directions of the "
        "norm of v*, the dashed lines the same for the norm of the learned vector. "
        "Up and left is better. Right: the DPO loss while vectors are learned, on "
        "training pairs (thin) and tune pairs (thick), with the step that was chosen. "
        f"{'; '.join(said)[:1].upper()}{'; '.join(said)[1:]}."
    )

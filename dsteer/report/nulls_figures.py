"""The null beside the pair, drawn: each stage's curves overlaid, and one forest of main numbers.

A figure is a list of panels, and a panel says where a run's curve stands in its artifacts; the
pair is drawn in colour with its intervals, the nulls as grey lines told apart by line and marker.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from dsteer.report.nulls_tables import Compared, compared, first_site, place
from dsteer.report.profile_tables import words_of
from dsteer.report.style import BLUE, GREY, INK, PALE, WIDE, Drawing, Line
from dsteer.report.values import (
    Estimate,
    at,
    block,
    estimate,
    items,
    mapping,
    point,
    real,
    site_order,
)
from dsteer.store import Json, read_tensors

_NULL_LINES: tuple[tuple[Line, str], ...] = (
    ("--", "s"),
    ("-.", "^"),
    (":", "v"),
    ((0, (5, 1, 1, 1)), "D"),
    ((0, (1, 1)), "P"),
    ((0, (7, 2)), "X"),
)
"""Line and marker of the nulls, in order; with more of them they come round again."""

_NULL_GREYS = (GREY, INK, "#9a9a9a")

_BINS = 48
"""Bins of the cosines' histogram."""

_MARKED = 24
"""Curves of more points have no markers."""

_LEAST = -1.0
"""Shares of KL recovered below this leave the axes: far outside, λ only shows how far."""


@dataclass(frozen=True)
class Curve:
    """One run's curve: numbers or names along x, estimates along y, and a band of chance."""

    x: Sequence[Any]
    y: Sequence[Estimate]
    chance: Sequence[Estimate] = ()


@dataclass(frozen=True)
class Panel:
    """One panel: its words, where each run's curve stands, and how the axes are."""

    title: str
    x: str
    y: str
    read: Callable[[Compared], Curve | None]
    share: bool = False
    log: bool = False
    steps: bool = False


# ---------------------------------------------------------------------------------- curves


def _over_sites(stage: str, *keys: str, null: Sequence[str] = ()) -> Callable[..., Curve | None]:
    def read(run: Compared) -> Curve | None:
        sites = mapping(at(run.results.get(stage), "sites"))
        order = site_order(sites)
        chance = [Estimate(None, None, point(at(sites[s], *null))) for s in order] if null else []
        return Curve(order, [estimate(at(sites[s], *keys)) for s in order], chance)

    return read


def _cosine_shares(run: Compared) -> Curve | None:
    """Share of the test prompts in each bin of the held-out cosine, at the run's chosen site."""
    site = at(run.results.get("cosine"), "chosen_site")
    path = run.folder / "cosine" / "cosines.safetensors"
    if site is None or not path.is_file():
        return None
    found = read_tensors(path).get(f"{site}/held_out")
    if found is None or not np.isfinite(found).any():
        return None
    counts, edges = np.histogram(found[np.isfinite(found)], _BINS, (-1, 1))
    middle = (edges[:-1] + edges[1:]) / 2
    return Curve(middle.tolist(), [Estimate(float(c), None, None) for c in counts / counts.sum()])


def _singular(run: Compared) -> Curve | None:
    """The largest σ_j/‖ΔH‖_F, uncentred, at the site that the stage tells of."""
    result = run.results.get("spectrum")
    site = str(at(result, "headline", "site"))
    top = items(at(result, "sites", site, "delta", "uncentred", "top"))
    return Curve(list(range(1, len(top) + 1)), [estimate(v) for v in top]) if top else None


def _recovered(panel: str) -> Callable[[Compared], Curve | None]:
    def read(run: Compared) -> Curve | None:
        found = at(run.results.get("vector"), "kl_recovery", panel)
        strengths, values = items(at(found, "strengths")), items(at(found, "recovered"))
        return Curve(strengths, [estimate(v) for v in values]) if strengths and values else None

    return read


def _swept(stage: str, metric: str) -> Callable[[Compared], Curve | None]:
    def read(run: Compared) -> Curve | None:
        result = run.results.get(stage)
        found, strengths = at(result, "metrics", metric), items(at(result, "strengths"))
        values = items(at(found, "curves", "v"))
        if not values:
            return None
        band = [
            Estimate(
                None, real(at(found, "random", "low", i)), real(at(found, "random", "high", i))
            )
            for i in range(len(strengths))
        ]
        return Curve(strengths, [estimate(v) for v in values], band)

    return read


def _learning(run: Compared) -> Curve | None:
    """The mean reward margin on held-out pairs over the steps."""
    points = items(at(run.results.get("dpo"), "curve", "heldout"))
    if not points:
        return None
    return Curve(
        [at(p, "step") for p in points], [estimate(at(p, "reward_margin")) for p in points]
    )


def _profiled(what: str, key: str) -> Callable[[Compared], Curve | None]:
    """Over sites, at the tokens that the pair's profile chose."""

    def read(run: Compared) -> Curve | None:
        result = run.results.get("profile")
        sites = mapping(at(result, "sites"))
        tokens = run.tokens or next(iter(items(at(result, "tokens"))), None)
        order = site_order(sites)
        if not order or tokens is None:
            return None
        found = [at(sites[site], str(tokens)) for site in order]
        bands = [at(each, "random", key) for each in found]
        return Curve(
            order,
            [estimate(at(each, what, key)) for each in found],
            [Estimate(None, real(at(b, "low")), real(at(b, "high"))) for b in bands]
            if what == "v"
            else (),
        )

    return read


def _ranked(*keys: str) -> Callable[[Compared], Curve | None]:
    def read(run: Compared) -> Curve | None:
        found = first_site(run.results.get("rank"))
        ks, values = items(at(found, "k")), items(at(found, *keys))
        if not ks or not values:
            return None
        band = [
            Estimate(None, real(at(each, "low")), real(at(each, "high")))
            for each in items(at(found, "random"))
        ]
        return Curve(ks, [estimate(v) for v in values], band)

    return read


_SHARE = "share of KL recovered"
_SITE = "block k; other sites apart"

_SWEEP_PANELS = {
    stage: (
        Panel("KL recovered under v*", "strength λ", _SHARE, _swept(stage, "kl_recovered"), True),
        Panel("Reward margin under v*", "strength λ", "reward margin",
              _swept(stage, "reward_margin")),
    )
    for stage in ("interpolation", "inversion")
}  # fmt: skip

PANELS: dict[str, tuple[Panel, ...]] = {
    "dpo": (Panel("Learning, held-out pairs", "step", "reward margin", _learning),),
    "vector": (
        Panel("First token", "strength λ at final_norm", _SHARE, _recovered("first_token"), True),
        Panel("Answer tokens", "strength λ at final_norm", _SHARE, _recovered("response"), True),
    ),
    "cosine": (
        Panel("Each at its chosen site", "held-out cosine with v*", "share of test prompts",
              _cosine_shares, steps=True),
        Panel("Mean over test prompts", _SITE, "held-out cosine",
              _over_sites("cosine", "held_out", "mean", null=("null", "q95"))),
    ),
    "spectrum": (
        Panel("Spectral entropy of ΔH", _SITE, "entropy, nats",
              _over_sites("spectrum", "delta", "uncentred", "entropy")),
        Panel("Singular values of ΔH", "j", r"$\sigma_j\,/\,\Vert\Delta H\Vert_F$", _singular,
              log=True),
    ),
    "profile": (
        Panel("v* added", _SITE, _SHARE, _profiled("v", "kl_recovered"), True),
        Panel("Tuned state patched in", _SITE, _SHARE, _profiled("patched", "kl_recovered"), True),
        Panel("v* added", _SITE, "reward margin", _profiled("v", "reward_margin")),
    ),
    "rank": (
        Panel("Oracle, singular order", "directions k", _SHARE,
              _ranked("oracle", "singular"), True),
        Panel("Deployable", "directions k", _SHARE, _ranked("deployable"), True),
    ),
    **_SWEEP_PANELS,
}  # fmt: skip
"""Stage → the panels of its figure beside the nulls."""


def beside_nulls(stage: str) -> Callable[[dict[str, Json], Path], Drawing | None]:
    """The figure of one stage, from the result and the folder of `claims`."""

    def draw(result: dict[str, Json], folder: Path) -> Drawing | None:
        runs = _runs(result, folder)
        measured = [run for run in runs if stage in run.results]
        if len(measured) < 2 or measured[0].name != "pair":
            return None
        found = [(panel, [panel.read(run) for run in measured]) for panel in PANELS[stage]]
        shown = [(panel, curves) for panel, curves in found if curves[0] is not None]
        if not shown:
            return None
        figure = Figure(figsize=(WIDE if len(shown) > 1 else WIDE / 1.6, 2.9))
        grid = figure.subplots(1, len(shown), squeeze=False)[0]
        data: dict[str, Json] = {"stage": stage, "runs": [r.name for r in measured], "panels": []}
        for axes, (panel, curves) in zip(grid, shown, strict=True):
            data["panels"].append(_panel(axes, panel, measured, curves))
        figure.legend(handles=_handles(measured, shown), loc="outside lower center",
                      ncols=4 if len(shown) > 1 else 2,
                      columnspacing=1.4)  # fmt: skip
        data["caption"] = (
            f"{stage}, beside its nulls: the same measured on pairs that differ from this one in "
            "one thing. In colour the pair with its intervals; grey lines are the nulls "
            f"({', '.join(run.label for run in measured[1:])}), each with its own v*"
            + (", and the grey band is the pair's own null or its random directions"
               if any(curves[0] and curves[0].chance for _, curves in shown) else "")
            + (f". Tokens changed: {words_of(measured[0].tokens)}"
               if stage == "profile" and measured[0].tokens else "")
            + (". Shares below −1 leave the axes" if any(p.share for p, _ in shown) else "")
            + "."
        )  # fmt: skip
        return Drawing(f"nulls_{stage}", figure, data)

    return draw


def _runs(result: dict[str, Json], folder: Path) -> list[Compared]:
    names = [str(at(null, "name")) for null in items(result.get("nulls"))]
    return compared(folder.parent, names) if names else []


def _look(i: int) -> dict[str, Any]:
    """How the i-th run is drawn; the pair is the 0-th."""
    if i == 0:
        return {"color": BLUE, "ls": "-", "marker": "o", "lw": 1.8, "zorder": 4}
    line, marker = _NULL_LINES[(i - 1) % len(_NULL_LINES)]
    colour = _NULL_GREYS[(i - 1) % len(_NULL_GREYS)]
    return {"color": colour, "ls": line, "marker": marker, "mfc": "white", "lw": 1.1, "zorder": 3}


def _panel(
    axes: Axes, panel: Panel, runs: Sequence[Compared], curves: Sequence[Curve | None]
) -> Json:
    """Draw one panel and return its numbers."""
    own = curves[0]
    assert own is not None
    named = bool(own.x) and isinstance(own.x[0], str)
    places = _places(own.x) if named else {x: float(x) for curve in curves if curve
                                           for x in curve.x}  # fmt: skip
    told: dict[str, Json] = {}
    for i, (run, curve) in enumerate(zip(runs, curves, strict=True)):
        if curve is None:
            continue
        told[run.name] = {"x": list(curve.x), "y": [value._asdict() for value in curve.y]}
        chance = list(curve.chance) if i == 0 else []
        if chance:
            told[run.name]["chance"] = [value._asdict() for value in chance]
        look = _look(i) | {"ms": 3.4 if len(curve.x) <= _MARKED else 0}
        if panel.steps:
            look |= {"drawstyle": "steps-mid", "marker": ""}
        for part in _joined(curve.x):
            here = [k for k in part if curve.x[k] in places]
            x, y = [places[curve.x[k]] for k in here], [curve.y[k] for k in here]
            axes.plot(x, _column(y, "value"), **look)
            if i == 0:
                _fill(axes, x, _column(y, "low"), _column(y, "high"), color=BLUE, alpha=0.2)
            if chance:
                low, high = (_column([chance[k] for k in here], end) for end in ("low", "high"))
                _fill(axes, x, np.where(np.isnan(low), 0.0, low), high, color=PALE, zorder=0)
    if named:
        step = math.ceil(len(own.x) / 9)
        shown = [k for k, x in enumerate(own.x) if k % step == 0 or block(str(x)) is None]
        axes.set_xticks([places[own.x[k]] for k in shown], [_short(str(own.x[k])) for k in shown])
    if panel.steps:
        reached = [x for curve in curves if curve for x, y in zip(curve.x, curve.y, strict=True)
                   if y.value]  # fmt: skip
        axes.set_xlim(min(reached) - 0.05, max(reached) + 0.05)
    if panel.share:
        bottom, top = axes.get_ylim()
        axes.set_ylim(max(bottom, _LEAST - 0.05), min(top, 1.1))
        for level in (0.0, 1.0):
            axes.axhline(level, color=PALE, lw=0.8, zorder=0)
    if panel.log:
        axes.set_yscale("log")
    axes.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
    return {"title": panel.title, "x": panel.x, "y": panel.y, "runs": told}


def _places(sites: Sequence[Any]) -> dict[Any, float]:
    """x of each site: blocks in a row, each other site apart from them."""
    others = 0
    places: dict[Any, float] = {}
    for k, site in enumerate(sites):
        others += block(str(site)) is None
        places[site] = k + 0.4 * others
    return places


def _joined(x: Sequence[Any]) -> list[list[int]]:
    """Places that one line joins: numbers all, blocks among each other, other sites alone."""
    if not x or not isinstance(x[0], str):
        return [list(range(len(x)))]
    alone = [[k] for k, site in enumerate(x) if block(site) is None]
    return [[k for k, site in enumerate(x) if block(site) is not None], *alone]


def _fill(axes: Axes, x: Sequence[float], low: Any, high: Any, **look: Any) -> None:
    """A band; of a single place, a bar as wide as a marker."""
    if len(x) == 1:
        x, low, high = [x[0] - 0.12, x[0] + 0.12], np.repeat(low, 2), np.repeat(high, 2)
    axes.fill_between(x, low, high, lw=0, **look)


def _column(values: Sequence[Estimate], part: str) -> np.ndarray:
    return np.array(
        [np.nan if (v := getattr(value, part)) is None else v for value in values], dtype=np.float64
    )


def _short(site: str) -> str:
    """k of a block; other sites by their name, folded."""
    k = block(site)
    return str(k) if k is not None else site.replace("_", "\n")


def _handles(
    runs: Sequence[Compared], shown: Sequence[tuple[Panel, Sequence[Curve | None]]] = ()
) -> list[Any]:
    handles: list[Any] = [
        Line2D([], [], label=run.label, ms=3.4, **_look(i)) for i, run in enumerate(runs)
    ]
    if any(curves[0] is not None and curves[0].chance for _, curves in shown):
        handles.append(Patch(color=PALE, label="chance, of the pair"))
    return handles


# ---------------------------------------------------------------------------------- the forest


def _chosen_cosine(run: Compared) -> Json:
    result = run.results.get("cosine")
    return at(result, "sites", str(at(result, "chosen_site")), "held_out", "mean")


def _share(run: Compared) -> Json:
    result = run.results.get("spectrum")
    site = at(run.results.get("cosine"), "chosen_site") or at(result, "headline", "site")
    return at(result, "sites", str(site), "shared_share")


_MAIN: tuple[tuple[str, Callable[[Compared], Json]], ...] = (
    ("held-out cosine", _chosen_cosine),
    ("shared share m", _share),
    ("k₉₀, oracle", lambda run: at(first_site(run.results.get("rank")), "k90", "oracle")),
    ("efficiency", lambda run: at(place(run.results.get("profile")), "efficiency")),
    ("KL of answers, by v*",
     lambda run: at(place(run.results.get("profile")), "v", "kl_recovered_answers")),
    ("margin under v*",
     lambda run: at(place(run.results.get("profile")), "v", "reward_margin")),
    ("reward accuracy", lambda run: at(run.results.get("dpo"), "test", "reward_accuracy")),
)  # fmt: skip
"""The main numbers, each at the place that the run itself chose on tune."""


def pair_and_nulls(result: dict[str, Json], folder: Path) -> Drawing | None:
    """One row a run, one panel a number, with intervals."""
    runs = _runs(result, folder)
    if len(runs) < 2:
        return None
    values = {title: [estimate(read(run)) for run in runs] for title, read in _MAIN}
    shown = {title: row for title, row in values.items() if any(e.value is not None for e in row)}
    if not shown:
        return None
    columns = min(4, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(WIDE, rows * (0.75 + 0.24 * len(runs))))
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(shown) :]:
        axes.set_axis_off()
    for i, (axes, (title, row)) in enumerate(zip(grid.flat, shown.items(), strict=False)):
        for y, value in enumerate(row):
            look = _look(y) | {"ls": ""}
            if value.value is None:
                axes.annotate("–", (0.02, y), xycoords=axes.get_yaxis_transform(), color=GREY,
                              va="center")  # fmt: skip
                continue
            if value.low is not None and value.high is not None:
                axes.plot([value.low, value.high], [y, y], color=look["color"], lw=1.3)
            axes.plot([value.value], [y], ms=4.5, **look)
        axes.axvline(0, color=PALE, lw=0.9, zorder=0)
        axes.set_yticks(range(len(runs)), [run.label for run in runs] if i % columns == 0 else [])
        axes.set_ylim(len(runs) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.set_title(title)
        axes.margins(x=0.12)
    return Drawing(
        "pair_and_nulls",
        figure,
        {
            "runs": [run.name for run in runs],
            "numbers": {title: [v._asdict() for v in row] for title, row in shown.items()},
            "caption": (
                "The pair and its nulls: main numbers on test prompts and pairs (m: on fit "
                "prompts) with their intervals, each run with its own v*, at the site that its own "
                "tune prompts chose. –: undefined, or not measured."
            ),
        },
    )


NULL_FIGURES = {stage: f"nulls_{stage}" for stage in PANELS}
"""Stage → the figure that `claims` draws for its section."""

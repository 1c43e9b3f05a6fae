"""The figures of the stages ``maps`` and ``strength``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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
    Mark,
)
from dsteer.report.values import (
    at,
    estimate,
    interval,
    is_undefined,
    items,
    mapping,
    plural,
    point,
    short_site,
    site_order,
)
from dsteer.store import Json, read_tensors

_MARKS = {
    "scale": Mark("scale", ORANGE, ":", "v"),
    "translation": Mark("translation", VERMILLION, "--", "s"),
    "scale_translation": Mark("both", PURPLE, "-.", "P"),
    "low_rank": Mark("low rank", GREEN, (0, (5, 1)), "^"),
    "ridge": Mark("ridge", BLUE, "-", "o"),
}
_FLOOR = -1.0


def nested_maps(result: dict[str, Json], _folder: Path) -> Drawing | None:
    """Left: R² over sites; right: KL recovered at the places measured."""
    sites = mapping(result.get("sites"))
    names = [site for site in site_order(sites) if not is_undefined(sites[site])]
    kl = {site: found for site, found in mapping(result.get("kl")).items()
          if at(found, "recovered") is not None}  # fmt: skip
    if not names:
        return None
    figure = Figure(figsize=(WIDE, 3.1))
    row = figure.subplots(1, 2 if kl else 1, squeeze=False)[0]
    data: dict[str, Json] = {"n_test": result.get("n_test"), "r2": {}, "kl": {}}
    for name, mark in _MARKS.items():
        values = [at(sites[site], "r2", name) for site in names]
        data["r2"][name] = dict(zip(names, values, strict=True))
        _line(row[0], values, mark)
    row[0].axhline(0, color=GREY, ls=":", lw=0.8)
    row[0].set_ylim(bottom=max(_FLOOR, min(row[0].get_ylim()[0], -0.05)))
    row[0].set_xticks(range(len(names)), [short_site(site) for site in names],
                      rotation=90 if len(names) > 12 else 0)  # fmt: skip
    row[0].set_xlabel("site (resid_post.k; then final_norm)")
    row[0].set_ylabel("R² of the displacement")
    row[0].set_title("Held-out states")
    if kl:
        data["kl"] = kl
        _bars(row[1], kl)
    handles, labels = row[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, columnspacing=1.4)
    first = str(at(result, "headline", "site"))
    data["caption"] = (
        "Left: share of the squared displacement that each map predicts from the base's state, on "
        f"{plural(result.get('n_test'), 'test prompt')}. Right: KL recovered when each map moves "
        "the base's states; the line is patching the tuned states. A translation is the steering "
        f"vector; what lies above it is what a constant misses (at {first}: "
        f"{interval(at(sites, first, 'gap'))} of R²). Bars are intervals."
    )
    return Drawing("maps", figure, data)


def _line(axes: Axes, values: Sequence[Json], mark: Mark) -> None:
    known = [(x, estimate(value)) for x, value in enumerate(values)]
    known = [(x, value) for x, value in known if value.value is not None]
    axes.plot([x for x, _ in known], [max(value.value or 0.0, _FLOOR) for _, value in known],
              color=mark.colour, ls=mark.line, marker=mark.marker, label=mark.label)  # fmt: skip
    for x, value in known:
        if value.low is not None and value.high is not None and value.high > _FLOOR:
            axes.plot([x, x], [max(value.low, _FLOOR), value.high], color=mark.colour, lw=0.9)


def _bars(axes: Axes, kl: dict[str, Json]) -> None:
    """One group of points a place, one point a map."""
    for group, found in enumerate(kl.values()):
        for number, (name, mark) in enumerate(_MARKS.items()):
            x = group + (number - 2) * 0.14
            value = estimate(at(found, "recovered", name))
            if value.value is None:
                continue
            shown = max(value.value, _FLOOR)
            axes.plot([x], [shown], color=mark.colour, marker=mark.marker, ls="")
            if value.value < _FLOOR:
                axes.annotate(f"{value.value:.1f}", (x, _FLOOR), xytext=(0, 4), size=6.5,
                              textcoords="offset points", ha="center",
                              color=mark.colour)  # fmt: skip
            elif value.low is not None and value.high is not None:
                axes.plot([x, x], [max(value.low, _FLOOR), value.high], color=mark.colour, lw=0.9)
        whole = point(at(found, "patched"))
        if whole is not None:
            axes.plot([group - 0.36, group + 0.36], [whole] * 2, color=INK, lw=0.9)
    axes.axhline(0, color=GREY, ls=":", lw=0.8)
    axes.set_xticks(range(len(kl)), list(kl))
    axes.set_xlim(-0.5, len(kl) - 0.5)
    axes.set_ylabel("KL recovered, R")
    axes.set_title("Moved by the map (line: patched)")


def best_strength(result: dict[str, Json], folder: Path) -> Drawing | None:
    """One row a site: each token's own strength, and KL recovered over λ."""
    sites = mapping(result.get("sites"))
    if not sites:
        return None
    path = folder / "strengths.safetensors"
    own = read_tensors(path) if path.is_file() else {}
    figure = Figure(figsize=(WIDE, 2.5 * len(sites) + 0.5))
    grid = figure.subplots(len(sites), 2, squeeze=False)
    data: dict[str, Json] = {"n_test": result.get("n_test"), "sites": {}}
    for row, (site, found) in zip(grid, sites.items(), strict=True):
        data["sites"][site] = {"histogram": _histogram(row[0], own.get(site)), **found}
        _curve(row[1], mapping(found))
        row[0].set_title(f"{site}: own strength of each test token")
        row[1].set_title("KL recovered at a constant λ")
    handles, labels = grid[0][1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, columnspacing=1.4)
    data["caption"] = (
        "Left: λ = ⟨Δ, v⟩/‖v‖² of the changed tokens of "
        f"{plural(result.get('n_test'), 'test pair')}. Right: KL recovered by λv* on the test "
        "pairs, with λ = 1, the least-squares strength and the constant of least KL, chosen on "
        "tune pairs; the band is the interval, the upper line is the best of these strengths for "
        "each answer, which none of them can pass for all."
    )
    return Drawing("strength", figure, data)


def _histogram(axes: Axes, values: np.ndarray | None) -> Json:
    axes.axvline(1, color=INK, lw=0.8)
    axes.set_xlabel("λ, in units of v*")
    axes.set_ylabel("tokens")
    if values is None or not len(values):
        return None
    low, high = np.quantile(values, [0.005, 0.995])
    counts, edges = np.histogram(values, bins=30, range=(low, max(high, low + 1e-9)))
    axes.stairs(counts, edges, fill=True, color=PALE)
    axes.stairs(counts, edges, color=BLUE)
    return {"counts": counts.tolist(), "edges": edges.tolist()}


def _curve(axes: Axes, found: dict[str, Json]) -> None:
    strengths = items(at(found, "curve", "strengths"))
    values = [estimate(value) for value in items(at(found, "curve", "recovered"))]
    known = [(x, v) for x, v in zip(strengths, values, strict=True) if v.value is not None]
    if not known:
        return
    places = [x for x, _ in known]
    axes.fill_between(places, [v.low if v.low is not None else v.value or 0.0 for _, v in known],
                      [v.high if v.high is not None else v.value or 0.0 for _, v in known],
                      color=PALE, lw=0)  # fmt: skip
    axes.plot(places, [v.value or 0.0 for _, v in known], color=BLUE, label="constant λ")
    oracle = point(at(found, "recovered", "per_prompt_oracle"))
    if oracle is not None:
        axes.axhline(oracle, color=INK, lw=0.8, label="best λ for each answer")
    for x, colour, line, words in (
        (1.0, GREY, ":", "λ = 1"),
        (point(at(found, "least_squares")), ORANGE, "--", "least squares"),
        (point(at(found, "kl_optimal")), GREEN, "-.", "least KL, on tune"),
    ):
        if x is not None:
            axes.axvline(x, color=colour, ls=line, lw=1.1, label=words)
    top = max(v.value or 0.0 for _, v in known)
    axes.set_ylim(bottom=max(axes.get_ylim()[0], -1.0 if top > 0 else axes.get_ylim()[0]))
    axes.set_xlabel("λ, in units of v*")
    axes.set_ylabel("KL recovered, R")

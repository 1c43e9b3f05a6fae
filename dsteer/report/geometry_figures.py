"""Figures 1a to 1c, drawn from the ``geometry`` stage's result and tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, Patch

from dsteer.report.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PALE,
    SHADES,
    VERMILLION,
    WIDE,
    Drawing,
)
from dsteer.report.values import (
    FINAL_NORM,
    at,
    estimate,
    interval,
    items,
    mapping,
    number,
    percent,
    plural,
    point,
    real,
    site_order,
)
from dsteer.store import Json, read_tensors

_ARROWS = 24
"""Pairs whose arrows figure 1a draws."""

_POINTS = 120
"""Prompts that each cloud of figure 1c draws."""

_UNDER = 0.86
"""Height of an upright line, as a share of the panel: the legend stands above."""

_AXES = (
    ("mean e_w − e_l", "the mean e_w − e_l"),
    ("v*, the rest", "what v* has beside it"),
    ("spread of n_base", "what n_base spreads most in beside these"),
)
"""The axes of figure 1a: a short name, and a long one."""

# ---------------------------------------------------------------------------------- 1a


def fig1a_preference_geometry(result: dict[str, Json], folder: Path) -> Drawing | None:
    """Figure 1a: n_base → n_tuned of real pairs in three real axes, and the margin change."""
    measured = mapping(result.get("preference"))
    if not measured:
        return None
    tensors = read_tensors(folder / "geometry.safetensors")
    change = tensors["margin/tuned"] - tensors["margin/base"]
    figure = Figure(figsize=(WIDE, 3.5))
    grid = GridSpec(1, 2, figure=figure, width_ratios=(1.25, 1))
    data: dict[str, Json] = {"n": measured.get("n")}
    data["sketch"] = _sketch(figure.add_subplot(grid[0], projection="3d"), tensors)
    axes = figure.add_subplot(grid[1])
    counts, edges = np.histogram(change, bins=min(30, max(5, round(math.sqrt(len(change))) * 2)))
    axes.stairs(counts / len(change), edges, fill=True, color=BLUE, alpha=0.3)
    axes.stairs(counts / len(change), edges, color=BLUE, lw=1)
    mean, alone = estimate(measured.get("margin_change")), estimate(measured.get("margin_change_v"))
    handles = [_upright(axes, 0.0, GREY, ":", "no change")]
    if mean.value is not None:
        handles.append(_upright(axes, mean.value, INK, "-", "mean"))
        if mean.low is not None and mean.high is not None:
            axes.axvspan(mean.low, mean.high, 0, _UNDER, color=INK, alpha=0.15, lw=0)
    if alone.value is not None:
        handles.append(_upright(axes, alone.value, VERMILLION, "--", "of v* alone"))
    axes.set_ylim(0, 1.2 * float(counts.max()) / len(change))
    axes.legend(handles=handles, loc="upper center", ncols=3, columnspacing=1.0, handlelength=1.8)
    axes.set_xlabel("change of the margin ⟨n, e_w − e_l⟩ (nats)")
    axes.set_ylabel("share of pairs")
    axes.set_title(f"Margin change (N = {plural(measured.get('n'), 'pair')})")
    data |= {
        "bin_edges": edges.tolist(),
        "share": (counts / len(change)).tolist(),
        "margin_change": mean._asdict(),
        "margin_change_v": alone._asdict(),
    }
    sketch = data["sketch"]
    has_v = "v" in sketch
    data["caption"] = (
        f"Figure 1a. Left: {len(sketch['drawn'])} of {plural(measured.get('n'), 'test pair')}. A "
        "thin line leads from n_base (square) to n_tuned (triangle), the final_norm states that "
        "predict the first token in which the pair's answers differ, in three orthogonal axes: "
        f"{'; '.join(sketch['axes'])}. Their scales differ, and the origin is the median n_base. "
        f"Green: the direction of the mean e_w − e_l, drawn as long as "
        + ("v* is (dashed, black). " if has_v else "the mean displacement. ")
        + f"Right: the margin change of every pair, mean {interval(measured.get('margin_change'))} "
        f"nats (shaded: interval); {percent(point(measured.get('share_rising')))} of the margins "
        "rise."
        + (
            f" v* alone, the same vector for each pair, gives {number(alone.value)}."
            if alone.value is not None
            else " v* is zero, or was not read, at final_norm."
        )
    )
    return Drawing("fig1a_preference_geometry", figure, data)


def _sketch(axes: Any, tensors: dict[str, np.ndarray]) -> dict[str, Json]:
    """The three-dimensional panel; returns what was drawn."""
    base, tuned = tensors["sketch/base"], tensors["sketch/tuned"]
    has_v = "sketch/v" in tensors
    kinds = [_AXES[0], *([_AXES[1]] if has_v else []), *[_AXES[2]] * 3]
    used = [kinds[number] for number in tensors["sketch/used"].tolist()]
    shown = _picked(len(base), _ARROWS)
    start, end = _three(base[shown]), _three(tuned[shown])
    for a, b in zip(start, end, strict=True):
        axes.plot(*zip(a, b, strict=True), color=GREY, lw=0.7)
    axes.scatter(*start.T, s=11, facecolor="white", edgecolor=ORANGE, marker="s", depthshade=False)
    axes.scatter(*end.T, s=13, color=VERMILLION, marker="^", depthshade=False)
    preference = _three(tensors["sketch/preference"][None])[0]
    v = _three(tensors["sketch/v"][None])[0] if has_v else None
    length = np.linalg.norm(end - start, axis=1).mean() if v is None else np.linalg.norm(v)
    scale = float(length / (np.linalg.norm(preference) or 1.0))
    axes.plot(*_ray(scale * preference), color=GREEN, lw=2.4, marker="o", ms=5, markevery=[1])
    handles = [
        Line2D([], [], ls="", marker="s", mfc="white", color=ORANGE, label="n_base"),
        Line2D([], [], ls="", marker="^", color=VERMILLION, label="n_tuned"),
        Line2D([], [], color=GREEN, lw=2.4, marker="o", label="mean e_w − e_l"),
    ]
    drawn: dict[str, Json] = {
        "axes": [words for _, words in used],
        "drawn": [int(i) for i in shown],
        "n_base": start.tolist(),
        "n_tuned": end.tolist(),
        "preference": preference.tolist(),
        "preference_scale": scale,
    }
    if v is not None:
        axes.plot(*_ray(v), color=INK, lw=1.8, ls="--", marker="D", ms=4.5, markevery=[1])
        handles.append(Line2D([], [], color=INK, lw=1.8, ls="--", marker="D", label="v*"))
        drawn["v"] = v.tolist()
    for axis, (name, _) in zip((axes.xaxis, axes.yaxis, axes.zaxis), used, strict=False):
        axis.set_label_text(name)
        axis.labelpad = -2
    axes.tick_params(pad=-1, labelsize=6.5)
    axes.zaxis.set_tick_params(pad=1)
    axes.zaxis.labelpad = 1
    axes.locator_params(nbins=4)
    axes.set_box_aspect((1, 1, 0.85), zoom=0.92)
    axes.view_init(elev=20, azim=-58)
    axes.legend(handles=handles, loc="upper left", ncols=4, columnspacing=0.9, handlelength=1.6,
                bbox_to_anchor=(-0.12, 1.1))  # fmt: skip
    return drawn


def _ray(end: np.ndarray) -> list[list[float]]:
    """x, y and z of a line from the origin."""
    return [[0.0, float(value)] for value in end]


def _three(rows: np.ndarray) -> np.ndarray:
    """Coordinates in three axes; those that do not exist are 0."""
    return np.pad(rows, ((0, 0), (0, max(0, 3 - rows.shape[1]))))


# ---------------------------------------------------------------------------------- 1b


_SITE_MARKS = ((GREEN, "-."), (ORANGE, "--"), (BLUE, "-"))
"""Colour and line of the sites of figure 1b, the last one's last."""


def fig1b_gradients(result: dict[str, Json], folder: Path) -> Drawing | None:
    """Figure 1b: sequence gradients of the DPO loss as a lattice, and their pairwise cosines."""
    gradients = mapping(result.get("gradients"))
    sites = mapping(at(gradients, "policies", "base", "sites"))
    if not sites:
        return None
    tensors = read_tensors(folder / "geometry.safetensors")
    order = site_order(sites)
    shown = FINAL_NORM if FINAL_NORM in sites else order[-1]
    figure = Figure(figsize=(WIDE, 3.5))
    grid = GridSpec(1, 2, figure=figure, width_ratios=(1, 1.1))
    data: dict[str, Json] = {"n": gradients.get("n"), "policy": "base", "lattice_site": shown}
    lattice = figure.add_subplot(grid[0])
    plane = tensors[f"gradient/base/{shown}/plane"]
    to_v = tensors.get(f"gradient/base/{shown}/cosine_v")
    data["lattice"] = _lattice(figure, lattice, plane, to_v)
    lattice.set_title(f"Descent of each pair at {shown}")

    axes = figure.add_subplot(grid[1])
    null = tensors["gradient/random"]
    found = {site: tensors[f"gradient/base/{site}/pairwise"] for site in order}
    edges = _edges([*found.values(), null])
    data |= {"bin_edges": edges.tolist(), "pairwise": {}}
    heights = np.histogram(null, edges)[0] / len(null)
    axes.stairs(heights, edges, fill=True, color=PALE)
    data["random"] = {"share": heights.tolist(), "n": len(null)}
    handles: list[Any] = []
    for site, (colour, line) in zip(order, _SITE_MARKS[-len(order) :], strict=True):
        mean = estimate(at(sites, site, "sequence", "pairwise_cosine"))
        drawn: dict[str, Json] = {"mean": mean._asdict(), "n": len(found[site])}
        data["pairwise"][site] = drawn
        label = f"{site}: undefined"
        if len(found[site]):
            drawn["share"] = (np.histogram(found[site], edges)[0] / len(found[site])).tolist()
            axes.stairs(drawn["share"], edges, color=colour, ls=line, lw=1.4, baseline=None)
            said = interval(at(sites, site, "sequence", "pairwise_cosine"), 2)
            label = f"{site}: {said}"
        handles.append(Line2D([], [], color=colour, ls=line, label=label))
    handles.append(Patch(color=PALE, label="random directions"))
    highest = max(
        [float(heights.max())] + [max(d.get("share", [0])) for d in data["pairwise"].values()]
    )
    axes.set_ylim(0, 1.55 * highest)
    axes.set_xlim(float(edges[0]), 1.02)
    axes.axvline(0, 0, 0.68, color=GREY, ls=":", lw=0.8)
    axes.legend(handles=handles, loc="upper left", title="mean and interval", alignment="left")
    axes.set_xlabel("cosine between the gradients of two pairs")
    axes.set_ylabel("share of couples of pairs")
    axes.set_title("Do the pairs agree?")
    tuned = at(gradients, "policies", "tuned", "sites")
    later = "; ".join(
        f"{site} {interval(at(tuned, site, 'sequence', 'pairwise_cosine'))}" for site in order
    )
    towards = "; ".join(
        f"{site} {interval(at(sites, site, 'sequence', 'cosine_v'))}" for site in order
    )
    data["caption"] = (
        f"Figure 1b. Automatic gradients of the DPO loss with respect to hidden states, on "
        f"{plural(gradients.get('n'), 'test pair')}, with the base as policy (the start of a "
        "training): directions of descent, summed over the tokens of both answers' texts. Left: "
        f"at {shown}, one cell a pair, projected on the mean direction (right) and on what the "
        "directions spread most in beside it (up); the circle is a length of "
        f"{data['lattice']['circle']:g}, where 1 would lie wholly in this plane; darker: nearer to "
        "v*. The mean holds each pair itself, which tilts arrows to the right. Right: cosines "
        "between different pairs, which have no such "
        "bias, with their mean and interval, beside independent random directions of the same "
        f"width. With the tuned model as policy the means are: {later}. Mean cosine with v* "
        f"(base as policy): {towards}."
    )
    return Drawing("fig1b_gradients", figure, data)


def _lattice(
    figure: Figure, axes: Axes, plane: np.ndarray, to_v: np.ndarray | None
) -> dict[str, Json]:
    """One cell a pair, in reading order, sorted by the part along the mean."""
    order = np.argsort(-plane[:, 0], kind="stable")
    columns = math.ceil(math.sqrt(len(plane)))
    full = _round_up(float(np.linalg.norm(plane, axis=1).max()))
    known = to_v is not None and bool(np.isfinite(to_v).any())
    most = _round_up(float(np.nanmax(np.abs(to_v)))) if known and to_v is not None else 1.0
    blues = LinearSegmentedColormap.from_list("blues", colormaps[SHADES](np.linspace(0.25, 1, 256)))
    scale = Normalize(-most, most)
    for cell, pair in enumerate(order):
        x, y = cell % columns, -(cell // columns)
        step = 0.42 / full * plane[pair]
        cosine = np.nan if to_v is None else to_v[pair]
        colour = blues(scale(cosine)) if np.isfinite(cosine) else INK
        axes.add_patch(Circle((x, y), 0.42, fill=False, edgecolor=PALE, lw=0.6))
        axes.annotate(
            "",
            (x + step[0], y + step[1]),
            (x, y),
            arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 1.2, "mutation_scale": 5,
                        "shrinkA": 0, "shrinkB": 0},
        )  # fmt: skip
    rows = math.ceil(len(plane) / columns)
    axes.set_xlim(-0.6, columns - 0.4)
    axes.set_ylim(-rows + 0.4, 0.6)
    axes.set_aspect("equal")
    axes.set_axis_off()
    if known:
        bar = figure.colorbar(ScalarMappable(scale, blues), ax=axes, shrink=0.7, pad=0.02)
        bar.set_label("cosine with v*")
        bar.set_ticks([-most, 0, most])
        bar.outline.set_linewidth(0.5)  # type: ignore[operator]
    return {
        "circle": full,
        "order": [int(pair) for pair in order],
        "plane": plane[order].tolist(),
        "cosine_v": None if to_v is None else [real(float(value)) for value in to_v[order]],
    }


def _round_up(value: float) -> float:
    """The next multiple of 0.1, at least 0.1 and at most 1."""
    return min(1.0, max(1, math.ceil(value * 10)) / 10)


def _edges(samples: Sequence[np.ndarray]) -> np.ndarray:
    """40 bins from just below the smallest cosine to 1."""
    low = min(float(values.min()) for values in samples if len(values))
    return np.linspace(max(-1.0, math.floor(low * 10) / 10), 1.0, 41)


# ---------------------------------------------------------------------------------- 1c


_CLOUDS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("base", "h_base", {"marker": "s", "facecolor": ORANGE, "edgecolor": "none", "alpha": 0.55}),
    ("tuned_minus", "h_tuned − v*", {"marker": "+", "color": INK}),
    ("tuned", "h_tuned", {"marker": "^", "facecolor": "none", "edgecolor": VERMILLION}),
    ("base_plus", "h_base + v*", {"marker": "x", "color": BLUE}),
)


def fig1c_clouds(result: dict[str, Json], folder: Path) -> Drawing | None:
    """Figure 1c: four clouds of states in the axes of the base's own largest variance."""
    clouds = mapping(result.get("clouds"))
    if not clouds:
        return None
    tensors = read_tensors(folder / "geometry.safetensors")
    order = site_order(clouds)
    figure = Figure(figsize=(max(WIDE * len(order) / 3, 3.4), 3.1))
    data: dict[str, Json] = {"sites": {}}
    handles: dict[str, Any] = {}
    for axes, site in zip(figure.subplots(1, len(order), squeeze=False)[0], order, strict=True):
        data["sites"][site] = _cloud(axes, site, clouds[site], tensors, handles)
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=5,
                  columnspacing=1.4, handletextpad=0.2)  # fmt: skip
    said = "; ".join(
        f"{site} {interval(at(clouds[site], 'distance_ratio'))}"
        f" (v* has {percent(point(at(clouds[site], 'v_in_plane')))} of its square in the plane)"
        for site in order
        if point(at(clouds[site], "distance_ratio")) is not None
    )
    undefined = [site for site in order if at(clouds[site], "undefined")]
    first = clouds[order[0]]
    data["caption"] = (
        f"Figure 1c. States of {plural(at(first, 'n'), 'test prompt')} in the two axes in which "
        f"the base's states vary most, fitted on the base's states of "
        f"{plural(at(first, 'n_fit'), 'fit prompt')} alone (on the axes: the share of their "
        "variance). Large: the mean of each cloud. A steered cloud is a model's own, moved by v*; "
        "what lies outside this plane is not seen."
        + (
            f" Mean distance of h_base + v* to h_tuned, over that of h_base to h_tuned: {said}."
            if said
            else ""
        )
        + (f" No steered cloud, because v* = 0, at {', '.join(undefined)}." if undefined else "")
    )
    return Drawing("fig1c_clouds", figure, data)


def _cloud(
    axes: Axes, site: str, measured: Json, tensors: dict[str, np.ndarray], handles: dict[str, Any]
) -> dict[str, Json]:
    explained = [real(share) for share in items(at(measured, "explained"))]
    axes.set_title(site)
    drawn: dict[str, Json] = {"explained": explained, "clouds": {}}
    if len(explained) < 2:
        axes.text(0.5, 0.5, "the base's states spread\nin fewer than two directions",
                  transform=axes.transAxes, ha="center", va="center")  # fmt: skip
        axes.set_xticks([])
        axes.set_yticks([])
        return drawn
    axes.set_xlabel(f"axis 1 ({percent(explained[0])} of variance)")
    axes.set_ylabel(f"axis 2 ({percent(explained[1])})")
    axes.locator_params(nbins=5)
    for name, label, look in _CLOUDS:
        rows = tensors.get(f"cloud/{site}/{name}")
        if rows is None:
            continue
        shown = _picked(len(rows), _POINTS)
        x, y = rows.mean(axis=0)
        handles[label] = axes.scatter(
            rows[shown, 0], rows[shown, 1], s=11, lw=0.7, label=label, **look
        )
        axes.scatter(x, y, s=95, lw=3.4, zorder=5, **_halo(look))
        axes.scatter(x, y, s=80, lw=1.8, zorder=6, **{**look, "alpha": 1.0})
        drawn["clouds"][name] = {"points": rows[shown].tolist(), "centre": [float(x), float(y)]}
    return drawn


def _halo(look: dict[str, Any]) -> dict[str, Any]:
    """A white outline under the large marker of a cloud's mean."""
    if "color" in look:
        return {"marker": look["marker"], "color": "white"}
    return {"marker": look["marker"], "facecolor": "none", "edgecolor": "white"}


# ---------------------------------------------------------------------------------- parts


def _picked(n: int, most: int) -> np.ndarray:
    """At most so many of n rows, evenly spaced."""
    return np.unique(np.linspace(0, n - 1, min(n, most)).round().astype(int))


def _upright(axes: Axes, x: float, colour: str, line: str, label: str) -> Any:
    """A vertical line that ends below the legend."""
    return axes.axvline(x, 0, _UNDER, color=colour, ls=line, lw=1.3, label=label)

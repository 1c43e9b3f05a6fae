"""The figures that set the variants of a study side by side, drawn from the comparison's result.

Up to four variants are told apart as curves; more are drawn as heat maps, whose every cell has its
number printed where there is room.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from dsteer.report.comparison_causal_figures import claims_matrix, variants_causal
from dsteer.report.style import (
    BLUE,
    COLUMN,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PALE,
    PURPLE,
    SHADES,
    SKY,
    VERMILLION,
    WIDE,
    Drawing,
    styled,
)
from dsteer.report.values import (
    FINAL_NORM,
    Estimate,
    at,
    block,
    estimate,
    items,
    mapping,
    number,
    point,
    real,
    site_order,
)
from dsteer.store import Json

_CURVES = 4
"""Up to so many variants, their at most six pairs are curves; more are heat maps."""

_BRACKETED = 3
"""Up to so many variants, a heat map's cells have room for intervals."""

_PRINTED = 12
"""Up to so many sites, a heat map over depth prints its values."""

_DARK = 0.55
"""Shades darker than this need white print."""

_MARKS = (
    (BLUE, "-", "o"),
    (VERMILLION, "--", "s"),
    (GREEN, "-.", "^"),
    (ORANGE, ":", "D"),
    (PURPLE, (0, (5, 1, 1, 1, 1, 1)), "v"),
    (SKY, (0, (3, 1)), "P"),
)
"""Colour, line and marker of each pair of up to four variants."""

KINDS = {"cosine": "as fitted", "disattenuated": "disattenuated"}
_LAYOUT = "above the diagonal: as fitted; below: disattenuated; on it: reliability of v*"

CENTRINGS = {"uncentred": "ΔH, shared shift kept", "centred": "ΔH centred: what is left"}


def draw_comparison(result: dict[str, Json], folder: Path) -> list[Path]:
    """Draw the comparison's figures into ``figures/`` of its folder.

    Returns:
        The files written: PDF, PNG and JSON of each figure.
    """
    written: list[Path] = []
    for function in FIGURES.values():
        with styled():
            drawing = function(result)
            if drawing is not None:
                written += drawing.save(folder / "figures")
    return written


# ---------------------------------------------------------------------------------- one number each


def variants_forest(result: dict[str, Json]) -> Drawing | None:
    """Each variant's held-out cosine, shared share and KL recovered, with intervals."""
    variants = _compared(result)
    if not variants:
        return None
    panels: tuple[tuple[str, str, Callable[[Json, str], Json] | None], ...] = (
        ("held_out", "mean held-out cosine", lambda v, where: at(v, "at", where, "held_out")),
        ("shared_share", "shared share m", lambda v, where: at(v, "at", where, "shared_share")),
        ("kl", "KL recovered, λ = 1", None),
    )
    names = list(variants)
    figure = Figure(figsize=(WIDE, 1.25 + 0.36 * len(names)))
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    data: dict[str, Json] = {"variants": names, "panels": {}}
    for axes, (key, title, read) in zip(grid, panels, strict=True):
        drawn: dict[str, Json] = {}
        if read is None:
            series = {
                words: [
                    estimate(at(v, "kl", tokens, "recovered_at_one")) for v in variants.values()
                ]
                for tokens, words in (
                    ("first_token", "first token"),
                    ("response", "response tokens"),
                )
            }
        else:
            series = {
                words: [estimate(read(v, where)) for v in variants.values()]
                for where, words in (("chosen", "chosen site"), ("final_norm", FINAL_NORM))
            }
        null = [point(at(v, "at", "chosen", "null_q95")) for v in variants.values()]
        _forest(axes, series, null if key == "held_out" else None)
        axes.set_title(title)
        drawn = {words: [value._asdict() for value in values] for words, values in series.items()}
        data["panels"][key] = drawn | ({"null_q95": null} if key == "held_out" else {})
    grid[0].set_yticks(range(len(names)), names)
    grid[0].set_ylim(len(names) - 0.5, -0.5)
    handles: list[Any] = [
        Line2D([], [], color=BLUE, marker="o", label="chosen site; KL: first token"),
        Line2D([], [], color=VERMILLION, marker="s", mfc="white",
               label=f"{FINAL_NORM}; KL: all response tokens"),
        Line2D([], [], color=GREY, marker="x", ls="", label="the null's 95 % quantile"),
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside upper center", ncols=3, columnspacing=1.4)
    data["caption"] = (
        "Each variant's headline numbers, on its test prompts (m: on its fit prompts), with their "
        "intervals. Left and middle: at the site that its tune prompts chose (filled), and at "
        "final_norm (hollow). Right: share of KL(tuned‖base) that adding v* once to the base at "
        "final_norm recovers, for the first response token (filled) and for all response tokens "
        "(hollow); 0 is no better than the base, 1 equals the tuned model, and an arrow at the "
        "left edge tells of a value below −1. A value that is undefined or was not measured is "
        "left out."
    )
    return Drawing("variants_forest", figure, data)


def _forest(
    axes: Axes, series: dict[str, list[Estimate]], null: Sequence[float | None] | None
) -> None:
    """Values with intervals, one row a variant, one mark a series; off the scale: an arrow."""
    lows = [v for values in series.values() for e in values for v in (e.value, e.low)
            if v is not None]  # fmt: skip
    left = max(-1.0, min([0.0, *lows]))
    axes.set_xlim(left - 0.06 * (1 - left), 1.06)
    for x in (0.0, 1.0):
        axes.axvline(x, color=PALE, lw=1, zorder=0)
    for (colour, marker, fill, shift), values in zip(
        ((BLUE, "o", BLUE, -0.14), (VERMILLION, "s", "white", 0.14)),
        series.values(),
        strict=True,
    ):
        for row, value in enumerate(values):
            if value.value is None:
                continue
            if value.value < left:
                axes.plot(left, row + shift, ls="", marker="<", color=colour, mfc=fill)
                continue
            if value.low is not None and value.high is not None:
                axes.plot(
                    [max(left, value.low), min(1.06, value.high)],
                    [row + shift] * 2,
                    color=colour,
                    lw=1.2,
                )
            axes.plot(value.value, row + shift, ls="", marker=marker, color=colour, mfc=fill)
    for row, bound in enumerate(null or ()):
        if bound is not None:
            axes.plot(bound, row - 0.14, ls="", marker="x", color=GREY)
    axes.tick_params(axis="y", length=0)


# ---------------------------------------------------------------------------------- cosines


def vector_cosines(result: dict[str, Json]) -> Drawing | None:
    """Cosines between v*s at final_norm and at a block: as fitted, disattenuated, reliability."""
    variants, sites = list(_compared(result)), _shown_sites(result)
    if len(variants) < 2 or not sites:
        return None
    data: dict[str, Json] = {"variants": variants, "layout": _LAYOUT, "sites": {}}
    figure, grid = _heat_axes(len(sites), len(variants))
    for axes, site in zip(grid, sites, strict=True):
        cells = _cells(
            variants,
            _pair_values(result, "sites", site, "cosine"),
            _pair_values(result, "sites", site, "disattenuated"),
            [estimate(at(result, "variants", v, "reliability", site, "full")) for v in variants],
        )
        _heat(axes, variants, cells, lambda v: min(1.0, abs(v)), lambda v: f"{v:.2f}")
        axes.set_title(f"v* at {site}")
        data["sites"][site] = [[cell._asdict() for cell in row] for row in cells]
    figure.suptitle(_LAYOUT, size=8, color=GREY)
    bar = figure.colorbar(
        ScalarMappable(Normalize(0, 1), colormaps[SHADES]), ax=list(grid), shrink=0.8, aspect=30
    )
    bar.set_label("size of the cosine; reliability")
    bar.outline.set_linewidth(0.5)  # type: ignore[operator]
    data["caption"] = (
        "Cosines between the variants' v*s. Above the diagonal: as fitted. Below: disattenuated, "
        "each v* from another half of the conversations and divided by the root of both "
        "reliabilities, so that neither noise nor errors in common play a part; it may exceed 1. "
        "On the diagonal: split-half reliability of v*, at full length (Spearman-Brown). "
        + ("Brackets: jackknife intervals. " if len(variants) <= _BRACKETED else "")
        + "Shade: size, whatever the sign. Hatched: undefined."
        + _random_words(result)
    )
    return Drawing("vector_cosines", figure, data)


def cosines_over_depth(result: dict[str, Json]) -> Drawing | None:
    """Cosines between v*s at every site: curves of few variants, a heat map of many."""
    pairs = [pair for pair in items(result.get("pairs")) if mapping(at(pair, "sites"))]
    if not pairs:
        return None
    sites = site_order({site for pair in pairs for site in pair["sites"]})
    few = len(_compared(result)) <= _CURVES
    values = {
        kind: {
            _named(pair): [estimate(at(pair, "sites", site, kind)) for site in sites]
            for pair in pairs
        }
        for kind in KINDS
    }
    draw = _depth_curves if few else _depth_map
    figure = draw(sites, values)
    data: dict[str, Json] = {
        "sites": sites,
        **{
            kind: {name: [e._asdict() for e in curve] for name, curve in curves.items()}
            for kind, curves in values.items()
        },
        "caption": "Cosine between the v*s of each two variants at every site: as fitted (left), "
        "and disattenuated (right: independent halves of the conversations, divided by the root "
        "of both reliabilities; may exceed 1). "
        + (
            "Bands and bars: jackknife intervals. "
            if few
            else "Shade: size, whatever the sign. Hatched: undefined. "
        )
        + "final_norm stands apart because it is another quantity than the blocks' outputs."
        + _random_words(result),
    }
    return Drawing("cosines_over_depth", figure, data)


def _depth_curves(sites: Sequence[str], values: dict[str, dict[str, list[Estimate]]]) -> Figure:
    figure = Figure(figsize=(WIDE, 3.3))
    groups = _site_groups(sites)
    widths = [width for _, width in groups]
    grid = GridSpec(1, 2 * len(groups), figure=figure, width_ratios=widths * 2)
    first: Axes | None = None
    ends: list[float] = [0.0, 1.0]
    handles: dict[str, Any] = {}
    for column, (kind, curves) in enumerate(values.items()):
        lead: Axes | None = None
        for i, (places, _) in enumerate(groups):
            axes = figure.add_subplot(grid[0, column * len(groups) + i], sharey=first)
            apart = block(sites[places[0]]) is None
            where = _where(sites, places)
            _site_ticks(axes, [sites[p] for p in places], where, apart)
            for y in (0.0, 1.0):
                axes.axhline(y, color=GREY, ls=":", lw=0.8, zorder=0)
            for n, (name, curve) in enumerate(curves.items()):
                shift = 0.12 * (n - (len(curves) - 1) / 2) if apart or len(places) <= 6 else 0.0
                shown = [curve[p] for p in places]
                handles[name] = _curve(axes, where + shift, shown, n, name, hollow=apart)
                ends += [v for e in shown for v in e if v is not None]
            if lead is None:
                lead = axes
                axes.set_title(KINDS[kind])
                if not any(e.value is not None for curve in curves.values() for e in curve):
                    _say(axes, "undefined at every site")
            if first is None:
                first = axes
                axes.set_ylabel("cosine between v*s")
            else:
                axes.tick_params(labelleft=False)
    if first is not None:
        pad = 0.05 * (max(ends) - min(ends))
        first.set_ylim(max(-1.5, min(ends) - pad), min(2.0, max(ends) + pad))
    _legend(figure, handles)
    return figure


def _depth_map(sites: Sequence[str], values: dict[str, dict[str, list[Estimate]]]) -> Figure:
    names = list(values["cosine"])
    figure = Figure(figsize=(WIDE, 1.3 + 0.19 * len(names)))
    groups = _site_groups(sites)
    widths = [width for _, width in groups]
    grid = GridSpec(1, 2 * len(groups) + 1, figure=figure,
                    width_ratios=[*widths * 2, 0.06 * sum(widths)])  # fmt: skip
    shades = colormaps[SHADES]
    for column, (kind, curves) in enumerate(values.items()):
        for i, (places, _) in enumerate(groups):
            axes = figure.add_subplot(grid[0, column * len(groups) + i])
            where = _where(sites, places)
            apart = block(sites[places[0]]) is None
            for row, curve in enumerate(curves.values()):
                for x, p in zip(where, places, strict=True):
                    value = curve[p].value
                    shade = None if value is None else min(1.0, abs(value))
                    _cell(axes, x, row, None if shade is None else shades(shade))
                    if value is not None and shade is not None and len(sites) <= _PRINTED // 2:
                        _print(axes, x, row, f"{value:.2f}".replace("-", "−"), shade, 5.5)
            _site_ticks(axes, [sites[p] for p in places], where, apart)
            axes.set_ylim(len(names) - 0.5, -0.5)
            axes.spines[:].set_visible(False)
            axes.tick_params(length=0)
            if column == 0 and i == 0:
                axes.set_yticks(range(len(names)), names, size=6.5)
            else:
                axes.set_yticks([])
            if i == 0:
                axes.set_title(KINDS[kind])
    bar = figure.colorbar(
        ScalarMappable(Normalize(0, 1), shades), cax=figure.add_subplot(grid[:, -1])
    )
    bar.set_label("size of the cosine")
    bar.outline.set_linewidth(0.5)  # type: ignore[operator]
    return figure


# ---------------------------------------------------------------------------------- subspaces


def principal_angles(result: dict[str, Json]) -> Drawing | None:
    """Principal angles between the variants' top subspaces of ΔH, beside random subspaces."""
    variants = list(_compared(result))
    measured = [
        pair
        for pair in items(result.get("pairs"))
        if any(c for angles in mapping(at(pair, "angles")).values() for c in angles.values())
    ]
    known = {site for pair in measured for site in pair["angles"]}
    sites = [site for site in _shown_sites(result) if site in known] or site_order(known)[-1:]
    if not measured:
        return None
    few = len(variants) <= _CURVES
    data: dict[str, Json] = {
        "subspace": result.get("subspace"),
        "sites": {
            site: {
                centring: {_named(pair): at(pair, "angles", site, centring) for pair in measured}
                for centring in CENTRINGS
            }
            for site in sites
        },
    }
    if few:
        figure = _angle_curves(data["sites"], sites)
        how = (
            "Curves: the angles of each pair, in order; the band: where "
            f"{_percent(result)} of random subspaces of these dimensions lie. "
        )
    else:
        figure = _angle_maps(result, sites, variants)
        how = (
            "Above the diagonal: the smallest angle; below: the largest. On the diagonal: the "
            "dimensions of the variant's subspace. Darker is nearer; a ring marks what lies within "
            "the null of random subspaces. "
        )
    data["caption"] = (
        "Principal angles between the subspaces that the first "
        f"{result.get('subspace')} right singular vectors of two variants' ΔH span (fewer where "
        f"the rest is within the noise): 0° is a shared direction, 90° an orthogonal one. {how}"
        "Uncentred ΔH holds the shift that all prompts share, v* in the main; centred ΔH what "
        "differs between prompts."
    )
    return Drawing("principal_angles", figure, data)


def _angle_curves(measured: Json, sites: Sequence[str]) -> Figure:
    figure = Figure(figsize=(WIDE if len(sites) > 1 else COLUMN + 1.4, 4.6))
    grid = figure.subplots(len(CENTRINGS), len(sites), squeeze=False, sharex=True, sharey=True)
    handles: dict[str, Any] = {}
    most = 1
    for column, site in enumerate(sites):
        for row, (centring, title) in enumerate(CENTRINGS.items()):
            axes, pairs = grid[row][column], measured[site][centring]
            axes.set_title(f"{site}: {title}")
            nulls = {tuple(v["dimensions"]): v for v in pairs.values() if v is not None}
            for null in nulls.values():
                x = np.arange(1.0, len(null["null_low"]) + 1)
                low, high = (np.array(null[bound]) for bound in ("null_low", "null_high"))
                if len(x) == 1:
                    x, low, high = np.array([0.8, 1.2]), low.repeat(2), high.repeat(2)
                axes.fill_between(x, low, high, facecolor=PALE, edgecolor=GREY, lw=0.6, ls=":")
            if not nulls:
                _say(axes, "undefined: nothing above the noise")
            for n, (name, value) in enumerate(pairs.items()):
                if value is None:
                    continue
                angles = [Estimate(real(a), None, None) for a in value["angles"]]
                most = max(most, len(angles))
                x = np.arange(1, len(angles) + 1) + 0.06 * (n - (len(pairs) - 1) / 2)
                handles[name] = _curve(axes, x, angles, n, name)
            if column == 0:
                axes.set_ylabel("principal angle (°)")
            if row == len(CENTRINGS) - 1:
                axes.set_xlabel("angle, from the smallest")
    axes = grid[0][0]
    axes.set_ylim(-3, 93)
    axes.set_yticks([0, 30, 60, 90])
    axes.set_xlim(0.5, most + 0.5)
    axes.set_xticks(range(1, most + 1))
    handles["random subspaces"] = Patch(facecolor=PALE, edgecolor=GREY, lw=0.6, ls=":")
    _legend(figure, handles)
    return figure


def _angle_maps(result: dict[str, Json], sites: Sequence[str], variants: Sequence[str]) -> Figure:
    size = 0.36 * len(variants) + 0.9
    figure = Figure(figsize=(WIDE if len(sites) > 1 else COLUMN + 1.2, 2 * size + 0.2))
    grid = figure.subplots(len(CENTRINGS), len(sites), squeeze=False)
    for column, site in enumerate(sites):
        for row, (centring, title) in enumerate(CENTRINGS.items()):
            axes = grid[row][column]

            where = ("angles", site, centring, "angles")
            cells = _cells(
                variants,
                _pair_values(result, *where, 0),
                _pair_values(result, *where, -1),
                [Estimate(None, None, None)] * len(variants),
            )
            _heat(
                axes,
                variants,
                cells,
                lambda v: 1 - v / 90,
                lambda v: f"{v:.0f}°",
                hatch_diagonal=False,
                labels=(row == len(CENTRINGS) - 1, column == 0),
            )
            dimensions: dict[int, Json] = {}
            for (i, j), pair in _placed(result, variants).items():
                found = at(pair, "angles", site, centring)
                for place, (x, y) in ((0, (j, i)), (-1, (i, j))):
                    angle_here, low = (real(at(found, k, place)) for k in ("angles", "null_low"))
                    if angle_here is not None and low is not None and angle_here >= low:
                        ring = "white" if 1 - angle_here / 90 > _DARK else GREY
                        axes.plot(x, y, marker="o", ms=15, mfc="none", color=ring, mew=0.8)
                dimensions |= dict(zip((i, j), items(at(found, "dimensions")), strict=False))
            for x, dimension in dimensions.items():
                _print(axes, x, x, f"k={dimension}", 0.0, 6.5)
            axes.set_title(f"{site}: {title}")
    return figure


# ---------------------------------------------------------------------------------- parts


def _compared(result: dict[str, Json]) -> dict[str, Json]:
    """The variants that were compared."""
    return {
        name: variant
        for name, variant in mapping(result.get("variants")).items()
        if at(variant, "failed") is None
    }


def _shown_sites(result: dict[str, Json]) -> list[str]:
    """The block and the site final_norm of the largest set that was compared."""
    largest = max(items(result.get("sets")), key=lambda each: len(each["members"]), default=None)
    measured = {site for pair in items(result.get("pairs")) for site in mapping(pair["sites"])}
    return [site for site in (at(largest, "block_site"), FINAL_NORM) if site in measured]


def _random_words(result: dict[str, Json]) -> str:
    """What random directions of the largest set's width give."""
    largest = max(items(result.get("sets")), key=lambda each: len(each["members"]), default=None)
    bound = real(at(largest, "random_cosine"))
    if bound is None:
        return ""
    return (
        f" 95\u00a0% of random directions in d = {at(largest, 'width')} have a cosine of "
        f"at most {number(bound)} in size."
    )


def _percent(result: dict[str, Json]) -> str:
    """The confidence in words."""
    level = real(result.get("confidence"))
    return "most" if level is None else f"{100 * level:g}\u00a0%"


def _named(pair: Json) -> str:
    return f"{pair['a']} – {pair['b']}"


def _placed(result: dict[str, Json], variants: Sequence[str]) -> dict[tuple[int, int], Json]:
    """The pairs by the places of their variants, the earlier one first."""
    place = {name: i for i, name in enumerate(variants)}
    return {
        (min(place[pair["a"]], place[pair["b"]]), max(place[pair["a"]], place[pair["b"]])): pair
        for pair in items(result.get("pairs"))
    }


def _pair_values(result: dict[str, Json], *keys: str | int) -> dict[tuple[int, int], Estimate]:
    """A value of each pair, by the places of its variants."""
    pairs = _placed(result, list(_compared(result)))
    return {places: estimate(at(pair, *keys)) for places, pair in pairs.items()}


def _cells(
    variants: Sequence[str],
    upper: dict[tuple[int, int], Estimate],
    lower: dict[tuple[int, int], Estimate],
    diagonal: Sequence[Estimate],
) -> list[list[Estimate]]:
    """Rows of a square: one value above the diagonal, another below, and one on it."""
    m, nothing = len(variants), Estimate(None, None, None)
    return [
        [
            diagonal[i]
            if i == j
            else upper.get((i, j), nothing)
            if i < j
            else lower.get((j, i), nothing)
            for j in range(m)
        ]
        for i in range(m)
    ]


def _heat_axes(panels: int, m: int) -> tuple[Figure, list[Axes]]:
    height = 1.2 + min(2.6, 0.55 * m)
    figure = Figure(figsize=(WIDE if panels > 1 else COLUMN + 2.0, height))
    return figure, list(figure.subplots(1, panels, squeeze=False, sharey=True)[0])


def _heat(
    axes: Axes,
    names: Sequence[str],
    cells: Sequence[Sequence[Estimate]],
    shade: Callable[[float], float],
    written: Callable[[float], str],
    *,
    hatch_diagonal: bool = True,
    labels: tuple[bool, bool] = (True, True),
) -> None:
    """A square of shaded cells with their numbers; few variants have room for intervals."""
    shades, m = colormaps[SHADES], len(names)
    for i, row in enumerate(cells):
        for j, value in enumerate(row):
            if value.value is None:
                if i != j or hatch_diagonal:
                    _cell(axes, j, i, None)
                continue
            dark = shade(value.value)
            _cell(axes, j, i, shades(dark))
            text = written(value.value)
            if value.low is not None and value.high is not None and m <= _BRACKETED:
                text += f"\n[{written(value.low)}, {written(value.high)}]"
            _print(axes, j, i, text.replace("-", "−"), dark, 6.3 if "\n" in text else 6.8)
    for k in range(m) if hatch_diagonal else ():
        axes.add_patch(Rectangle((k - 0.5, k - 0.5), 1, 1, facecolor="none", edgecolor=INK, lw=0.9))
    axes.set_xlim(-0.5, m - 0.5)
    axes.set_ylim(m - 0.5, -0.5)
    axes.set_xticks(range(m), names if labels[0] else [""] * m, rotation=35, ha="right",
                    rotation_mode="anchor")  # fmt: skip
    axes.set_yticks(range(m), names if labels[1] else [""] * m)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def _cell(axes: Axes, x: float, y: float, colour: Any) -> None:
    look: dict[str, Any] = (
        {"facecolor": "white", "edgecolor": GREY, "hatch": "////", "lw": 0}
        if colour is None
        else {"facecolor": colour, "edgecolor": "white", "lw": 0.5}
    )
    axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, **look))


def _print(axes: Axes, x: float, y: float, text: str, dark: float, size: float) -> None:
    colour = "white" if dark > _DARK else INK
    axes.text(x, y, text, ha="center", va="center", size=size, color=colour, linespacing=1.1)


def _say(axes: Axes, words: str) -> None:
    """Words in place of what can't be drawn."""
    axes.patch.set(hatch="////", edgecolor=PALE)
    axes.text(0.5, 0.5, words, transform=axes.transAxes, ha="center", va="center", color=INK,
              bbox={"facecolor": "white", "edgecolor": "none", "pad": 3})  # fmt: skip


def _legend(figure: Figure, handles: dict[str, Any]) -> None:
    """A legend above the figure, in as many columns as its width has room for."""
    room = float(figure.get_figwidth())
    column = 0.065 * max(map(len, handles), default=1) + 0.65  # letters of 8 points, and a handle
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside upper center",
        ncols=max(1, min(len(handles), int(room / column))),
    )


def _site_groups(sites: Sequence[str]) -> list[tuple[list[int], float]]:
    """Places of the blocks, and apart from them of the other sites, with their relative widths."""
    blocks = [i for i, site in enumerate(sites) if block(site) is not None]
    others = [i for i, site in enumerate(sites) if block(site) is None]
    groups = [(blocks, float(len(blocks))), (others, max(1.0, 0.2 * len(blocks)) * len(others))]
    return [group for group in groups if group[0]]


def _where(sites: Sequence[str], places: Sequence[int]) -> np.ndarray:
    """x of each site: k of a block, else its place in the group."""
    return np.array(
        [float(i if (k := block(sites[p])) is None else k) for i, p in enumerate(places)]
    )


def _site_ticks(axes: Axes, group: Sequence[str], where: np.ndarray, apart: bool) -> None:
    axes.set_xlim(where[0] - 0.5, where[-1] + 0.5)
    if apart:
        axes.set_xticks(where, list(group))
        return
    step = max(1, len(group) // 8)
    axes.set_xticks(where[::step], [f"{x:g}" for x in where[::step]])
    axes.set_xlabel("block k (resid_post.k)")


def _curve(
    axes: Axes,
    x: np.ndarray,
    values: Sequence[Estimate],
    n: int,
    label: str,
    *,
    hollow: bool = False,
) -> Any:
    """One pair's curve, with a band and bars where it has intervals."""
    colour, line, marker = _MARKS[n % len(_MARKS)]
    middle, low, high = (
        np.array([np.nan if v[i] is None else v[i] for v in values], dtype=np.float64)
        for i in range(3)
    )
    if np.isfinite(low).any():
        axes.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
        if len(x) <= _PRINTED:
            bars = np.nan_to_num(np.stack([middle - low, high - middle]))
            axes.errorbar(x, middle, yerr=bars.clip(0), fmt="none", ecolor=colour, elinewidth=0.9)
    return axes.plot(
        x,
        middle,
        color=colour,
        ls=line,
        marker=marker,
        mfc="white" if hollow else colour,
        label=label,
        zorder=3,
    )[0]


FIGURES: dict[str, Callable[[dict[str, Json]], Drawing | None]] = {
    "variants_forest": variants_forest,
    "variants_causal": variants_causal,
    "claims_matrix": claims_matrix,
    "vector_cosines": vector_cosines,
    "cosines_over_depth": cosines_over_depth,
    "principal_angles": principal_angles,
}
"""The comparison's figures, by file name, in the order of the report."""

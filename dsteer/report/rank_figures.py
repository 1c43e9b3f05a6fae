"""The figure of the ``rank`` stage: KL recovered against the number of directions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dsteer.report.rank_tables import reached
from dsteer.report.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PALE,
    WIDE,
    Drawing,
    Mark,
)
from dsteer.report.values import at, estimate, items, mapping, plain, plural, point
from dsteer.store import Json

CURVES = {
    "oracle": Mark("oracle, singular order", BLUE, "-", "o"),
    "greedy": Mark("oracle, greedy order", GREEN, "--", "^"),
    "deployable": Mark("deployable: μ, and ĉ(h_base)", ORANGE, "-.", "s"),
}


def rank_curves(result: dict[str, Json], _folder: Path) -> Drawing | None:
    """One panel a site: R against k of every kind of subspace, k₅₀ and k₉₀."""
    sites = {site: mapping(found) for site, found in mapping(result.get("sites")).items()
             if items(at(found, "k"))}  # fmt: skip
    if not sites:
        return None
    figure = Figure(figsize=(WIDE if len(sites) > 1 else 0.75 * WIDE, 3.3))
    row = figure.subplots(1, len(sites), squeeze=False)[0]
    data: dict[str, Json] = {"n_test": result.get("n_test"), "sites": {}}
    for axes, (site, found) in zip(row, sites.items(), strict=True):
        data["sites"][site] = _panel(axes, found)
        axes.set_title(f"{site}, {plain(found.get('tokens')).replace('_', ' ')} tokens")
    row[0].set_ylabel("KL recovered, R")
    handles, labels = row[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, columnspacing=1.4)
    data["caption"] = _caption(result, sites)
    return Drawing("rank", figure, data)


def _panel(axes: Axes, found: dict[str, Json]) -> dict[str, Json]:
    ks = items(found.get("k"))
    shown: dict[str, Json] = {"k": ks, "patched": found.get("patched")}
    band = [(k, b) for k, b in zip(ks, items(found.get("random")),
                                   strict=True) if b is not None]  # fmt: skip
    if band:
        places = [k for k, _ in band]
        low, high, middle = (
            [point(b.get(key)) or 0.0 for _, b in band] for key in ("low", "high", "median")
        )
        axes.fill_between(places, low, high, color=PALE, lw=0, label="random, middle 95 %")
        axes.plot(places, middle, color=GREY, ls=":", lw=1)
        shown["random"] = [{"k": k, **b} for k, b in band]
    whole = estimate(found.get("patched"))
    if whole.value is not None:
        axes.axhline(whole.value, color=INK, lw=0.8, label="whole displacement (patched)")
        for share in (0.5, 0.9):
            axes.axhline(share * whole.value, color=GREY, lw=0.6, ls=(0, (1, 3)))
            axes.annotate(f"{share:.0%}", (1.0, share * whole.value), size=7, color=GREY,
                          xycoords=axes.get_yaxis_transform(), ha="right", va="bottom")  # fmt: skip
    for name, mark in CURVES.items():
        values = items(at(found, "oracle", {"oracle": "singular", "greedy": "greedy"}[name])
                       if name != "deployable" else found.get("deployable"))  # fmt: skip
        if name == "deployable" and found.get("constant") is not None:
            values = [found["constant"], *values]
        places = [0, *ks][-len(values) :] if name == "deployable" else ks[: len(values)]
        shown[name] = [{"k": k, "recovered": value} for k, value in
                       zip(places, values, strict=True)]  # fmt: skip
        _curve(axes, places, values, mark)
    axes.set_xscale("symlog", linthresh=1, linscale=0.5)
    ticks = [k for k in (0, 1, 2, 4, 8, 16, 32, 64, 128) if k <= max(ks)]
    axes.set_xticks(ticks, [str(k) for k in ticks])
    axes.minorticks_off()
    axes.set_xlim(-0.15, max(ks) * 1.12)
    axes.set_xlabel("directions k")
    lowest = min((point(v) or 0.0 for v in items(found.get("deployable"))), default=0.0)
    if whole.value is not None and lowest < -whole.value:  # far below nothing: cut, and say so
        axes.set_ylim(bottom=-0.5 * whole.value)
    shown |= {name: found.get(name) for name in ("k50", "k90")}
    return shown


def _curve(axes: Axes, places: Sequence[float], values: Sequence[Json], mark: Mark) -> None:
    known = [(k, estimate(value)) for k, value in zip(places, values, strict=True)]
    known = [(k, value) for k, value in known if value.value is not None]
    if not known:
        return
    axes.plot([k for k, _ in known], [value.value or 0.0 for _, value in known],
              color=mark.colour, ls=mark.line, marker=mark.marker, label=mark.label)  # fmt: skip
    for k, value in known:
        if value.low is not None and value.high is not None:
            axes.plot([k, k], [value.low, value.high], color=mark.colour, lw=0.9)


def _caption(result: dict[str, Json], sites: dict[str, dict[str, Json]]) -> str:
    said = "; ".join(
        f"at {site} k₅₀ = {reached(at(found, 'k50', 'oracle'))} and k₉₀ = "
        f"{reached(at(found, 'k90', 'oracle'))} of {plain(found.get('width'))} (oracle)"
        for site, found in sites.items()
    )
    return (
        "KL(tuned‖base) that is recovered on "
        f"{plural(result.get('n_test'), 'test pair')} when of the displacement only its projection "
        "on k directions is added: the leading singular vectors of fit tokens (oracle), the same "
        "in the order in which they recover most on tune pairs (greedy), their coefficients "
        "predicted from the base's state (deployable; k = 0 adds the mean alone), and random "
        "subspaces (grey). The line is what the whole displacement recovers; dotted lines are "
        f"shares of it. Bars are intervals. {said[:1].upper()}{said[1:]}."
    )

"""The figure of the ``profile`` stage: what each site's change does, and its efficiency."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dsteer.report.profile_tables import words_of
from dsteer.report.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    PALE,
    VERMILLION,
    WIDE,
    Drawing,
    Mark,
)
from dsteer.report.values import (
    at,
    estimate,
    interval,
    items,
    mapping,
    plural,
    point,
    short_site,
    site_order,
)
from dsteer.store import Json

ARMS = {
    "patched": Mark("tuned state patched in", BLUE, "-", "o"),
    "v": Mark("v* added", VERMILLION, "--", "s"),
    "v_here": Mark("mean displacement of these tokens added", GREEN, "-.", "^"),
}
FLOOR = -0.6
"""R below is not drawn: worse than the base by more than half, an arrow says so."""


def layer_profile(result: dict[str, Json], _folder: Path) -> Drawing | None:
    """One column a kind of tokens: KL recovered, reward margin and efficiency over sites."""
    kinds = [str(tokens) for tokens in items(result.get("tokens"))]
    sites = site_order(mapping(result.get("sites")))
    if not kinds or not sites:
        return None
    figure = Figure(figsize=(WIDE, 6.4))
    grid = figure.subplots(3, len(kinds), squeeze=False, sharex=True)
    data: dict[str, Json] = {"sites": sites, "n_test": result.get("n_test"), "tokens": {}}
    for column, tokens in enumerate(kinds):
        found = [at(result, "sites", site, tokens) for site in sites]
        data["tokens"][tokens] = {
            "kl_recovered": _panel(grid[0][column], found, "kl_recovered", FLOOR),
            "reward_margin": _panel(grid[1][column], found, "reward_margin", None),
            "efficiency": _efficiency(grid[2][column], found),
        }
        grid[0][column].set_title(f"{words_of(tokens)} changed")
        grid[2][column].set_xticks(
            range(len(sites)), [short_site(site) for site in sites],
            rotation=90 if len(sites) > 12 else 0,
        )  # fmt: skip
        grid[2][column].set_xlabel("site (resid_post.k; then final_norm)")
    for axes, words in zip(
        grid[:, 0], ("KL recovered, R", "reward margin", "efficiency, R / R(patched)"), strict=True
    ):
        axes.set_ylabel(words)
    handles, labels = grid[0][-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, columnspacing=1.4)
    data["caption"] = _caption(result)
    return Drawing("profile", figure, data)


def _panel(axes: Axes, found: Sequence[Json], metric: str, floor: float | None) -> dict[str, Json]:
    axes.axhline(0, color=GREY, ls=":", lw=0.8)
    if metric == "kl_recovered":
        axes.axhline(1, color=INK, lw=0.6)
    shown: dict[str, Json] = {"random": [at(row, "random", metric) for row in found]}
    known = [(x, band) for x, band in enumerate(shown["random"]) if band is not None]
    if known:
        places = [x for x, _ in known]
        low, high = ([_cut(point(b[key]), floor) for _, b in known] for key in ("low", "high"))
        axes.fill_between(places, low, high, color=PALE, lw=0, label="random, middle 95 %")
    for name, mark in ARMS.items():
        values = [at(row, name, metric) for row in found]
        shown[name] = values
        _line(axes, values, mark, floor)
    if floor is not None:
        axes.set_ylim(bottom=floor - 0.08)
    return shown


def _cut(value: float | None, floor: float | None) -> float:
    value = 0.0 if value is None else value
    return value if floor is None else max(value, floor)


def _line(axes: Axes, values: Sequence[Json], mark: Mark, floor: float | None) -> None:
    known = [(x, estimate(value)) for x, value in enumerate(values)]
    known = [(x, value) for x, value in known if value.value is not None]
    if not known:
        return
    axes.plot([x for x, _ in known], [_cut(value.value, floor) for _, value in known],
              color=mark.colour, ls=mark.line, marker=mark.marker, label=mark.label)  # fmt: skip
    for x, value in known:
        if floor is not None and value.value is not None and value.value < floor:
            axes.annotate(f"{value.value:.1f}", (x, floor), xytext=(0, 4), size=6.5,
                          textcoords="offset points", ha="center", color=mark.colour)  # fmt: skip
        elif value.low is not None and value.high is not None:
            axes.plot([x, x], [_cut(value.low, floor), value.high], color=mark.colour, lw=0.9)


def _efficiency(axes: Axes, found: Sequence[Json]) -> dict[str, Json]:
    axes.axhline(0, color=GREY, ls=":", lw=0.8)
    axes.axhline(1, color=INK, lw=0.6)
    shown: dict[str, Json] = {}
    for key, arm in (("efficiency", "v"), ("efficiency_here", "v_here")):
        shown[key] = [at(row, key) for row in found]
        _line(axes, shown[key], ARMS[arm], FLOOR)
    axes.set_ylim(FLOOR - 0.08, 1.3)
    return shown


def _caption(result: dict[str, Json]) -> str:
    site, tokens = str(at(result, "chosen", "site")), str(at(result, "chosen", "tokens"))
    row = at(result, "sites", site, tokens)
    return (
        f"What changing one site does, on {plural(result.get('n_test'), 'test pair')}: top, KL "
        "recovered (on the first answer token where the last prompt token alone is changed, else "
        "on all answer tokens); middle, the mean reward margin; bottom, the share of what "
        "patching recovers (undefined where that can't be told from 0). Numbers at the lower edge "
        f"are values below {FLOOR:g}. Bars are intervals, the grey band is random directions of "
        f"the norm of v*. Chosen on tune pairs: {site}, {words_of(tokens)}; efficiency there "
        f"{interval(at(row, 'efficiency'))}."
    )

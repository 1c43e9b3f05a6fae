"""The figure of the ``reversal`` stage: how far each way came back."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from dsteer.report.reversal_tables import WAYS
from dsteer.report.style import BLUE, PALE, VERMILLION, WIDE, Drawing
from dsteer.report.values import at, estimate, mapping
from dsteer.store import Json

_PANELS = {
    "way_back": ("reward margin gone", (0.0, 1.0)),
    "recovered": ("R, chosen (filled), rejected (hollow)", (0.0, 1.0)),
    "kl_to_tuned": ("KL from the tuned model (nats a token)", (0.0,)),
}


def ways_back(result: dict[str, Json], _folder: Path) -> Drawing | None:
    """One row a way, with intervals."""
    ways = {way: found for way, found in mapping(result.get("ways")).items() if way != "tuned"}
    if not ways:
        return None
    figure = Figure(figsize=(WIDE, 1.0 + 0.4 * len(ways)))
    grid = figure.subplots(1, len(_PANELS), sharey=True, squeeze=False)[0]
    data: dict[str, Json] = {"ways": list(ways), "panels": {}}
    for axes, (key, (title, lines)) in zip(grid, _PANELS.items(), strict=True):
        for x in lines:
            axes.axvline(x, color=PALE, lw=1, zorder=0)
        for name, colour, marker, fill, shift in (
            (key, BLUE, "o", BLUE, -0.12), (f"{key}_rejected", VERMILLION, "s", "white", 0.12),
        ):  # fmt: skip
            series = [estimate(at(found, name)) for found in ways.values()]
            if all(each.value is None for each in series):
                continue
            data["panels"][name] = [each._asdict() for each in series]
            for row, each in enumerate(series):
                if each.value is None:
                    continue
                if each.low is not None and each.high is not None:
                    axes.plot([each.low, each.high], [row + shift] * 2, color=colour, lw=1.2)
                axes.plot(each.value, row + shift, ls="", marker=marker, color=colour, mfc=fill)
        axes.set_title(title, fontsize="small")
        axes.margins(x=0.1)
        axes.tick_params(axis="y", length=0)
    grid[0].set_yticks(range(len(ways)), [WAYS.get(way, way) for way in ways])
    grid[0].set_ylim(len(ways) - 0.5, -0.5)
    data["caption"] = (
        "Three ways to undo the tuning, on test pairs, with intervals. Left: the share of the "
        "tuned model's reward margin that is gone; 0 is the tuned model, 1 the base, above 1 past "
        "it. Middle: R = 1 − Σ KL(base‖undone) / Σ KL(base‖tuned) on the chosen answers and on the "
        "rejected ones; 1 is the base. Right: KL(tuned‖undone)."
    )
    return Drawing("ways_back", figure, data)

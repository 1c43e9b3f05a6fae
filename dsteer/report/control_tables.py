"""The tables and the sentences of the ``control`` stage."""

from __future__ import annotations

from dsteer.report.tables import Column, Table
from dsteer.report.values import (
    DASH,
    UNDEFINED,
    at,
    count,
    estimate,
    interval,
    items,
    mapping,
    number,
    percent,
    plain,
    plural,
    point,
)
from dsteer.store import Json

READ = {"last": "last token", "mean": "mean over tokens"}
"""Where a vector's states were read."""

LEVELS = ("−λ", "0", "+λ")
"""The levels of a vector in the grid."""


def control_tables(result: Json) -> list[Table]:
    """What each vector does to each oracle, where it acts, and two axes at once."""
    found = mapping(result)
    tables = [_settings(found), _matrix(found), *_effects(found), _grid(found), _cells(found)]
    return [table for table in tables if table is not None and table.rows]


def control_sentences(result: Json) -> list[str]:
    """What came out, for the first page."""
    found = mapping(result)
    said = []
    for axis, row in mapping(found.get("measured")).items():
        own = f"The contrast vector of {axis} moves its own oracle by {interval(at(row, 'own'))}"
        if not at(row, "oracles", axis, "stands_out"):
            own += ", not clearly more than random directions of its norm do"
        others = [str(name) for name in items(at(row, "others_stand_out"))]
        leaked = (
            f"it also moves {', '.join(others)} more than random directions do"
            if others
            else "no other oracle moves clearly more than under random directions"
        )
        said.append(f"{own}; {leaked} (most: {_worst(row)}).")
    grid = mapping(found.get("grid"))
    for axis, row in mapping(grid.get("oracles")).items():
        other = _other(grid, axis)
        said.append(
            f"With both vectors at once, {axis} moves by {interval(at(row, 'own'))} through its "
            f"own vector and by {interval(at(row, 'cross'))} through that of {other}; at one level "
            f"of its own it depends on {other} by at most {number(point(at(row, 'dependence')))}, "
            f"and an additive model explains {percent(point(at(row, 'additive_r2')))} of its cells."
        )
    if grid.get("undefined"):
        said.append(f"Both axes at once: undefined, {grid['undefined']}.")
    return said


def _worst(row: Json) -> str:
    """The other oracle that moves most, and the leakage."""
    name = at(row, "worst_other")
    move = interval(at(row, "oracles", str(name), "move"))
    leakage = point(at(row, "leakage"))
    if leakage is None:
        return f"{name} {move}; leakage undefined: {at(row, 'leakage_undefined')}"
    return f"{name} {move}, leakage {number(leakage)}"


def _other(grid: dict[str, Json], axis: str) -> str:
    return next(str(name) for name in items(grid.get("axes")) if name != axis)


def _settings(result: dict[str, Json]) -> Table:
    pairs, prompts = mapping(result.get("pairs")), mapping(result.get("prompts"))
    rows = []
    grid = mapping(at(result, "grid", "settings"))
    for axis, found in mapping(result.get("measured")).items():
        kinds = [("alone", at(found, "setting"))]
        kinds += [("at once", grid[axis])] if axis in grid else []
        for words, setting in kinds:
            rows.append(
                [
                    axis,
                    words,
                    plain(at(setting, "site")),
                    READ[str(at(setting, "read"))],
                    plain(at(setting, "positions")),
                    number(point(at(setting, "strength"))),
                    number(point(at(setting, "strength_in_vectors"))),
                    number(point(at(setting, "tune_move"))),
                    number(point(at(setting, "tune_selective"))),
                    percent(point(at(setting, "tune_degenerate"))),
                    count(pairs.get(axis)),
                    percent(point(at(found, "separation", "accuracy"))) if words == "alone"
                    else DASH,
                ]
            )  # fmt: skip
    return Table(
        "control-settings",
        f"Where each vector acts, chosen on {plural(prompts.get('tune'), 'tune prompt')}.",
        [
            Column("axis", text=True),
            Column("used", "alone, or with another axis's vector at one site", text=True),
            Column("site", text=True),
            Column("read at", "token of the contrast texts at which states are read", text=True),
            Column("steered tokens", text=True),
            Column("λ", "in units of the mean norm of the states that were read"),
            Column("λ in vectors", "times the vector as it was built"),
            Column("move, tune", "of the axis's own oracle, on tune prompts"),
            Column("selective move", "less the largest move of another oracle: what was maximised"),
            Column("degenerate, tune", "share of texts, the larger one of −λ and +λ"),
            Column("pairs", "contrast pairs that the vector is the mean difference of"),
            Column("held-out accuracy", "of telling a pair's texts apart by the vector"),
        ],
        rows,
    )


def _matrix(result: dict[str, Json]) -> Table:
    oracles = [str(name) for name in items(result.get("oracles"))]
    prompts = plural(at(result, "prompts", "test"), "test prompt")
    return Table(
        "control-matrix",
        f"Vector of axis → oracle: moves on {prompts}. A star: beyond 0 and all random directions.",
        [
            Column("vector of", text=True),
            *(Column(name, str(at(result, "descriptions", name))) for name in oracles),
            Column("leakage", "largest |move| of another oracle / move of the own one"),
        ],
        [
            [
                axis,
                *(
                    number(point(at(row, "oracles", name, "move")), 2)
                    + ("*" if at(row, "oracles", name, "stands_out") else "")
                    for name in oracles
                ),
                number(point(at(row, "leakage")), 2)
                if at(row, "leakage") is not None
                else f"{UNDEFINED}: {at(row, 'leakage_undefined')}",
            ]
            for axis, row in mapping(result.get("measured")).items()
        ],
    )


def _effects(result: dict[str, Json]) -> list[Table]:
    """One table an axis, with the intervals."""
    return [
        Table(
            f"control-{axis}",
            f"The vector of {axis} on test prompts; degenerate texts: "
            f"{percent(point(at(row, 'degenerate', '-')))} at −λ, "
            f"{percent(point(at(result, 'base', 'degenerate')))} at 0, "
            f"{percent(point(at(row, 'degenerate', '+')))} at +λ.",
            [
                Column("oracle", text=True),
                Column("−λ", "mean score, in [−1, 1]"),
                Column("0", "mean score of the model as it is"),
                Column("+λ", "mean score"),
                Column("move", "mean of (score at +λ − score at −λ) / 2"),
                Column("random directions", "range of moves, norm-matched, at the same site"),
                Column("beyond them", "and the interval excludes 0", text=True),
            ],
            [
                [
                    name + (" (own)" if name == axis else ""),
                    interval(at(cell, "at", "-")),
                    interval(at(result, "base", "scores", name)),
                    interval(at(cell, "at", "+")),
                    interval(at(cell, "move")),
                    f"{number(point(at(cell, 'random', 'low')))} to "
                    f"{number(point(at(cell, 'random', 'high')))} "
                    f"({count(at(cell, 'random', 'draws'))})",
                    plain(at(cell, "stands_out")),
                ]
                for name, cell in mapping(at(row, "oracles")).items()
            ],
        )
        for axis, row in mapping(result.get("measured")).items()
    ]


def _grid(result: dict[str, Json]) -> Table | None:
    grid = mapping(result.get("grid"))
    if not mapping(grid.get("oracles")):
        return None
    settings = next(iter(mapping(grid["settings"]).values()))
    return Table(
        "control-grid",
        f"Two axes at once, both vectors added at {at(settings, 'site')} on "
        f"{at(settings, 'positions')} tokens; cosine of the two {number(point(grid['cosine']))}.",
        [
            Column("oracle", text=True),
            Column("own vector", "mean move over the levels of the other vector"),
            *(Column(f"other at {level}", "own move at that level") for level in LEVELS),
            Column("other vector", "mean move over the levels of the own vector"),
            Column("interaction", "(y₊₊ − y₊₋ − y₋₊ + y₋₋) / 4"),
            Column("depends by at most", "largest difference of two cells of one own level"),
            Column("additive R²", "share of the cells' variation that rows and columns explain"),
        ],
        [
            [
                axis,
                interval(at(row, "own")),
                *(interval(cell) for cell in items(at(row, "own_at"))),
                interval(at(row, "cross")),
                interval(at(row, "interaction")),
                number(point(at(row, "dependence"))),
                number(point(at(row, "additive_r2")))
                if at(row, "additive_r2") is not None
                else f"{UNDEFINED}: {at(row, 'additive_undefined')}",
            ]
            for axis, row in mapping(grid["oracles"]).items()
        ],
    )


def _cells(result: dict[str, Json]) -> Table | None:
    grid = mapping(result.get("grid"))
    oracles = mapping(grid.get("oracles"))
    if not oracles:
        return None
    a, b = (str(name) for name in items(grid["axes"]))
    rows = [
        [
            one,
            two,
            interval(at(oracles, a, "cells", i, j)),
            interval(at(oracles, b, "cells", j, i)),
            percent(point(at(grid, "degenerate", i, j))),
        ]
        for i, one in enumerate(LEVELS)
        for j, two in enumerate(LEVELS)
    ]
    return Table(
        "control-cells",
        "The cells of the grid: mean scores.",
        [
            Column(f"vector of {a}", text=True),
            Column(f"vector of {b}", text=True),
            Column(f"oracle {a}"),
            Column(f"oracle {b}"),
            Column("degenerate", "share of texts"),
        ],
        rows,
    )


def bounds(cell: Json) -> tuple[float, float, float] | None:
    """An interval's value, low and high; the value alone where it has no bounds."""
    value, low, high = estimate(cell)
    if value is None:
        return None
    return value, value if low is None else low, value if high is None else high

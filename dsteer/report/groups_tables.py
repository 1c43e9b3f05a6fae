"""The tables and the sentences of the ``groups`` stage."""

from __future__ import annotations

from dsteer.report.tables import Column, Table
from dsteer.report.values import (
    at,
    count,
    interval,
    items,
    mapping,
    number,
    percent,
    plural,
    point,
)
from dsteer.store import Json

RANKS = (
    ("displacements", "participation", "all displacements"),
    ("displacements", "centred_participation", "all displacements, centred"),
    ("means", "participation", "one vector a group"),
    ("means", "centred_participation", "one vector a group, centred"),
)
"""Where ranks are recovered: two keys of a site, and words."""


def groups_tables(result: Json) -> list[Table]:
    """The groups, the ranks, and what each removal takes."""
    found = mapping(result)
    tables = [_groups(found), _ranks(found), _removal(found)]
    return [table for table in tables if table.rows]


def groups_sentences(result: Json) -> list[str]:
    """What came out, for the first page."""
    found = mapping(result)
    head = mapping(found.get("headline"))
    site = str(head.get("site"))
    row = mapping(at(found, "sites", site))
    if not row:
        return []
    names = plural(head.get("groups"), "group")
    said = []
    expected = at(found, "expected", "participation")
    recovered = interval(at(row, "displacements", "participation"))
    if expected is not None:
        said.append(
            f"At {site} the displacements of {names} have participation {recovered}; the planted "
            f"preferences, were each one direction of equal length, give {number(point(expected))}."
        )
    else:
        said.append(f"At {site} the displacements of {names} have participation {recovered}.")
    own, others = at(row, "removal", "own"), at(row, "removal", "others")
    if others is not None:
        said.append(
            f"Removing one group's vector takes {interval(at(own, 'margin_taken'))} of that "
            f"group's reward margin and {interval(at(others, 'margin_taken'))} of the others'."
        )
    elif own is not None:
        said.append(
            f"Removing its vector takes {interval(at(own, 'margin_taken'))} of the reward margin."
        )
    return said


def _groups(result: dict[str, Json]) -> Table:
    rows = []
    for site, row in mapping(result.get("sites")).items():
        for number_of, group in enumerate(items(result.get("groups"))):
            name = str(at(group, "name"))
            rows.append(
                [
                    site,
                    name,
                    count(at(group, "n_fit")),
                    number(point(at(row, "norms", number_of))),
                    interval(at(row, "within", name)),
                ]
            )
    return Table(
        "groups",
        "The vector of each group, and how far it is one constant vector within the group.",
        [
            Column("site", text=True),
            Column("group", text=True),
            Column("N", "fit rows"),
            Column("‖v_g‖", "norm of the group's mean displacement"),
            Column("m", "shared share within the group, debiased"),
        ],
        rows,
    )


def _ranks(result: dict[str, Json]) -> Table:
    rows = []
    for site, row in mapping(result.get("sites")).items():
        for part, key, words in RANKS:
            rows.append(
                [
                    site,
                    words,
                    number(point(at(result, "expected", key))),
                    interval(at(row, part, key)),
                    count(at(row, "n")),
                ]
            )
    return Table(
        "groups-ranks",
        "Participation (Σσ²)² / Σσ⁴: what the planted preferences give if each axis is one "
        "direction of equal length, and what is recovered.",
        [
            Column("site", text=True),
            Column("of", text=True),
            Column("expected"),
            Column("recovered"),
            Column("N"),
        ],
        rows,
    )


def _removal(result: dict[str, Json]) -> Table:
    rows = []
    for site, row in mapping(result.get("sites")).items():
        removal = mapping(at(row, "removal"))
        for kind, words in (("removed", "own vector"), ("others_removed", "all other vectors")):
            for name, cells in mapping(removal.get(kind)).items():
                own = mapping(mapping(cells).get(name))
                band = at(removal, "random", name, "margin_taken") if kind == "removed" else None
                rows.append(
                    [
                        site,
                        name,
                        words,
                        interval(own.get("margin_taken")),
                        "–"
                        if band is None
                        else f"{percent(point(at(band, 'low')))} to "
                        f"{percent(point(at(band, 'high')))}",
                        interval(own.get("kl_taken")),
                    ]
                )
    rows = [cells for cells in rows if cells[3:] != ["–", "–", "–"]]
    return Table(
        "groups-removal",
        "What is taken from a group's test pairs when its own vector, or those of all other "
        "groups, are removed from the tuned model.",
        [
            Column("site", text=True),
            Column("group", text=True),
            Column("removed", text=True),
            Column("reward margin taken", "share of what the tuning gained"),
            Column("random", "range of random directions that move states as far"),
            Column("KL taken", "share of KL(base‖tuned)"),
        ],
        rows,
    )

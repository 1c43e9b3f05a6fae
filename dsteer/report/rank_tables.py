"""The tables and the sentences of the ``rank`` stage."""

from __future__ import annotations

from dsteer.report.profile_tables import band
from dsteer.report.tables import Column, Table
from dsteer.report.values import (
    DASH,
    at,
    count,
    interval,
    items,
    mapping,
    plain,
    point,
)
from dsteer.store import Json

KINDS = {
    "oracle": ("oracle, singular order", "the displacement's projection on the first k"),
    "greedy": ("oracle, greedy order", "ordered by the KL that each adds on tune pairs"),
    "deployable": ("deployable", "the mean and k coefficients predicted from h_base"),
    "random": ("random", "the projection on k random directions"),
}


def reached(value: Json) -> str:
    """``3 [2, 4]``; ``never`` where no k reached the share; a dash where it is undefined."""
    if not mapping(value):
        return DASH
    words = [
        f"{point(at(value, key)):.0f}" if point(at(value, key)) is not None else "never"
        for key in ("value", "low", "high")
    ]
    if at(value, "resampled") is False:  # one conversation leaves nothing to vary
        return words[0]
    return f"{words[0]} [{words[1]}, {words[2]}]"


def rank_tables(result: Json) -> list[Table]:
    """The k that reach half and nine tenths, and R at every k."""
    sites = {site: mapping(found) for site, found in mapping(at(result, "sites")).items()}
    least = [
        [site, plain(found.get("tokens")), count(found.get("width")), words,
         reached(at(found, "k50", kind)), reached(at(found, "k90", kind))]
        for site, found in sites.items()
        for kind, (words, _) in KINDS.items()
    ]  # fmt: skip
    curves = [row for site, found in sites.items() for row in _curves(site, found)]
    tables = [
        Table(
            "rank-least",
            "The least k of those measured that recovers a share of what patching the whole "
            "displacement recovers ('never': not up to the largest k that was tried).",
            [
                Column("site", text=True),
                Column("tokens", "whose states are changed", text=True),
                Column("d", "width"),
                Column("directions", text=True),
                Column("k₅₀", "half"),
                Column("k₉₀", "nine tenths"),
            ],
            least,
        ),
        Table(
            "rank-curves",
            "KL recovered on test pairs by k directions (random: median and middle 95 % of draws).",
            [Column("site", text=True), Column("k")]
            + [Column(words, meaning) for words, meaning in KINDS.values()],
            curves,
        ),
    ]
    return [table for table in tables if table.rows]


def _curves(site: str, found: dict[str, Json]) -> list[list[str]]:
    ks = items(found.get("k"))
    singular, greedy = (items(at(found, "oracle", kind)) for kind in ("singular", "greedy"))
    deployable = [found.get("constant"), *items(found.get("deployable"))]
    random = [None, *items(found.get("random"))]
    rows = []
    for number_, k in enumerate([0, *ks] if ks else []):
        rows.append(
            [
                site,
                count(k),
                interval(at(singular, number_ - 1)) if k else DASH,
                interval(at(greedy, number_ - 1)) if k and number_ <= len(greedy) else DASH,
                interval(at(deployable, number_)),
                band(at(random, number_)),
            ]
        )
    if ks:
        rows.append([site, "all", interval(found.get("patched")), DASH, DASH, DASH])
    return rows


def rank_sentences(result: Json) -> list[str]:
    """What came out, for the first page."""
    said = []
    for site, found in mapping(at(result, "sites")).items():
        if not items(at(found, "k")):
            continue
        said.append(
            f"At {site} patching the tuned states recovers {interval(at(found, 'patched'))} of the "
            f"KL; nine tenths of that take {reached(at(found, 'k90', 'oracle'))} of "
            f"{count(at(found, 'width'))} directions in singular order, "
            f"{reached(at(found, 'k90', 'deployable'))} with coefficients predicted from the base "
            f"(0: the mean alone), {reached(at(found, 'k90', 'random'))} random ones."
        )
    return said

"""What the report of a study says of its variants side by side: findings, and tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dsteer.report.comparison_causal import causal_findings, causal_rows
from dsteer.report.headline import CONSTANT_BIAS, Point
from dsteer.report.tables import Column, Table
from dsteer.report.values import (
    DASH,
    FINAL_NORM,
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
    real,
)
from dsteer.store import Json

_TOKENS = {"first_token": "first token", "response": "response tokens"}


def compared(result: dict[str, Json]) -> dict[str, Json]:
    """The variants that were compared."""
    return {
        name: variant
        for name, variant in mapping(result.get("variants")).items()
        if at(variant, "failed") is None
    }


def lost(result: dict[str, Json]) -> dict[str, str]:
    """The variants that could not be compared, and why."""
    return {
        name: str(at(variant, "failed"))
        for name, variant in mapping(result.get("variants")).items()
        if at(variant, "failed") is not None
    }


# ---------------------------------------------------------------------------------- findings


def comparison_findings(result: dict[str, Json]) -> list[Point]:
    """The findings, most important first; each sentence is made from the numbers at hand."""
    points: list[Point] = [("Compared", _compared(result))]
    points += _each("Shared direction, variant by variant", result, _direction)
    points += _directions(result)
    points += _subspaces(result)
    points += _reliability(result)
    points += _each(f"Reach of v* at {FINAL_NORM}", result, _reach)
    points += causal_findings(compared(result))
    return [*points, ("Keep in mind", [CONSTANT_BIAS])]


def _compared(result: dict[str, Json]) -> list[str]:
    said = [
        f"{name}: {plain(at(v, 'base'))} → {plain(at(v, 'tuned'))} (width {count(at(v, 'width'))}, "
        f"v* fitted on {plural(at(v, 'n_fit'), 'prompt')}, tested on {count(at(v, 'n_test'))})."
        for name, v in compared(result).items()
    ]
    return [*said, *(f"{name} is not compared: {why}." for name, why in lost(result).items())]


def _each(title: str, result: dict[str, Json], say: Callable[[Json], str]) -> list[Point]:
    said = [f"{name}: {words}" for name, v in compared(result).items() if (words := say(v))]
    return [(title, said)] if said else []


def _direction(variant: Json) -> str:
    here = at(variant, "at", "chosen")
    if here is None:
        return ""
    if at(here, "undefined") is True:
        return f"undefined at {at(here, 'site')}, Δ = 0."
    text = (
        f"mean held-out cosine {interval(at(here, 'held_out'))} at {at(here, 'site')}, chosen on "
        f"tune (the null's 95\u00a0% quantile is {number(point(at(here, 'null_q95')))})"
    )
    held, null = estimate(at(here, "held_out")), point(at(here, "null_q95"))
    bound = held.low if held.low is not None else held.value
    if bound is not None and null is not None and bound <= null:
        text += ", so a shared direction cannot be told from chance"
    share = at(here, "shared_share")
    return text + (f"; m = {interval(share)}." if point(share) is not None else ".")


def _reach(variant: Json) -> str:
    said = []
    for key, words in _TOKENS.items():
        panel = at(variant, "kl", key)
        if panel is None:
            continue
        if at(panel, "undefined") is not None:
            said.append(f"undefined on the {words} ({at(panel, 'undefined')})")
        else:
            shares = [
                f"{percent(share)} at λ = {strength}"
                for share, strength in (
                    (point(at(panel, "recovered_at_one")), "1"),
                    (
                        point(at(panel, "recovered_at_chosen")),
                        f"{number(point(at(panel, 'chosen_strength')))}, chosen on tune",
                    ),
                )
                if share is not None
            ]
            said.append(
                f"of {number(point(at(panel, 'kl_tuned_base')))} nats of KL(tuned‖base) on the "
                f"{words} it recovers {', '.join(shares) or 'an unmeasured share'}"
            )
    return "; ".join(said) + "." if said else ""


def _directions(result: dict[str, Json]) -> list[Point]:
    """Do the v*s point one way? From the sets, each at its block and at final_norm."""
    said = []
    for each in items(result.get("sets")):
        for site in _told_sites(each):
            found = at(each, "by_site", site, "directions")
            if found is None:
                said.append(f"At {site}: undefined, fewer than two v*s are not zero.")
                continue
            share, null = real(found["share"]), real(found["share_null_q95"])
            text = (
                f"At {site}, one line through the v*s of {_names(each)} holds "
                f"{percent(share)} of their unit vectors' squared length (σ₁²/m; random "
                f"directions: {percent(null)} at most, in 95\u00a0% of draws)"
            )
            if share is not None and null is not None and share <= null:
                text += ", so a common direction cannot be told from chance"
            said.append(f"{text}.{_extremes(result, each, site)}")
    return [("One direction for all?", said)] if said else []


def _extremes(result: dict[str, Json], each: Json, site: str) -> str:
    """The nearest and the farthest pair of a set."""
    members = set(each["members"])
    known = [
        (value, pair)
        for pair in items(result.get("pairs"))
        if {pair["a"], pair["b"]} <= members
        and (value := point(at(pair, "sites", site, "cosine"))) is not None
    ]
    if not known:
        return ""
    known.sort(key=lambda item: item[0])

    def told(pair: Json) -> str:
        corrected = at(pair, "sites", site, "disattenuated")
        beside = (
            f"disattenuated {interval(corrected)}"
            if point(corrected) is not None
            else "disattenuated: undefined"
        )
        return (
            f"{pair['a']} and {pair['b']}, cosine "
            f"{interval(at(pair, 'sites', site, 'cosine'))}, {beside}"
        )

    if len(known) == 1:
        return f" The pair: {told(known[0][1])}."
    return f" Nearest: {told(known[-1][1])}. Farthest: {told(known[0][1])}."


def _subspaces(result: dict[str, Json]) -> list[Point]:
    said = []
    for each in items(result.get("sets")):
        for site in _told_sites(each):
            for centring, words in (("uncentred", "ΔH"), ("centred", "centred ΔH")):
                found = at(each, "by_site", site, "subspace", centring)
                if found is None:
                    continue
                largest = real(at(found, "eigenvalues", 0))
                said.append(
                    f"At {site}, {plural(found['count'], 'direction')} of the top "
                    f"{max(found['dimensions'])} of {words} "
                    f"{'is' if found['count'] == 1 else 'are'} shared by all of {_names(each)} "
                    f"beyond chance: the average projector's largest eigenvalue is "
                    f"{number(largest)} (1: in every subspace; "
                    f"{number(real(found['null_q95']))}: in all but one, a random one)."
                )
    return [("Shared subspace", said)] if said else []


def _reliability(result: dict[str, Json]) -> list[Point]:
    site_of = {name: at(v, "at", "final_norm", "site") for name, v in compared(result).items()}
    known = [
        (value, name)
        for name, v in compared(result).items()
        if (value := point(at(v, "reliability", site_of[name] or "", "full"))) is not None
    ]
    if not known:
        return []
    value, name = min(known)
    return [
        (
            "Reliability",
            [
                f"Split-half reliability of v* at {FINAL_NORM}, at full length, is lowest in "
                f"{name}: {number(value)}; its cosine with the v* of endlessly many prompts is "
                f"about {number(value**0.5)}."
            ],
        )
    ]


def _told_sites(each: Json) -> list[str]:
    """The sites of a set that the findings speak of: its block and final_norm."""
    return [site for site in (each["block_site"], FINAL_NORM) if site in each["by_site"]]


def _names(each: Json) -> str:
    *first, last = each["members"]
    return f"{', '.join(first)} and {last}" if first else str(last)


# ---------------------------------------------------------------------------------- tables


def comparison_tables(result: dict[str, Json]) -> list[Table]:
    """THE table of the variants, their pairs, their sets, and what is missing."""
    tables = [
        _variants(result),
        _pairs(result),
        _sets(result),
        _lost(result),
    ]
    return [table for table in tables if table.rows]


def _of_groups(show: Callable[[Json], str], keys: tuple[str, ...]) -> Callable[[Json], str]:
    return lambda variant: show(at(variant, "groups", *keys))


def _k(value: Json) -> str:
    return count(at(value, "value"))


_GROUPS: tuple[tuple[str, str, Callable[[Json], str], tuple[str, ...]], ...] = (
    ("groups", "of prompts with a vector each", count, ("groups",)),
    ("groups: site", "where their vectors are compared", plain, ("site",)),
    ("participation, expected", "were each planted axis one direction of equal length",
     lambda value: number(point(value)), ("expected", "participation")),
    ("participation, recovered", "(Σσ²)²/Σσ⁴ of ΔH", interval, ("displacements", "participation")),
    ("centred participation, expected", "the mean taken off first",
     lambda value: number(point(value)), ("expected", "centred_participation")),
    ("centred participation, recovered", "of ΔH", interval,
     ("displacements", "centred_participation")),
    ("participation of the groups' vectors", "without the scatter within groups", interval,
     ("means", "participation")),
    ("k₉₀", "directions of the displacement that recover 90 % of what patching it recovers", _k,
     ("k90",)),
    ("own margin taken", "share of a group's reward margin that removing its vector takes",
     interval, ("own", "margin_taken")),
    ("others' margin taken", "share that removing another group's vector takes", interval,
     ("others", "margin_taken")),
)  # fmt: skip
"""Rows of the stage groups: quantity, what it is, how it is shown and where it is."""


def _variants(result: dict[str, Json]) -> Table:
    """One column a variant, one row a quantity."""
    variants = compared(result)

    def row(quantity: str, meaning: str, read: Callable[[Json], str]) -> tuple[str, list[str], str]:
        return quantity, [read(v) for v in variants.values()], meaning

    def where(place: str, key: str, show: Callable[[Json], str]) -> Callable[[Json], str]:
        def cell(variant: Json) -> str:
            here = at(variant, "at", place)
            return UNDEFINED if at(here, "undefined") is True else show(at(here, key))

        return cell

    rows = [
        row("base", "", lambda v: plain(at(v, "base"))),
        row("tuned", "", lambda v: plain(at(v, "tuned"))),
        row("d", "width of the states", lambda v: count(at(v, "width"))),
        row("N fit", "prompts that v* is fitted on", lambda v: count(at(v, "n_fit"))),
        row("N test", "prompts of the held-out numbers", lambda v: count(at(v, "n_test"))),
        row("site where it lives", "where the tune prompts agree most with v*",
            lambda v: plain(at(v, "chosen_site"))),
    ]  # fmt: skip
    for key, quantity, meaning, show in (
        ("held_out", "held-out cosine", "mean of cos(Δ, v*) over test prompts", interval),
        ("null_q95", "its null", "95 % quantile of the same with a random sign a conversation",
         _number),
        ("shared_share", "shared share m", "N‖v*‖²/‖ΔH‖² on the fit prompts", interval),
        ("sigma_ratio", "σ₂/σ₁", "of ΔH, uncentred; says little alone", interval),
        ("effective_rank", "effective rank", "exp of the spectral entropy with p = 1; depends on N",
         interval),
        ("relative_norm", "‖v*‖/‖h‖", "length of v* over the base states' mean length", _number),
        ("reliability", "split-half reliability", "of v* at full length: 2r/(1 + r), r the mean "
         "cosine of the v*s of random halves of the conversations", interval),
    ):  # fmt: skip
        rows += [
            row(f"{quantity}, {words}", meaning if place == "chosen" else "the same",
                where(place, key, show))
            for place, words in (("chosen", "chosen site"), ("final_norm", FINAL_NORM))
        ]  # fmt: skip
    for tokens, words in _TOKENS.items():
        rows += [
            row(f"KL(tuned‖base), {words}", "nats a token, on test prompts",
                _panel(tokens, "kl_tuned_base")),
            row(f"KL recovered, {words}, λ = 1",
                "share of it that adding v* to the base at final_norm recovers",
                _panel(tokens, "recovered_at_one")),
            row(f"KL recovered, {words}, λ chosen", "at the λ that was chosen on tune prompts",
                _panel(tokens, "recovered_at_chosen")),
        ]  # fmt: skip
    rows += [
        row("λ chosen", "the λ of least KL on tune prompts, at final_norm",
            _panel("first_token", "chosen_strength")),
        row("interpolation: site", "where the sweep adds λv*, and to which tokens",
            lambda v: _sweep_site(at(v, "interpolation"))),
        row("interpolation: KL recovered", "over answers, at the λ of the sweep nearest to 1",
            lambda v: interval(at(v, "interpolation", "kl_recovered", "steered"))),
        row("interpolation: preference match",
            "share of test pairs whose chosen answer has the higher implicit reward, base → "
            "steered → tuned", lambda v: _moved(at(v, "interpolation", "preference_match"))),
        row("interpolation: reward margin", "nats × β, base → steered → tuned",
            lambda v: _moved(at(v, "interpolation", "reward_margin"))),
    ]  # fmt: skip
    rows += [
        row(quantity, meaning, _of_groups(show, keys)) for quantity, meaning, show, keys in _GROUPS
    ]
    return Table(
        "comparison-variants",
        "The variants side by side. Brackets: interval. –: not measured.",
        [Column("quantity", text=True), *map(Column, variants), Column("what it is", text=True)],
        [
            [quantity, *cells, meaning]
            for quantity, cells, meaning in rows
            if any(cell != DASH for cell in cells)
        ]
        + causal_rows(variants),
    )


def _number(value: Json) -> str:
    return number(point(value))


def _panel(tokens: str, key: str) -> Callable[[Json], str]:
    def cell(variant: Json) -> str:
        panel = at(variant, "kl", tokens)
        value = at(panel, key)
        return UNDEFINED if at(panel, "undefined") and value is None else interval(value)

    return cell


def _sweep_site(sweep: Json) -> str:
    if sweep is None:
        return DASH
    return f"{plain(at(sweep, 'site'))}, {plain(at(sweep, 'positions'))}"


def _moved(metric: Json) -> str:
    steered = at(metric, "steered")
    if point(steered) is None:
        return DASH
    start, target = (number(point(at(metric, key))) for key in ("start", "target"))
    return f"{start} → {number(point(steered))} → {target}"


def _pairs(result: dict[str, Json]) -> Table:
    sites = _pair_sites(result)
    columns = [Column("pair", text=True)]
    for site in sites:
        columns += [
            Column(f"cosine, {site}", "between the v*s as fitted, on all fit prompts"),
            Column(f"disattenuated, {site}", "each v* from another half of the conversations, over "
                   "the root of both halves' reliabilities; may exceed 1"),
            Column(f"angles, {site}", "smallest and largest principal angle between the top "
                   "subspaces of ΔH; in brackets the null's lower bounds"),
        ]  # fmt: skip
    columns += [
        Column("bases", "mean cosine of the two base models' states at the last site; 1: one base"),
        Column("if undefined, why", text=True),
    ]
    return Table(
        "comparison-pairs",
        "The variants two by two. Brackets: jackknife intervals over conversations.",
        columns,
        [
            [
                f"{pair['a']} – {pair['b']}",
                *(cell for site in sites for cell in _pair_cells(pair, site)),
                number(real(pair["base_cosine"])),
                str(pair["why"] or _undefined(pair, sites)),
            ]
            for pair in items(result.get("pairs"))
        ],
    )


def _pair_cells(pair: Json, site: str) -> list[str]:
    measured = at(pair, "sites", site)
    if measured is None:
        return [DASH] * 3
    cosine, corrected = (
        UNDEFINED if measured[key] is None else interval(measured[key])
        for key in ("cosine", "disattenuated")
    )
    return [cosine, corrected, _angles(at(pair, "angles", site, "uncentred"))]


def _angles(found: Json) -> str:
    if found is None:
        return DASH
    ends, null = (
        [f"{values[0]:.1f}°", f"{values[-1]:.1f}°"][: len(values)]
        for values in (found["angles"], found["null_low"])
    )
    return f"{' to '.join(ends)} [{', '.join(null)}]"


def _undefined(pair: Json, sites: Sequence[str]) -> str:
    reasons = {at(pair, "sites", site, "undefined") for site in sites} - {None}
    return "; ".join(sorted(map(str, reasons))) or DASH


def _pair_sites(result: dict[str, Json]) -> list[str]:
    """The block of the largest set, and final_norm."""
    largest = max(items(result.get("sets")), key=lambda each: len(each["members"]), default=None)
    return _told_sites(largest) if largest else []


def _sets(result: dict[str, Json]) -> Table:
    def shared(found: Json) -> str:
        if found is None:
            return UNDEFINED
        eigenvalues = ", ".join(f"{value:.2f}" for value in found["eigenvalues"][:3])
        return (
            f"{found['count']} of {max(found['dimensions'])} "
            f"[{eigenvalues}; null {number(real(found['null_q95']))}]"
        )

    rows = []
    for each in items(result.get("sets")):
        for site, found in each["by_site"].items():
            directions = found["directions"]
            rows.append(
                [
                    site,
                    ", ".join(each["members"]),
                    number(real(at(directions, "share"))) if directions else UNDEFINED,
                    number(real(at(directions, "share_null_q95"))),
                    number(real(at(directions, "sigma_ratio"))),
                    shared(found["subspace"]["uncentred"]),
                    shared(found["subspace"]["centred"]),
                ]
            )
    return Table(
        "comparison-sets",
        "All variants of one width and the same prompts together.",
        [
            Column("site", text=True),
            Column("variants", text=True),
            Column("σ₁²/m of v*s", "the unit v*s stacked: 1 where all are parallel, 1/m where all "
                   "are orthogonal"),
            Column("its null", "95 % quantile for random directions"),
            Column("σ₂/σ₁ of v*s", "0: one line holds all of them"),
            Column("shared, ΔH", "directions of the average projector whose eigenvalue is above "
                   "the null; in brackets the three largest eigenvalues, and as null the 95 % "
                   "quantile where all but one subspace are one and the last is random"),
            Column("shared, centred ΔH", "the same after taking the mean row off"),
        ],
        rows,
    )  # fmt: skip


def _lost(result: dict[str, Json]) -> Table:
    return Table(
        "comparison-lost",
        "Variants that are not compared.",
        [Column("variant", text=True), Column("reason", text=True)],
        [[name, why] for name, why in lost(result).items()],
    )

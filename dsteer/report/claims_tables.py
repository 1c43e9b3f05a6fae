"""The claims, their verdicts and the self-check, as tables and sentences."""

from __future__ import annotations

from collections.abc import Mapping

from dsteer.report.nulls_tables import LABELS, shown
from dsteer.report.tables import Column, Table
from dsteer.report.values import DASH, at, estimate, interval, items, mapping, number, plain, point
from dsteer.store import Json

CLAIMS = {
    "shared_shift": "shared shift",
    "low_dimensional": "low-dimensional",
    "constant_suffices": "one constant vector suffices",
    "preference_specific": "preference-specific",
    "reversible": "reversible",
}
"""The claims, in the order in which they are graded."""

HEAD = ("claim", "verdict", "number", "null")


def claim_rows(result: Json) -> list[tuple[str, str, str, str]]:
    """Claim, verdict, number and null of each claim; what a run prints at its end."""
    return [
        (
            CLAIMS.get(str(at(claim, "name")), str(at(claim, "name"))),
            str(at(claim, "verdict")),
            told(at(claim, "number")),
            told(at(claim, "null")),
        )
        for claim in items(at(result, "claims"))
    ]


def told(found: Json) -> str:
    """A number after what it is; a dash where it was not measured."""
    if found is None:
        return DASH
    value, low, high = estimate(found)
    ends = value is None and (low is not None or high is not None)
    numbers = f"{number(low)} to {number(high)}" if ends else shown(found)
    return f"{plain(at(found, 'words'))}: {numbers}"


def self_check_words(result: Json) -> str:
    """Whether the self-check passed, with counts."""
    checked = at(result, "self_check")
    checks = items(at(checked, "checks"))
    passed = sum(at(check, "passed") is True for check in checks)
    if at(checked, "passed") is None:
        return f"self-check: not run ({plain(at(checked, 'why'))})"
    state = "passed" if at(checked, "passed") is True else "FAILED"
    return f"self-check on planted truth: {state}, {passed} of {len(checks)} checks"


def warning(result: Json) -> str | None:
    """What must stand on top of everything: a self-check that failed."""
    if at(result, "self_check", "passed") is not False:
        return None
    lost = [str(at(check, "what")) for check in items(at(result, "self_check", "checks"))
            if at(check, "passed") is not True]  # fmt: skip
    return (
        f"The self-check failed ({'; '.join(lost)}): on this architecture the measurement does not "
        "find what was planted, so no number here can be trusted."
    )


def claims_table(result: Json) -> Table | None:
    """The verdicts, for the top of the report."""
    rows = [
        [claim, verdict, shown, null, str(at(entry, "why"))]
        for (claim, verdict, shown, null), entry in zip(
            claim_rows(result), items(at(result, "claims")), strict=True
        )
    ]
    if not rows:
        return None
    return Table(
        "claims",
        "Claims, each graded by a fixed rule. Without its stage, its control or its interval a "
        f"claim is not tested, and never supported; {self_check_words(result)}.",
        [Column(title, text=True) for title in (*HEAD, "why")],
        rows,
    )


def claims_tables(result: Json) -> list[Table]:
    """The rules, the verdicts of the pair and its nulls, what their v*s are, and the self-check."""
    found = mapping(result)
    tables = [_rules(found), _pairs(found), _beside(found), _checks(found)]
    return [table for table in tables if table.rows]


def _rules(result: dict[str, Json]) -> Table:
    return Table(
        "claims-rules",
        "The rules. What is told beside never decides.",
        [Column(title, text=True) for title in ("claim", "verdict", "rule", "told beside")],
        [
            [
                CLAIMS.get(str(at(claim, "name")), str(at(claim, "name"))),
                str(at(claim, "verdict")),
                str(at(claim, "rule")),
                " ".join(map(str, items(at(claim, "beside")))) or DASH,
            ]
            for claim in items(result.get("claims"))
        ],
    )


def _pairs(result: dict[str, Json]) -> Table:
    pairs = mapping(result.get("pairs"))
    return Table(
        "claims-pairs",
        "The pair and its nulls, graded by the same rules against the same coin-flip null (whose "
        "own difference from itself is 0).",
        [Column("pair", text=True), *(Column(words, text=True) for words in CLAIMS.values())],
        [
            [LABELS.get(name, name), *(plain(at(verdicts, claim)) for claim in CLAIMS)]
            for name, verdicts in pairs.items()
        ]
        if len(pairs) > 1
        else [],
    )


def _beside(result: dict[str, Json]) -> Table:
    found = mapping(result.get("beside"))
    rows = [
        [
            LABELS.get(name, name),
            number(point(at(null, "cosine"))),
            number(point(at(null, "norm"))),
            interval(at(null, "reward_margin")),
            interval(at(null, "difference")),
        ]
        for name, null in mapping(found.get("nulls")).items()
    ]
    own = [LABELS["pair"], "1", number(point(found.get("norm"))),
           interval(found.get("reward_margin")), DASH]  # fmt: skip
    return Table(
        "claims-beside",
        f"v* of the pair and of its nulls at {plain(found.get('site'))}; random directions have "
        f"|cos| of {number(point(found.get('random_cosine')))} at most, in 95 % of draws.",
        [
            Column("pair", text=True),
            Column("cosine", "cos(v*, v* of the pair)"),
            Column("‖v*‖"),
            Column("margin", "mean reward margin under its own v* at its own chosen place"),
            Column("pair − null", "paired difference of these margins on the same test pairs"),
        ],
        [own, *rows] if rows else [],
    )


def _checks(result: dict[str, Json]) -> Table:
    checked = result.get("self_check")
    return Table(
        "self-check",
        "Self-check: truths planted in a tiny random model of this run's architecture, measured by "
        f"the code that measured this run ({plain(at(checked, 'architecture'))}).",
        [
            Column("check", text=True),
            Column("expected", text=True),
            Column("found", text=True),
            Column("passed", text=True),
        ],
        [
            [plain(at(check, key)) for key in ("what", "expected", "found", "passed")]
            for check in items(at(checked, "checks"))
        ],
    )


def claims_sentences(result: Json) -> list[str]:
    """One sentence a verdict, and what they rest on."""
    by_verdict: dict[str, list[str]] = {}
    for claim, verdict, *_ in claim_rows(result):
        by_verdict.setdefault(verdict, []).append(claim)
    if not by_verdict:
        return []
    said = "; ".join(
        f"{verdict}: {', '.join(by_verdict[verdict])}"
        for verdict in ("supported", "not supported", "not tested")
        if verdict in by_verdict
    )
    words = self_check_words(result)
    seeds = point(at(result, "training_seeds"))
    sentences = [f"{said[:1].upper()}{said[1:]}.", f"{words[:1].upper()}{words[1:]}."]
    if seeds is not None:
        sentences.append(
            f"Training seeds: {seeds:.0f}; a claim about training, not about this pair, needs 3 or "
            "more."
        )
    return sentences


def variant_verdicts(variants: Mapping[str, Json]) -> Table | None:
    """A study's variants by claims; None where no variant graded any."""
    graded = {name: at(v, "claims") for name, v in variants.items() if at(v, "claims")}
    if not graded:
        return None
    return Table(
        "comparison-claims",
        "The claims, variant by variant, each graded by the same rules on its own run.",
        [
            Column("variant", text=True),
            *(Column(words, text=True) for words in CLAIMS.values()),
            Column("self-check", text=True),
        ],
        [
            [name, *(plain(at(found, claim)) for claim in (*CLAIMS, "self_check"))]
            for name, found in graded.items()
        ],
    )

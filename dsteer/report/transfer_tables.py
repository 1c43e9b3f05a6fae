"""The tables and the sentences of the ``transfer`` stage."""

from __future__ import annotations

from dsteer.report.tables import Column, Table
from dsteer.report.values import (
    DASH,
    UNDEFINED,
    at,
    count,
    interval,
    items,
    mapping,
    number,
    plain,
    plural,
    point,
)
from dsteer.store import Json

METRICS = {
    "kl_recovered": "KL recovered",
    "first_token": "KL recovered, first token",
    "reward_margin": "reward margin",
    "reward_accuracy": "reward accuracy above chance",
}
"""The metrics of the stage."""

LEVELS = {"one": "λ = 1", "tuned": "λ chosen on tune"}
"""The strengths at which effects are measured."""

_TIE = 1e-9

_MOST = 16
"""Site pairs that the table of choices lists."""


def transfer_tables(result: Json) -> list[Table]:
    """How the vector was carried, what it does, the nulls, and what was chosen from."""
    found = mapping(result)
    tables = [_set_up(found), *(_effects(found, level) for level in LEVELS), _choices(found)]
    return [table for table in tables if table.rows]


def sender_name(result: Json) -> str:
    """How sentences name the sender."""
    sender = mapping(at(result, "sender"))
    return f"{plain(sender.get('vectors') or sender.get('tuned'))} (base {plain(sender['base'])})"


def transfer_sentences(result: Json) -> list[str]:
    """What came out, for the first page."""
    if not mapping(result):
        return []
    chosen, kl = at(result, "chosen"), at(result, "metrics", "kl_recovered", "one")
    cosine = mapping(at(result, "cosine"))
    highest = max(
        (point(at(row, "high")) or 0.0 for row in mapping(cosine.get("nulls")).values()),
        default=0.0,
    )
    text = (
        f"The vector of {sender_name(result)}, carried from its {at(chosen, 'sender_site')} to "
        f"{at(chosen, 'receiver_site')} by {at(chosen, 'map')}, has cosine "
        f"{number(point(cosine.get('carried')))} with this pair's own v* (nulls reach "
        f"{number(highest)})"
    )
    if not mapping(kl):
        return [f"{text}; KL recovered is undefined."]
    verdict = {
        True: "above all nulls",
        False: "not above all nulls: another vector of that size can do as much",
    }.get(at(kl, "above_nulls"), "without an interval to compare with the nulls")
    if at(kl, "harms"):
        verdict = "it does harm"
    best = mapping(at(result, "native_best", "one"))
    effect = (
        f"At λ = 1 it recovers {interval(at(kl, 'carried'))} of the KL, {verdict}; v* recovers "
        f"{interval(at(kl, 'native_best'))} where it does best ({plain(best.get('receiver_site'))},"
        f" {plain(best.get('positions'))} tokens) and {interval(at(kl, 'native'))} where the "
        "carried vector acts"
    )
    share = interval(at(kl, "share"))
    if share == DASH:
        return [f"{text}. {effect}; its share of the native best is undefined: {at(kl, 'why')}."]
    return [f"{text}. {effect}; its share of the native best is {share}."]


def _set_up(result: dict[str, Json]) -> Table:
    sender, receiver = mapping(result.get("sender")), mapping(result.get("receiver"))
    text, chosen = mapping(result.get("text")), mapping(result.get("chosen"))
    settings = {
        "penalty": number(point(chosen.get("penalty"))),
        "components": count(chosen.get("components")),
    }
    tuned = mapping(at(result, "strengths", "tuned"))
    facts = {
        "sender (A)": sender_name(result),
        "width and blocks, A": f"{count(sender.get('width'))}, {count(sender.get('blocks'))}",
        "width and blocks, B": f"{count(receiver.get('width'))}, {count(receiver.get('blocks'))}",
        "neutral text": f"{plain(text.get('source'))}: {plural(text.get('texts'), 'text')}, tokens "
        f"of A {count(at(text, 'tokens', 'sender'))}, of B {count(at(text, 'tokens', 'receiver'))}",
        "shared positions (word ends)": "; ".join(
            f"{part} {count(n)}" for part, n in mapping(text.get("positions")).items()
        )
        + f"; attention sinks left out {count(text.get('sinks'))}",
        "site pair": f"{plain(chosen.get('sender_site'))} → {plain(chosen.get('receiver_site'))}",
        "map": ", ".join(
            [plain(chosen.get("map"))]
            + [f"{words} {value}" for words, value in settings.items() if value != DASH]
        ),
        "chosen on": f"{plain(result.get('chosen_on'))}, by {plain(result.get('chosen_by'))}",
        "R² of the map on held-out text": number(point(chosen.get("r_squared"))),
        "‖W v_A‖ before it is scaled": number(point(chosen.get("carried_norm"))),
        "scaled to ‖v*‖ of B at the site": number(point(result.get("natural_norm"))),
        "steered tokens": plain(result.get("positions")),
        "λ chosen on tune": "; ".join(
            f"{name} {plain(at(tuned, name, 0))}" for name in ("native", "carried")
        ),
        **{
            f"native best, {words}": ", ".join(
                [
                    plain(at(best, "receiver_site")),
                    f"{plain(at(best, 'positions'))} tokens",
                    f"λ {plain(at(best, 'strength'))}",
                ]
            )
            for level, words in LEVELS.items()
            if (best := mapping(at(result, "native_best", level)))
        },
        "pairs": f"tune {count(at(result, 'pairs', 'tune'))} "
        f"(the first {count(at(result, 'pairs', 'choice'))} for the choice of the way), "
        f"test {count(at(result, 'pairs', 'test'))}",
    }
    return Table(
        "transfer-set-up",
        "How the vector was carried over.",
        [Column("what", text=True), Column("value", text=True)],
        [[key, value] for key, value in facts.items()],
    )


def _effects(result: dict[str, Json], level: str) -> Table:
    """Effects and shares at one level, with the cosines where λ plays no part."""
    labels = mapping(result.get("null_labels"))
    rows = []
    if level == "one":
        cosine = mapping(result.get("cosine"))
        rows.append(
            [
                "cosine with native v*",
                DASH,
                "1",
                number(point(cosine.get("carried"))),
                DASH,
                DASH,
                plain(cosine.get("above_nulls")),
                *(_band(at(cosine, "nulls", name)) for name in labels),
            ]
        )
    for name, metric in mapping(result.get("metrics")).items():
        found = at(metric, level)
        words = METRICS[name]
        if found is None:
            rows.append([words, *[UNDEFINED] * 5, DASH, *[DASH] * len(labels)])
            continue
        rows.append(
            [
                words,
                interval(at(found, "native_best")),
                interval(at(found, "native")),
                interval(at(found, "carried")),
                _share(found, "share", "why"),
                _share(found, "share_here", "why_here"),
                "no: it does harm" if at(found, "harms") else plain(at(found, "above_nulls")),
                *(_band(at(found, "nulls", key, "effect")) for key in labels),
            ]
        )
    return Table(
        f"transfer-effects-{level}",
        f"What the vectors do in B's base on test pairs, {LEVELS[level]}"
        + (" (for each vector, nulls too)." if level == "tuned" else "."),
        [
            Column("metric", "effects are 0 for the base as it is", text=True),
            Column(
                "native best",
                "B's own vector at the site and tokens"
                + (", with the λ," if level == "tuned" else "")
                + " that suit it best on tune pairs: the ceiling",
            ),
            Column("native here", "B's own vector at the carried one's site and tokens"),
            Column("carried", "v_A through the map, at the norm of v*"),
            Column("of the native best", "Σ effect carried / Σ effect native best over the pairs"),
            Column("of native here", "Σ effect carried / Σ effect native here over the pairs"),
            Column(
                "above nulls",
                "yes: the low end of the carried vector's interval lies above 0 and above every "
                "null's range; each draw of a null went through the choice that v_A went through",
                text=True,
            ),
            *(Column(f"null: {name.replace('_', ' ')}", str(labels[name])) for name in labels),
        ],
        rows,
    )


def _share(found: Json, key: str, why: str) -> str:
    share = interval(at(found, key))
    return f"{UNDEFINED}: {at(found, why)}" if share == DASH else share


def _band(row: Json) -> str:
    low, high = point(at(row, "low")), point(at(row, "high"))
    if low is None or high is None:
        return DASH
    return number(low) if low == high else f"{number(low)} to {number(high)}"


def _choices(result: dict[str, Json]) -> Table:
    """The site pairs with the best map of each, best first."""
    best: dict[tuple[Json, Json], Json] = {}
    for row in items(result.get("candidates")):
        key = at(row, "sender_site"), at(row, "receiver_site")
        if key not in best or _tuned(row) > _tuned(best[key]) + _TIE:
            best[key] = row
    rows = sorted(best.values(), key=_tuned, reverse=True)
    shown = f" The best {_MOST} of {len(rows)} site pairs." if len(rows) > _MOST else ""
    return Table(
        "transfer-choices",
        "Site pairs, each with its best map, on tune pairs at λ = 1: the first was taken." + shown,
        [
            Column("from (A)", text=True),
            Column("to (B)", text=True),
            Column("map", text=True),
            Column(
                "tokens", "that are steered: those that suit the carried vector best", text=True
            ),
            Column("KL recovered", "by the carried vector on the tune pairs of the choice"),
            Column("native", "KL recovered by B's own v* there, on the same pairs"),
            Column("cosine", "with B's own v* there"),
            Column("R²", "of the map, on text that it was neither fitted nor chosen on"),
            Column("‖W v_A‖ / ‖v*‖", "before the vector is scaled"),
        ],
        [
            [
                plain(at(row, "sender_site")),
                plain(at(row, "receiver_site")),
                plain(at(row, "map")),
                plain(at(row, "positions")),
                number(_tuned(row)),
                number(point(at(row, "native_kl_recovered_tune"))),
                number(point(at(row, "cosine"))),
                number(point(at(row, "r_squared"))),
                number(_over(at(row, "carried_norm"), at(row, "natural_norm"))),
            ]
            for row in rows[:_MOST]
        ],
    )


def _tuned(row: Json) -> float:
    value = point(at(row, "kl_recovered_tune"))
    return float("-inf") if value is None else value


def _over(top: Json, bottom: Json) -> float | None:
    above, below = point(top), point(bottom)
    return None if above is None or not below else above / below

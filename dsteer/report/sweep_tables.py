"""The tables of the λ sweeps, interpolation and inversion."""

from __future__ import annotations

from dsteer.report.sweep_values import baselines, best, nearest
from dsteer.report.tables import Column, Table
from dsteer.report.values import (
    DASH,
    at,
    count,
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

_WAYS = {"up": "higher", "down": "lower"}


def sweep_tables(result: Json) -> list[Table]:
    """How the sweep was made, its metrics at chosen strengths, its texts, and what is absent."""
    sweep = mapping(result)
    stage = str(sweep.get("direction") or "sweep")
    tables = [_set_up(stage, sweep), _metrics(stage, sweep), _arms(stage, sweep)]
    if stage == "inversion":
        tables.append(_crossings(stage, sweep))
    tables += [
        _texts(stage, sweep),
        _sites(stage, sweep),
        _definitions(stage, sweep),
        _absent(stage, sweep),
    ]
    return [table for table in tables if table.rows]


def _random(metric: Json, i: int | None) -> str:
    """``−0.02 to 0.05``: where the random directions lie at a strength."""
    low, high = (point(at(metric, "random", bound, i)) for bound in ("low", "high"))  # type: ignore[arg-type]
    return DASH if low is None or high is None else f"{number(low)} to {number(high)}"


def _name(key: str, metric: Json) -> str:
    label, unit = at(metric, "label") or key, at(metric, "unit")
    return f"{label} ({unit})" if unit else str(label)


def _set_up(stage: str, sweep: dict[str, Json]) -> Table:
    grid, sham = mapping(sweep.get("grid")), mapping(sweep.get("sham"))
    others = baselines(sweep)
    sign = "−" if sweep.get("sign") == -1 else "+"
    facts = {
        "operation": f"{plain(sweep.get('start'))} model, state {sign} λ v",
        "target": f"{plain(sweep.get('target'))} model",
        "site": plain(sweep.get("site")),
        "site chosen on": plain(sweep.get("site_chosen_on")),
        "positions": plain(sweep.get("positions")),
        "strengths λ": plain(sweep.get("strengths")),
        "strengths chosen on": plain(grid.get("chosen_on")),
        "share of degenerate outputs when the range was sought": "; ".join(
            f"λ = {plain(at(probe, 'strength'))}: {percent(point(at(probe, 'degenerate')))}"
            for probe in items(grid.get("probes"))
        ),
        "norms of the arms' vectors": "; ".join(
            f"{at(arm, 'label') or key} {number(point(at(arm, 'norm')))} ({plain(at(arm, 'site'))})"
            for key, arm in mapping(sweep.get("arms")).items()
            if key not in others
        ),
        "baselines": "; ".join(others.values()),
        "random directions of the same norm": f"{count(at(sweep, 'random', 'draws'))}, "
        f"on generated texts {count(at(sweep, 'random', 'generated'))}"
        if sweep.get("random")
        else "",
        "sham arm (hooks on, λ = 0)": f"texts identical: {plain(sham.get('texts_identical'))}; "
        f"logits identical: {plain(sham.get('logits_identical'))}"
        if sham
        else "",
        "decoding": _decoding(mapping(sweep.get("texts"))),
    }
    return Table(
        f"{stage}-set-up",
        "How the sweep was made.",
        [Column("what", text=True), Column("value", text=True)],
        [[key, value] for key, value in facts.items() if value not in ("", DASH)]
        if sweep.get("strengths")
        else [],
    )


def _decoding(texts: dict[str, Json]) -> str:
    if not texts:
        return ""
    note = texts.get("decoder_note")
    return (
        f"{'greedy' if texts.get('greedy') is True else 'sampled'}, "
        f"{count(texts.get('max_new_tokens'))} new tokens at most, "
        f"{'in shared batches' if texts.get('fast_path') is True else 'one strength at a time'}"
        + (f"; {note}" if note else "")
    )


def _metrics(stage: str, sweep: dict[str, Json]) -> Table:
    """Every metric of arm v at λ = 0, nearest 1, and where v* is nearest to the target."""
    strengths = items(sweep.get("strengths"))
    start, target = sweep.get("start"), sweep.get("target")
    zero, one, top = nearest(sweep, 0.0), nearest(sweep, 1.0), best(sweep)
    places = [i for i in dict.fromkeys((zero, one, top)) if i is not None]
    columns = []
    for i in places:
        words = {
            top: f"here v* comes nearest to the {target} model in KL; picked on these same test "
            "prompts, so it flatters",
            one: "v* itself, the strength given in advance"
            if strengths[i] == 1
            else "the strength of the sweep nearest to 1",
            zero: f"the {start} model as it is",
        }
        # λ = 1 may be the nearest too; what was given in advance is told first.
        columns.append(Column(f"λ = {plain(strengths[i])}",
                              words[one] if i == one else words[i]))  # fmt: skip
        if i != zero:
            columns.append(
                Column(
                    f"random, λ = {plain(strengths[i])}",
                    "where random directions of v*'s norm lie at this strength",
                )
            )
    return Table(
        f"{stage}-metrics",
        f"The {start} model steered by v* at {sweep.get('site')}, on test prompts: every metric "
        "at a few strengths. Brackets: interval over conversations (bootstrap; of shares of yes "
        "and no, Wilson's).",
        [
            Column("metric", "its definition stands in a table below", text=True),
            Column("n", "prompts or texts measured"),
            *columns,
            Column(f"{target} model", "the target's own level"),
        ],
        [
            [
                _name(key, metric),
                count(at(metric, "n")),
                *(
                    cell
                    for i in places
                    for cell in (
                        interval(at(metric, "curves", "v", i)),
                        *([_random(metric, i)] if i != zero else []),
                    )
                ),
                interval(at(metric, "target")),
            ]
            for key, metric in mapping(sweep.get("metrics")).items()
        ],
    )


def _arms(stage: str, sweep: dict[str, Json]) -> Table:
    """The arms side by side at the strength nearest 1."""
    arms, one, others = mapping(sweep.get("arms")), nearest(sweep, 1.0), baselines(sweep)
    strength = plain(at(sweep, "strengths", one)) if one is not None else DASH
    return Table(
        f"{stage}-arms",
        f"The arms side by side at λ = {strength} (each adds its own vector"
        + (", but for the baselines" if others else "")
        + "; – is not measured).",
        [
            Column("metric", text=True),
            *(
                Column(
                    str(at(arm, "label") or key),
                    others.get(
                        key,
                        f"at {plain(at(arm, 'site'))}, of norm {number(point(at(arm, 'norm')))}",
                    ),
                )
                for key, arm in arms.items()
            ),
        ],
        [
            [
                _name(key, metric),
                *(interval(at(metric, "curves", arm, one)) for arm in arms),
            ]
            for key, metric in mapping(sweep.get("metrics")).items()
        ]
        if one is not None and len(arms) > 1
        else [],
    )


def _crossings(stage: str, sweep: dict[str, Json]) -> Table:
    start, target = sweep.get("start"), sweep.get("target")
    return Table(
        f"{stage}-crossings",
        f"λ-equivalent: the strength at which each metric meets the {target} model's level.",
        [
            Column("metric", text=True),
            Column(f"{start} model", "the start's own level"),
            Column(f"{target} model", "the target's own level"),
            Column(
                "λ-equivalent",
                "the first λ at which v*'s curve crosses the target's level (units of v*)",
            ),
            Column("if none, why", text=True),
        ],
        [
            [
                _name(key, metric),
                interval(at(metric, "start")),
                interval(at(metric, "target")),
                interval(at(metric, "crossing", "strength")),
                plain(at(metric, "crossing", "why")),
            ]
            for key, metric in mapping(sweep.get("metrics")).items()
            if at(metric, "crossing") is not None
        ],
    )


def _texts(stage: str, sweep: dict[str, Json]) -> Table:
    texts = mapping(sweep.get("texts"))
    kinds = mapping(texts.get("kinds"))
    return Table(
        f"{stage}-texts",
        f"Degenerate outputs of v* among {plural(texts.get('n'), 'text')} a strength.",
        [
            Column("λ", "strength (units of v*)"),
            Column("degenerate", "share of outputs that are of any of these kinds"),
            *(Column(kind.replace("_", " "), "count") for kind in kinds),
        ],
        [
            [
                plain(strength),
                percent(real(share)),
                *(count(at(counts, i)) for counts in kinds.values()),
            ]
            for i, (strength, share) in enumerate(
                zip(items(sweep.get("strengths")), items(texts.get("degenerate")), strict=False)
            )
        ],
    )


def _sites(stage: str, sweep: dict[str, Json]) -> Table:
    rows = mapping(sweep.get("sites"))
    kinds = list(
        dict.fromkeys(kind for row in rows.values() for kind in mapping(at(row, "kl_recovered")))
    )
    chosen = (sweep.get("site"), sweep.get("positions"))
    return Table(
        f"{stage}-sites",
        "The choice of site and positions, on tune prompts: share of KL recovered at λ = 1.",
        [
            Column("site", text=True),
            Column("‖v*‖", "norm of v* at the site (units of the state)"),
            *(
                Column(f"on {kind}", "1 − Σ KL(target‖steered) / Σ KL(target‖start)")
                for kind in kinds
            ),
        ],
        [
            [
                site,
                number(point(at(row, "norm"))),
                *(
                    number(point(at(row, "kl_recovered", kind)))
                    + (" (chosen)" if (site, kind) == chosen else "")
                    for kind in kinds
                ),
            ]
            for site, row in rows.items()
        ],
    )


def _definitions(stage: str, sweep: dict[str, Json]) -> Table:
    return Table(
        f"{stage}-definitions",
        "The metrics, defined.",
        [
            Column("metric", text=True),
            Column("definition", text=True),
            Column("measured on", text=True),
            Column("better", text=True),
        ],
        [
            [
                _name(key, metric),
                plain(at(metric, "definition")),
                plain(at(metric, "source")).replace("_", "-"),
                _WAYS.get(at(metric, "better") or "", "neither way"),
            ]
            for key, metric in mapping(sweep.get("metrics")).items()
        ],
    )


def _absent(stage: str, sweep: dict[str, Json]) -> Table:
    return Table(
        f"{stage}-absent",
        "Metrics that were not measured.",
        [Column("metric", text=True), Column("reason", text=True)],
        [
            [plain(at(entry, "metric")), plain(at(entry, "reason"))]
            for entry in items(sweep.get("absent"))
        ],
    )

"""The table and the sentences of the ``profile`` stage."""

from __future__ import annotations

from dsteer.report.tables import Column, Table
from dsteer.report.values import (
    DASH,
    at,
    interval,
    items,
    mapping,
    number,
    plain,
    plural,
    point,
    site_order,
)
from dsteer.store import Json


def words_of(tokens: Json) -> str:
    """``the last prompt token``, ``all tokens``, ``the answer's tokens``."""
    return {
        "prompt_last": "the last prompt token",
        "all": "all tokens",
        "generated": "the tokens that answer",
    }.get(str(tokens), plain(tokens))


def profile_tables(result: Json) -> list[Table]:
    """Every site, for each kind of tokens."""
    tables = [_table(mapping(result), str(tokens)) for tokens in items(at(result, "tokens"))]
    return [table for table in tables if table.rows]


def _table(result: dict[str, Json], tokens: str) -> Table:
    sites = mapping(result.get("sites"))
    rows = []
    for site in site_order(sites):
        found = at(sites, site, tokens)
        if found is None:
            continue
        rows.append(
            [
                site,
                *(interval(at(found, arm, "kl_recovered")) for arm in ("patched", "v", "v_here")),
                *(
                    (interval(at(found, arm, "kl_recovered_answers")) for arm in ("patched", "v"))
                    if tokens == "prompt_last"
                    else ()
                ),
                band(at(found, "random", "kl_recovered")),
                interval(at(found, "efficiency")),
                interval(at(found, "efficiency_here")),
                *(interval(at(found, arm, "reward_margin")) for arm in ("patched", "v")),
                band(at(found, "random", "reward_margin")),
            ]
        )
    which = "first answer tokens" if tokens == "prompt_last" else "answer tokens"
    return Table(
        f"profile-{tokens.replace('_', '-')}",
        f"The base with {words_of(tokens)} changed at one site: KL recovered on {which}, and the "
        f"reward margin, on {plural(result.get('n_test'), 'test pair')}.",
        [
            Column("site", text=True),
            Column("patched", "R with the tuned model's states put in"),
            Column("v*", "R with v* added"),
            Column("mean here", "R with the mean displacement of just these tokens added"),
            *(
                (
                    Column("patched, answers", "R over all answer tokens"),
                    Column("v*, answers", "R over all answer tokens"),
                )
                if tokens == "prompt_last"
                else ()
            ),
            Column("random", "R of random directions of the norm of v*: median, middle 95 %"),
            Column("efficiency", "R(v*) / R(patched)"),
            Column("efficiency here", "R(mean here) / R(patched)"),
            Column("margin, patched", "mean β [Δ ln π(chosen) − Δ ln π(rejected)], Δ to the base"),
            Column("margin, v*"),
            Column("margin, random"),
        ],
        rows,
    )


def band(value: Json) -> str:
    """``0.01 [−0.2, 0.2]`` of a random band."""
    if not mapping(value):
        return DASH
    low, middle, high = (number(point(at(value, key))) for key in ("low", "median", "high"))
    return f"{middle} [{low}, {high}]"


def profile_sentences(result: Json) -> list[str]:
    """What came out, for the first page."""
    chosen = mapping(at(result, "chosen"))
    site, tokens = str(chosen.get("site")), str(chosen.get("tokens"))
    row = at(result, "sites", site, tokens)
    if row is None:
        return []
    said = [
        f"v* recovers most at {site}, on {words_of(tokens)} (chosen on tune pairs): "
        f"{interval(at(row, 'v', 'kl_recovered_answers'))} of the KL over whole answers; patching "
        "the tuned states there recovers "
        f"{interval(at(row, 'patched', 'kl_recovered_answers'))}, random directions "
        f"{band(at(row, 'random', 'kl_recovered_answers'))}. Efficiency, v* over patched"
        f"{', on the first answer token' if tokens == 'prompt_last' else ''}: "
        f"{interval(at(row, 'efficiency'))}."
    ]
    for other in items(at(result, "tokens")):
        found = at(result, "sites", site, str(other))
        if other != tokens and at(found, "efficiency_here") is not None:
            said.append(
                f"With {words_of(other)} changed, patching {site} recovers "
                f"{interval(at(found, 'patched', 'kl_recovered'))} of the KL on answer tokens, "
                "and the best guess at a constant, the mean displacement of these tokens, "
                f"{interval(at(found, 'v_here', 'kl_recovered'))}: an efficiency of "
                f"{interval(at(found, 'efficiency_here'))}."
            )
    share = at(result, "readout_share")
    if share is not None:
        said.append(
            f"The readout, which no state holds, has {interval(share)} of the KL (what patching "
            "final_norm leaves)."
        )
    return said

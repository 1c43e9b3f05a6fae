"""The tables and the sentences of the ``learned`` stage."""

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
    plain,
    plural,
    point,
)
from dsteer.store import Json

METRICS = {
    "reward_margin": ("reward margin", "mean β [Δ ln π(chosen) − Δ ln π(rejected)], Δ to the base"),
    "preference_accuracy": ("preference accuracy", "share of margins above 0, a tie ½"),
    "loss": ("DPO loss", "mean −ln σ(margin); ln 2 of the base"),
    "kl_recovered": ("KL recovered", "1 − Σ KL(tuned‖steered) / Σ KL(tuned‖base), answer tokens"),
    "kl_recovered_first": ("KL recovered, first token", "the same on the first answer tokens"),
    "kl_to_base": ("KL to the base", "the cost: KL(steered‖base) in nats a token"),
}
"""Name and meaning of each metric."""

AGAINST = {"vector": "v* at λ = 1", "vector_least_loss": "v* at its λ of least loss"}
"""What learned vectors are held against."""


def learned_tables(result: Json) -> list[Table]:
    """How vectors were learned, what all of them do, and what learned ones do more than v*."""
    found = mapping(result)
    tables = [_set_up(found), _arms(found), _differences(found), _candidates(found)]
    return [table for table in tables if table.rows]


def learned_sentences(result: Json) -> list[str]:
    """What came out, for the first page."""
    return [
        sentence
        for site, found in mapping(at(result, "sites")).items()
        for sentence in _sentences(site, mapping(found))
    ]


def _sentences(site: str, found: dict[str, Json]) -> list[str]:
    learned = str(found.get("learned"))
    row, own = at(found, "arms", learned), at(found, "arms", "vector")
    said = [
        f"At {site} ({plain(found.get('positions'))} tokens) the vector {plain(at(row, 'label'))} "
        f"has a held-out reward margin of {interval(at(row, 'metrics', 'reward_margin'))} at a KL "
        f"to the base of {number(point(at(row, 'metrics', 'kl_to_base')))} nats a token; v* has "
        f"{interval(at(own, 'metrics', 'reward_margin'))} at "
        f"{number(point(at(own, 'metrics', 'kl_to_base')))}, the tuned model "
        f"{interval(at(found, 'tuned', 'reward_margin'))} at "
        f"{number(point(at(found, 'tuned', 'kl_to_base')))}. It recovers "
        f"{interval(at(row, 'metrics', 'kl_recovered'))} of the KL, v* "
        f"{interval(at(own, 'metrics', 'kl_recovered'))}. Its cosine with v* is "
        f"{number(point(at(row, 'cosine')))} (random directions "
        f"{number(point(at(found, 'cosine_null', 'low')))} to "
        f"{number(point(at(found, 'cosine_null', 'high')))})."
    ]
    band = at(found, "random", learned)
    if at(band, "metrics", "reward_margin") is not None:
        said.append(
            "Random directions of its norm have margins from "
            f"{_band(at(band, 'metrics', 'reward_margin'))} (middle 95 % of "
            f"{count(at(band, 'draws'))}, on {plural(at(band, 'pairs'), 'test pair')})."
        )
    best = at(found, "arms", "vector_least_loss", "strength")
    text = (
        f"It {_verdict(at(row, 'against', 'vector_least_loss', 'loss'))} v* at λ = {plain(best)}, "
        "the strength of least loss on tune pairs: on the same test pairs, DPO loss "
        f"{_signed(at(row, 'against', 'vector_least_loss', 'loss'))}, reward margin "
        f"{_signed(at(row, 'against', 'vector_least_loss', 'reward_margin'))}, KL to the base "
        f"{_signed(at(row, 'against', 'vector_least_loss', 'kl_to_base'))}"
    )
    bounded = next(
        (arm for arm in mapping(found.get("arms")).values() if at(arm, "max_norm") is not None),
        None,
    )
    if bounded is not None:
        text += (
            "; with a norm no larger than that of v*, learning "
            f"{_verdict(at(bounded, 'against', 'vector', 'loss'))} v* at λ = 1: reward margin "
            f"{_signed(at(bounded, 'against', 'vector', 'reward_margin'))}"
        )
    return [*said, text + "."]


def _verdict(gap: Json) -> str:
    """Whether a loss is lower: by the interval of the paired difference."""
    _, low, high = estimate(gap)
    if low is None or high is None:
        return "has no interval to be compared by, beside"
    if high < 0:
        return "does better than"
    return "does worse than" if low > 0 else "can't be told from"


def _signed(gap: Json) -> str:
    words = interval(gap)
    value = point(gap)
    return f"+{words}" if value is not None and value > 0 else words


def _set_up(result: dict[str, Json]) -> Table:
    settings = mapping(result.get("settings"))
    facts = {
        "learned from": f"{plural(result.get('n_fit'), 'pair')} of the {plain(result.get('split'))}"
        " split; step and λ chosen on "
        f"{plural(result.get('n_tune'), 'tune pair')}; reported on "
        f"{plural(result.get('n_test'), 'test pair')}",
        "loss": f"DPO, sigmoid, β = {plain(result.get('beta'))}; the base is frozen and is the "
        "reference",
        "Adam": f"{plural(settings.get('steps'), 'step')} of "
        f"{plural(settings.get('batch_size'), 'pair')}, learning rate "
        f"{plain(settings.get('learning_rate'))} of the norm of the base's states, falling to 0; "
        f"tune loss every {plural(settings.get('eval_every'), 'step')}",
        "λ of v* tried": plain(result.get("strengths")),
    }
    return Table(
        "learned-set-up",
        "How vectors were learned.",
        [Column("what", text=True), Column("value", text=True)],
        [[key, value] for key, value in facts.items()],
    )


def _arms(result: dict[str, Json]) -> Table:
    rows = []
    for site, found in mapping(result.get("sites")).items():
        for arm in mapping(at(found, "arms")).values():
            step = at(arm, "chosen_step")
            rows.append(
                [
                    site,
                    plain(at(arm, "label")),
                    number(point(at(arm, "strength"))),
                    count(step),
                    number(point(at(arm, "norm"))),
                    number(point(at(arm, "cosine"))),
                    *(_shown(at(arm, "metrics", name)) for name in METRICS),
                ]
            )
        for name, band in mapping(at(found, "random")).items():
            if band is not None:
                label = f"random, norm of {plain(at(found, 'arms', name, 'label'))}"
                rows.append(
                    [site, label, DASH, DASH, number(point(at(band, "norm"))), DASH]
                    + [_band(at(band, "metrics", metric)) for metric in METRICS]
                )
        rows.append(
            [site, "tuned model", DASH, DASH, DASH, DASH]
            + [_shown(at(found, "tuned", metric)) for metric in METRICS]
        )
    return Table(
        "learned-vectors",
        "Every vector on test pairs, beside random directions (the middle 95 % of the draws) and "
        "the tuned model.",
        [
            Column("site", text=True),
            Column("vector", text=True),
            Column("λ", "strength at which it is added"),
            Column("step", "at which learning stopped: the least loss on tune pairs"),
            Column("norm", "of what is added, λ‖v‖"),
            Column("cosine", "with v*"),
            *(Column(name, words) for name, words in METRICS.values()),
        ],
        rows,
    )


def _differences(result: dict[str, Json]) -> Table:
    rows = [
        [
            site,
            plain(at(arm, "label")),
            words,
            *(_signed(at(arm, "against", other, name)) for name in METRICS),
        ]
        for site, found in mapping(result.get("sites")).items()
        for arm in mapping(at(found, "arms")).values()
        for other, words in AGAINST.items()
        if at(arm, "against", other) is not None
    ]
    return Table(
        "learned-differences",
        "What learned vectors have more than v*, on the same test pairs (of loss and KL to the "
        "base, less is better).",
        [
            Column("site", text=True),
            Column("vector", text=True),
            Column("against", text=True),
            *(Column(name, words) for name, words in METRICS.values()),
        ],
        rows,
    )


def _candidates(result: dict[str, Json]) -> Table:
    found = mapping(result.get("candidates"))
    kinds = list(
        dict.fromkeys(kind for row in found.values() for kind in mapping(at(row, "kl_recovered")))
    )
    return Table(
        "learned-places",
        "KL that v* recovers at λ = 1 on tune pairs, by site and steered tokens.",
        [
            Column("site", text=True),
            Column("‖v*‖"),
            *(Column(f"{kind} tokens") for kind in kinds),
            Column("learned there", text=True),
        ],
        [
            [
                site,
                number(point(at(row, "norm"))),
                *(number(point(at(row, "kl_recovered", kind))) for kind in kinds),
                f"{plain(at(row, 'positions'))} tokens"
                if site in mapping(result.get("sites"))
                else "no",
            ]
            for site, row in found.items()
        ],
    )


def _shown(value: Json) -> str:
    return UNDEFINED if point(value) is None else interval(value)


def _band(row: Json) -> str:
    low, high = point(at(row, "low")), point(at(row, "high"))
    return DASH if low is None or high is None else f"{number(low)} to {number(high)}"


def curve(arm: Json, *keys: str) -> tuple[list[float], list[float]]:
    """Steps and values of one series of an arm's learning curve."""
    pairs = [
        (float(at(row, "step")), value)
        for row in items(at(arm, "curve"))
        if (value := point(at(row, *keys))) is not None
    ]
    return [step for step, _ in pairs], [value for _, value in pairs]

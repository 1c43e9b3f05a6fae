"""The tables and sentences of the ``template`` stage."""

from __future__ import annotations

from collections.abc import Sequence

from dsteer.report.tables import Column, Table
from dsteer.report.values import (
    FINAL_NORM,
    UNDEFINED,
    at,
    count,
    estimate,
    interval,
    is_undefined,
    mapping,
    number,
    percent,
    plural,
    point,
    site_order,
)
from dsteer.store import Json

_SITE = Column("site", text=True)

_FORMS = {"raw": "raw text", "templated": "chat template"}

_REACHED = {
    "base_raw": ("base on raw text", "the start: 0 by definition"),
    "v_training": ("base on raw text + v(training)", "the training vector alone"),
    "v_template": ("base on raw text + v(template)", "the template's vector alone"),
    "v_both": ("base on raw text + both", "both vectors, without the interaction"),
    "v_total": ("base on raw text + mean displacement", "both and the interaction's mean"),
    "tuned_raw": ("tuned on raw text", "training itself, no template"),
    "base_templated": ("base in the template", "the template itself, no training"),
}


ROUNDING = "within rounding"

WHY = {
    "zero": "there is no displacement",
    "rounding": "the displacement is within rounding",
    "one_conversation": "the test prompts are of one conversation",
    "scatter": "the mean displacement is not told from 0 beside the prompts' scatter",
}
"""Why a site has no shares."""


def four_way_tables(result: Json) -> list[Table]:
    """Every table of the stage."""
    tables = [_prompts(result), _shares(result), _norms(result), _directions(result)]
    return [*tables, *([_reach(result)] if mapping(at(result, "kl")) else [])]


def four_way_sentences(result: Json, sites: list[str]) -> list[str]:
    """What the stage found at some sites, in plain words; at final_norm where none is measured."""
    measured = mapping(at(result, "sites"))
    ordered = site_order(measured)
    usual = [FINAL_NORM] if FINAL_NORM in measured else ordered[-1:]
    said = []
    for site in [site for site in sites if site in measured] or usual:
        parts = at(measured, site, "parts")
        if is_undefined(measured[site]):
            said.append(f"At {site}: undefined, {why_undefined(measured[site])}.")
            continue
        moved = [_moved(parts, f"training_{form}") for form in ("raw", "templated")]
        said.append(
            f"At {site}, {_share(parts, 'template_base')} of the displacement "
            "between the base on raw text and the tuned model in its template is the template, "
            f"{_share(parts, 'training_raw')} the training, and "
            f"{_share(parts, 'interaction')} their interaction. Training moves raw "
            f"text by {moved[0]} and text in the template by {moved[1]}"
            + (
                f", at a cosine of {interval(cosine)}."
                if (cosine := at(measured, site, "cosines", "training_forms")) is not None
                else "."
            )
        )
    kl = at(result, "kl")
    if point(at(kl, "v_both", "recovered")) is not None:
        said.append(
            "Added to the base on raw text, the training vector recovers "
            f"{_percent(at(kl, 'v_training', 'recovered'))} of the KL to the tuned model in its "
            f"template, the template's vector {_percent(at(kl, 'v_template', 'recovered'))}, both "
            f"{_percent(at(kl, 'v_both', 'recovered'))}; the template itself, given to the base, "
            f"{_percent(at(kl, 'base_templated', 'recovered'))} (first token)."
        )
    return said


def why_undefined(row: Json) -> str:
    """Why a site that is marked as undefined has no shares, in words."""
    return WHY[str(at(row, "why"))]


def within_rounding(part: Json) -> bool:
    """Whether a mean part is not 0, and yet not to be told from rounding."""
    return at(part, "within_rounding") is True and at(part, "zero") is not True


def _moved(parts: Json, part: str) -> str:
    """The length of a mean part, in words; never a number where it has none."""
    if within_rounding(at(parts, part)):
        return "nothing above rounding"
    length = point(at(parts, part, "relative_norm"))
    if length is None:
        return "nothing that is told from 0"
    return f"{number(length)} mean lengths of the base's states"


def _share(parts: Json, part: str) -> str:
    """A share in per cent; rounding is no number."""
    if within_rounding(at(parts, part)):
        return "0\u00a0% (within rounding)"
    return _percent(at(parts, part, "share"))


def _percent(value: Json) -> str:
    middle, low, high = estimate(value)
    if low is None or high is None:
        return percent(middle)
    return f"{percent(middle)} [{percent(low)}, {percent(high)}]"


def _cells(row: Json, *paths: tuple[str, ...]) -> list[str]:
    """Numbers with intervals; ``undefined`` where one is not defined."""
    found = [at(row, *path) for path in paths]
    return [UNDEFINED if point(value) is None else interval(value) for value in found]


def _parts(row: Json, key: str, parts: Sequence[str]) -> list[str]:
    """Numbers of some parts with intervals; words for one that is undefined or rounding."""
    return [
        ROUNDING
        if point(at(row, "parts", part, key)) is not None
        and within_rounding(at(row, "parts", part))
        else _cells(row, ("parts", part, key))[0]
        for part in parts
    ]


def _rows(result: Json) -> list[tuple[str, Json]]:
    sites = mapping(at(result, "sites"))
    return [(site, sites[site]) for site in site_order(sites)]


def _n(result: Json) -> str:
    return f"N = {plural(at(result, 'n_test'), 'test prompt')}"


# ---------------------------------------------------------------------------------- tables


def _prompts(result: Json) -> Table:
    dropped = [
        [f"left out of {split}: {rule.replace('_', ' ')}", count(times)]
        for split, rules in mapping(at(result, "dropped")).items()
        for rule, times in mapping(rules).items()
    ]
    forms = [
        [
            f"{words}: read at the token",
            f"{at(result, 'forms', form, 'last_token')!r} in "
            f"{percent(point(at(result, 'forms', form, 'last_token_share')))} of the prompts",
        ]
        for form, words in _FORMS.items()
    ]
    tokens = [
        [f"{words}: tokens", count(at(result, "forms", form, "tokens"))]
        for form, words in _FORMS.items()
    ]
    return Table(
        "template-prompts",
        "The same conversations in two forms: the raw transcript, and through the chat template.",
        [Column("what", text=True), Column("value", text=True)],
        [
            ["fit prompts", count(at(result, "n_fit"))],
            ["test prompts", count(at(result, "n_test"))],
            *tokens,
            *forms,
            *dropped,
        ],
    )


def _shares(result: Json) -> Table:
    shares = ("training_raw", "template_base", "interaction", "training_mean", "template_mean")
    return Table(
        "template-shares",
        "The displacement from the base on raw text to the tuned model in its template, divided "
        f"({_n(result)}). Shares are projections of a part's mean vector on the total's. Products "
        "of means, G(P, Q), are averages of ⟨Pᵢ, Qⱼ⟩ over pairs of different conversations, so the "
        "prompts' scatter adds nothing to them. Undefined: no displacement, one within rounding, "
        "or G(total, total) not positive. Within rounding: the mean part is. Brackets: jackknife "
        "over conversations; of energies, bootstrap.",
        [
            _SITE,
            Column("training T_raw", "G(T_raw, total) / G(total, total), with T_raw = h_tuned − "
                   "h_base on raw text"),
            Column("template B", "the same of B = h_base(template) − h_base(raw)"),
            Column("interaction I", "the same of I = T_templ − T_raw = U − B: what only both "
                   "together do. The three shares sum to 1"),
            Column("training, halved", "share of ½ (T_raw + T_templ): the interaction divided "
                   "equally. This and the next sum to 1"),
            Column("template, halved", "share of ½ (B + U)"),
            Column("energy T_raw", "Σ‖T_raw‖² / Σ‖total‖², prompt by prompt; energies do not sum "
                   "to 1 where parts are not orthogonal"),
            Column("energy B", "Σ‖B‖² / Σ‖total‖²"),
            Column("energy I", "Σ‖I‖² / Σ‖total‖²"),
        ],
        [
            [
                site,
                *_parts(row, "share", shares),
                *_parts(row, "energy", shares[:3]),
            ]
            for site, row in _rows(result)
        ],
    )  # fmt: skip


def _norms(result: Json) -> Table:
    parts = {
        "total": "total",
        "training_raw": "T_raw",
        "training_templated": "T_templ",
        "template_base": "B",
        "template_tuned": "U",
        "interaction": "I",
    }
    return Table(
        "template-norms",
        f"Norms of the mean parts, in units of the mean ‖h_base‖ on raw text ({_n(result)}), and "
        "how much of a part is one vector: m, the debiased shared share, mean of ⟨Pᵢ, Pⱼ⟩ over "
        "i ≠ j / mean ‖Pᵢ‖². A norm is √G(P, P), from pairs of different conversations, so the "
        "prompts' scatter adds nothing to it; undefined where G(P, P) is not positive: the part is "
        "not told from 0. Brackets: jackknife over conversations.",
        [
            _SITE,
            Column("mean ‖h_base‖", "in the states' units"),
            *(Column(f"‖{words}‖") for words in parts.values()),
            Column("m of T_raw", "1: one vector for all prompts; 0: scatter around none"),
            Column("m of B"),
            Column("m of I"),
        ],
        [
            [
                site,
                number(point(at(row, "base_norm"))),
                *_parts(row, "relative_norm", list(parts)),
                *_cells(
                    row,
                    *(
                        ("parts", part, "shared_share")
                        for part in ("training_raw", "template_base", "interaction")
                    ),
                ),
            ]
            for site, row in _rows(result)
        ],
    )


def _directions(result: Json) -> Table:
    pairs = [(fitted, tested) for fitted in _FORMS for tested in _FORMS]
    return Table(
        "template-directions",
        f"Directions: whether training does the same in both forms ({_n(result)}). “v of … on …”: "
        "mean held-out cosine of the training effect on test prompts in the second form with v, "
        f"its mean on {plural(at(result, 'n_fit'), 'fit prompt')} in the first; within one form it "
        "is the ceiling. Cosines of means are G(P, Q) / √(G(P, P) G(Q, Q)), from pairs of "
        "different conversations: scatter does not lower them, and an estimate may exceed 1. "
        "Undefined: a part within rounding, or with G not positive. Brackets: jackknife over "
        "conversations; of v, bootstrap. No unit.",
        [
            _SITE,
            Column("cos(T_raw, T_templ)", "between the mean training effects in both forms"),
            Column("cos(B, U)", "between the mean template effects in both models"),
            Column("cos(T_raw, B)", "between the mean training and the mean template effect"),
            *(Column(f"v of {_FORMS[fitted]} on {_FORMS[tested]}") for fitted, tested in pairs),
        ],
        [
            [
                site,
                *_cells(
                    row,
                    ("cosines", "training_forms"),
                    ("cosines", "template_models"),
                    ("cosines", "training_template"),
                    *(("held_out", fitted, tested) for fitted, tested in pairs),
                ),
            ]
            for site, row in _rows(result)
        ],
    )


def _reach(result: Json) -> Table:
    return Table(
        "template-kl",
        "How near the first token's distribution comes to that of the tuned model in its template "
        f"({_n(result)}; vectors are means over fit prompts, added at final_norm)."
        + (
            " Recovered is undefined: the base's KL on raw text is not above "
            f"{number(point(at(result, 'kl_floor')))} nats, what rounding could make."
            if point(at(result, "kl", "base_raw", "recovered")) is None
            else ""
        ),
        [
            Column("states", text=True),
            Column("what it is", text=True),
            Column("KL", "mean KL(tuned in its template ‖ these states), nats"),
            Column("recovered", "R = 1 − ΣKL / ΣKL of the base on raw text"),
        ],
        [
            [words, meaning, *_cells(at(result, "kl", key), ("kl",), ("recovered",))]
            for key, (words, meaning) in _REACHED.items()
        ],
    )

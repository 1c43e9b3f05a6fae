"""The tables and the sentences of the stages ``maps`` and ``strength``."""

from __future__ import annotations

from dsteer.report.tables import Column, Table
from dsteer.report.values import (
    at,
    interval,
    is_undefined,
    items,
    mapping,
    number,
    plain,
    point,
    site_order,
)
from dsteer.store import Json

MAPS = {
    "scale": ("scale", "h ↦ (1 + a) h"),
    "translation": ("translation", "h ↦ h + v: the steering vector"),
    "scale_translation": ("both", "h ↦ (1 + a) h + b"),
    "low_rank": ("low rank", "reduced-rank ridge regression; rank chosen on tune"),
    "ridge": ("ridge", "full affine map; penalty chosen on tune"),
}
"""Name and meaning of each map, from few to many free numbers."""


def maps_tables(result: Json) -> list[Table]:
    """R² at every site, and KL at the places that were measured."""
    columns = [Column(name, meaning) for name, meaning in MAPS.values()]
    sites = mapping(at(result, "sites"))
    r2 = [
        [
            site,
            *(interval(at(sites[site], "r2", name)) for name in MAPS),
            interval(at(sites[site], "gap")),
            plain(at(sites[site], "chosen", "low_rank", "rank")),
        ]
        for site in site_order(sites)
        if not is_undefined(sites[site])
    ]
    kl = [
        [
            site,
            plain(at(found, "tokens")),
            *(interval(at(found, "recovered", name)) for name in MAPS),
            interval(at(found, "patched")),
            interval(at(found, "gap")),
        ]
        for site, found in mapping(at(result, "kl")).items()
    ]
    tables = [
        Table(
            "maps-r2",
            "Share of the squared displacement that a map predicts from the base's state, on test "
            "prompts (R², the identity has 0).",
            [
                Column("site", text=True),
                *columns,
                Column("gap", "ridge − translation: what a constant misses"),
                Column("rank", "of the low-rank map"),
            ],
            r2,
        ),
        Table(
            "maps-kl",
            "KL recovered when each map moves the base's states.",
            [
                Column("site", text=True),
                Column("tokens", text=True),
                *columns,
                Column("patched", "the tuned states themselves"),
                Column("gap", "ridge − translation"),
            ],
            kl,
        ),
    ]
    return [table for table in tables if table.rows]


def maps_sentences(result: Json) -> list[str]:
    """What came out, for the first page."""
    site = str(at(result, "headline", "site"))
    found, kl = at(result, "sites", site), at(result, "kl", site)
    said = []
    if at(found, "r2") is not None:
        said.append(
            f"At {site} a constant predicts {interval(at(found, 'r2', 'translation'))} of the "
            f"squared displacement, a scale {interval(at(found, 'r2', 'scale'))}, an affine map "
            f"{interval(at(found, 'r2', 'ridge'))}: a constant misses "
            f"{interval(at(found, 'gap'))} that the base's state tells."
        )
    if at(kl, "recovered") is not None:
        said.append(
            f"In KL recovered there: constant {interval(at(kl, 'recovered', 'translation'))}, "
            f"affine {interval(at(kl, 'recovered', 'ridge'))}, patched "
            f"{interval(at(kl, 'patched'))}."
        )
    return said


ARMS = {
    "one": ("λ = 1", "v* as it is"),
    "least_squares": ("least squares", "the mean of ⟨Δ, v⟩/‖v‖² on tune"),
    "kl_optimal": ("least KL", "the constant of least KL on tune"),
    "predicted": ("predicted", "each token's λ predicted from its base state"),
    "along_displacement": ("own λ", "each token's own ⟨Δ, v⟩/‖v‖², from the tuned state"),
    "per_prompt_oracle": ("best per answer", "of all constants, each answer's best"),
}


def strength_tables(result: Json) -> list[Table]:
    """The strengths, and what each recovers."""
    sites = mapping(at(result, "sites"))
    strengths = [
        [
            site,
            plain(at(found, "tokens")),
            interval(at(found, "least_squares")),
            number(point(at(found, "kl_optimal"))),
            f"{number(point(at(found, 'per_prompt', 'mean')))} ± "
            f"{number(point(at(found, 'per_prompt', 'sd')))}",
            f"{number(point(at(found, 'per_prompt', 'q05')))} to "
            f"{number(point(at(found, 'per_prompt', 'q95')))}",
            interval(at(found, "predictable_r2")),
            interval(at(found, "regret", "one")),
            interval(at(found, "regret", "constant")),
        ]
        for site, found in sites.items()
    ]
    recovered = [
        [site, *(interval(at(found, "recovered", name)) for name in ARMS)]
        for site, found in sites.items()
    ]
    tables = [
        Table(
            "strength-best",
            "The best strength of v*, each token's own, and what constants lose.",
            [
                Column("site", text=True),
                Column("tokens", text=True),
                Column("least squares", "mean of ⟨Δ, v⟩/‖v‖² on test tokens"),
                Column("least KL", "the constant of least KL, chosen on tune"),
                Column("own λ", "mean ± standard deviation over test tokens"),
                Column("5 % to 95 %", "of the own λ"),
                Column("predictable", "R² of the own λ from the base's state, held out"),
                Column("regret of 1", "R(best per answer) − R(λ = 1)"),
                Column("regret of a constant", "R(best per answer) − R(least KL)"),
            ],
            strengths,
        ),
        Table(
            "strength-recovered",
            "KL recovered at each strength.",
            [Column("site", text=True)] + [Column(*words) for words in ARMS.values()],
            recovered,
        ),
    ]
    return [table for table in tables if table.rows]


def strength_sentences(result: Json) -> list[str]:
    """What came out, for the first page."""
    site = next(iter(mapping(at(result, "sites"))), None)
    found = at(result, "sites", str(site))
    if found is None or not items(at(found, "curve", "strengths")):
        return []
    return [
        f"At {site} the best constant strength is {number(point(at(found, 'kl_optimal')))} by KL "
        f"(chosen on tune) and {interval(at(found, 'least_squares'))} by least squares. Against "
        f"the best strength for each answer, λ = 1 loses {interval(at(found, 'regret', 'one'))} of "
        f"the KL; the base's state predicts {interval(at(found, 'predictable_r2'))} of how the "
        "strengths differ."
    ]

"""The best strength of v*: least squares, least KL, each prompt's own; and the regret of others.

Constants are chosen on tune pairs; every number that is reported is of test pairs. The per-prompt
oracle takes, of the grid and the chosen constants, the strength that serves each answer best, which
no one can know before.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float
from torch import Tensor

from dsteer.activations.sites import ENCODER, FINAL_NORM
from dsteer.behaviour.edited import Bench, Place, Split, json_of, places, rows_of
from dsteer.config import StrengthConfig
from dsteer.errors import MeasurementError
from dsteer.geometry.intervals import bootstrap_mean, bootstrap_ratio
from dsteer.geometry.subspaces import PENALTIES, Coefficients, fit_coefficients
from dsteer.models.load import Model
from dsteer.models.pair import ModelPair
from dsteer.report.figures import draw_result
from dsteer.stages import StageContext
from dsteer.steering.edits import Change, Edit, adding
from dsteer.steering.vector import SteeringVectorSet
from dsteer.store import Json, write_tensors

ROUNDING = 1e-5
"""Strengths that differ by no more, in units of v*, differ by the rounding of float32 states."""


def run(context: StageContext) -> Json:
    """Measure every place; write each test token's own strength to ``strengths.safetensors``."""
    config = context.config.strength or StrengthConfig()
    vectors = SteeringVectorSet.load(context.input("vector") / "vectors.safetensors")
    profile, cosine = (
        context.result(name) if name in context.inputs else None for name in ("profile", "cosine")
    )
    wanted = [
        place
        for place in places(config.sites, config.tokens, profile, cosine, FINAL_NORM)
        if place.site in vectors and place.site != ENCODER and not vectors[place.site].undefined
    ]
    if not wanted:
        raise MeasurementError(
            f"strength.sites {', '.join(config.sites)}: v* is zero or absent there; name sites "
            "where the models differ"
        )
    pair = ModelPair.configured(context.config.models, context.base_path, context.tuned_path)
    bench = Bench(
        pair,
        config,
        context.input("data"),
        context.template,
        [place.site for place in wanted],
        context.seed("bootstrap"),
        context.reporter,
    )
    splits = bench.splits(wanted[0].tokens)
    sites: dict[str, Json] = {}
    tensors: dict[str, np.ndarray] = {}
    with pair.using("base") as model:
        for place in wanted:
            v = vectors[place.site].tensor
            sites[place.site], own = _place(context, config, bench, splits, place, v, model)
            tensors[place.site] = own.numpy()
        del model
    pair.release()
    write_tensors(context.folder / "strengths.safetensors", tensors)
    first = sites[wanted[0].site]
    result = {
        "n_test": splits["test"].answers.pairs,
        "n_tune": splits["tune"].answers.pairs,
        "sites": sites,
        "headline": {
            "site": wanted[0].site,
            "least_squares": first["least_squares"]["value"],
            "kl_optimal": first["kl_optimal"]["value"],
            "recovered_one": _value(first["recovered"]["one"]),
            "regret_one": _value(first["regret"]["one"]),
            "predictable_r2": _value(first["predictable_r2"]),
        },
        "notes": list(dict.fromkeys([*bench.notes, *_notes(sites, config)])),
    }
    draw_result("strength", result, context.folder)
    return result


def _value(interval: Json) -> Json:
    return None if interval is None else interval["value"]


def _notes(sites: Mapping[str, Json], config: StrengthConfig) -> list[str]:
    ends = {config.strengths[0], config.strengths[-1]}
    return [
        f"At {site} the λ of least KL on tune pairs is {found['kl_optimal']['value']:g}, an "
        "end of the grid: the best one may lie beyond (strength.strengths)."
        for site, found in sites.items()
        if found["kl_optimal"]["value"] in ends
    ]


def along(v: Float[Tensor, " d"]) -> Change:
    """The change h + (⟨Δ, v⟩/‖v‖²) v: each token has the strength of its own displacement."""

    def change(base: Tensor, tuned: Tensor) -> Tensor:
        vector = v.to(base)
        own = (tuned - base) @ vector / (vector @ vector)
        return base + own[..., None] * vector

    return change


def predicted(found: Coefficients) -> Change:
    """The change along v by the strength that the base's state predicts."""
    constant = found.directions.T @ (found.directions @ found.displacement)

    def change(base: Tensor, _tuned: Tensor) -> Tensor:
        rest = found.displace(base, 1) - found.displacement.to(base)
        return base + constant.to(base) + rest

    return change


def least(strengths: np.ndarray, kl: np.ndarray) -> float:
    """The strength of least KL: the vertex of the parabola through the least grid point and its
    neighbours; the grid point itself at an end."""
    i = int(kl.argmin())
    if i in {0, len(kl) - 1}:
        return float(strengths[i])
    a, b, _ = np.polyfit(strengths[i - 1 : i + 2], kl[i - 1 : i + 2], 2)
    return float(-b / (2 * a)) if a > 0 else float(strengths[i])


def _place(
    context: StageContext,
    config: StrengthConfig,
    bench: Bench,
    splits: Mapping[str, Split],
    place: Place,
    v: Float[Tensor, " d"],
    model: Model,
) -> tuple[Json, Float[Tensor, " n"]]:
    stored = context.input("activations")
    site, tokens, test = place.site, place.tokens, splits["test"]
    rows = {name: rows_of(stored, split, site, tokens) for name, split in splits.items()}
    square = v.double() @ v.double()
    own = {name: (tuned - base) @ v.double() / square for name, (base, tuned, _) in rows.items()}
    grid = np.asarray(config.strengths)
    edits = [Edit(site, adding(v, float(strength))) for strength in grid]
    tune_gains, tune_before = bench.gains(
        splits["tune"], bench.score(model, splits["tune"], edits, tokens, f"λ, {site}"), tokens
    )
    optimal = least(grid, (tune_before.sum() - tune_gains.sum(dim=1)).numpy())
    squares = float(own["tune"].mean())
    base, tuned, _ = rows["fit"]
    tune_base, tune_tuned, _ = rows["tune"]
    unit = (v.double() / v.double().norm())[None]
    found = fit_coefficients(base, tuned - base, unit, PENALTIES, tune_base, tune_tuned - tune_base)
    edits += [
        Edit(site, adding(v, squares)),
        Edit(site, adding(v, optimal)),
        Edit(site, along(v)),
        Edit(site, predicted(found)),
    ]
    gains, before = bench.gains(
        test, bench.score(model, test, edits, tokens, f"strengths, {site}"), tokens
    )
    oracle = gains[: len(grid) + 2].amax(dim=0)  # with both constants: no regret is negative
    arms = {
        "one": gains[config.strengths.index(1.0)],
        "least_squares": gains[len(grid)],
        "kl_optimal": gains[len(grid) + 1],
        "along_displacement": gains[len(grid) + 2],
        "predicted": gains[len(grid) + 3],
        "per_prompt_oracle": oracle,
    }

    def share(values: Tensor) -> Json:
        return json_of(bench.ratio(values, before, test))

    test_base, test_tuned, keys = rows["test"]
    quantiles = np.quantile(own["test"].numpy(), [0.05, 0.95])
    result = {
        "tokens": tokens,
        "least_squares": json_of(
            bootstrap_mean(
                own["test"], keys, draws=config.bootstrap, confidence=config.confidence,
                seed=bench.seed,
            )
        ),
        "least_squares_tune": squares,
        "kl_optimal": {"value": optimal, "on": "tune"},
        "per_prompt": {
            "mean": float(own["test"].mean()),
            "sd": float(own["test"].std()) if len(own["test"]) > 1 else None,
            "q05": float(quantiles[0]),
            "q95": float(quantiles[1]),
            "n": len(own["test"]),
        },
        "recovered": {name: share(values) for name, values in arms.items()},
        "regret": {
            "one": share(oracle - arms["one"]),
            "constant": share(oracle - arms["kl_optimal"]),
        },
        "predictable_r2": _predictable(found, test_base, test_tuned, keys, config, bench.seed),
        "curve": {
            "strengths": [float(strength) for strength in grid],
            "recovered": [share(row) for row in gains[: len(grid)]],
        },
    }  # fmt: skip
    return result, own["test"]


def _predictable(
    found: Coefficients,
    base: Tensor,
    tuned: Tensor,
    keys: list[str],
    config: StrengthConfig,
    seed: int,
) -> Json:
    """1 − Σ(c − ĉ)² / Σ(c − c̄)², c̄ the mean of the fit tokens; None where c does not vary."""
    unit = found.directions[0]
    truth = (tuned - base - found.displacement) @ unit
    guess = (found.displace(base, 1) - found.displacement) @ unit
    whole = truth**2
    if float(whole.mean()) <= (ROUNDING * float(found.displacement.norm())) ** 2:
        return None
    return json_of(
        bootstrap_ratio(
            whole - (truth - guess) ** 2, whole, keys, draws=config.bootstrap,
            confidence=config.confidence, seed=seed,
        )
    )  # fmt: skip

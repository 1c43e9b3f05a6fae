"""Fit nested maps from base to tuned states: what a constant vector misses.

R² is of the run's own stored states, 1 − Σ‖Δ − Δ̂‖² / Σ‖Δ‖², so the identity has 0. KL recovered is
of test answers whose tokens are moved by each map. Rank and penalties are chosen on tune tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dsteer.activations.extract import PairedActivations
from dsteer.activations.sites import ENCODER, FINAL_NORM
from dsteer.behaviour.edited import Bench, Place, Split, json_of, places, rows_of
from dsteer.config import MapsConfig
from dsteer.errors import MeasurementError
from dsteer.geometry.intervals import bootstrap_ratio
from dsteer.geometry.maps import NAMES, StateMap, fit_maps
from dsteer.models.load import Model
from dsteer.models.pair import ModelPair
from dsteer.report.figures import draw_result
from dsteer.stages import StageContext
from dsteer.steering.edits import Change, Edit, patched
from dsteer.store import Json


def run(context: StageContext) -> Json:
    """R² at every site, and KL at the places asked for."""
    config = context.config.maps or MapsConfig()
    measured = context.result("activations")
    acts = PairedActivations.open(context.input("activations"))
    rows = {split: slice(*measured["rows"][split]) for split in ("fit", "tune", "test")}
    sites: dict[str, Json] = {}
    asked = acts.sites if config.sites == "all" else config.sites
    for site in asked:
        if site not in acts.sites:
            raise MeasurementError(
                f"maps.sites: {site}: the run holds no states there; name some of "
                f"{', '.join(acts.sites)}"
            )
    with context.reporter.bar("maps", len(asked), unit="site") as advance:
        for site in asked:
            base, delta = acts.base[site].double(), acts.displacement(site)
            keys = measured["conversations"]["test"]
            sites[site] = _site(base, delta, rows, keys, config, context.seed(site))
            advance(1)
    pair = ModelPair.configured(context.config.models, context.base_path, context.tuned_path)
    profile, cosine = (
        context.result(name) if name in context.inputs else None for name in ("profile", "cosine")
    )
    wanted = [
        place
        for place in places(config.kl_sites, config.tokens, profile, cosine, FINAL_NORM)
        if place.site != ENCODER
    ]
    kl, notes = _divergences(context, config, pair, wanted)
    pair.release()
    first = wanted[0].site if wanted else next(iter(sites))
    result = {
        "maps": list(NAMES),
        "n_fit": rows["fit"].stop - rows["fit"].start,
        "n_test": rows["test"].stop - rows["test"].start,
        "sites": sites,
        "kl": kl,
        "headline": _headline(first, sites.get(first), kl.get(first)),
        "notes": [*_notes(sites), *notes],
    }
    draw_result("maps", result, context.folder)
    return result


def _headline(site: str, found: Json, kl: Json) -> dict[str, Json]:
    def value(node: Json, *keys: str) -> Json:
        for key in (*keys, "value"):
            node = None if node is None else node.get(key)
        return node

    return {
        "site": site,
        "r2_translation": value(found, "r2", "translation"),
        "r2_ridge": value(found, "r2", "ridge"),
        "kl_translation": value(kl, "recovered", "translation"),
        "kl_ridge": value(kl, "recovered", "ridge"),
    }


def _notes(sites: Mapping[str, Json]) -> list[str]:
    undefined = [site for site, found in sites.items() if found["r2"] is None]
    grown = [
        site
        for site, found in sites.items()
        if found["r2"] is not None
        and None not in (one := found["r2"]["scale"], other := found["r2"]["translation"])
        and one["value"] > other["value"]
    ]
    notes = []
    if undefined:
        notes.append(
            "No map has an R² where the displacement is exactly zero: " + ", ".join(undefined) + "."
        )
    if grown:
        notes.append(
            f"At {', '.join(grown)} a scale predicts more of the displacement than a constant: the "
            "states' norm grows or shrinks, which looks like steering in R² and in cosines; where "
            "a norm follows (anywhere but at final_norm) it is taken away again, so judge by KL."
        )
    return notes


def _site(
    base: Tensor,
    delta: Tensor,
    rows: Mapping[str, slice],
    keys: list[str],
    config: MapsConfig,
    seed: int,
) -> Json:
    """R² of every map on the test rows."""
    if not bool(delta.any()):
        return {"undefined": True, "r2": None, "chosen": None, "gap": None}
    fit, tune, test = (rows[name] for name in ("fit", "tune", "test"))
    found = fit_maps(base[fit], delta[fit], base[tune], delta[tune], config.ranks, config.ridge)
    aim = delta[test]
    whole = (aim**2).sum(dim=1)
    left = {
        name: ((aim - each.displace(base[test])) ** 2).sum(dim=1) for name, each in found.items()
    }

    def share(above: Tensor) -> Json:
        return json_of(
            bootstrap_ratio(
                above, whole, keys, draws=config.bootstrap, confidence=config.confidence, seed=seed
            )
        )

    return {
        "r2": {name: share(whole - error) for name, error in left.items()},
        "gap": share(left["translation"] - left["ridge"]),
        "chosen": _chosen(found),
    }


def _chosen(found: Mapping[str, StateMap]) -> dict[str, Json]:
    return {
        "scale": found["scale"].factor,
        "low_rank": {"rank": found["low_rank"].rank, "penalty": found["low_rank"].penalty},
        "ridge": {"penalty": found["ridge"].penalty},
    }


# ---------------------------------------------------------------------------------- KL


def moving(each: StateMap) -> Change:
    """The change h + Δ̂(h)."""

    def change(base: Tensor, _tuned: Tensor) -> Tensor:
        return base + each.displace(base)

    return change


def _divergences(
    context: StageContext, config: MapsConfig, pair: ModelPair, wanted: list[Place]
) -> tuple[dict[str, Json], list[str]]:
    if not wanted:
        return {}, []
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
    found: dict[str, Json] = {}
    with pair.using("base") as model:
        for place in wanted:
            found[place.site] = _place(context, config, bench, splits, place, model)
        del model
    return found, list(dict.fromkeys(bench.notes))


def _place(
    context: StageContext,
    config: MapsConfig,
    bench: Bench,
    splits: Mapping[str, Split],
    place: Place,
    model: Model,
) -> Json:
    """KL that each map recovers at one place."""
    stored = context.input("activations")
    site, tokens = place.site, place.tokens
    base, tuned, _ = rows_of(stored, splits["fit"], site, tokens)
    tune_base, tune_tuned, _ = rows_of(stored, splits["tune"], site, tokens)
    if torch.equal(base, tuned):
        return {"tokens": tokens, "recovered": None, "patched": None, "gap": None, "chosen": None}
    fitted = fit_maps(
        base, tuned - base, tune_base, tune_tuned - tune_base, config.ranks, config.ridge
    )
    edits = [Edit(site, patched), *(Edit(site, moving(fitted[name])) for name in NAMES)]
    scores = bench.score(model, splits["test"], edits, tokens, f"maps, {site}")
    gains, before = bench.gains(splits["test"], scores, tokens)
    whole, rest = gains[0], dict(zip(NAMES, gains[1:], strict=True))
    gap = rest["ridge"] - rest["translation"]
    return {
        "tokens": tokens,
        "n_fit": len(base),
        "recovered": {
            name: json_of(bench.ratio(row, before, splits["test"])) for name, row in rest.items()
        },
        "patched": json_of(bench.ratio(whole, before, splits["test"])),
        "gap": json_of(bench.ratio(gap, before, splits["test"])),
        "chosen": _chosen(fitted),
    }

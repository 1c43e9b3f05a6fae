"""Measure cosines of displacements with v*: in-sample, leave-one-out, held-out, and their null.

v* and the first two kinds use the fit rows, the site is chosen on the tune rows, and held-out
cosines, the headline, are those of the test rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsteer.activations.extract import PairedActivations
from dsteer.activations.moments import open_streamed
from dsteer.activations.sites import FINAL_NORM
from dsteer.config import CosineConfig
from dsteer.geometry.alignment import cosine_to, cosine_to_mean, histogram_mode
from dsteer.geometry.displacement import shared_share
from dsteer.geometry.intervals import (
    Interval,
    bootstrap_mean,
    held_out_cosine,
    mean_cosine,
    sign_flip_null,
)
from dsteer.geometry.preference import paired_cosines
from dsteer.geometry.sums import (
    BUCKETS,
    NULL_DRAWS,
    ClusterSums,
    held_out_from_sums,
    in_sample_from_sums,
    null_from_sums,
)
from dsteer.report.figures import draw_result
from dsteer.stages import StageContext
from dsteer.steering.vector import SteeringVectorSet
from dsteer.store import Json, write_tensors

TIE = 1e-9
"""Mean cosines that are so close count as equal: of sites, the earlier one is chosen."""

OVERSTATED = 0.02
"""An in-sample mean so far above the held-out one is noted."""

KINDS = ("in_sample", "leave_one_out", "held_out")

NO_NULL: dict[str, Json] = {"mean": None, "q95": None, "p": None, "draws": 0}
"""The null of a site where no cosine is defined."""


def run(context: StageContext) -> Json:
    """Measure every site and choose one; write ``cosines.safetensors``, float64, one a prompt."""
    config = context.config.cosine or CosineConfig()
    measured = context.result("activations")
    rows = {split: slice(*measured["rows"][split]) for split in ("fit", "tune", "test")}
    folder = context.input("activations")
    activations = PairedActivations.open(folder)
    streamed = open_streamed(folder)
    vectors = SteeringVectorSet.load(context.input("vector") / "vectors.safetensors")

    sites: dict[str, Json] = {}
    tensors: dict[str, np.ndarray] = {}
    with context.reporter.bar("cosines", len(activations.sites), unit="site") as advance:
        for site in activations.sites:
            if vectors[site].undefined:
                sites[site] = _undefined()
            else:
                delta = activations.displacement(site)
                split = {name: delta[where] for name, where in rows.items()}
                keys, seed = measured["conversations"], context.seed(site)
                if streamed is None:
                    sites[site], cosines = _measure(split, vectors[site].tensor, keys, config, seed)
                else:
                    sums = {name: moments[site].sums for name, moments in streamed.items()}
                    sites[site], cosines = _measure_sums(
                        sums, split, vectors[site].tensor, keys, config, seed
                    )
                tensors |= {f"{site}/{kind}": values.numpy() for kind, values in cosines.items()}
            advance(1)
    write_tensors(context.folder / "cosines.safetensors", tensors)

    chosen = _choose(sites)
    paper = FINAL_NORM if FINAL_NORM in sites else None
    kept = {name: where.stop - where.start for name, where in rows.items()}
    counts = kept if streamed is None else measured["counts"]
    result = {
        "n_fit": counts["fit"],
        "n_test": counts["test"],
        "sites": sites,
        "chosen_site": chosen,
        "paper_site": paper,
        "headline": {
            "chosen_site": chosen,
            "held_out_cosine": _mean(sites, chosen),
            "held_out_cosine_final_norm": _mean(sites, paper),
            "null_q95": sites[chosen]["null"]["q95"] if chosen else None,
            "shared_share": sites[chosen]["shared_share_test"] if chosen else None,
        },
        "notes": [
            *_notes(sites, chosen),
            *([] if streamed is None else _sums_notes(kept, counts, config)),
        ],
    }
    if streamed is not None:
        result["rows_kept"] = {name: kept[name] for name in ("fit", "test")}
    draw_result("cosine", result, context.folder)
    return result


def _measure(
    split: Mapping[str, Tensor],
    v: Tensor,
    keys: Mapping[str, Sequence[str]],
    config: CosineConfig,
    seed: int,
) -> tuple[Json, dict[str, Tensor]]:
    """One site's result and its cosines: one a row, and of the null one mean a draw."""
    fit, test = split["fit"], split["test"]
    draws: dict[str, Any] = {
        "draws": config.bootstrap,
        "confidence": config.confidence,
        "seed": seed,
    }
    cosines = {
        "in_sample": cosine_to_mean(fit, "in_sample"),
        "leave_one_out": cosine_to_mean(fit, "leave_one_out"),
        "held_out": cosine_to(test, v),
    }
    intervals = {
        "in_sample": mean_cosine(fit, "in_sample", keys["fit"], **draws),
        "leave_one_out": mean_cosine(fit, "leave_one_out", keys["fit"], **draws),
        "held_out": held_out_cosine(fit, test, keys["fit"], keys["test"], **draws),
    }
    flipped = sign_flip_null(
        fit, test, "held_out", keys["fit"], keys["test"], draws=config.null_draws, seed=seed
    )
    cosines["null"] = flipped.nanmean(dim=1)
    tune = _number(cosine_to(split["tune"], v).nanmean())
    return _result(cosines, intervals, tune, shared_share(test).plain), cosines


def _measure_sums(
    sums: Mapping[str, ClusterSums],
    kept: Mapping[str, Tensor],
    v: Tensor,
    keys: Mapping[str, Sequence[str]],
    config: CosineConfig,
    seed: int,
) -> tuple[Json, dict[str, Tensor]]:
    """As :func:`_measure`, of sums over all rows, and of the displacements of the kept rows.

    Means come from the sums, but for the leave-one-out cosine, which is no sum over rows: its mean
    is that of the kept rows. Single cosines are those of the kept rows, with v of all.
    """
    fit, test = sums["fit"], sums["test"]
    draws: dict[str, Any] = {
        "draws": config.bootstrap,
        "confidence": config.confidence,
        "seed": seed,
    }
    whole = torch.from_numpy(fit.total.sum(axis=0))
    cosines = {
        "in_sample": cosine_to(kept["fit"], fit.mean),
        "leave_one_out": paired_cosines(kept["fit"], whole - kept["fit"]),
        "held_out": cosine_to(kept["test"], v),
        "null": null_from_sums(fit, test, draws=config.null_draws),
    }
    left_out = (
        mean_cosine(kept["fit"], "leave_one_out", keys["fit"], **draws)
        if len(kept["fit"]) == fit.n
        else bootstrap_mean(cosines["leave_one_out"], keys["fit"], **draws)
    )
    intervals = {
        "in_sample": in_sample_from_sums(fit, **draws),
        "leave_one_out": left_out,
        "held_out": held_out_from_sums(fit, test, **draws),
    }
    return _result(cosines, intervals, sums["tune"].mean_cosine(v), test.share.plain), cosines


def _result(
    cosines: Mapping[str, Tensor],
    intervals: Mapping[str, Interval | None],
    tune_mean: float | None,
    share: float | None,
) -> Json:
    held_out = intervals["held_out"]
    return {kind: _describe(cosines[kind], intervals[kind]) for kind in KINDS} | {
        "null": _null(cosines["null"], held_out.value if held_out else None),
        "tune_mean": tune_mean,
        "shared_share_test": share,
        "undefined": False,
    }


def _null(means: Tensor, measured: float | None) -> Json:
    """The null's means, and p of the measured one: (1 + draws that reach it) / (1 + draws)."""
    null = means[means.isfinite()]
    if not len(null) or measured is None:
        return dict(NO_NULL)
    reached = int((null >= measured - TIE).sum())
    return {
        "mean": _number(null.mean()),
        "q95": _number(null.quantile(0.95)),
        "p": (1 + reached) / (1 + len(null)),
        "draws": len(null),
    }


def _describe(cosines: Tensor, mean: Interval | None) -> Json:
    defined = cosines[cosines.isfinite()]
    return {
        "mean": mean.json() if mean else None,
        "median": _number(defined.quantile(0.5)) if len(defined) else None,
        "peak": histogram_mode(defined),
        "share_above_0.9": _number((defined > 0.9).double().mean()),
    }


def _undefined() -> Json:
    nothing = {"mean": None, "median": None, "peak": None, "share_above_0.9": None}
    return dict.fromkeys(KINDS, nothing) | {
        "null": dict(NO_NULL),
        "tune_mean": None,
        "shared_share_test": None,
        "undefined": True,
    }


def _number(value: Tensor) -> float | None:
    return float(value) if torch.isfinite(value) else None


def _mean(sites: Mapping[str, Json], site: str | None, kind: str = "held_out") -> float | None:
    mean = sites[site][kind]["mean"] if site else None
    return float(mean["value"]) if mean else None


def _choose(sites: Mapping[str, Json]) -> str | None:
    """The site of highest mean cosine on the tune rows; of equals, the earliest."""
    tuned = {site: r["tune_mean"] for site, r in sites.items() if r["tune_mean"] is not None}
    best = max(tuned.values(), default=0.0)
    return next((site for site, mean in tuned.items() if mean >= best - TIE), None)


def _notes(sites: Mapping[str, Json], chosen: str | None) -> list[str]:
    notes = []
    undefined = [site for site, result in sites.items() if result["undefined"]]
    if undefined:
        notes.append(
            "No cosine is defined where the displacement of every fit prompt is exactly zero: "
            f"{', '.join(undefined)}."
        )
    if chosen is None:
        notes.append("No site could be chosen: no held-out cosine is defined on the tune prompts.")
    else:
        notes.append(
            f"{chosen} was chosen: of all sites its tune prompts agree most with v* (mean cosine "
            f"{sites[chosen]['tune_mean']:.3f}); the cosines reported are of the test prompts."
        )
    over = {
        site: inside - outside
        for site in sites
        if (inside := _mean(sites, site, "in_sample")) is not None
        and (outside := _mean(sites, site)) is not None
        and inside - outside > OVERSTATED
    }
    if over:
        worst = max(over, key=lambda site: over[site])
        notes.append(
            f"In-sample cosines, the paper's kind, overstate: at {_count(over)} the in-sample mean "
            f"is more than {OVERSTATED} above the held-out one, most at {worst} "
            f"({_mean(sites, worst, 'in_sample'):.3f} against {_mean(sites, worst):.3f})."
        )
    lost = [
        site
        for site, result in sites.items()
        if (bound := _lower(result)) is not None
        and result["null"]["q95"] is not None
        and bound <= result["null"]["q95"]
    ]
    if lost:
        notes.append(
            "No shared direction can be told from chance at "
            f"{', '.join(lost)}: the interval of the mean held-out cosine reaches down to the "
            "null's 95 % quantile."
        )
    return notes


def _sums_notes(
    kept: Mapping[str, int], counts: Mapping[str, int], config: CosineConfig
) -> list[str]:
    draws = min(config.null_draws, NULL_DRAWS)
    notes = [
        "store: moments: mean in-sample and held-out cosines and the null are of all prompts. "
        f"Intervals resample {BUCKETS} buckets of conversations; the null flips each conversation "
        f"by itself, in {draws} draws whose signs are bits of the hash of its key."
    ]
    if config.null_draws > draws:
        notes.append(
            f"cosine.null_draws {config.null_draws} was not met: with store: moments the null has "
            f"{draws} draws, which are summed while the states are read."
        )
    if (kept["fit"], kept["test"]) != (counts["fit"], counts["test"]):
        notes.append(
            f"Medians, peaks, shares above 0.9 and histograms are of the prompts whose states were "
            f"kept: {kept['fit']} of {counts['fit']} fit and {kept['test']} of {counts['test']} "
            "test rows, against v* of all fit prompts."
        )
    if kept["fit"] != counts["fit"]:
        notes.append(
            "The mean leave-one-out cosine is of the kept fit prompts, each against v* of all "
            "others; its interval holds v* fixed."
        )
    return notes


def _lower(result: Json) -> float | None:
    """Lower end of the mean held-out cosine; the mean itself where it has no interval."""
    mean = result["held_out"]["mean"]
    if mean is None:
        return None
    low: float | None = mean["low"] if mean["low"] is not None else mean["value"]
    return low


def _count(sites: Mapping[str, float]) -> str:
    return f"{len(sites)} site{'s' if len(sites) != 1 else ''}"

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
from dsteer.activations.sites import FINAL_NORM
from dsteer.config import CosineConfig
from dsteer.geometry.alignment import cosine_to, cosine_to_mean, histogram_mode
from dsteer.geometry.displacement import shared_share
from dsteer.geometry.intervals import Interval, held_out_cosine, mean_cosine, sign_flip_null
from dsteer.report.figures import draw_result
from dsteer.stages import StageContext
from dsteer.steering.vector import SteeringVectorSet
from dsteer.store import Json, write_tensors

TIE = 1e-9
"""Mean cosines that are so close count as equal: the earlier site is chosen."""

OVERSTATED = 0.02
"""An in-sample mean so far above the held-out one is noted."""

KINDS = ("in_sample", "leave_one_out", "held_out")


def run(context: StageContext) -> Json:
    """Measure every site and choose one; write ``cosines.safetensors``, float64, one a prompt."""
    config = context.config.cosine or CosineConfig()
    measured = context.result("activations")
    rows = {split: slice(*measured["rows"][split]) for split in ("fit", "tune", "test")}
    activations = PairedActivations.open(context.input("activations"))
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
                sites[site], cosines = _measure(
                    split,
                    vectors[site].tensor,
                    measured["conversations"],
                    config,
                    context.seed(site),
                )
                tensors |= {f"{site}/{kind}": values.numpy() for kind, values in cosines.items()}
            advance(1)
    write_tensors(context.folder / "cosines.safetensors", tensors)

    chosen = _choose(sites)
    paper = FINAL_NORM if FINAL_NORM in sites else None
    result = {
        "n_fit": rows["fit"].stop - rows["fit"].start,
        "n_test": rows["test"].stop - rows["test"].start,
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
        "notes": _notes(sites, chosen),
    }
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
    null = cosines["null"][cosines["null"].isfinite()]
    result = {kind: _describe(cosines[kind], intervals[kind]) for kind in KINDS} | {
        "null": {"mean": _number(null.mean()), "q95": _number(null.quantile(0.95))}
        if len(null)
        else {"mean": None, "q95": None},
        "tune_mean": _number(cosine_to(split["tune"], v).nanmean()),
        "shared_share_test": shared_share(test).plain,
        "undefined": False,
    }
    return result, cosines


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
        "null": {"mean": None, "q95": None},
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


def _lower(result: Json) -> float | None:
    """Lower end of the mean held-out cosine; the mean itself where it has no interval."""
    mean = result["held_out"]["mean"]
    if mean is None:
        return None
    low: float | None = mean["low"] if mean["low"] is not None else mean["value"]
    return low


def _count(sites: Mapping[str, float]) -> str:
    return f"{len(sites)} site{'s' if len(sites) != 1 else ''}"

"""A made-up study: variants in the forms that their runs have, and a comparison's result."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from fabricate import fabricate

from dsteer.store import write_json

MEASURED = ("activations", "vector", "cosine", "spectrum")


def around(value: float, half: float = 0.04) -> dict[str, Any]:
    return {"value": value, "low": value - half, "high": value + half, "n": 400}


def causal(i: int) -> dict[str, Any]:
    """A variant's causal numbers; the third one on has none but its training's."""
    dpo = {"reward_accuracy": around(0.9), "reward_margin": around(1.5),
           "kl_to_base": around(0.02 + 0.01 * i, 0.003)}  # fmt: skip
    if i > 1:
        return {
            "dpo": dpo,
            "profile": None,
            "rank": None,
            "maps": None,
            "groups": None,
            "claims": None,
        }
    return {
        "dpo": dpo,
        "profile": {
            "site": "resid_post.2", "tokens": "prompt_last", "v": around(0.6 - 0.6 * i),
            "patched": around(0.9), "random": 0.2, "efficiency": around(0.7) if not i else None,
            "readout_share": around(0.1),
        },
        "rank": {
            "site": "resid_post.2", "tokens": "prompt_last", "width": 48,
            "k50": {"deployable": {"value": 1, "low": 1, "high": 2},
                    "oracle": {"value": 1, "low": 1, "high": 1}},
            "k90": {"deployable": {"value": None if i else 4, "low": None, "high": None},
                    "oracle": {"value": 2, "low": 2, "high": 3}},
        },
        "maps": {
            "site": "resid_post.2", "tokens": "prompt_last",
            "r2": {"translation": around(0.5), "ridge": around(0.7)},
            "kl": {"translation": around(0.6), "ridge": around(0.8)},
        },
        "groups": None if i else {
            "site": "resid_post.2", "groups": 2, "expected": 2.0, "participation": around(1.2),
            "own": around(0.6), "others": around(0.5),
        },
        "collapse": {"up": 8.0 + i, "down": None},
        "reversal": None if i else {
            "inversion": {"way_back": around(0.3), "accuracy": around(0.9),
                          "kl_to_base": around(0.1), "recovered": around(0.04)},
        },
        "claims": {
            "shared_shift": "supported",
            "low_dimensional": "not supported" if i else "supported",
            "constant_suffices": "not supported", "preference_specific": "not tested",
            "reversible": "not tested",
        },
    }  # fmt: skip


def comparison(
    names: Sequence[str],
    *,
    blocks: int = 4,
    apart: Collection[str] = (),
    failed: Collection[str] = (),
    undefined: bool = False,
    rowless: bool = False,
) -> dict[str, Any]:
    """A comparison's result.

    Args:
        names: the variants.
        blocks: sites are so many blocks, and final_norm.
        apart: variants of another width.
        failed: variants that failed.
        undefined: no reliability is positive, and no subspace has a dimension above the noise.
        rowless: the states are gone: cosines without intervals alone.
    """
    random = np.random.default_rng(3)
    sites = [f"resid_post.{k}" for k in range(blocks)] + ["final_norm"]
    block_site = sites[blocks // 2] if blocks else None
    there = [name for name in names if name not in failed]
    together = [name for name in there if name not in apart]
    nothing = undefined or rowless

    def variant(i: int, name: str) -> dict[str, Any]:
        if name in failed:
            return {"failed": "the GPU is out of memory"}
        place = {
            "undefined": False, "norm": 2.0, "relative_norm": 0.2 + 0.01 * i,
            "held_out": around(0.9 - 0.08 * i), "null_q95": 0.1, "sigma_ratio": around(0.3),
            "effective_rank": around(20.0 + i), "participation_ratio": around(1.2 + i),
            "effective_rank_centred": around(30.0 + i), "shared_share": around(0.8 - 0.05 * i),
            "shared_share_debiased": 0.7, "reliability": None if nothing else around(0.97),
        }  # fmt: skip
        kl = {
            "kl_tuned_base": 0.2, "recovered_at_one": around(0.6 - 0.4 * i),
            "chosen_strength": 1.1, "recovered_at_chosen": around(0.62), "undefined": None,
        }  # fmt: skip
        reliability = {
            "half": None if nothing else around(0.9),
            "full": None if nothing else around(0.95),
            "spread": None,
            "undefined": "the halves' mean cosine is not above 0" if nothing else None,
        }
        return {
            "failed": None, "description": "", "base": "tea-8b", "base_revision": None,
            "tuned": f"tea-8b-{name}", "tuned_revision": None, "n_fit": 400, "n_test": 160,
            "width": 96 if name in apart else 48, "blocks": blocks, "position": "prompt_last",
            "template": "none", "ids_sha256": "0" * 64, "rows_missing": None,
            "chosen_site": block_site or "final_norm",
            "at": {"chosen": {"site": block_site or "final_norm", **place},
                   "final_norm": {"site": "final_norm", **place}},
            "kl": {"first_token": kl, "response": None},
            "interpolation": None if i else {
                "site": "resid_post.2", "positions": "all", "strength": 1.0,
                "kl_recovered": {"steered": around(0.41), "start": None, "target": None},
                "preference_match": {"steered": around(0.81), "start": around(0.5),
                                     "target": around(0.93)},
                "reward_margin": {"steered": None, "start": None, "target": None},
            },
            "causal": causal(i), "reliability": dict.fromkeys(sites, reliability),
        }  # fmt: skip

    def angles() -> dict[str, Any] | None:
        if nothing:
            return None
        return {
            "dimensions": [5, 5], "angles": sorted(random.uniform(5, 89, 5).tolist()),
            "null_mean": [50.0, 60.0, 70.0, 80.0, 86.0], "null_low": [40.0, 50.0, 60.0, 70.0, 80.0],
            "null_high": [60.0, 70.0, 80.0, 85.0, 89.0],
        }  # fmt: skip

    def between(a: str, b: str) -> dict[str, Any]:
        if a not in together or b not in together:
            return {"a": a, "b": b, "why": "widths differ (48 and 96)", "base_cosine": None,
                    "sites": {}, "angles": {}}  # fmt: skip
        measured = {}
        for site in sites:
            value = float(random.uniform(-0.4, 0.95))
            raw = {"value": value, "low": None, "high": None} if rowless else around(value)
            measured[site] = {
                "cosine": raw, "cross": None,
                "disattenuated": None if nothing else around(1.08 * value),
                "undefined": "a split-half reliability is not positive (-0.1)" if nothing else None,
            }  # fmt: skip
        shown = {s: {c: angles() for c in ("uncentred", "centred")}
                 for s in (block_site, "final_norm") if s}  # fmt: skip
        return {"a": a, "b": b, "why": None, "base_cosine": 1.0, "sites": measured, "angles": shown}

    subspace = None if nothing else {
        "dimensions": [5] * len(together), "eigenvalues": [0.98, 0.7, 0.5], "null_q95": 0.6,
        "count": 2,
    }  # fmt: skip
    directions = {"m": len(together), "singular_values": [1.4, 0.9, 0.2], "share": 0.65,
                  "share_null_q95": 0.4, "sigma_ratio": 0.64}  # fmt: skip
    together_set = {
        "members": together, "width": 48, "n": 400, "random_cosine": 0.28,
        "sites": [s for s in (block_site, "final_norm") if s], "block_site": block_site,
        "by_site": {
            site: {"directions": directions,
                   "subspace": {"uncentred": subspace, "centred": subspace}}
            for site in (block_site, "final_norm") if site
        },
    }  # fmt: skip
    return {
        "variants": {name: variant(i, name) for i, name in enumerate(names)},
        "pairs": [between(a, b) for a, b in combinations(there, 2)],
        "sets": [together_set] if len(together) > 1 else [],
        "subspace": 5, "draws": 100, "null_draws": 200, "confidence": 0.95,
        "headline": {}, "notes": ["The null is random directions, alike in all d dimensions."],
    }  # fmt: skip


def write_study(folder: Path, result: dict[str, Any], *, name: str = "made-up-study") -> Path:
    """Write a study's folder: its comparison, and the variants that did not fail; no figures."""
    for variant, entry in result["variants"].items():
        if entry["failed"] is None:
            run = fabricate(
                folder / "variants" / variant, stages=MEASURED, n_fit=30, n_test=12, width=12,
                blocks=2, name=variant,
            )  # fmt: skip
            (run / "report.html").write_text("<p>its own</p>", encoding="utf-8")
    (folder / "variants").mkdir(parents=True, exist_ok=True)
    write_json(folder / "comparison" / "result.json", result)
    write_json(
        folder / "manifest.json",
        {
            "name": name,
            "description": "A study that never was.",
            "dsteer_version": "0.1.0",
            "config": {"seed": 0, "variants": {v: {"models.tuned": v} for v in result["variants"]}},
        },
    )
    return folder

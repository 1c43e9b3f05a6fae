"""Made-up results of the stages that claims rest on, and run folders that hold them.

A pair is set by three numbers: how much of the KL patching and v* recover, and the mean reward
margin under v*. All else follows in the forms of the stages.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dsteer.steering.vector import SteeringVector, SteeringVectorSet
from dsteer.store import write_json, write_tensors

SITES = ("resid_post.0", "resid_post.1", "resid_post.2", "final_norm")
CHOSEN, TOKENS = "resid_post.1", "all"
WIDTH, PAIRS = 64, 40
CONVERSATIONS = [f"c{i // 2}" for i in range(PAIRS)]
STRENGTHS = [-1.0, 0.0, 0.5, 1.0, 2.0]


def around(value: float, half: float = 0.02) -> dict[str, Any]:
    """An interval."""
    return {"value": value, "low": value - half, "high": value + half, "n": PAIRS}


def margins(mean: float, seed: int = 0) -> np.ndarray:
    """Reward margins of each test pair, whose conversations differ by ±0.1 or so."""
    rng = np.random.default_rng(seed)
    return mean + np.repeat(rng.normal(0, 0.1, PAIRS // 2), 2) + rng.normal(0, 0.1, PAIRS)


def results(
    patched: float = 0.95, own: float = 0.9, margin: float = 1.0, cosine: float = 0.9
) -> dict[str, Any]:
    """Stage → result of one pair."""
    depth = {site: 1 - 0.2 * abs(k - 1) for k, site in enumerate(SITES)}

    def band(half: float, v: float) -> dict[str, float]:
        return {"low": -half, "median": 0.0, "high": half, "v": v}

    def place(site: str) -> dict[str, Any]:
        return {
            "patched": {"kl_recovered": around(patched * depth[site]),
                        "kl_recovered_answers": around(patched * depth[site]),
                        "reward_margin": around(margin)},
            "v": {"kl_recovered": around(own * depth[site]),
                  "kl_recovered_answers": around(own * depth[site]),
                  "reward_margin": around(margin * depth[site])},
            "v_here": None,
            "random": {"kl_recovered": band(0.05, own * depth[site]),
                       "kl_recovered_answers": band(0.05, own * depth[site]),
                       "reward_margin": band(0.1, margin * depth[site]),
                       "draws": 20, "pairs": 16},
            "efficiency": around(own / patched),
            "inert": False,
        }  # fmt: skip

    def curve(share: float) -> list[dict[str, Any]]:
        return [around(share * (1 - 0.6**k), 0.03) for k in (1, 2, 4, 8)]

    sweep = {
        "site": CHOSEN,
        "strengths": STRENGTHS,
        "metrics": {
            "kl_recovered": {
                "label": "KL recovered",
                "curves": {"v": [around(own * (1 - (1 - s) ** 2)) for s in STRENGTHS]},
                "random": {
                    "low": [-0.3] * 5,
                    "high": [0.1] * 5,
                    "mean": [-0.1] * 5,
                    "v": [own * (1 - (1 - s) ** 2) for s in STRENGTHS],
                },
                "crossing": {"strength": None, "why": "the end of the scale"},
            },
            "reward_margin": {
                "label": "reward margin",
                "curves": {"v": [around(margin * s) for s in STRENGTHS]},
                "random": {
                    "low": [-0.1] * 5,
                    "high": [0.1] * 5,
                    "mean": [0.0] * 5,
                    "v": [margin * s for s in STRENGTHS],
                },
                "crossing": {"strength": around(1.1), "why": None},
            },
        },
    }
    top = [cosine, 0.2, 0.1, 0.08, 0.05]
    found: dict[str, Any] = {
        "dpo": {
            "curve": {"heldout": [{"step": s, "reward_margin": margin * s / 40}
                                  for s in (10, 20, 40)]},
            "test": {"reward_accuracy": around(0.5 + margin / 2.5),
                     "reward_margin": around(margin)},
            "kl_to_base": around(0.02, 0.002),
            "learned": margin > 0.1,
        },
        "vector": {
            "sites": {site: {"norm": 2.0, "noise_mean_norm": 1e-6, "within_rounding": False}
                      for site in SITES},
            "kl_recovery": {
                "first_token": {"strengths": STRENGTHS, "recovered": [
                    around(own * (1 - (1 - s) ** 2)) for s in STRENGTHS]},
                "response": None,
            },
        },
        "cosine": {
            "chosen_site": CHOSEN,
            "sites": {site: {"held_out": {"mean": around(cosine * depth[site])},
                             "null": {"mean": 0.0, "q95": 0.1, "p": 0.001, "draws": 999},
                             "shared_share_test": cosine**2} for site in SITES},
        },
        "spectrum": {
            "headline": {"site": "final_norm"},
            "sites": {site: {"shared_share": around(cosine**2), "delta": {"uncentred": {
                "sigma_ratio": 0.1, "entropy": around(1 - depth[site] / 2), "top": top}}}
                      for site in SITES},
        },
        "profile": {
            "n_test": PAIRS, "tokens": [TOKENS], "beta": 0.1,
            "sites": {site: {TOKENS: place(site)} for site in SITES},
            "chosen": {"site": CHOSEN, "tokens": TOKENS, "on": "tune"},
            "conversations": CONVERSATIONS,
        },
        "rank": {
            "sites": {CHOSEN: {
                "tokens": TOKENS, "width": WIDTH, "k": [1, 2, 4, 8], "patched": around(patched),
                "oracle": {"singular": curve(1.0), "greedy": curve(1.0)}, "deployable": curve(0.9),
                "random": [{"low": 0.0, "median": 0.02 * k, "high": 0.04 * k}
                           for k in (1, 2, 4, 8)],
                "k50": {"oracle": {"value": 1, "low": 1, "high": 1}},
                "k90": {"oracle": {"value": 2, "low": 1, "high": 3},
                        "random": {"value": None, "low": None, "high": None}},
            }},
        },
        "maps": {
            "maps": ["scale", "translation", "ridge"],
            "sites": {CHOSEN: {"r2": {"scale": around(0.1), "translation": around(0.7),
                                      "ridge": around(0.8)}}},
            "kl": {CHOSEN: {"tokens": TOKENS, "recovered": {"translation": around(own)}}},
        },
        "strength": {
            "sites": {CHOSEN: {"least_squares": around(0.98), "kl_optimal": around(1.1),
                               "recovered": {"one": around(own), "kl_optimal": around(own)},
                               "regret": {"one": around(0.03), "constant": around(0.02)}}},
        },
        "inversion": sweep,
        "interpolation": sweep,
    }  # fmt: skip
    return {stage: {"headline": {}, "notes": []} | result for stage, result in found.items()}


def write_run(
    run: Path, found: dict[str, Any], *, config: dict[str, Any] | None = None, seed: int = 0
) -> Path:
    """A run folder with these results, the profile's margins, vectors, cosines and a manifest."""
    for stage, result in found.items():
        (run / stage).mkdir(parents=True)
        write_json(run / stage / "result.json", result)
    if "profile" in found:
        means = [
            place[TOKENS]["v"]["reward_margin"]["value"]
            for place in found["profile"]["sites"].values()
        ]
        rows = np.stack([margins(mean, seed) for mean in means])
        write_tensors(run / "profile" / "pairs.safetensors", {f"margin.{TOKENS}.v": rows})
    if "vector" in found:
        rng = np.random.default_rng(seed)
        SteeringVectorSet(SteeringVector(rng.normal(size=WIDTH), site) for site in SITES).save(
            run / "vector" / "vectors.safetensors"
        )
    if "cosine" in found:
        middle = found["cosine"]["sites"][CHOSEN]["held_out"]["mean"]["value"]
        noise = np.random.default_rng(seed).normal(0, 0.05, PAIRS)
        write_tensors(
            run / "cosine" / "cosines.safetensors",
            {f"{CHOSEN}/held_out": np.clip(middle + noise, -1, 1)},
        )
    manifest = {"stages": {stage: {} for stage in found}, "config": config or {}}
    write_json(run / "manifest.json", manifest)
    return run

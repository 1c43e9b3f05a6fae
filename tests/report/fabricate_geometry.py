"""A made-up ``geometry`` folder from simulated states, in the forms that its stage writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dsteer.store import write_tensors


def interval(values: np.ndarray) -> dict[str, Any]:
    """Mean with a normal interval; without bounds for one value."""
    middle, n = float(values.mean()), len(values)
    half = 1.96 * float(values.std()) / np.sqrt(n)
    low, high = (middle - half, middle + half) if n > 1 else (None, None)
    return {"value": middle, "low": low, "high": high, "n": n}


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def write_geometry(
    folder: Path,
    base: dict[str, np.ndarray],
    delta: dict[str, np.ndarray],
    n_fit: int,
    *,
    answers: bool = True,
    pairs: int = 40,
) -> dict[str, Any]:
    """Write ``geometry.safetensors`` and return the result.

    Args:
        folder: the stage's folder.
        base: H_base of each site; the first ``n_fit`` rows are the fit prompts.
        delta: ΔH of each site.
        n_fit: fit prompts.
        answers: whether the test prompts have answers, so that 1a and 1b exist.
        pairs: test pairs.
    """
    blocks = [site for site in base if site.startswith("resid_post")]
    wanted = [*blocks[(len(blocks) - 1) // 2 :][:1], *blocks[-1:], "final_norm"]
    sites = [site for site in dict.fromkeys(wanted) if site in base]
    width = next(iter(base.values())).shape[1]
    random = np.random.default_rng(11)
    tensors: dict[str, np.ndarray] = {}
    clouds = {site: _clouds(site, base[site], delta[site], n_fit, tensors) for site in sites}
    preference = _preference(random, pairs, width, tensors) if answers else None
    gradients = _gradients(random, pairs, width, [*sites], tensors) if answers else None
    write_tensors(folder / "geometry.safetensors", tensors)
    return {
        "beta": 0.1,
        "width": width,
        "sites": sites,
        "pairs": {"fit": {}, "test": {}},
        "preference": preference,
        "gradients": gradients,
        "clouds": clouds,
        "headline": {"margin_change": preference["margin_change"]["value"] if preference else None},
        "notes": [],
    }


def _clouds(
    site: str, base: np.ndarray, delta: np.ndarray, n_fit: int, tensors: dict[str, np.ndarray]
) -> dict[str, Any]:
    fit, test, moved = base[:n_fit], base[n_fit:], delta[n_fit:]
    v = delta[:n_fit].mean(0)
    zero = not v.any()
    _, values, axes = np.linalg.svd(fit - fit.mean(0), full_matrices=False)
    clouds = {"base": test, "tuned": test + moved}
    if not zero:
        clouds |= {"base_plus": test + v, "tuned_minus": test + moved - v}
    for name, rows in clouds.items():
        tensors[f"cloud/{site}/{name}"] = (rows - fit.mean(0)) @ axes[:2].T
    apart, left = np.linalg.norm(moved, axis=1), np.linalg.norm(moved - v, axis=1)
    return {
        "n_fit": n_fit,
        "n": len(test),
        "explained": [float(x) for x in (values**2 / (values**2).sum())[:2]],
        "v_in_plane": None if zero else float(((axes[:2] @ v) ** 2).sum() / (v @ v)),
        "distance": interval(apart),
        "distance_steered": None if zero else interval(left),
        "distance_ratio": None if zero else interval(left / apart.mean()),
        "centre_distance": float(np.linalg.norm(moved.mean(0))),
        "centre_distance_steered": None if zero else float(np.linalg.norm(moved.mean(0) - v)),
        "spread_base": float(np.sqrt(((test - test.mean(0)) ** 2).sum(1).mean())),
        "spread_tuned": float(np.sqrt(((test - test.mean(0)) ** 2).sum(1).mean())),
        "undefined": zero,
    }


def _preference(
    random: np.random.Generator, n: int, width: int, tensors: dict[str, np.ndarray]
) -> dict[str, Any]:
    before, change = random.normal(size=n), 0.4 + 0.6 * random.normal(size=n)
    cosine = 0.2 + 0.1 * random.normal(size=n)
    start = random.normal(size=(n, 3)) * (1, 1, 3)
    v, direction = np.array([1.5, 2.5, 0.0]), np.array([0.2, 0.0, 0.0])
    tensors |= {
        "margin/base": before,
        "margin/tuned": before + change,
        "margin/cosine": cosine,
        "sketch/base": start,
        "sketch/tuned": start + v + 0.3 * random.normal(size=(n, 3)),
        "sketch/preference": direction,
        "sketch/v": v,
        "sketch/used": np.arange(3),
    }
    return {
        "n": n,
        "norm": interval(1 + 0.1 * random.normal(size=n)),
        "pairwise_cosine": interval(cosine),
        "pairwise_sign_flip_q95": 0.05,
        "mean": {
            "n": 400,
            "norm": 0.2,
            "relative_norm": 0.2,
            "held_out_cosine": interval(cosine),
            "cosine_v": 0.51,
        },
        "margin_base": interval(before),
        "margin_tuned": interval(before + change),
        "margin_change": interval(change),
        "margin_change_other_pairs": interval(0.8 * change),
        "margin_change_v": interval(0.9 * change),
        "margin_change_own_heads": None,
        "share_rising": interval((change > 0).astype(float)),
        "cosine": interval(cosine),
        "cosine_other_pairs": interval(0.9 * cosine),
        "cosine_v": interval(cosine),
        "random_sd": width**-0.5,
        "softcap": None,
    }


def _gradients(
    random: np.random.Generator,
    n: int,
    width: int,
    sites: list[str],
    tensors: dict[str, np.ndarray],
) -> dict[str, Any]:
    null = unit(random.normal(size=(2, 4000, width)))
    tensors["gradient/random"] = (null[0] * null[1]).sum(1)
    policies: dict[str, Any] = {}
    for policy in ("base", "tuned"):
        found = {}
        for depth, site in enumerate(sites):
            rows = unit(random.normal(size=(n, width)) / np.sqrt(width) + 0.15 * depth)
            cosines = (rows @ rows.T)[np.triu_indices(n, 1)]
            to_v = rows @ np.ones(width) / np.sqrt(width)
            mean = unit(rows.mean(0))
            along = rows @ mean
            across = unit(np.linalg.svd(rows - along[:, None] * mean)[2][0])
            tensors |= {
                f"gradient/{policy}/{site}/pairwise": cosines,
                f"gradient/{policy}/{site}/cosine_v": to_v,
                f"gradient/{policy}/{site}/plane": np.stack([along, rows @ across], axis=1),
            }
            measured = {
                "pairwise_cosine": interval(cosines) if len(cosines) else None,
                "pairwise_sign_flip_q95": 0.03,
                "cosine_v": interval(to_v),
                "mean_cosine_v": float(mean.mean() * np.sqrt(width)),
                "norm": interval(np.ones(n)),
            }
            found[site] = {"undefined": False, "sequence": measured, "context": measured}
        policies[policy] = {
            "loss_weight": interval(np.full(n, 0.05)),
            "formula_error": 1e-7,
            "sites": found,
        }
    return {"n": n, "random_sd": width**-0.5, "policies": policies}

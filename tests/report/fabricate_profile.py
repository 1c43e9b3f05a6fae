"""A made-up result of the stage ``profile``."""

from __future__ import annotations

from typing import Any

SITES = (*(f"resid_post.{k}" for k in range(4)), "final_norm")


def about(value: float, half: float = 0.05) -> dict[str, Any]:
    return {"value": value, "low": value - half, "high": value + half, "n": 32}


def _changed(share: float, margin: float) -> dict[str, Any]:
    return {"kl_recovered": about(share), "reward_margin": about(margin, 0.02)}


def _row(depth: int, tokens: str) -> dict[str, Any]:
    """The first site's models agree; the share grows with depth, v* does half of it."""
    whole = 0.3 * depth if tokens == "all" else 0.1 * depth
    row: dict[str, Any] = {
        "patched": _changed(whole, whole / 2),
        "v": None,
        "v_here": None,
        "random": None,
        "efficiency": None,
        "efficiency_here": None,
        "efficiency_why": "the run's v* is zero or absent here",
        "inert": False,
    }
    if depth:
        del row["efficiency_why"]
        band = {"low": -0.2, "median": -0.05, "high": 0.02}
        row |= {
            "v": _changed(whole / 2, whole / 4),
            "random": {"kl_recovered": band, "reward_margin": band, "draws": 20, "pairs": 16},
            "efficiency": about(0.5),
        }
        if tokens == "all":
            row["v_here"] = _changed(whole * 0.6, whole / 3)
            row["efficiency_here"] = about(0.6)
    return row


def profile_result() -> dict[str, Any]:
    tokens = ["prompt_last", "all"]
    sites = {site: {k: _row(depth, k) for k in tokens} for depth, site in enumerate(SITES)}
    return {
        "n_test": 32,
        "n_tune": 16,
        "beta": 0.1,
        "confidence": 0.95,
        "tokens": tokens,
        "sites": sites,
        "chosen": {"site": "resid_post.3", "tokens": "all", "on": "tune"},
        "peak": {
            k: {"site": "final_norm", "patched": sites["final_norm"][k]["patched"]} for k in tokens
        },
        "readout_share": about(0.02, 0.01),
        "conversations": [f"c{i}" for i in range(32)],
        "headline": {"site": "resid_post.3", "tokens": "all", "kl_recovered": 0.45,
                     "kl_recovered_patched": 0.9, "efficiency": 0.5, "reward_margin": 0.225,
                     "readout_share": 0.02},
        "notes": [],
    }  # fmt: skip

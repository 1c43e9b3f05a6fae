"""A made-up ``template`` result from simulated states, in the form that its stage writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

WEIGHTS = {
    "training_raw": (-1, 0, 1, 0),
    "training_templated": (0, -1, 0, 1),
    "template_base": (-1, 1, 0, 0),
    "template_tuned": (0, 0, -1, 1),
    "interaction": (1, -1, -1, 1),
    "training_mean": (-0.5, -0.5, 0.5, 0.5),
    "template_mean": (-0.5, 0.5, -0.5, 0.5),
    "total": (-1, 0, 0, 1),
}


def around(value: float | None, half: float = 0.03) -> dict[str, Any] | None:
    if value is None:
        return None
    return {"value": value, "low": value - half, "high": value + half, "n": 60}


def write_template(
    _folder: Path,
    base: dict[str, np.ndarray],
    delta: dict[str, np.ndarray],
    *,
    template: float = 1.0,
) -> dict[str, Any]:
    """The result, for a template that adds one vector and changes training by a tenth of another.

    Args:
        base: H_base of each site, on raw text.
        delta: ΔH of each site, on raw text.
        template: size of the template's vectors.
    """
    random = np.random.default_rng(17)
    sites = {}
    for site, h in base.items():
        shift, twist = template * random.normal(size=(2, h.shape[1]))
        changes = delta[site].any()
        cells = (
            h,
            h + shift,
            h + delta[site],
            h + delta[site] + shift + 0.1 * twist * changes,
        )
        sites[site] = _site(cells)
    kl = {
        name: {"kl": around(1 - r), "recovered": around(r)}
        for name, r in {
            "base_raw": 0.0,
            "base_templated": 0.6,
            "tuned_raw": 0.2,
            "v_training": 0.15,
            "v_template": 0.45,
            "v_both": 0.7,
            "v_total": 0.75,
        }.items()
    }
    return {
        "n_fit": 80,
        "n_test": 60,
        "dropped": {"fit": {}, "test": {"template_refuses": 4}},
        "forms": {
            "raw": {"tokens": 5120, "ids_sha256": "0" * 64, "last_token": ":",
                    "last_token_share": 1.0},
            "templated": {"tokens": 6000, "ids_sha256": "1" * 64, "last_token": "\n",
                          "last_token_share": 1.0},
        },
        "sites": sites,
        "kl": kl if "final_norm" in base else None,
        "kl_floor": 1e-8 if "final_norm" in base else None,
        "headline": {"site": list(sites)[-1]},
        "notes": [],
    }  # fmt: skip


def _site(cells: tuple[np.ndarray, ...]) -> dict[str, Any]:
    rows = {
        name: sum(w * cell for w, cell in zip(weights, cells, strict=True) if w)
        for name, weights in WEIGHTS.items()
    }
    total, unit = rows["total"].mean(0), float(np.linalg.norm(cells[0], axis=1).mean())
    squared = float(total @ total)
    parts = {}
    for name, part in rows.items():
        mean, energy = part.mean(0), float((part**2).sum())
        norm = float(np.linalg.norm(mean))
        parts[name] = {
            "norm_squared": around(norm**2),
            "norm": around(norm),
            "relative_norm": around(norm / unit),
            "share": around(float(mean @ total) / squared if squared else None),
            "energy": around(energy / float((rows["total"] ** 2).sum()) if squared else None),
            "shared_share": around(len(part) * norm**2 / energy if energy else None),
            "zero": norm == 0,
            "within_rounding": norm == 0,
        }

    def cosine(a: str, b: str) -> dict[str, Any] | None:
        one, two = rows[a].mean(0), rows[b].mean(0)
        lengths = float(np.linalg.norm(one) * np.linalg.norm(two))
        return around(float(one @ two) / lengths if lengths else None)

    trained = cosine("training_raw", "training_templated")
    return {
        "base_norm": unit,
        "noise_mean_norm": 1e-7,
        "parts": parts,
        "cosines": {
            "training_forms": trained,
            "template_models": cosine("template_base", "template_tuned"),
            "training_template": cosine("training_raw", "template_base"),
        },
        "held_out": {form: {"raw": trained, "templated": trained} for form in ("raw", "templated")},
        "undefined": not squared,
        "why": None if squared else "zero",
    }

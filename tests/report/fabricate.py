"""A made-up run folder in the forms that the stages write, from simulated states.

Each site's displacement is a shared vector, times a strength that differs between prompts, plus
isotropic rest. Every number in the results is computed from these arrays, so figures look like
real ones. Intervals are normal approximations: only their form matters here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from fabricate_geometry import write_geometry
from fabricate_sweep import write_sweep
from fabricate_template import write_template

from dsteer.store import write_json, write_tensors

STAGES = (
    "data",
    "base",
    "dpo",
    "activations",
    "vector",
    "cosine",
    "spectrum",
    "template",
    "geometry",
    "interpolation",
    "inversion",
)


def fabricate(
    run: Path,
    *,
    blocks: int = 4,
    undefined: Collection[int] = (),
    all_undefined: bool = False,
    norm: bool = True,
    n_fit: int = 400,
    n_test: int = 160,
    width: int = 48,
    response: bool = True,
    learned: bool = True,
    stages: Collection[str] = STAGES,
    name: str = "made-up",
    note: str | None = None,
    config: dict[str, Any] | None = None,
) -> Path:
    """Write a run with results, tensors, manifest, summary and YAML; no figures."""
    states = _States(blocks, set(undefined), all_undefined, norm, n_fit, n_test, width)
    results: dict[str, Any] = {}
    for stage in STAGES:
        if stage not in stages:
            continue
        folder = run / stage
        folder.mkdir(parents=True)
        results[stage] = _WRITERS[stage](states, folder, response=response, learned=learned)
        if note is not None and stage == "data":
            results[stage]["notes"].append(note)
        write_json(folder / "result.json", results[stage])
    run.mkdir(parents=True, exist_ok=True)
    manifest = _manifest(name, results, config)
    write_json(run / "manifest.json", manifest)
    summary = {
        "run": name,
        "stages": {stage: result["headline"] for stage, result in results.items()},
        "notes": [
            {"stage": stage, "text": text}
            for stage, result in results.items()
            for text in result["notes"]
        ],
    }
    write_json(run / "summary.json", summary)
    (run / "pipeline.yaml").write_text(f"# a made-up pipeline\nname: {name}\n", encoding="utf-8")
    return run


class _States:
    def __init__(
        self,
        blocks: int,
        undefined: set[int],
        all_undefined: bool,
        norm: bool,
        n_fit: int,
        n_test: int,
        width: int,
    ) -> None:
        self.n_fit, self.n_test, self.width, self.blocks = n_fit, n_test, width, blocks
        self.random = np.random.default_rng(7)
        n = n_fit + n_test
        self.sites = [f"resid_post.{k}" for k in range(blocks)] + ["final_norm"] * norm
        self.base: dict[str, np.ndarray] = {}
        self.delta: dict[str, np.ndarray] = {}
        mean = self.random.normal(size=width)
        shared = self.random.normal(size=width) / np.sqrt(width)
        topics = self.random.normal(size=(n, 6)) @ self.random.normal(size=(6, width))
        rest = self.random.normal(size=(n, width)) / np.sqrt(width)
        gain = self.random.normal(1.0, 0.25, size=(n, 1))
        for k, site in enumerate(self.sites):
            depth = (k + 1) / len(self.sites)
            self.base[site] = (1 + 2 * depth) * (1.5 * mean + 0.5 * topics) + self.random.normal(
                size=(n, width)
            )
            spread = 1.15 - 0.7 * depth
            zero = all_undefined or k in undefined
            self.delta[site] = (depth * 3) * (gain * shared + spread * rest) * (not zero)

    def fit(self, site: str) -> np.ndarray:
        return self.delta[site][: self.n_fit]

    def test(self, site: str) -> np.ndarray:
        return self.delta[site][self.n_fit :]


def _interval(values: np.ndarray) -> dict[str, Any]:
    middle = float(values.mean())
    half = 1.96 * float(values.std()) / np.sqrt(max(len(values), 1))
    return {"value": middle, "low": middle - half, "high": middle + half, "n": len(values)}


def _around(value: float, share: float = 0.04) -> dict[str, float]:
    return {"value": value, "low": value * (1 - share), "high": value * (1 + share)}


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# ---------------------------------------------------------------------------------- stages


def _data(states: _States, _folder: Path, **_: Any) -> dict[str, Any]:
    sizes = {"train": 1500, "fit": states.n_fit, "tune": 64, "test": states.n_test}
    kept = sum(sizes.values())
    return {
        "sources": [
            {
                "path": "Anthropic/hh-rlhf",
                "format": "hh-rlhf",
                "identity": f"sha256:{_sha('hh')}",
                "rows": kept + 22,
                "kept": kept,
                "dropped": {"roles_do_not_alternate": 9, "transcripts_differ_earlier": 13},
                "messages_skipped": {},
            }
        ],
        "duplicates": 4,
        "left_out": {"conversation_cut": 2},
        "splits": {
            split: {"pairs": size, "conversations": size, "sha256": _sha(split)}
            for split, size in sizes.items()
        },
        "headline": {"rows": kept + 22, "kept": kept, **sizes},
        "notes": ["22 rows were dropped: their reasons are counted in the table."],
    }


def _base(states: _States, _folder: Path, **_: Any) -> dict[str, Any]:
    steps = list(range(20, 620, 20))
    loss = [2.1 + 5.4 * np.exp(-step / 90) + 0.05 * states.random.normal() for step in steps]
    return {
        "parameters": {"total": 1_312_896, "embedding": 524_288},
        "architecture": {
            "vocab_size": 2048,
            "hidden_size": states.width,
            "num_hidden_layers": states.blocks,
            "tie_word_embeddings": False,
        },
        "tokens_seen": 2_457_600,
        "curve": [{"step": s, "loss": v} for s, v in zip(steps, loss, strict=True)],
        "heldout_loss": 2.17,
        "headline": {"parameters": 1_312_896, "heldout_perplexity": float(np.exp(2.17))},
        "notes": [],
    }


def _dpo(states: _States, _folder: Path, *, learned: bool, **_: Any) -> dict[str, Any]:
    steps = list(range(10, 210, 10))
    grow = np.array([1 - np.exp(-step / 60) for step in steps]) * (1.0 if learned else 0.01)
    noise = states.random.normal(size=(3, len(steps))) * 0.02
    train = [
        {
            "step": s,
            "loss": 0.693 - 0.55 * g + a,
            "reward_accuracy": min(1.0, 0.5 + 0.46 * g + b),
            "reward_margin": 4.2 * g + 5 * c,
        }
        for s, g, (a, b, c) in zip(steps, grow, noise.T, strict=True)
    ]
    heldout = [
        {
            "step": s,
            "loss": 0.693 - 0.48 * g,
            "reward_accuracy": 0.5 + 0.41 * g,
            "reward_margin": 3.4 * g,
        }
        for s, g in list(zip(steps, grow, strict=True))[3::4]
    ]
    accuracy = 0.91 if learned else 0.51
    same, other = _sha("embedding"), _sha("head")
    return {
        "curve": {"train": train, "heldout": heldout},
        "test": {
            "reward_accuracy": {
                "value": accuracy,
                "low": accuracy - 0.04,
                "high": accuracy + 0.035,
            },
            "reward_margin": {"value": 3.2, "low": 2.9, "high": 3.5},
            "n": states.n_test,
        },
        "kl_to_base": {"value": 0.84, "low": 0.78, "high": 0.9},
        "kl_noise_floor": 3.1e-7,
        "first_loss": 0.6931,
        "freeze": {
            "mode": "both",
            "tied": False,
            "input": {"before": same, "after": same, "unchanged": True},
            "output": {"before": other, "after": other, "unchanged": True},
        },
        "parameters": {
            "total": 1_312_896,
            "trainable": 788_608,
            "changed": 788_001,
            "changed_share": 0.6002,
        },
        "pairs": {"train": 1500, "dropped": 2, "truncated": 7, "split_token": 0},
        "learned": learned,
        "headline": {"reward_accuracy": accuracy, "reward_margin": 3.2, "kl_to_base": 0.84},
        "notes": []
        if learned
        else ["Training learned nothing on held-out pairs: the interval of accuracy holds 0.5."],
    }


def _activations(states: _States, _folder: Path, *, response: bool, **_: Any) -> dict[str, Any]:
    fit, test = states.n_fit, states.n_test
    return {
        "n": fit + 64 + test,
        "width": states.width,
        "blocks": states.blocks,
        "sites": states.sites,
        "position": "prompt_last",
        "template": "none",
        "rows": {"fit": [0, fit], "tune": [fit, fit + 64], "test": [fit + 64, fit + 64 + test]},
        "ids_sha256": _sha("ids"),
        "tokens": 48_213,
        "truncated": 3,
        "noise_floor": {s: {"rms": 2.1e-6, "mean_norm": 4.0e-7} for s in states.sites},
        "response": {"pairs": test, "tokens": 32 * test} if response else None,
        "conversations": {"fit": [], "tune": [], "test": []},
        "headline": {
            "prompts": fit + test,
            "tokens": 48_213,
            "sites": len(states.sites),
            "truncated": 3,
        },
        "notes": ["3 prompts were longer than the context and were cut on the left."],
    }


def _vector(states: _States, _folder: Path, *, response: bool, **_: Any) -> dict[str, Any]:
    sites, curves = {}, {}
    for site in states.sites:
        fit, test, base = states.fit(site), states.test(site), states.base[site]
        v = fit.mean(0)
        size, zero = float(np.linalg.norm(v)), not fit.any()
        mean = base.mean(0) / np.linalg.norm(base.mean(0))
        sites[site] = {
            "norm": size,
            "relative_norm": size / float(np.linalg.norm(base, axis=1).mean()),
            "noise_rms": 2.1e-6,
            "noise_mean_norm": 4.0e-7,
            "radial_cosine": None if zero else float(mean @ v) / size,
            "radial_norm": None if zero else float(mean @ v),
            "tangential_norm": None if zero else float(np.linalg.norm(v - (mean @ v) * mean)),
            "inert": None if zero else False,
            "strength_least_squares": None if zero else _interval(test @ v / size**2),
            "within_rounding": None if zero else False,
            "undefined": zero,
        }
        points = []
        n = 2
        while n <= states.n_fit // 2:
            draws = []
            for _ in range(10):
                order = states.random.permutation(states.n_fit)
                a, b = fit[order[:n]].mean(0), fit[order[n : 2 * n]].mean(0)
                draws.append(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) if not zero else 0)
            low, high = np.quantile(draws, [0.025, 0.975])
            point = {
                "n": n,
                "cosine": float(np.mean(draws)),
                "low": float(low),
                "high": float(high),
            }
            points.append(point)
            n *= 2
        curves[site] = [] if zero else points
    strengths = [round(-1 + 0.25 * i, 2) for i in range(17)]
    dead = not any(states.fit(site).any() for site in states.sites)
    kl: dict[str, Any] | None = None
    if "final_norm" in states.sites:
        kl = {
            "first_token": _recovery(strengths, 0.71, 0.93, states.n_test, dead),
            "response": _recovery(strengths, 0.42, 1.21, states.n_test, dead) if response else None,
        }
    return {
        "n": states.n_fit,
        "sites": sites,
        "convergence": curves,
        "kl_recovery": kl,
        "headline": {"norm": next(iter(sites.values()))["norm"]},
        "notes": [],
    }


def _recovery(
    strengths: list[float], best: float, optimum: float, n: int, dead: bool
) -> dict[str, Any]:
    share = [best * (1 - ((s - optimum) / optimum) ** 2) for s in strengths]
    measured = {
        "strengths": strengths,
        "recovered": [{"value": r, "low": r - 0.05, "high": r + 0.04} for r in share],
        "kl": [0.8 * (1 - r) for r in share],
        "agreement": [max(0.1, 0.5 + 0.4 * r) for r in share],
        "optimal_strength": _around(optimum),
        "optimal_on": "tune",
        "chosen_strength": 0.93,
        "chosen_on": "tune",
        "recovered_at_chosen": _around(best),
        "least_squares_strength": _around(1.02, 0.02),
        "kl_tuned_base": 0.8,
        "kl_noise_floor": 3e-7,
        "n": n,
        "undefined": None,
    }
    if dead:
        nothing = ("optimal_strength", "chosen_strength", "recovered_at_chosen")
        measured |= dict.fromkeys(nothing)
        measured |= {"recovered": [None] * len(strengths), "kl_tuned_base": 0.0}
        measured["undefined"] = "KL(tuned‖base) is 0 nats: there is nothing to recover"
    return measured


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def _cosine(states: _States, folder: Path, **_: Any) -> dict[str, Any]:
    tensors, sites = {}, {}
    for site in states.sites:
        fit, test = states.fit(site), states.test(site)
        if not fit.any():
            nothing = {"value": None, "low": None, "high": None}
            empty = {"mean": nothing, "median": None, "peak": None, "share_above_0.9": None}
            sites[site] = {
                **dict.fromkeys(("in_sample", "leave_one_out", "held_out"), empty),
                "null": {"mean": None, "q95": None},
                "shared_share_test": None,
                "undefined": True,
            }
            continue
        v = fit.mean(0)
        others = (len(fit) * v - fit) / max(len(fit) - 1, 1)
        signs = states.random.choice([-1, 1], size=(80, len(fit), 1))
        flips = states.random.choice([-1, 1], size=(80, len(test)))
        null = flips * (_unit((signs * fit).mean(1)) @ _unit(test).T)
        kinds = {
            "in_sample": _unit(fit) @ _unit(v),
            "leave_one_out": (_unit(fit) * _unit(others)).sum(1),
            "held_out": _unit(test) @ _unit(v),
        }
        result: dict[str, Any] = {}
        for kind, values in kinds.items():
            tensors[f"{site}/{kind}"] = values
            counts, edges = np.histogram(values, 50, (-1, 1))
            top = int(counts.argmax())
            result[kind] = {
                "mean": _interval(values),
                "median": float(np.median(values)),
                "peak": float(edges[top] + edges[top + 1]) / 2,
                "share_above_0.9": float((values > 0.9).mean()),
            }
        tensors[f"{site}/null"] = null = null.mean(1)
        result["null"] = {"mean": float(null.mean()), "q95": float(np.quantile(null, 0.95))}
        shared = len(test) * np.linalg.norm(test.mean(0)) ** 2 / np.linalg.norm(test) ** 2
        sites[site] = {**result, "shared_share_test": float(shared), "undefined": False}
    write_tensors(folder / "cosines.safetensors", tensors or {"empty": np.zeros(1)})
    defined = [s for s in states.sites if not sites[s]["undefined"]]
    blocks = [s for s in defined if s != "final_norm"] or defined
    chosen = max(blocks, key=lambda s: sites[s]["held_out"]["mean"]["value"], default=None)
    return {
        "n_fit": states.n_fit,
        "n_test": states.n_test,
        "sites": sites,
        "chosen_site": chosen,
        "paper_site": "final_norm" if "final_norm" in states.sites else None,
        "headline": {"chosen_site": chosen},
        "notes": [],
    }


def _spectral(matrix: np.ndarray, centred: bool) -> dict[str, Any]:
    if not matrix.any():
        nothing = dict.fromkeys(
            ("sigma_ratio", "entropy", "entropy_p1", "entropy_normalised", "effective_rank",
             "participation_ratio", "stable_rank")
        )  # fmt: skip
        return {**nothing, "top": []}
    if centred:
        matrix = matrix - matrix.mean(0)
    s = np.linalg.svd(matrix, compute_uv=False)
    s = s[s > 1e-12 * s[0]] if s[0] > 0 else s[:1]

    def entropy(power: int) -> float:
        q = s**power / (s**power).sum()
        return float(-(q * np.log(q)).sum())

    return {
        "sigma_ratio": _around(float(s[1] / s[0]) if len(s) > 1 else 0.0),
        "entropy": _around(entropy(2)),
        "entropy_p1": _around(entropy(1)),
        "entropy_normalised": _around(entropy(2) / float(np.log(max(2, min(matrix.shape))))),
        "effective_rank": _around(float(np.exp(entropy(1)))),
        "participation_ratio": _around(float((s**2).sum() ** 2 / (s**4).sum())),
        "stable_rank": _around(float((s**2).sum() / s[0] ** 2)),
        "top": (s[:5] / np.sqrt((s**2).sum())).tolist(),
    }


def _spectrum(states: _States, folder: Path, **_: Any) -> dict[str, Any]:
    sites = {}
    for site in states.sites:
        fit, base = states.fit(site), states.base[site][: states.n_fit]
        zero = not fit.any()
        v = fit.mean(0)
        share = 0.0 if zero else len(fit) * float(v @ v) / float((fit**2).sum())
        u1 = None if zero else float(abs(np.linalg.svd(fit)[2][0] @ _unit(v)))
        sites[site] = {
            **{
                matrix: {
                    "uncentred": _spectral(values, False),
                    "centred": _spectral(values, True),
                }
                for matrix, values in (("delta", fit), ("base", base), ("tuned", base + 2 * fit))
            },
            "shared_share": None if zero else _around(share),
            "shared_share_debiased": None if zero else _around(share - 1 / len(fit)),
            "u1_cosine": u1,
            "undefined": zero,
        }
    write_tensors(folder / "spectra.safetensors", {"empty": np.zeros(1)})
    return {
        "n": states.n_fit,
        "d": states.width,
        "power": 2,
        "sites": sites,
        "headline": {},
        "notes": [],
    }


_WRITERS = {
    "data": _data,
    "base": _base,
    "dpo": _dpo,
    "activations": _activations,
    "vector": _vector,
    "cosine": _cosine,
    "spectrum": _spectrum,
    "template": lambda states, folder, **__: write_template(folder, states.base, states.delta),
    "geometry": lambda states, folder, **__: write_geometry(
        folder, states.base, states.delta, states.n_fit
    ),
    "interpolation": lambda _, folder, **__: write_sweep(folder, "interpolation"),
    "inversion": lambda _, folder, **__: write_sweep(folder, "inversion"),
}


def _manifest(name: str, results: dict[str, Any], config: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "name": name,
        "description": "A run that never was: made-up states for the report's tests.",
        "dsteer_version": "0.1.0",
        "commit": "e68fe43a1b2c3d4e5f60718293a4b5c6d7e8f901",
        "dirty": False,
        "versions": {"python": "3.12.1", "torch": "2.13.0", "transformers": "5.23.0"},
        "platform": "Linux-made-up",
        "device": "cpu (2 threads)",
        "config": config
        or {
            "name": name,
            "seed": 0,
            "models": {"base": None, "tuned": None, "dtype": "float32"},
            "dpo": {"beta": 0.1, "freeze": "both", "loss_type": "sigmoid", "lora": None}
            if "dpo" in results
            else None,
            "base": {"steps": 600} if "base" in results else None,
            "cosine": {"confidence": 0.95},
        },
        "overrides": [],
        "inputs": {"data.sources.0": f"sha256:{_sha('hh')}"},
        "stages": {
            stage: {
                "fingerprint": _sha(stage),
                "version": 1,
                "seconds": 12.5 * (i + 1),
                "peak_memory_bytes": {"host": 900_000_000 + 100_000_000 * i},
                "resumed": False,
                "outputs": {"result.json": _sha(stage)},
            }
            for i, stage in enumerate(results)
        },
    }


@contextmanager
def edited(path: Path) -> Iterator[dict[str, Any]]:
    """Change a JSON file in place."""
    value = json.loads(path.read_text(encoding="utf-8"))
    yield value
    write_json(path, value)

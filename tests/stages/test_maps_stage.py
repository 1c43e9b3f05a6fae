"""Nested maps and strengths: planted ones are found, and the maths against numpy and scipy."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planted import byte_tokenizer, planted_pair
from scipy.optimize import minimize_scalar

from dsteer.config import read_pipeline
from dsteer.geometry.maps import NAMES, fit_maps
from dsteer.models.pair import ModelPair
from dsteer.pipeline import run_pipeline
from dsteer.progress import SILENT
from dsteer.report.headline import headline
from dsteer.report.maps_tables import (
    maps_sentences,
    maps_tables,
    strength_sentences,
    strength_tables,
)
from dsteer.stages.strength import least
from dsteer.store import read_json

YAML = """
name: planted
data: {sources: [{format: synthetic, conversations: 140}], splits: {fit: 48, tune: 16, test: 24}}
models: {base: ./base, tuned: ./tuned, device: cpu}
activations: {batch_tokens: 4096, noise_floor_prompts: 2, response_tokens: 0}
vector: {bootstrap: 50, convergence_draws: 2}
maps: {kl_sites: [resid_post.1], tokens: all, pairs: 8, tune_pairs: 6, fit_pairs: 8,
       response_tokens: 4, bootstrap: 100}
strength: {sites: [resid_post.1], tokens: all, pairs: 8, tune_pairs: 6, fit_pairs: 8,
           response_tokens: 4, bootstrap: 100}
"""
SITE = "resid_post.1"


def measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: Any, tuned: Any) -> Path:
    def loaded(*_arguments: object) -> ModelPair:
        return ModelPair.load(base, tuned, tokenizer=byte_tokenizer())

    monkeypatch.setattr(ModelPair, "configured", loaded)
    monkeypatch.chdir(tmp_path)
    for name in ("base", "tuned"):
        (tmp_path / name).mkdir()
    run_pipeline(read_pipeline(YAML), YAML, tmp_path / "run", reporter=SILENT)
    return tmp_path / "run"


def test_a_planted_constant_is_a_translation_of_strength_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = planted_pair(1, max_position_embeddings=1024)
    out = measure(tmp_path, monkeypatch, planted.base, planted.tuned)
    maps = read_json(out / "maps" / "result.json")
    r2 = {name: value["value"] for name, value in maps["sites"][SITE]["r2"].items()}
    assert r2["translation"] == pytest.approx(1, abs=1e-10)  # squares of float32 rounding
    assert r2["ridge"] == pytest.approx(1, abs=1e-6)
    assert r2["scale"] < 0.5, "a constant is no scale"
    assert maps["sites"]["resid_post.0"]["undefined"]
    kl = maps["kl"][SITE]
    for name in ("translation", "low_rank", "ridge"):
        assert kl["recovered"][name]["value"] == pytest.approx(1, abs=1e-4), name
    assert kl["patched"]["value"] == pytest.approx(1, abs=1e-6)
    assert kl["recovered"]["scale"]["value"] < 0.5
    later = maps["sites"]["resid_post.3"]["r2"]
    assert later["ridge"]["value"] != later["translation"]["value"]

    strength = read_json(out / "strength" / "result.json")
    found = strength["sites"][SITE]
    assert found["least_squares"]["value"] == pytest.approx(1, abs=1e-5)
    assert found["kl_optimal"]["value"] == pytest.approx(1, abs=0.02)  # a parabola's vertex
    assert found["regret"]["one"]["value"] == pytest.approx(0, abs=1e-6)
    assert found["recovered"]["one"]["value"] == pytest.approx(1, abs=1e-6)
    assert found["recovered"]["predicted"]["value"] == pytest.approx(1, abs=1e-5)
    assert found["per_prompt"]["sd"] < 1e-5
    assert found["predictable_r2"] is None, "strengths that do not vary predict nothing"
    # told
    assert {table.key for table in maps_tables(maps)} == {"maps-r2", "maps-kl"}
    assert {t.key for t in strength_tables(strength)} == {"strength-best", "strength-recovered"}
    assert len(maps_sentences(maps)) == 2
    assert strength_sentences(strength)
    points = dict(headline({}, {"maps": maps, "strength": strength}))
    assert {"Which map", "Which strength"} <= points.keys()
    for stage, name in (("maps", "maps"), ("strength", "strength")):
        assert (out / stage / "figures" / f"{name}.pdf").is_file()


def test_trap_3_low_rank_is_not_constant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change of rank 1 whose size depends on the state: one direction, no constant."""
    planted = planted_pair(1, max_position_embeddings=1024)
    tuned = copy.deepcopy(planted.base)
    d = planted.base.config.hidden_size
    generator = torch.Generator().manual_seed(5)
    u, w = (torch.nn.functional.normalize(torch.randn(d, generator=generator), dim=0)
            for _ in range(2))  # fmt: skip

    def add(_module: object, _inputs: object, output: Any) -> Any:
        state = output[0] if isinstance(output, tuple) else output
        moved = state + (state @ w)[..., None] * u
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    tuned.model.layers[1].register_forward_hook(add)
    out = measure(tmp_path, monkeypatch, planted.base, tuned)
    found = read_json(out / "maps" / "result.json")
    r2 = {name: value["value"] for name, value in found["sites"][SITE]["r2"].items()}
    assert found["sites"][SITE]["chosen"]["low_rank"]["rank"] == 1
    assert r2["low_rank"] > 0.99
    assert r2["translation"] < r2["low_rank"] - 0.05
    assert found["kl"][SITE]["gap"]["low"] > 0, "a constant misses what the state tells"
    strength = read_json(out / "strength" / "result.json")["sites"][SITE]
    assert strength["predictable_r2"]["value"] > 0.99
    assert strength["regret"]["one"]["value"] > 0.01


def rows(seed: int, n: int, d: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d)) + 1.0


def fitted(delta: Any, penalties: list[float], ranks: tuple[int, ...] = (2,)) -> Any:
    base, tune = rows(0, 60), rows(1, 40)
    tensors = [torch.from_numpy(x) for x in (base, delta(base), tune, delta(tune))]
    return base, fit_maps(*tensors, ranks, penalties)


def test_a_planted_scale_is_a_scale() -> None:
    base, maps = fitted(lambda h: 0.3 * h, [1e-3])
    shown = maps["scale"].displace(torch.from_numpy(base)).numpy()
    assert np.allclose(shown, 0.3 * base)
    both = maps["scale_translation"].displace(torch.from_numpy(base)).numpy()
    assert np.allclose(both, 0.3 * base)
    mean = maps["translation"].displace(torch.from_numpy(base)).numpy()
    assert np.allclose(mean, 0.3 * base.mean(0))


def test_ridge_and_reduced_rank_are_the_closed_forms() -> None:
    law = np.random.default_rng(2).normal(size=(6, 2)) @ np.random.default_rng(3).normal(
        size=(2, 6)
    )
    noise = 0.2 * np.random.default_rng(4).normal(size=(60, 6))

    def delta(h: np.ndarray) -> np.ndarray:
        return np.asarray(h @ law + 2.0 + (noise if len(h) == 60 else 0.0))

    penalty = 0.05
    base, maps = fitted(delta, [penalty], (1, 2, 3))
    x, y = base - base.mean(0), delta(base) - delta(base).mean(0)
    shrink = 60 * penalty * (x**2).mean()
    want = np.linalg.solve(x.T @ x + shrink * np.eye(6), x.T @ y)
    assert np.allclose((maps["ridge"].left @ maps["ridge"].right).numpy(), want)
    assert maps["low_rank"].rank == 2, "the planted rank, chosen on tune"
    fit = np.vstack([x @ want, np.sqrt(shrink) * want])  # of the augmented problem
    axes = np.linalg.svd(fit)[2][:2]
    low = (maps["low_rank"].left @ maps["low_rank"].right).numpy()
    assert np.allclose(low, want @ axes.T @ axes)


def test_fewer_tokens_than_width_and_constant_columns_have_every_map() -> None:
    base = np.random.default_rng(6).normal(size=(4, 10))
    base[:, 3] = 1.0
    tensors = [torch.from_numpy(x) for x in (base, base * 0.1, base, base * 0.1)]
    maps = fit_maps(*tensors, [16], [1e-4])
    assert list(maps) == list(NAMES)
    for each in maps.values():
        assert torch.isfinite(each.displace(tensors[0])).all()


def test_the_strength_of_least_kl_is_scipys() -> None:
    def curve(strength: float) -> float:
        return float(np.log(np.cosh(strength - 1.37)))  # convex, as KL is at final_norm

    grid = np.arange(0, 3.01, 0.125)
    want = minimize_scalar(curve, bounds=(0, 3), method="bounded").x
    # a parabola through three points an eighth apart
    assert least(grid, np.array([curve(s) for s in grid])) == pytest.approx(want, abs=2e-3)
    assert least(grid, grid) == 0.0
    assert least(grid, -grid) == 3.0

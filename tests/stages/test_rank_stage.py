"""How many directions: planted ones are counted, and the maths against numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from grouped import Grouped, grouped_pair
from planted import byte_tokenizer

from dsteer.config import read_pipeline
from dsteer.geometry.intervals import spectral_intervals
from dsteer.geometry.spectrum import spectrum
from dsteer.geometry.subspaces import fit_coefficients, leading, random_directions
from dsteer.models.pair import ModelPair
from dsteer.pipeline import run_pipeline
from dsteer.progress import SILENT
from dsteer.report.headline import headline
from dsteer.report.rank_tables import rank_sentences, rank_tables, reached
from dsteer.store import Json, read_json

YAML = """
name: planted
data: {sources: [{format: synthetic, conversations: 160}], splits: {fit: 64, tune: 16, test: 24}}
models: {base: ./base, tuned: ./tuned, device: cpu}
activations: {batch_tokens: 4096, noise_floor_prompts: 2, response_tokens: 0}
vector: {bootstrap: 50, convergence_draws: 2}
spectrum: {}
rank: {sites: [resid_post.1], tokens: all, pairs: 12, tune_pairs: 8, fit_pairs: 12,
       response_tokens: 4, most: 6, random_pairs: 4, bootstrap: 200}
"""


@pytest.fixture
def measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def run(pair: Grouped, *overrides: str) -> Path:
        def loaded(*_arguments: object) -> ModelPair:
            return ModelPair.load(pair.base, pair.tuned, tokenizer=byte_tokenizer())

        monkeypatch.setattr(ModelPair, "configured", loaded)
        monkeypatch.chdir(tmp_path)
        for name in ("base", "tuned"):
            (tmp_path / name).mkdir(exist_ok=True)
        out = tmp_path / "run"
        run_pipeline(read_pipeline(YAML, overrides), YAML, out, reporter=SILENT)
        return out

    return run


def rank_of(out: Path, site: str = "resid_post.1") -> Json:
    return read_json(out / "rank" / "result.json")["sites"][site]


def values(curve: Json) -> list[float]:
    return [entry["value"] for entry in curve]


def test_one_planted_direction_is_all_at_k_1(measure: Any) -> None:
    found = rank_of(measure(grouped_pair(1, 1)))
    # float32 states: KL is second order in their rounding
    assert found["patched"]["value"] == pytest.approx(1, abs=1e-6)
    assert values(found["oracle"]["singular"])[0] == pytest.approx(1, abs=1e-6)
    assert found["constant"]["value"] == pytest.approx(1, abs=1e-6), "a constant is all"
    assert values(found["deployable"])[0] == pytest.approx(1, abs=1e-6)
    assert found["k90"]["oracle"] == {"value": 1, "low": 1, "high": 1, "resampled": True}
    assert found["k90"]["deployable"]["value"] == 0
    assert found["k50"]["random"]["value"] is None


def test_k_switched_directions_need_k(measure: Any) -> None:
    pair = grouped_pair(3, 1)
    out = measure(pair)
    found = rank_of(out)
    curve = dict(zip(found["k"], values(found["oracle"]["singular"]), strict=True))
    assert curve[3] == pytest.approx(1, abs=1e-5)
    assert curve[1] < curve[2] < 0.95, "two of three switched directions are not enough"
    assert found["k90"]["oracle"]["value"] == 3
    assert found["k90"]["greedy"]["value"] == 3
    assert sorted(found["greedy_order"][:3]) == [1, 2, 3]
    # and the spectrum: k directions of one size, switched, have participation k, centred rank k − 1
    from dsteer.activations.extract import PairedActivations

    rows = read_json(out / "activations" / "result.json")
    fit = slice(*rows["rows"]["fit"])
    acts = PairedActivations.open(out / "activations")
    delta = acts.displacement("resid_post.1")[fit]
    groups = [int(pair.group(torch.tensor([item.ids]))) for item in acts.encoded[fit]]
    shares = np.bincount(groups) / len(groups)
    uncentred, _ = spectral_intervals(delta, rows["conversations"]["fit"])
    bounds = uncentred.participation_ratio
    assert bounds is not None
    assert bounds.low is not None
    assert bounds.high is not None
    assert bounds.low - 1e-6 <= 3 <= bounds.high + 0.15, "groups are of about one size"
    assert bounds.value == pytest.approx(1 / (shares**2).sum(), rel=1e-4)
    centred = spectrum(delta, centred=True).singular_values
    assert int((centred > 1e-4 * centred[0]).sum()) == 2
    # told
    result = read_json(out / "rank" / "result.json")
    least, curves = rank_tables(result)
    assert any("never" in row[5] for row in least.rows if row[3] == "random")
    assert len(curves.rows) == len(found["k"]) + 2
    assert "nine tenths of that take 3" in rank_sentences(result)[0]
    assert any(point == "How many directions" for point, _ in headline({}, {"rank": result}))
    assert (out / "rank" / "figures" / "rank.pdf").is_file()
    assert reached(None) == "–"
    alone = {"value": 2, "low": None, "high": None, "resampled": False}
    assert reached(alone) == "2", "one conversation has no interval"


def test_graded_axes_have_the_ranks_of_their_sizes(measure: Any) -> None:
    """Groups of sizes s_g in shares p_g: σ_g² = N p_g s_g², worked by hand."""
    pair = grouped_pair(3, 1, sizes=(4.0, 2.0, 1.0))
    out = measure(pair, "rank=null")
    from dsteer.activations.extract import PairedActivations

    acts = PairedActivations.open(out / "activations")
    rows = read_json(out / "activations" / "result.json")
    fit = slice(*rows["rows"]["fit"])
    delta = acts.displacement("resid_post.1")[fit]
    groups = [
        int(pair.group(torch.tensor([acts.encoded[row].ids]))) for row in range(fit.start, fit.stop)
    ]
    shares = np.bincount(groups, minlength=3)
    squares = shares * np.array([4.0, 2.0, 1.0]) ** 2
    found = spectrum(delta)
    # float32 states: relative rounding 1e-7 of states, about 1e-6 of displacements
    assert np.allclose(found.singular_values[:3] ** 2, np.sort(squares)[::-1], rtol=1e-4)
    assert found.participation_ratio == pytest.approx(
        squares.sum() ** 2 / (squares**2).sum(), rel=1e-4
    )
    assert found.stable_rank == pytest.approx(squares.sum() / squares.max(), rel=1e-4)


def test_equal_models_have_nothing_to_count(measure: Any) -> None:
    pair = grouped_pair(1, 1)
    out = measure(pair, "rank.sites=[resid_post.0]")
    found = rank_of(out, "resid_post.0")
    assert found["undefined"]
    assert found["k90"] is None
    assert "nothing to count" in " ".join(read_json(out / "rank" / "result.json")["notes"])


# ---------------------------------------------------------------------------------- maths


def test_coefficients_are_those_of_ridge_regression() -> None:
    rng = np.random.default_rng(0)
    base, tune = rng.normal(size=(50, 6)), rng.normal(size=(30, 6))
    law = rng.normal(size=(6, 6))
    delta = base @ law + 3.0 + 0.1 * rng.normal(size=(50, 6))
    tune_delta = tune @ law + 3.0
    axes = leading(torch.from_numpy(delta), 2).numpy()
    assert np.allclose(axes, np.linalg.svd(delta)[2][:2] * np.sign(
        (np.linalg.svd(delta)[2][:2] @ delta.mean(0))[:, None]))  # fmt: skip
    penalty = 0.01
    found = fit_coefficients(*map(torch.from_numpy, (base, delta, axes)), [penalty],
                             *map(torch.from_numpy, (tune, tune_delta)))  # fmt: skip
    x = base - base.mean(0)
    want = np.linalg.solve(
        x.T @ x + 50 * penalty * (x**2).mean() * np.eye(6), x.T @ (delta - delta.mean(0)) @ axes.T
    )
    assert np.allclose(found.weights.numpy(), want)  # float64
    shown = found.displace(torch.from_numpy(tune), 1).numpy()
    assert np.allclose(shown, delta.mean(0) + np.outer((tune - base.mean(0)) @ want[:, 0], axes[0]))
    assert found.r2 is not None
    assert found.r2 > 0.99
    chosen = fit_coefficients(*map(torch.from_numpy, (base, delta, axes)), [1e-6, 1e3],
                              *map(torch.from_numpy, (tune, tune_delta)))  # fmt: skip
    assert chosen.penalty == 1e-6, "chosen for the tune tokens"


def test_fewer_rows_than_columns_have_a_ridge_too() -> None:
    rng = np.random.default_rng(1)
    base, delta = (torch.from_numpy(rng.normal(size=(5, 20))) for _ in range(2))
    found = fit_coefficients(base, delta, leading(delta, 3), [0.1], base, delta)
    assert torch.isfinite(found.weights).all()


def test_random_directions_are_orthonormal_and_seeded() -> None:
    axes = random_directions(12, 5, 3)
    assert torch.allclose(axes @ axes.T, torch.eye(5, dtype=torch.float64))
    assert torch.equal(axes, random_directions(12, 5, 3))
    assert not torch.equal(axes, random_directions(12, 5, 4))

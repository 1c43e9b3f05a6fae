"""The spectrum stage on made-up states: planted truth, k directions, noise, zeros, notes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from measured import WIDTH, N, context, measure, normal, rows, write_activations

from dsteer.steering.vector import SteeringVector, SteeringVectorSet
from dsteer.store import Json, hash_file, read_tensors

B = normal(1, WIDTH)
CONSTANT = np.tile(B, (N, 1))
ZERO = np.zeros((N, WIDTH))
N_FIT = 96


def run(folder: Path, displacements: dict[str, np.ndarray], **changes: object) -> Json:
    """The stage's result, with v* the mean of the fit rows."""
    write_activations(folder, displacements)
    (folder / "vector").mkdir()
    SteeringVectorSet(
        SteeringVector((delta[rows("fit")]).mean(0), site) for site, delta in displacements.items()
    ).save(folder / "vector" / "vectors.safetensors")
    return measure(folder, "spectrum", **changes)


def test_planted_constant_is_rank_one(tmp_path: Path) -> None:
    result = run(tmp_path, {"resid_post.0": ZERO, "resid_post.1": CONSTANT, "final_norm": CONSTANT})
    assert (result["n"], result["d"], result["rows"]) == (N_FIT, WIDTH, "fit")
    site = result["sites"]["resid_post.1"]
    delta = site["delta"]["uncentred"]
    assert delta["sigma_ratio"]["value"] < 1e-5
    assert delta["entropy"]["value"] == pytest.approx(0, abs=1e-9)
    assert delta["effective_rank"]["value"] == pytest.approx(1, abs=1e-4)
    assert delta["participation_ratio"]["value"] == pytest.approx(1, abs=1e-9)
    assert delta["stable_rank"]["value"] == pytest.approx(1, abs=1e-9)
    assert delta["top"][0] == pytest.approx(1, abs=1e-9)
    assert len(delta["top"]) == 5
    assert site["shared_share"]["value"] == pytest.approx(1, abs=1e-9)
    assert site["shared_share_debiased"]["value"] == pytest.approx(1, abs=1e-9)
    assert site["u1_cosine"] == pytest.approx(1, abs=1e-9)
    assert site["held_out_cosine"] == pytest.approx(1, abs=1e-9)
    assert site["rest_within_rounding"]
    assert any("within rounding at resid_post.1" in note for note in result["notes"])
    assert any(
        "σ₂/σ₁ < 0.1 alone says little" in note and "m 1, held-out cosine 1" in note
        for note in result["notes"]
    )


def test_zero_displacement_is_undefined_but_the_models_are_measured(tmp_path: Path) -> None:
    result = run(tmp_path, {"resid_post.0": ZERO, "resid_post.1": CONSTANT})
    site = result["sites"]["resid_post.0"]
    assert site["undefined"]
    for centring in ("uncentred", "centred"):
        assert set(site["delta"][centring].values()) == {None}
        assert site["base"][centring] == site["tuned"][centring]
        assert site["base"][centring]["entropy"]["value"] > 2
    for key in ("shared_share", "shared_share_debiased", "u1_cosine", "held_out_cosine"):
        assert site[key] is None
    assert any("exactly zero: resid_post.0." in note for note in result["notes"])


@pytest.mark.parametrize("k", [2, 3])
def test_k_directions(tmp_path: Path, k: int) -> None:
    # 96 fit rows hold each of k unit vectors equally often: σ₁² = … = σ_k² = 96/k uncentred, and
    # centring takes the mean direction off: rank k − 1
    delta = np.eye(WIDTH)[np.arange(N) % k]
    site = run(tmp_path, {"resid_post.0": delta})["sites"]["resid_post.0"]
    whole, rest = site["delta"]["uncentred"], site["delta"]["centred"]
    assert whole["entropy"]["value"] == pytest.approx(math.log(k), abs=1e-6)
    expected = {
        "entropy_p1": pytest.approx(math.log(k), abs=1e-4),  # p = 1 weighs rounding more
        "entropy_normalised": pytest.approx(math.log(k) / math.log(WIDTH), abs=1e-6),
        "participation_ratio": pytest.approx(k, abs=1e-5),
        "sigma_ratio": pytest.approx(1, abs=1e-6),
    }
    assert {name: whole[name]["value"] for name in expected} == expected
    for name, value in (("participation_ratio", k), ("sigma_ratio", 1)):
        assert whole[name]["low"] <= value <= whole[name]["high"] + 1e-5
    assert rest["participation_ratio"]["value"] == pytest.approx(k - 1, abs=1e-5)
    assert rest["effective_rank"]["value"] == pytest.approx(k - 1, abs=1e-4)
    assert site["shared_share"]["value"] == pytest.approx(1 / k, abs=1e-6)
    # Σᵢ≠ⱼ⟨Δᵢ,Δⱼ⟩ / (N(N−1)) = (N/k − 1)/(N − 1)
    debiased = (N_FIT / k - 1) / (N_FIT - 1)
    assert site["shared_share_debiased"]["value"] == pytest.approx(debiased, abs=1e-6)


def test_it_equals_numpy_on_the_fit_rows(tmp_path: Path) -> None:
    base, delta = normal(0, N, WIDTH), CONSTANT + normal(2, N, WIDTH)
    result = run(tmp_path, {"final_norm": delta})
    stored = read_tensors(tmp_path / "spectrum" / "spectra.safetensors")
    fit = rows("fit")
    low = np.float32(base)[fit].astype(float), np.float32(base + delta)[fit].astype(float)
    matrices = {"base": low[0], "tuned": low[1], "delta": low[1] - low[0]}
    for name, matrix in matrices.items():
        for centring, values in (("uncentred", matrix), ("centred", matrix - matrix.mean(0))):
            sigma = np.linalg.svd(values, compute_uv=False)
            key = f"final_norm/{name}/{centring}"
            np.testing.assert_allclose(stored[key], sigma, atol=1e-10 * sigma[0])
            got = result["sites"]["final_norm"][name][centring]
            q = sigma**2 / (sigma**2).sum()
            assert got["entropy"]["value"] == pytest.approx(-(q * np.log(q)).sum(), abs=1e-9)
            assert got["sigma_ratio"]["value"] == pytest.approx(sigma[1] / sigma[0], abs=1e-9)
            for measured in (each for key, each in got.items() if key != "top"):
                assert measured["low"] < measured["value"] < measured["high"]
            assert got["top"] == pytest.approx(sigma[:5] / np.linalg.norm(sigma), abs=1e-9)
    site = result["sites"]["final_norm"]
    u1 = np.linalg.svd(matrices["delta"])[2][0]
    v = matrices["delta"].mean(0)
    assert site["u1_cosine"] == pytest.approx(abs(u1 @ v) / np.linalg.norm(v), abs=1e-6)
    share = N_FIT * (v @ v) / (matrices["delta"] ** 2).sum()
    assert site["shared_share"]["value"] == pytest.approx(share, abs=1e-9)
    assert site["shared_share"]["low"] < share < site["shared_share"]["high"]
    assert not site["rest_within_rounding"]
    assert result["headline"]["sigma_ratio"] == site["delta"]["uncentred"]["sigma_ratio"]["value"]


def test_noise_shares_nothing(tmp_path: Path) -> None:
    site = run(tmp_path, {"resid_post.0": normal(3, N, WIDTH)})["sites"]["resid_post.0"]
    # 1/N in the mean for plain, 0 for debiased; spread √(2/d)/N = 0.004
    assert site["shared_share"]["value"] == pytest.approx(1 / N_FIT, abs=0.015)
    assert site["shared_share_debiased"]["value"] == pytest.approx(0, abs=0.015)
    assert site["shared_share_debiased"]["low"] < 0 < site["shared_share_debiased"]["high"]
    assert site["delta"]["uncentred"]["entropy_normalised"]["value"] > 0.9


def test_power_and_top_are_the_pipelines(tmp_path: Path) -> None:
    changes = {"spectrum": {"power": 1, "top": 2}}
    result = run(tmp_path, {"resid_post.0": CONSTANT + normal(4, N, WIDTH)}, **changes)
    whole = result["sites"]["resid_post.0"]["delta"]["uncentred"]
    assert result["power"] == 1
    assert whole["entropy"]["value"] == pytest.approx(whole["entropy_p1"]["value"])
    assert len(whole["top"]) == 2


def test_every_result_says_its_n(tmp_path: Path) -> None:
    result = run(tmp_path, {"resid_post.0": CONSTANT})
    assert "N = 96, d = 16" in result["notes"][0]
    assert result["headline"]["n"] == N_FIT


def test_a_lora_that_this_run_trains_bounds_the_rank(tmp_path: Path) -> None:
    changes = {"dpo": {"lora": {"rank": 3}}, "models": {"base": "base", "device": "cpu"}}
    result = run(tmp_path, {"resid_post.0": CONSTANT}, **changes)
    assert any("LoRA of rank 3" in note for note in result["notes"])


def test_an_adapter_that_is_given_bounds_the_rank(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 5}))
    models = {"base": "base", "tuned": str(adapter), "device": "cpu"}
    result = run(tmp_path / "run", {"resid_post.0": CONSTANT}, models=models)
    assert any("LoRA of rank 5" in note for note in result["notes"])


def test_full_weights_have_no_bound(tmp_path: Path) -> None:
    result = run(tmp_path, {"resid_post.0": CONSTANT})
    assert not any("LoRA" in note for note in result["notes"])


def test_the_same_states_give_the_same_bytes(tmp_path: Path) -> None:
    hashes = []
    for name in ("a", "b"):
        run(tmp_path / name, {"resid_post.0": CONSTANT + normal(5, N, WIDTH)})
        folder = tmp_path / name / "spectrum"
        hashes.append([hash_file(folder / file) for file in ("result.json", "spectra.safetensors")])
    assert hashes[0] == hashes[1]


def test_figures_are_drawn(tmp_path: Path) -> None:
    run(tmp_path, {"resid_post.0": ZERO, "final_norm": CONSTANT}, figures=True)
    figures = context(tmp_path, "spectrum").folder / "figures"
    drawn = {path.name for path in figures.glob("*.png")}
    assert drawn == {"fig4a_entropy.png", "fig4b_singular_values.png"}

"""The vector stage on made-up states: planted truth, splits kept apart, noise, and KL recovered."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from measured import WIDTH, N, context, measure, normal, rows, write_activations, write_pair

from dsteer.store import hash_file, read_metadata, read_tensors

B = normal(1, WIDTH)
CONSTANT = np.tile(B, (N, 1))
ZERO = np.zeros((N, WIDTH))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pair(tmp_path_factory.mktemp("model"))


def head(model: Path) -> np.ndarray:
    return read_tensors(model / "model.safetensors")["lm_head.weight"].astype(np.float64)


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL of softmax(p) and softmax(q), written out in float64."""
    p = p - np.log(np.exp(p).sum(1, keepdims=True))
    q = q - np.log(np.exp(q).sum(1, keepdims=True))
    return (np.exp(p) * (p - q)).sum(1)


def test_planted_constant_is_found_and_sites_before_it_are_undefined(
    tmp_path: Path, model: Path
) -> None:
    displacements = {
        "resid_post.0": ZERO,
        "resid_post.1": CONSTANT,
        "final_norm": CONSTANT + 0.5 * normal(2, N, WIDTH),
    }
    write_activations(tmp_path, displacements, noise=1e-6)
    result = measure(tmp_path, "vector", model=model)

    vectors = read_tensors(tmp_path / "vector" / "vectors.safetensors")
    # states are float32 of size ~1, so each displacement is off by at most ~1e-7
    np.testing.assert_allclose(vectors["resid_post.1"], B, atol=1e-6)
    planted = result["sites"]["resid_post.1"]
    assert planted["norm"] == pytest.approx(np.linalg.norm(B), abs=1e-6)
    base = normal(0, N, WIDTH)[rows("fit")]
    relative = np.linalg.norm(B) / np.linalg.norm(base, axis=1).mean()
    assert planted["relative_norm"] == pytest.approx(relative, rel=1e-6)
    strength = planted["strength_least_squares"]
    assert strength["value"] == pytest.approx(1, abs=1e-6)
    assert strength["n"] == 64
    assert [point["n"] for point in result["convergence"]["resid_post.1"]] == [8, 16, 32, 48]
    assert all(
        point["cosine"] == pytest.approx(1, abs=1e-9)
        for point in result["convergence"]["resid_post.1"]
    )

    before = result["sites"]["resid_post.0"]
    assert before["undefined"]
    assert before["norm"] == 0
    ratios = {
        "relative_norm", "radial_cosine", "radial_norm", "tangential_norm", "inert",
        "strength_least_squares", "within_rounding",
    }  # fmt: skip
    assert all(before[key] is None for key in ratios)
    assert result["convergence"]["resid_post.0"] == []
    assert any("undefined" in note and "resid_post.0" in note for note in result["notes"])
    assert any("same logit bias" in note for note in result["notes"])


def test_only_fit_rows_make_the_vector_and_only_test_rows_are_reported(
    tmp_path: Path, model: Path
) -> None:
    delta = CONSTANT.copy()
    delta[rows("tune")] *= -5
    delta[rows("test")] *= 3
    write_activations(tmp_path, {"resid_post.0": delta})
    result = measure(tmp_path, "vector", model=model)
    vectors = read_tensors(tmp_path / "vector" / "vectors.safetensors")
    np.testing.assert_allclose(vectors["resid_post.0"], B, atol=1e-6)
    strength = result["sites"]["resid_post.0"]["strength_least_squares"]
    assert strength["value"] == pytest.approx(3, abs=1e-6)
    assert result["kl_recovery"] == {"first_token": None, "response": None}
    assert any("final_norm is not among the sites" in note for note in result["notes"])


def test_vectors_file_says_what_it_holds(tmp_path: Path, model: Path) -> None:
    write_activations(tmp_path, {"resid_post.0": CONSTANT})
    measure(tmp_path, "vector", model=model)
    metadata = read_metadata(tmp_path / "vector" / "vectors.safetensors")
    assert metadata["width"] == WIDTH
    assert metadata["position"] == "prompt_last"
    assert metadata["ids_sha256"] == "0" * 64
    assert metadata["vectors"]["resid_post.0"]["n"] == 96
    assert str(tmp_path) not in str(metadata)


def test_a_vector_within_rounding_is_noted(tmp_path: Path, model: Path) -> None:
    # the noise of the mean is a tenth of the given rms: 0.6 |b|, so |b| < 5 × that
    write_activations(tmp_path, {"resid_post.0": CONSTANT}, noise=6 * float(np.linalg.norm(B)))
    result = measure(tmp_path, "vector", model=model)
    assert result["sites"]["resid_post.0"]["within_rounding"]
    assert any("within rounding at resid_post.0" in note for note in result["notes"])


def test_growth_along_the_state_is_flagged_as_inert_but_not_at_final_norm(
    tmp_path: Path, model: Path
) -> None:
    base = 10 * B + 0.1 * normal(3, N, WIDTH)
    write_activations(tmp_path, {"resid_post.0": 0.3 * base, "final_norm": 0.3 * base}, base=base)
    result = measure(tmp_path, "vector", model=model)
    site = result["sites"]["resid_post.0"]
    assert site["inert"] is True
    assert site["radial_cosine"] == pytest.approx(1, abs=1e-3)  # states spread 1 % around 10 b
    assert site["radial_norm"] == pytest.approx(0.3 * np.linalg.norm(base[rows("fit")].mean(0)))
    assert result["sites"]["final_norm"]["inert"] is None
    assert any("behaviourally inert at resid_post.0:" in note for note in result["notes"])


def test_planted_constant_at_final_norm_recovers_all_kl(tmp_path: Path, model: Path) -> None:
    write_activations(tmp_path, {"final_norm": CONSTANT}, noise=1e-6)
    result = measure(tmp_path, "vector", model=model)
    panel = result["kl_recovery"]["first_token"]
    at = dict(zip(panel["strengths"], panel["recovered"], strict=True))
    # logits of the head are float32: 1e-6 of their size, so KL is off by about 1e-12
    assert at[1.0]["value"] == pytest.approx(1, abs=1e-8)
    assert at[0.0]["value"] == pytest.approx(0, abs=1e-8)
    assert panel["kl"][panel["strengths"].index(1.0)] < 1e-8
    assert panel["agreement"][panel["strengths"].index(1.0)] == 1
    assert panel["chosen_strength"] == pytest.approx(1, abs=1e-4)
    assert panel["optimal_strength"]["value"] == panel["chosen_strength"]
    assert panel["recovered_at_chosen"]["value"] == pytest.approx(1, abs=1e-6)
    assert (panel["chosen_on"], panel["optimal_on"], panel["n"]) == ("tune", "tune", 64)
    base = normal(0, N, WIDTH)[rows("test")]
    expected = kl((base + B) @ head(model).T, base @ head(model).T).mean()
    assert panel["kl_tuned_base"] == pytest.approx(expected, rel=1e-5)
    assert panel["kl_noise_floor"] < 1e-9
    assert result["headline"]["kl_recovered"] == panel["recovered_at_chosen"]["value"]


def test_the_strength_is_chosen_on_tune_and_reported_on_test(tmp_path: Path, model: Path) -> None:
    delta = CONSTANT.copy()
    delta[rows("tune")] *= 2
    write_activations(tmp_path, {"final_norm": delta}, noise=1e-6)
    panel = measure(tmp_path, "vector", model=model)["kl_recovery"]["first_token"]
    assert panel["chosen_strength"] == pytest.approx(2, abs=1e-4)
    base, W = normal(0, N, WIDTH)[rows("test")], head(model)
    steered = kl((base + B) @ W.T, (base + 2 * B) @ W.T).sum()
    unsteered = kl((base + B) @ W.T, base @ W.T).sum()
    assert panel["recovered_at_chosen"]["value"] == pytest.approx(
        1 - steered / unsteered,
        abs=1e-3,  # the chosen strength is 2 to 1e-4
    )
    best = max(value["value"] for value in panel["recovered"])
    assert panel["recovered_at_chosen"]["value"] < best - 0.5
    assert panel["least_squares_strength"]["value"] == pytest.approx(1, abs=1e-6)


def test_response_tokens_are_described_and_use_the_strength_chosen_before(
    tmp_path: Path, model: Path
) -> None:
    offsets = [0, 0, *range(2, 125, 2)]  # the first pair has no answer, the others two tokens
    states, delta = normal(4, 124, WIDTH), 0.5 * np.tile(B, (124, 1))
    write_activations(tmp_path, {"final_norm": CONSTANT}, response=(states, delta, [*offsets, 124]))
    result = measure(tmp_path, "vector", model=model)
    panel = result["kl_recovery"]["response"]
    assert panel["n"] == 124
    assert panel["optimal_on"] == "test"
    assert panel["optimal_strength"]["value"] == pytest.approx(0.5, abs=1e-4)
    chosen = result["kl_recovery"]["first_token"]["chosen_strength"]
    assert panel["chosen_strength"] == chosen == pytest.approx(1, abs=1e-4)
    W = head(model)
    steered = kl((states + delta) @ W.T, (states + B) @ W.T).sum()
    unsteered = kl((states + delta) @ W.T, states @ W.T).sum()
    assert panel["recovered_at_chosen"]["value"] == pytest.approx(1 - steered / unsteered, abs=1e-3)
    assert any("read off the test prompts themselves" in note for note in result["notes"])


def test_kl_at_the_noise_floor_is_undefined(tmp_path: Path, model: Path) -> None:
    small = 1e-3 * CONSTANT
    write_activations(tmp_path, {"final_norm": small}, noise=1e-3 * float(np.linalg.norm(B)))
    result = measure(tmp_path, "vector", model=model)
    panel = result["kl_recovery"]["first_token"]
    assert "noise floor" in panel["undefined"]
    assert panel["recovered"] == [None] * 17
    assert panel["chosen_strength"] is panel["recovered_at_chosen"] is None
    assert panel["optimal_strength"] is None
    assert any("first token: KL(tuned‖base) is" in note for note in result["notes"])
    assert result["headline"]["kl_recovered"] is None


def test_identical_final_states_leave_nothing_to_recover(tmp_path: Path, model: Path) -> None:
    write_activations(tmp_path, {"resid_post.0": CONSTANT, "final_norm": ZERO})
    result = measure(tmp_path, "vector", model=model)
    panel = result["kl_recovery"]["first_token"]
    assert panel["undefined"] is not None
    assert panel["recovered"] == [None] * 17
    assert panel["least_squares_strength"] is None


def test_another_position_has_no_first_token(tmp_path: Path, model: Path) -> None:
    write_activations(tmp_path, {"final_norm": CONSTANT}, position="prompt_mean")
    result = measure(tmp_path, "vector", model=model)
    assert result["kl_recovery"]["first_token"] is None
    assert any("prompt_mean was read" in note for note in result["notes"])


def test_heads_that_differ_are_both_used(tmp_path: Path, model: Path) -> None:
    other = write_pair(tmp_path / "other", seed=1)
    write_activations(tmp_path / "run", {"final_norm": CONSTANT})
    models = {"base": str(model), "tuned": str(other), "device": "cpu"}
    result = measure(tmp_path / "run", "vector", models=models)
    base = normal(0, N, WIDTH)[rows("test")]
    expected = kl((base + B) @ head(other).T, base @ head(model).T).mean()
    panel = result["kl_recovery"]["first_token"]
    assert panel["kl_tuned_base"] == pytest.approx(expected, rel=1e-5)


def test_the_same_states_give_the_same_bytes(tmp_path: Path, model: Path) -> None:
    hashes = []
    for name in ("a", "b"):
        write_activations(tmp_path / name, {"final_norm": CONSTANT + normal(5, N, WIDTH)})
        torch.manual_seed(len(hashes))  # the state of torch's own generator plays no part
        measure(tmp_path / name, "vector", model=model)
        folder = tmp_path / name / "vector"
        hashes.append([hash_file(folder / file) for file in ("result.json", "vectors.safetensors")])
    assert hashes[0] == hashes[1]
    assert str(tmp_path) not in (tmp_path / "a" / "vector" / "result.json").read_text()


def test_figures_are_drawn(tmp_path: Path, model: Path) -> None:
    write_activations(tmp_path, {"resid_post.0": CONSTANT, "final_norm": CONSTANT})
    measure(tmp_path, "vector", model=model, figures=True)
    figures = context(tmp_path, "vector").folder / "figures"
    assert {path.name for path in figures.glob("*.png")} == {"kl_recovery.png", "convergence.png"}

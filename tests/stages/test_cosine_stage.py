"""The cosine stage on made-up states: planted truth at every block, k directions, noise, zeros."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from measured import WIDTH, N, context, measure, normal, rows, write_activations

from dsteer.stages.cosine import NO_NULL
from dsteer.steering.vector import SteeringVector, SteeringVectorSet
from dsteer.store import Json, hash_file, read_tensors

B = normal(1, WIDTH)
CONSTANT = np.tile(B, (N, 1))
ZERO = np.zeros((N, WIDTH))
SITES = ("resid_post.0", "resid_post.1", "resid_post.2", "resid_post.3", "final_norm")


def run(folder: Path, displacements: dict[str, np.ndarray], **changes: object) -> Json:
    """The stage's result, with v* the mean of the fit rows."""
    write_activations(folder, displacements)
    (folder / "vector").mkdir()
    SteeringVectorSet(
        SteeringVector((delta[rows("fit")]).mean(0), site) for site, delta in displacements.items()
    ).save(folder / "vector" / "vectors.safetensors")
    return measure(folder, "cosine", **changes)


@pytest.mark.parametrize("planted", range(4))
def test_the_planted_block_is_chosen(tmp_path: Path, planted: int) -> None:
    displacements = {}
    for k, site in enumerate(SITES):
        rest = 0.1 * (k - planted) * normal(k, N, WIDTH)
        displacements[site] = ZERO if k < planted else CONSTANT + rest
    result = run(tmp_path, displacements)
    site = SITES[planted]
    assert result["chosen_site"] == result["headline"]["chosen_site"] == site
    assert result["paper_site"] == "final_norm"
    for kind in ("in_sample", "leave_one_out", "held_out"):
        # float32 states of size 1 turn b by about 1e-7: the cosine is off by its square
        assert result["sites"][site][kind]["mean"]["value"] == pytest.approx(1, abs=1e-9)
    cosines = read_tensors(tmp_path / "cosine" / "cosines.safetensors")
    assert abs(cosines[f"{site}/leave_one_out"] - 1).max() < 1e-6
    assert cosines[f"{site}/leave_one_out"].shape == (96,)
    assert cosines[f"{site}/held_out"].shape == (64,)
    assert result["sites"][site]["shared_share_test"] == pytest.approx(1, abs=1e-9)
    assert result["sites"]["final_norm"]["held_out"]["mean"]["value"] < 1 - 1e-4
    before = SITES[:planted]
    for name in before:
        assert result["sites"][name]["undefined"]
        assert result["sites"][name]["held_out"]["mean"] is None
        assert result["sites"][name]["null"] == NO_NULL
        assert f"{name}/held_out" not in cosines
    said = [note for note in result["notes"] if "exactly zero" in note]
    assert len(said) == bool(before)
    assert all(name in note for name in before for note in said)


def test_sites_that_tie_give_the_earliest(tmp_path: Path) -> None:
    result = run(tmp_path, dict.fromkeys(SITES, CONSTANT))
    assert result["chosen_site"] == "resid_post.0"


def test_the_site_is_chosen_on_tune_and_reported_on_test(tmp_path: Path) -> None:
    first, second = CONSTANT + normal(2, N, WIDTH), CONSTANT + normal(3, N, WIDTH)
    first[rows("test")] = CONSTANT[rows("test")]  # perfect on test, but only there
    second[rows("tune")] = CONSTANT[rows("tune")]
    result = run(tmp_path, {"resid_post.0": first, "resid_post.1": second})
    held_out = {site: value["held_out"]["mean"]["value"] for site, value in result["sites"].items()}
    assert held_out["resid_post.0"] > held_out["resid_post.1"] + 0.1
    assert result["chosen_site"] == "resid_post.1"
    assert result["headline"]["held_out_cosine"] == held_out["resid_post.1"]
    v = second[rows("fit")].mean(0)
    test = second[rows("test")]
    expected = test @ v / np.linalg.norm(test, axis=1) / np.linalg.norm(v)
    assert held_out["resid_post.1"] == pytest.approx(expected.mean(), abs=1e-6)
    site = result["sites"]["resid_post.1"]["held_out"]
    assert site["median"] == pytest.approx(np.median(expected), abs=1e-6)
    assert site["share_above_0.9"] == np.mean(expected > 0.9)
    assert site["mean"]["low"] < site["mean"]["value"] < site["mean"]["high"]


@pytest.mark.parametrize("k", [2, 4])
def test_k_directions_give_cosines_of_one_over_root_k(tmp_path: Path, k: int) -> None:
    delta = np.eye(WIDTH)[np.arange(N) % k]  # every split holds each direction equally often
    result = run(tmp_path, {"resid_post.0": delta})
    site = result["sites"]["resid_post.0"]
    assert site["held_out"]["mean"]["value"] == pytest.approx(k**-0.5, abs=1e-6)
    assert site["in_sample"]["mean"]["value"] == pytest.approx(k**-0.5, abs=1e-6)
    assert site["leave_one_out"]["mean"]["value"] < k**-0.5
    assert site["shared_share_test"] == pytest.approx(1 / k, abs=1e-6)


def test_noise_is_within_its_null_and_the_in_sample_kind_overstates(tmp_path: Path) -> None:
    # one site in 20 of pure noise is above the null's 95 % quantile: this seed's is not
    result = run(tmp_path, {"resid_post.0": normal(4, N, WIDTH)})
    site = result["sites"]["resid_post.0"]
    means = {
        kind: site[kind]["mean"]["value"] for kind in ("in_sample", "leave_one_out", "held_out")
    }
    # one row's share of its own mean: 1/√N, spread over 96 rows by ±1/√(96·16)
    assert means["in_sample"] - means["leave_one_out"] == pytest.approx(96**-0.5, abs=0.03)
    assert abs(means["held_out"]) < 0.1
    assert means["held_out"] <= site["null"]["q95"]
    assert abs(site["null"]["mean"]) < 0.02
    # the mean over 64 rows of random cosines in 16 dimensions: about 1.64/√(64·16) = 0.05
    assert site["null"]["q95"] == pytest.approx(0.05, abs=0.03)
    assert any("from chance at resid_post.0" in note for note in result["notes"])
    assert any("In-sample cosines" in note and "1 site " in note for note in result["notes"])
    null = read_tensors(tmp_path / "cosine" / "cosines.safetensors")["resid_post.0/null"]
    assert null.shape == (100,)
    # p by hand: the measured mean is one of 101 that are equally likely
    reached = sum(float(mean) >= means["held_out"] for mean in null)
    assert site["null"]["p"] == (1 + reached) / 101 > 0.05
    assert site["null"]["draws"] == 100


def test_a_planted_constant_stands_out_from_its_null(tmp_path: Path) -> None:
    result = run(tmp_path, {"resid_post.0": CONSTANT})
    # flipped signs of 64 test rows: the mean is within 2/√64 with 95 %
    assert result["headline"]["null_q95"] < 0.3
    assert not any("from chance" in note for note in result["notes"])


def test_rows_without_displacement_are_left_out(tmp_path: Path) -> None:
    delta = CONSTANT.copy()
    delta[128:138] = 0
    result = run(tmp_path, {"resid_post.0": delta})
    mean = result["sites"]["resid_post.0"]["held_out"]["mean"]
    assert mean["n"] == 54
    assert mean["value"] == pytest.approx(1, abs=1e-9)
    cosines = read_tensors(tmp_path / "cosine" / "cosines.safetensors")["resid_post.0/held_out"]
    assert np.isnan(cosines[:10]).all()
    assert not np.isnan(cosines[10:]).any()


def test_no_displacement_anywhere_chooses_nothing(tmp_path: Path) -> None:
    result = run(tmp_path, {"resid_post.0": ZERO, "final_norm": ZERO})
    assert result["chosen_site"] is None
    assert result["headline"]["held_out_cosine"] is None
    assert any("No site could be chosen" in note for note in result["notes"])


def test_conversations_are_resampled_whole(tmp_path: Path) -> None:
    # each test conversation holds 8 equal rows: intervals must be wider than with rows of their own
    delta = np.repeat(CONSTANT[:24] + 2 * normal(5, 24, WIDTH), 8, axis=0)
    widths = []
    for name, length in (("rows", 1), ("conversations", 8)):
        keys = {
            split: [f"{split}-{i // length}" for i in range(count)]
            for split, count in (("fit", 96), ("tune", 32), ("test", 64))
        }
        write_activations(tmp_path / name, {"resid_post.0": delta}, conversations=keys)
        (tmp_path / name / "vector").mkdir()
        vector = SteeringVector(delta[rows("fit")].mean(0), "resid_post.0")
        SteeringVectorSet([vector]).save(tmp_path / name / "vector" / "vectors.safetensors")
        site = measure(tmp_path / name, "cosine")["sites"]["resid_post.0"]
        mean = site["held_out"]["mean"]
        widths.append(mean["high"] - mean["low"])
    assert widths[1] > 1.8 * widths[0]  # √8 = 2.8 in the long run, but of only 8 conversations


def test_the_same_states_give_the_same_bytes(tmp_path: Path) -> None:
    hashes = []
    for name in ("a", "b"):
        run(tmp_path / name, {"resid_post.0": CONSTANT + normal(6, N, WIDTH)})
        folder = tmp_path / name / "cosine"
        hashes.append([hash_file(folder / file) for file in ("result.json", "cosines.safetensors")])
    assert hashes[0] == hashes[1]


def test_the_figure_is_drawn(tmp_path: Path) -> None:
    run(tmp_path, {"resid_post.0": ZERO, "final_norm": CONSTANT}, figures=True)
    figures = context(tmp_path, "cosine").folder / "figures"
    assert {path.name for path in figures.glob("*.png")} == {"fig3_cosine.png"}

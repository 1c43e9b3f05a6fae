"""What sets hold: cosines against numpy, norms, and what is undefined."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.torch import save_file
from torch import from_numpy

from dsteer.errors import ConfigError
from dsteer.steering.overview import overview
from dsteer.steering.vector import SteeringVector, SteeringVectorSet

RNG = np.random.default_rng(0)
A, B = RNG.normal(size=(3, 16)), RNG.normal(size=(3, 16))
SITES = ["final_norm", "resid_post.10", "resid_post.2"]


def of(rows: np.ndarray, sites: list[str], **metadata: object) -> SteeringVectorSet:
    made = [SteeringVector(row, site) for row, site in zip(rows, sites, strict=True)]
    return SteeringVectorSet(made, metadata)  # type: ignore[arg-type]


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def test_cosines_and_norms() -> None:
    found = overview({"a": of(A, SITES, method="contrast mean"), "b": of(B[:2], SITES[:2])})
    assert found["sites"] == ["resid_post.2", "resid_post.10", "final_norm"]
    assert found["sets"]["a"]["metadata"] == {"method": "contrast mean"}
    norms = {site: one["norm"] for site, one in found["sets"]["a"]["sites"].items()}
    assert norms == pytest.approx(dict(zip(SITES, np.linalg.norm(A, axis=1), strict=True)))
    (pair,) = found["cosines"]
    expected = {site: cosine(A[k], B[k]) for k, site in enumerate(SITES[:2])}
    assert list(pair["by_site"]) == ["resid_post.10", "final_norm"]
    assert pair["by_site"] == pytest.approx(expected)
    assert pair["mean"] == pytest.approx(np.mean(list(expected.values())))
    assert pair["note"] is None


def test_one_site() -> None:
    found = overview({"a": of(A, SITES), "b": of(B, SITES)}, "resid_post.2")
    assert found["sites"] == ["resid_post.2"]
    assert found["cosines"][0]["by_site"] == pytest.approx({"resid_post.2": cosine(A[2], B[2])})
    with pytest.raises(ConfigError, match=r"site 'resid_post.3': no file holds a vector there"):
        overview({"a": of(A, SITES)}, "resid_post.3")


def test_norms_relative_to_states() -> None:
    told = SteeringVector(A[0], "resid_post.1", relative_norm=0.25)
    measured = SteeringVector(A[0], "resid_post.2", mean_state_norm=4.0)
    sites = overview({"a": SteeringVectorSet([told, measured])})["sets"]["a"]["sites"]
    assert sites["resid_post.1"]["relative_norm"] == 0.25
    assert sites["resid_post.2"]["relative_norm"] == pytest.approx(np.linalg.norm(A[0]) / 4)
    only = overview({"a": of(A, SITES)})["sets"]["a"]["sites"]["final_norm"]
    assert only["relative_norm"] is None


def test_what_is_undefined() -> None:
    sets = {
        "a": of(A, SITES),
        "zero": of(np.zeros((1, 16)), ["final_norm"]),
        "elsewhere": of(B[:1], ["resid_post.7"]),
        "wide": of(RNG.normal(size=(1, 20)), ["final_norm"]),
    }
    pairs = {(pair["a"], pair["b"]): pair for pair in overview(sets)["cosines"]}
    assert pairs["a", "zero"]["by_site"] == {"final_norm": None}
    assert pairs["a", "zero"]["note"] == "a vector is zero"
    assert pairs["a", "elsewhere"]["note"] == "no common sites"
    assert pairs["a", "wide"]["note"] == "other widths: vectors of different models"
    assert all(pairs["a", other]["mean"] is None for other in ("zero", "elsewhere", "wide"))


def test_sites_of_other_names(tmp_path: object) -> None:
    """A file of another program may call its layers as it likes."""
    file = f"{tmp_path}/foreign.safetensors"
    save_file({"layer.b": from_numpy(A[0]), "layer.a": from_numpy(A[1])}, file)
    assert overview({"x": SteeringVectorSet.load(file)})["sites"] == ["layer.a", "layer.b"]

"""Arithmetic on vectors and sets: values worked by hand or by numpy, and where they come from."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dsteer import SteeringVector, SteeringVectorSet, cosine_matrix
from dsteer.errors import MeasurementError

V = SteeringVector([3.0, 4.0], "resid_post.0", n=7, source="a")
W = SteeringVector([1.0, 0.0], "resid_post.0", n=7, source="b")
ZERO = SteeringVector([0.0, 0.0], "resid_post.0")


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (V + W, [4, 4]),
        (V - W, [2, 4]),
        (2 * V, [6, 8]),
        (V * 2, [6, 8]),
        (V / 2, [1.5, 2]),
        (-V, [-3, -4]),
        (sum([V, W, W]), [5, 4]),
        (2 * (V - W) / 4 + -W, [0, 2]),
        (np.float64(2) * V, [6, 8]),
        (np.float32(0.5) * V, [1.5, 2]),
        (V * np.int64(2), [6, 8]),
        (torch.tensor(2.0) * V, [6, 8]),
        (V.normalised(), [0.6, 0.8]),
        (V.normalised(relative_to=10.0), [6, 8]),
        (V.project_out(W), [0, 4]),
        (V.project_out(5 * V), [0, 0]),
    ],
)
def test_vectors(found: SteeringVector, expected: list[float]) -> None:
    # a few roundings of float64
    assert found.tensor.numpy() == pytest.approx(expected, abs=1e-14)
    assert found.site == "resid_post.0"
    assert V.tensor.tolist() == [3, 4]  # nothing changes in place
    assert V.metadata == {"n": 7, "source": "a"}


def test_cosines() -> None:
    assert V.cosine(W) == pytest.approx(0.6, abs=1e-15)
    assert V.cosine(-V) == -1
    assert V.cosine(ZERO) is None
    assert V.cosine(SteeringVector([0.0, 1.0], "final_norm")) == pytest.approx(0.8, abs=1e-15)
    matrix = cosine_matrix([V, W, ZERO])
    assert matrix[:2, :2].numpy() == pytest.approx(np.array([[1, 0.6], [0.6, 1]]), abs=1e-15)
    assert matrix[2].isnan().all()
    assert matrix[:, 2].isnan().all()


def test_metadata_says_what_a_vector_was_made_of() -> None:
    total = V + W
    assert total.metadata == {
        "n": 7,
        "sum_of": [
            {"n": 7, "source": "a", "norm": 5.0},
            {"n": 7, "source": "b", "norm": 1.0},
        ],
    }
    assert (2 * V).metadata == {"n": 7, "source": "a", "steps": [{"scaled_by": 2.0}]}
    assert (-(2 * V)).metadata["steps"] == [{"scaled_by": 2.0}, {"scaled_by": -1.0}]
    assert V.normalised().metadata["steps"] == [{"normalised_to": 1.0, "norm_before": 5.0}]
    step = {"projected_out": {"n": 7, "source": "b", "site": "resid_post.0"}}
    assert V.project_out(W).metadata == {"n": 7, "source": "a", "steps": [step]}
    assert [term["source"] for term in (V + W + V).metadata["sum_of"]] == ["a", "b", "a"]  # flat
    half = (V + W) / 2
    assert half.metadata == {**total.metadata, "steps": [{"scaled_by": 0.5}]}
    mixed = (half - W).metadata["sum_of"]
    assert mixed[0] == {**half.metadata, "norm": half.norm}  # half a sum is a term of its own
    assert mixed[1]["steps"] == [{"scaled_by": -1.0}]
    json.dumps(mixed)


OTHER_SITE = SteeringVector([1.0, 0.0], "resid_post.1")
WIDER = SteeringVector([1.0, 0.0, 0.0], "resid_post.0")


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (lambda: V + OTHER_SITE, "resid_post.0 and one at resid_post.1: .* don't add up"),
        (lambda: V - WIDER, "width 2 .* and 3"),
        (lambda: V.cosine(WIDER), "width 2 .* and 3"),
        (lambda: V.project_out(WIDER), "width 2 .* and 3"),
        (lambda: V / 0, "divided by 0"),
        (lambda: V * math.nan, "times nan: expected a finite number"),
        (lambda: ZERO.normalised(), "zero, so it has no direction to normalise"),
        (lambda: V.normalised(relative_to=0.0), "relative_to 0.0 .* above 0"),
        (lambda: V.normalised(relative_to=math.inf), "relative_to inf"),
        (lambda: V.project_out(ZERO), "zero, so it has no direction to project out"),
        (lambda: cosine_matrix([]), "no vectors"),
    ],
)
def test_what_makes_no_sense_is_refused(attempt: Callable[[], Any], message: str) -> None:
    with pytest.raises(MeasurementError, match=message) as caught:
        attempt()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "attempt",
    [
        lambda: V + 1.0,
        lambda: 1.0 + V,
        lambda: V * V,
        lambda: V * "2",
        lambda: V / V,
        lambda: V - 1,
    ],
)
def test_other_types_are_pythons_own_mistake(attempt: Callable[[], Any]) -> None:
    with pytest.raises(TypeError, match=r"unsupported operand|multiply"):
        attempt()


# ---------------------------------------------------------------------------------- sets


def make_set(seed: int, sites: tuple[str, ...], **metadata: object) -> SteeringVectorSet:
    rng = np.random.default_rng(seed)
    return SteeringVectorSet(
        [SteeringVector(rng.standard_normal(5), site, n=seed) for site in sites], metadata
    )


SITES = ("resid_post.0", "resid_post.2", "final_norm")
A = make_set(1, SITES, model="m", position="prompt_last")
B = make_set(2, SITES[::-1], model="m", position="prompt_mean")


def numbers(vectors: SteeringVectorSet) -> np.ndarray:
    return np.stack([vectors[site].tensor.numpy() for site in SITES])


def test_sets_are_taken_site_by_site() -> None:
    a, b = numbers(A), numbers(B)
    for found, expected in (
        (A + B, a + b),
        (A - B, a - b),
        (2 * A, 2 * a),
        (A * 2, 2 * a),
        (A / 4, a / 4),
        (-A, -a),
        (sum([A, B]) / 2, (a + b) / 2),
        (np.float64(3) * A, 3 * a),
    ):
        assert list(found) == list(SITES)
        assert numbers(found) == pytest.approx(expected, abs=1e-14)
    lengths = np.linalg.norm(a, axis=1)
    assert numbers(A.normalised()) == pytest.approx(a / lengths[:, None], abs=1e-14)
    norms = dict(zip(SITES, (1.0, 20.0, 3.0), strict=True))
    relative = A.normalised(relative_to=norms)
    assert [relative[site].norm for site in SITES] == pytest.approx([1, 20, 3], abs=1e-12)
    along = (a * b).sum(axis=1) / (b * b).sum(axis=1)
    assert numbers(A.project_out(B)) == pytest.approx(a - along[:, None] * b, abs=1e-14)
    one = B["resid_post.2"].tensor.numpy()
    rest = numbers(A.project_out(B["resid_post.2"]))
    assert rest @ one == pytest.approx(np.zeros(3), abs=1e-13)
    cosines = (a * b).sum(axis=1) / (lengths * np.linalg.norm(b, axis=1))
    assert [A.cosine(B)[site] for site in SITES] == pytest.approx(cosines, abs=1e-14)
    matrices = cosine_matrix([A, B, make_set(3, ("resid_post.2",))])
    assert list(matrices) == ["resid_post.2"]
    assert matrices["resid_post.2"].shape == (3, 3)
    assert float(matrices["resid_post.2"][0, 1]) == pytest.approx(cosines[1], abs=1e-14)


def test_metadata_of_sets(tmp_path: Path) -> None:
    total = A + B
    assert total.metadata == {"model": "m", "sum_of": [A.metadata, B.metadata]}
    assert total["final_norm"].metadata["sum_of"][1]["n"] == 2
    half = total / 2
    assert half.metadata["steps"] == [{"scaled_by": 0.5}]
    half.normalised(relative_to=dict.fromkeys(SITES, 2.0)).save(tmp_path / "v.safetensors")
    again = SteeringVectorSet.load(tmp_path / "v.safetensors")
    assert again.metadata["steps"][1] == {"normalised_to": dict.fromkeys(SITES, 2.0)}
    assert again.metadata["sum_of"] == total.metadata["sum_of"]


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (lambda: A + make_set(1, SITES[:2]), "final_norm is in one of both sets only"),
        (lambda: A.cosine(make_set(1, ("resid_post.7",))), "in one of both sets only"),
        (lambda: A.normalised(relative_to={"final_norm": 1.0}), "no norm for resid_post.0"),
        (lambda: (0 * A).normalised(), "resid_post.0 is zero"),
        (lambda: cosine_matrix([A, make_set(1, ("resid_post.7",))]), "no site in common"),
        (lambda: 2 * SteeringVectorSet(behavior="formality"), "no vector yet"),
    ],
)
def test_sets_that_do_not_go_together(attempt: Callable[[], Any], message: str) -> None:
    with pytest.raises(MeasurementError, match=message):
        attempt()


# ---------------------------------------------------------------------------------- known words


def test_words_of_other_libraries() -> None:
    vector = SteeringVector(
        behavior="formality",
        layer_index=3,
        vector=torch.tensor([3.0, 4.0]),
        model_name="some/model",
        extraction_method="caa",
        metadata={"num_pairs": 4},
    )
    assert vector.site == "resid_post.3"
    assert (vector.behavior, vector.layer_index) == ("formality", 3)
    assert (vector.model_name, vector.extraction_method) == ("some/model", "caa")
    assert (vector.norm, vector.dim) == (5, 2)
    assert vector.metadata["num_pairs"] == 4
    assert vector.vector.dtype == torch.float32  # a state plus a multiple of it stays float32
    assert torch.equal(vector.vector, torch.tensor([3.0, 4.0]))
    plain = SteeringVector([1.0], "attn_out.3")
    assert plain.layer_index is plain.behavior is plain.model_name is plain.extraction_method
    assert plain.behavior is None


def test_a_set_by_layers() -> None:
    vectors = [
        SteeringVector(behavior="formality", layer_index=layer, vector=torch.ones(2) * size)
        for layer, size in ((10, 1.0), (2, 3.0), (4, 2.0))
    ]
    for named in (
        SteeringVectorSet("formality", vectors),
        SteeringVectorSet(behavior="formality", vectors=vectors),
    ):
        assert named.behavior == "formality"
        assert named.layers == [2, 4, 10]
        assert named[10] is named["resid_post.10"] is vectors[0]
        assert named.get(4) is vectors[2]
        assert named.get(5) is None
        assert 2 in named
        assert 5 not in named
        assert named.get_best() is vectors[1]
    growing = SteeringVectorSet(behavior="formality")
    assert len(growing) == 0
    assert growing.layers == []
    for vector in vectors:
        growing.add(vector)
    growing.add(2 * vectors[0])  # in the place of the first
    assert growing.layers == [2, 4, 10]
    assert growing[10].vector.tolist() == [2, 2]
    assert SteeringVectorSet([V, SteeringVector([9.0, 9.0], "final_norm")]).get_best() is V


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (lambda: SteeringVector([1.0]), "site None is no name"),
        (lambda: SteeringVector([1.0], "final_norm", layer_index=2), "beside site 'final_norm'"),
        (lambda: SteeringVector(vector=[1.0], layer_index=-1), "layer_index -1"),
        (lambda: SteeringVector([1.0], "final_norm", vector=[1.0]), "give one of both"),
        (lambda: SteeringVector(layer_index=1), "expected real numbers"),
        (lambda: SteeringVectorSet(iter(list(A))), r"a str in a set; .* set.values\(\)"),
        (lambda: SteeringVectorSet("humour", [SteeringVector([1.0], "a", behavior="b")]), "'b'"),
        (lambda: SteeringVectorSet(behavior="humour").get_best(), "no vector yet"),
        (lambda: SteeringVectorSet(behavior="humour").width, "no vector yet"),
        (lambda: A.get_best("accuracy"), "metric 'accuracy'"),
    ],
)
def test_words_that_do_not_go_together(attempt: Callable[[], Any], message: str) -> None:
    with pytest.raises(MeasurementError, match=message):
        attempt()

"""Steering vectors from anywhere, sets of them, and their file."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import dsteer
from dsteer.errors import MeasurementError, StoreError
from dsteer.steering.vector import SteeringVector, SteeringVectorSet
from dsteer.store import read_metadata


@pytest.mark.parametrize(
    "given",
    [
        [3, 4],
        (3.0, 4.0),
        np.array([3.0, 4.0]),
        np.array([3, 4], dtype=np.float32),
        torch.tensor([3.0, 4.0]),
        torch.tensor([3.0, 4.0], dtype=torch.bfloat16, requires_grad=True),
        torch.nn.Parameter(torch.tensor([3.0, 4.0])),
    ],
)
def test_a_vector_from_anywhere(given: object) -> None:
    vector = SteeringVector(given, site="resid_post.6", source="made up")
    assert vector.tensor.tolist() == [3, 4]
    assert vector.tensor.dtype == torch.float64
    assert not vector.tensor.requires_grad
    assert (vector.site, vector.width, vector.norm) == ("resid_post.6", 2, 5)
    assert vector.metadata == {"source": "made up"}
    assert not vector.undefined
    assert repr(vector) == "SteeringVector(site='resid_post.6', width=2, norm=5)"


def test_a_vector_is_a_copy() -> None:
    for given in (np.ones(3), torch.ones(3, dtype=torch.float64)):
        vector = SteeringVector(given, "final_norm")
        given[0] = 7
        assert vector.tensor.tolist() == [1, 1, 1]


def test_a_zero_vector_is_undefined() -> None:
    assert SteeringVector(torch.zeros(4), "resid_post.0").undefined


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.ones(2, 3), r"vector at resid_post.1: shape \(2, 3\), expected \(d\)"),
        ([], "shape"),
        (3.0, "shape"),
        ([1.0, math.nan], "1 of 2 numbers are not finite"),
        ([1.0, [2.0]], "not an array of numbers"),
        (["1", "2"], "expected real numbers"),
        (torch.ones(2, dtype=torch.complex64), "expected real numbers"),
        (None, "expected real numbers"),
    ],
)
def test_what_is_no_vector_is_refused(given: object, message: str) -> None:
    with pytest.raises(MeasurementError, match=message):
        SteeringVector(given, "resid_post.1")


def make_set(metadata: dict[str, object] | None = None) -> SteeringVectorSet:
    rng = np.random.default_rng(0)
    return SteeringVectorSet(
        [
            SteeringVector(rng.standard_normal(5).astype(np.float32), site, n=7, note=["é", None])
            for site in ("resid_post.0", "resid_post.2", "resid_post.10", "final_norm")
        ],
        metadata,
    )


def test_a_set_is_a_mapping() -> None:
    vectors = make_set({"position": "prompt_last"})
    assert list(vectors) == ["resid_post.0", "resid_post.2", "resid_post.10", "final_norm"]
    assert len(vectors) == 4
    assert vectors.width == 5
    assert vectors["final_norm"].site == "final_norm"
    assert "resid_post.1" not in vectors
    assert dict(vectors) == {site: vectors[site] for site in vectors}
    assert vectors.metadata == {"position": "prompt_last"}
    with pytest.raises(KeyError):
        vectors["resid_post.1"]


def test_sets_that_make_no_sense_are_refused() -> None:
    a, b = SteeringVector([1.0, 2.0], "resid_post.0"), SteeringVector([1.0], "resid_post.1")
    with pytest.raises(MeasurementError, match=r"resid_post.1 has width 1, the others 2"):
        SteeringVectorSet([a, b])
    with pytest.raises(MeasurementError, match=r"two vectors for site resid_post.0"):
        SteeringVectorSet([a, a])
    with pytest.raises(MeasurementError, match="no steering vectors"):
        SteeringVectorSet([])


@pytest.mark.parametrize("as_path", [str, Path])
def test_round_trip(tmp_path: Path, as_path: type) -> None:
    metadata = {"base": "some/model", "position": "prompt_last", "nested": {"a": [1, 2.5, None]}}
    vectors = make_set(metadata)
    path = tmp_path / "folder" / "vectors.safetensors"
    vectors.save(as_path(path))
    again = SteeringVectorSet.load(as_path(path))
    assert list(again) == list(vectors)  # the order too
    assert again.metadata == metadata
    for site, vector in vectors.items():
        assert torch.equal(again[site].tensor, vector.tensor)
        assert again[site].metadata == vector.metadata
    copy = tmp_path / "copy.safetensors"
    again.save(copy)
    assert copy.read_bytes() == path.read_bytes()
    assert [item.name for item in path.parent.iterdir()] == ["vectors.safetensors"]


def test_the_file_is_what_other_programs_expect(tmp_path: Path) -> None:
    path = tmp_path / "vectors.safetensors"
    make_set({"position": "prompt_last"}).save(path)
    with safe_open(path, framework="pt") as file:
        for site in file.keys():  # noqa: SIM118
            tensor = file.get_tensor(site)
            assert tensor.dtype == torch.float32
            assert tensor.shape == (5,)
    metadata = read_metadata(path)
    assert metadata["format"] == "dsteer.steering-vectors/1"
    assert metadata["dsteer_version"] == dsteer.__version__
    assert metadata["width"] == 5
    assert metadata["hook_points"] == [
        "resid_post.0",
        "resid_post.2",
        "resid_post.10",
        "final_norm",
    ]
    assert metadata["operation"] == "add"
    assert metadata["scale"] == 1.0
    assert "0-based" in metadata["layer_indexing"]
    assert metadata["position"] == "prompt_last"


def test_values_are_rounded_to_float32_once(tmp_path: Path) -> None:
    exact = torch.tensor([1 / 3, 1e-3], dtype=torch.float64)
    SteeringVectorSet([SteeringVector(exact, "final_norm")]).save(tmp_path / "v.safetensors")
    loaded = SteeringVectorSet.load(tmp_path / "v.safetensors")["final_norm"]
    assert torch.equal(loaded.tensor, exact.float().double())


def test_a_file_of_another_program(tmp_path: Path) -> None:
    """Bare tensors keyed by site, without metadata, in half precision too."""
    path = tmp_path / "bare.safetensors"
    save_file({"resid_post.1": torch.ones(3), "final_norm": torch.zeros(3).half()}, path)
    vectors = SteeringVectorSet.load(path)
    assert sorted(vectors) == ["final_norm", "resid_post.1"]
    assert vectors["resid_post.1"].tensor.tolist() == [1, 1, 1]
    assert vectors.metadata == {}
    save_file({"final_norm": torch.ones(3).bfloat16()}, path)
    assert SteeringVectorSet.load(path)["final_norm"].tensor.tolist() == [1, 1, 1]


def refused(path: Path, message: str) -> None:
    with pytest.raises(StoreError, match=message) as caught:
        SteeringVectorSet.load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_malformed_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "vectors.safetensors"
    refused(path, "no such file")
    path.write_bytes(b"not a tensor in sight")
    refused(path, "not a safetensors file")
    make_set().save(path)
    path.write_bytes(path.read_bytes()[:-3])
    refused(path, "not a safetensors file")
    save_file({"final_norm": torch.ones(2, 3)}, path)
    refused(path, "shape")
    save_file({"final_norm": torch.ones(2), "resid_post.0": torch.ones(3)}, path)
    refused(path, "width")
    save_file({"final_norm": torch.tensor([1.0, math.inf])}, path)
    refused(path, "not finite")
    save_file({}, path)
    refused(path, "no steering vectors")
    save_file({"final_norm": torch.ones(2)}, path, metadata={"format": '"dsteer.other/9"'})
    refused(path, "format 'dsteer.other/9', expected 'dsteer.steering-vectors/1'")
    for metadata in (
        {"hook_points": '["resid_post.3"]'},
        {"hook_points": "7"},
        {"vectors": "[1]"},
        {"vectors": '{"final_norm": {"tensor": 1}}'},
        {"vectors": '{"final_norm": 5}'},
    ):
        save_file({"final_norm": torch.ones(2)}, path, metadata=metadata)
        refused(path, "no set of steering vectors")
    refused(tmp_path, "a folder")

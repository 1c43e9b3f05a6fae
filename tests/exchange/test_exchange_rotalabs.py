"""The folder of layers: rotalabs-steer reads ours and steers by it, and its own is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planted import tiny_llama

from dsteer import SteeringVector, SteeringVectorSet, steer
from dsteer.errors import ConfigError, StoreError
from dsteer.exchange import export, read

IDS = torch.tensor([[0, 5, 6, 7, 8, 9, 40]])


@pytest.fixture
def rotalabs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setenv("HOME", str(tmp_path))
    return pytest.importorskip("rotalabs_steer")


def make(*sites: str) -> SteeringVectorSet:
    rng = np.random.default_rng(7)
    return SteeringVectorSet(
        [SteeringVector(rng.standard_normal(32), site, n=9) for site in sites],
        {"method": "contrast mean", "model": "owner/model", "position": "prompt_last"},
    )


def test_rotalabs_reads_the_folder_and_steers_as_the_hook_does(
    rotalabs: Any, tmp_path: Path
) -> None:
    vectors, model = make("resid_post.0", "resid_post.2"), tiny_llama()
    export(vectors, tmp_path / "v", "rotalabs", strength=0.5, model=model)
    theirs = rotalabs.SteeringVectorSet.load(tmp_path / "v")
    assert theirs.layers == [0, 2]
    assert theirs.model_name == "owner/model"
    assert theirs[0].extraction_method == "contrast mean"
    with torch.no_grad(), steer(model, vectors, 0.5):
        expected = model(IDS).logits
    with torch.no_grad(), rotalabs.ActivationInjector(model, list(theirs), strength=1.0):
        found = model(IDS).logits
    assert torch.allclose(found, expected, atol=1e-4)  # float32, rounded at another place


def test_a_folder_of_rotalabs_is_read(rotalabs: Any, tmp_path: Path) -> None:
    tensor = torch.arange(32.0)
    theirs = rotalabs.SteeringVector("calm", 2, tensor, "owner/model", "caa")
    rotalabs.SteeringVectorSet("calm", [theirs]).save(tmp_path / "theirs")
    vectors = read(tmp_path / "theirs", "rotalabs", model=tiny_llama())
    assert list(vectors) == ["resid_post.2"]
    assert torch.equal(vectors["resid_post.2"].tensor, tensor.double())
    assert vectors["resid_post.2"].metadata["behavior"] == "calm"
    assert vectors.metadata["imported_from"] == "rotalabs"


def test_round_trip_and_refusals(tmp_path: Path) -> None:
    vectors = make("resid_post.1", "mlp_out.1", "final_norm")
    with pytest.raises(ConfigError, match=r"can't express mlp_out.1 .*; final_norm "):
        export(vectors, tmp_path / "v", "rotalabs")
    notes = export(vectors, tmp_path / "v", "rotalabs", skip=True, strength=-2)
    assert notes[0].startswith("Left out: mlp_out.1")
    again = read(tmp_path / "v", "rotalabs")
    assert list(again) == ["resid_post.1"]
    expected = (-2 * vectors["resid_post.1"].tensor).float().double()
    assert torch.equal(again["resid_post.1"].tensor, expected)
    assert again.metadata["position"] == "prompt_last"
    assert again.metadata["strength_baked_in"] == -2
    with pytest.raises(StoreError, match="something is there already"):
        export(make("resid_post.1"), tmp_path / "v", "rotalabs")

"""v* is the float64 mean of the displacements of the rows asked for."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from dsteer.activations.extract import PairedActivations
from dsteer.activations.storage import States
from dsteer.data.tokens import Encoded, hash_ids
from dsteer.errors import MeasurementError
from dsteer.steering import build
from dsteer.steering.build import mean_difference
from dsteer.steering.vector import SteeringVectorSet

N, D = 11, 4


def paired(shift: torch.Tensor) -> PairedActivations:
    generator = torch.Generator().manual_seed(0)
    base = {site: torch.randn(N, D, generator=generator) for site in ("resid_post.0", "final_norm")}
    tuned = {"resid_post.0": base["resid_post.0"].clone(), "final_norm": base["final_norm"] + shift}
    return PairedActivations(
        States.hold(base),
        States.hold(tuned),
        ("resid_post.0", "final_norm"),
        "prompt_last",
        tuple(Encoded((1, i), 2, False) for i in range(N)),
        tuple(range(N + 1)),
    )


@pytest.mark.parametrize("chunk", [1, 3, 1024])
@pytest.mark.parametrize("rows", [None, slice(0, 5), slice(4, 11), slice(-3, None)])
def test_mean_of_the_rows(monkeypatch: pytest.MonkeyPatch, chunk: int, rows: slice | None) -> None:
    monkeypatch.setattr(build, "_CHUNK", chunk)
    acts = paired(torch.randn(N, D, generator=torch.Generator().manual_seed(1)))
    vectors = mean_difference(acts, rows=rows)
    kept = rows if rows is not None else slice(None)
    expected = acts.displacement("final_norm")[kept].mean(dim=0)
    found = vectors["final_norm"]
    np.testing.assert_allclose(found.tensor.numpy(), expected.numpy(), rtol=1e-14, atol=1e-16)
    assert found.metadata == {"n": len(range(N)[kept])}
    assert not found.undefined
    assert list(vectors) == ["resid_post.0", "final_norm"]
    assert vectors.metadata == {
        "position": "prompt_last",
        "ids_sha256": hash_ids(acts.encoded[kept]),
    }


def test_zero_displacement_is_flagged_and_kept() -> None:
    vectors = mean_difference(paired(torch.ones(D)))
    assert vectors["resid_post.0"].undefined
    assert vectors["resid_post.0"].norm == 0
    assert not vectors["final_norm"].undefined


def test_planted_constant(tmp_path: Path) -> None:
    """Tuned = base + b: v* = b to the rounding of float32 states, in memory and in the file."""
    b = torch.linspace(-1, 2, D)
    vectors = mean_difference(paired(b))
    # each Δ is b up to 1e-7 of a state of size 3
    np.testing.assert_allclose(vectors["final_norm"].tensor.numpy(), b.numpy(), atol=3e-7)
    vectors.save(tmp_path / "v.safetensors")
    loaded = SteeringVectorSet.load(tmp_path / "v.safetensors")
    assert loaded["resid_post.0"].undefined
    np.testing.assert_allclose(loaded["final_norm"].tensor.numpy(), b.numpy(), atol=4e-7)


def test_no_rows_and_bad_states_are_refused() -> None:
    with pytest.raises(MeasurementError, match="none of the 11 prompts"):
        mean_difference(paired(torch.ones(D)), rows=slice(5, 5))
    with pytest.raises(MeasurementError, match="not finite"):
        mean_difference(paired(torch.full((D,), math.inf)))

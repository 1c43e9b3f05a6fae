"""v* is the mean of the displacements asked for; principal directions are their eigenvectors."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from planted import PROMPTS, planted_pair

from dsteer.activations.accumulate import accumulate, accumulate_splits
from dsteer.activations.extract import PairedActivations, extract
from dsteer.activations.storage import States
from dsteer.data.tokens import Encoded, hash_ids
from dsteer.errors import MeasurementError
from dsteer.geometry.spectrum import spectrum
from dsteer.steering import build
from dsteer.steering.build import increments, mean_difference, principal_directions
from dsteer.steering.intervene import steer
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


# ------------------------------------------------------------------------------ directions


def displaced(delta: torch.Tensor) -> PairedActivations:
    """Acts with these displacements (N, D) at one site, whose base is zero."""
    n = len(delta)
    return PairedActivations(
        States.hold({"final_norm": torch.zeros_like(delta)}),
        States.hold({"final_norm": delta}),
        ("final_norm",),
        "prompt_last",
        tuple(Encoded((1, i), 2, False) for i in range(n)),
        tuple(range(n + 1)),
    )


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("n", [5, 30])
def test_principal_directions_are_eigenvectors(n: int, centred: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    scale = torch.tensor([4.0, 2.0, 1.0, 0.5, 0.2, 0.1, 0.05])
    delta = torch.randn(n, 7, generator=generator) * scale + 1
    sets = principal_directions(displaced(delta), 3, centred=centred)
    rows = delta.double().numpy()
    rest = rows - rows.mean(axis=0) if centred else rows
    values, vectors = np.linalg.eigh(rest.T @ rest)
    for j, found in enumerate(sets):
        v = found["final_norm"]
        assert v.norm == pytest.approx(1, rel=1e-12)
        assert abs(v.tensor.numpy() @ vectors[:, -1 - j]) == pytest.approx(1, rel=1e-9)
        assert v.metadata["n"] == n
        assert v.metadata["singular_value"] == pytest.approx(values[-1 - j] ** 0.5, rel=1e-9)
        assert v.metadata["share"] == pytest.approx(values[-1 - j] / values.sum(), rel=1e-9)
        side = v.tensor[v.tensor.abs().argmax()] if centred else (rows @ v.tensor.numpy()).mean()
        assert side > 0
        assert found.metadata["direction_number"] == j + 1
        assert found.metadata["centred"] is centred
    first = spectrum(rows, centred=centred).first_right
    assert first is not None
    torch.testing.assert_close(sets[0]["final_norm"].tensor, first, rtol=0, atol=1e-9)


def test_one_shared_shift_has_one_direction() -> None:
    b = torch.linspace(-1, 2, D)
    first, second = principal_directions(displaced(b.expand(6, D).clone()), 2)
    v = first["final_norm"]
    torch.testing.assert_close(v.tensor, (b / b.norm()).double(), rtol=0, atol=1e-6)
    assert v.metadata["share"] == pytest.approx(1, rel=1e-12)
    assert second["final_norm"].undefined
    (centred,) = principal_directions(displaced(b.expand(6, D).clone()), centred=True)
    assert centred["final_norm"].undefined
    assert centred["final_norm"].metadata["singular_value"] == 0


def test_directions_of_moments_are_those_of_the_states() -> None:
    planted = planted_pair(1, hidden_size=16, num_hidden_layers=2, intermediate_size=24)
    acts, moments = extract(planted.pair, PROMPTS), accumulate(planted.pair, PROMPTS)
    for of_acts, of_moments in zip(
        principal_directions(acts, 2), principal_directions(moments, 2), strict=True
    ):
        assert of_acts.metadata == of_moments.metadata
        v = of_acts["final_norm"]
        # a moment's rounding, 1e-16 of σ₁², by the gap to the next
        torch.testing.assert_close(v.tensor, of_moments["final_norm"].tensor, rtol=0, atol=1e-7)
        assert v.metadata["share"] == pytest.approx(of_moments["final_norm"].metadata["share"])
    b = planted.b.double() / planted.b.double().norm()
    found = principal_directions(acts)[0]["resid_post.1"].tensor
    torch.testing.assert_close(found, b, rtol=0, atol=1e-5)  # float32 states
    split = accumulate_splits(planted.pair, {"fit": PROMPTS}, spectra=(), nulls=())
    bare = split.moments["fit"]
    with pytest.raises(MeasurementError, match="hold no matrix of displacements"):
        principal_directions(bare)


@pytest.mark.parametrize("k", [0, 5])
def test_no_such_direction_is_refused(k: int) -> None:
    with pytest.raises(MeasurementError, match=f"{k} principal directions of 6 states of width 4"):
        principal_directions(displaced(torch.ones(6, D)), k)


# ------------------------------------------------------------------------------ increments


def test_several_sites_at_once_need_increments() -> None:
    """Trap 4. b at block 1 is all there is: later v's hold it again, later increments are 0.

    All v's together overshoot; all increments together give the tuned model's own states.
    """
    planted = planted_pair(1)
    sites = ("resid_post.0", "resid_post.1", "resid_post.2")
    acts = extract(planted.pair, PROMPTS, sites=sites, position="prompt_last")
    vectors, steps = mean_difference(acts), increments(planted.pair, acts)
    assert tuple(steps) == sites
    assert steps["resid_post.0"].undefined
    assert torch.equal(steps["resid_post.1"].tensor, vectors["resid_post.1"].tensor)
    # float32 states of size 10 and more, so 1e-5 is rounding
    assert steps["resid_post.2"].norm < 1e-5
    assert vectors["resid_post.2"].norm > 0.5 * float(planted.b.norm())

    ids = torch.tensor([acts.encoded[0].ids])
    with torch.no_grad():
        tuned = planted.tuned(ids).logits
        with steer(planted.base, steps):
            found = planted.base(ids).logits
        with steer(planted.base, vectors):
            too_much = planted.base(ids).logits
    torch.testing.assert_close(found, tuned, rtol=0, atol=1e-4)
    assert (too_much - tuned).abs().max() > 0.1


def test_increments_of_the_tokens_that_are_steered() -> None:
    """Where the last prompt token alone is steered, that is where they are estimated."""
    planted = planted_pair(0)
    acts = extract(
        planted.pair, PROMPTS, sites=("resid_post.0", "resid_post.2"), position="prompt_last"
    )
    steps = increments(planted.pair, acts, positions="prompt_last")
    assert steps.metadata["positions"] == "prompt_last"
    left = []
    for item, tuned in zip(acts.encoded, acts.tuned["resid_post.2"], strict=True):
        seen: list[torch.Tensor] = []
        hook = planted.base.model.layers[2].register_forward_hook(
            lambda _m, _i, out, seen=seen: seen.append(out[0, -1])
        )
        with torch.no_grad(), steer(planted.base, steps["resid_post.0"], positions="prompt_last"):
            planted.base(torch.tensor([item.ids]))
        hook.remove()
        left.append((tuned - seen[0]).double())
    expected = torch.stack(left).mean(dim=0)
    assert expected.norm() > 1e-2  # earlier tokens' b reaches it through attention
    torch.testing.assert_close(steps["resid_post.2"].tensor, expected, rtol=0, atol=1e-5)

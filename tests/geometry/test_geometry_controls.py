"""Controls of an ablation remove what it removes."""

from __future__ import annotations

import numpy as np
import pytest

from dsteer.errors import MeasurementError
from dsteer.geometry.controls import energy_matched

RNG = np.random.default_rng(5)
STATES = RNG.standard_normal((80, 24)) * np.geomspace(8, 0.05, 24) + np.linspace(2, 0, 24)


def removed(states: np.ndarray, direction: np.ndarray) -> float:
    """‖h‖² before and after the ablation, row by row."""
    unit = direction / np.linalg.norm(direction)
    after = np.stack([h - (h @ unit) * unit for h in states])
    return float(np.mean([h @ h for h in states]) - np.mean([h @ h for h in after]))


@pytest.mark.parametrize("strong", [True, False])
def test_ablation_controls_remove_the_same_energy(strong: bool) -> None:
    """Trap 15. Isotropic directions remove far less, or more, than a direction of the states."""
    v = np.linspace(3, 0, 24) if strong else np.eye(24)[-2] + 0.1 * np.eye(24)[3]
    target = removed(STATES, v)
    found = energy_matched(STATES, v, draws=20, seed=1).numpy()
    assert found.shape == (20, 24)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-12)
    # bisected to the last bits; removed() differs two sums of squares
    np.testing.assert_allclose([removed(STATES, r) for r in found], target, rtol=1e-8)
    isotropic = np.array([removed(STATES, r) for r in RNG.standard_normal((200, 24))])
    assert (np.median(isotropic) < target / 2) if strong else (np.median(isotropic) > 2 * target)
    cosines = found @ found.T
    assert np.abs(cosines[np.triu_indices(20, 1)]).min() < 0.3  # they are different directions


def test_fewer_states_than_dimensions() -> None:
    few = STATES[:5]
    found = energy_matched(few, few[0], seed=2).numpy()
    np.testing.assert_allclose([removed(few, r) for r in found], removed(few, few[0]), rtol=1e-7)


def test_nothing_to_match() -> None:
    with pytest.raises(MeasurementError, match="vector: it is zero"):
        energy_matched(STATES, np.zeros(24))
    with pytest.raises(MeasurementError, match="states: all are zero"):
        energy_matched(np.zeros((3, 4)), np.ones(4))

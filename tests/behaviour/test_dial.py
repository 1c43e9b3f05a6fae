"""What a sweep does with random directions and with collapsed texts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dsteer.behaviour.curves import Ledger
from dsteer.behaviour.dial import _Run
from dsteer.config import InterpolationConfig, InversionConfig
from dsteer.geometry.intervals import wilson
from dsteer.steering.vector import SteeringVector


@pytest.mark.parametrize("config", [InterpolationConfig(), InversionConfig()])
def test_twenty_random_directions_as_long_as_v(config: Any) -> None:
    """Trap 15: of v's norm, different ones, and 20 of them unless fewer are asked for."""
    v = SteeringVector(torch.linspace(-3, 1, 32), "resid_post.1")
    run: Any = SimpleNamespace(study=SimpleNamespace(seed=lambda _name: 7), config=config)
    found = _Run._random_directions(run, v)
    assert len(found) >= 20
    assert {draw.site for draw in found} == {"resid_post.1"}
    rows = torch.stack([draw.tensor for draw in found]).numpy()
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), v.norm, rtol=1e-12)
    cosines = rows @ rows.T / v.norm**2
    assert (
        np.abs(cosines[np.triu_indices(len(rows), 1)]).max() < 0.75
    )  # 5 deviations of 1/√32 are 0.88


def test_collapsed_texts_are_left_out_counted_and_scored_as_the_worst() -> None:
    """Trap 16: three prompts, of which the second collapses at strength 1."""
    ledger = Ledger([0.0, 1.0], 50, 0.95, 0)
    run: Any = SimpleNamespace(
        ledger=ledger,
        prompt_clusters=["a", "b", "c"],
        collapsed={"v": torch.tensor([[False, False, False], [False, True, False]])},
    )
    overlap = torch.tensor([[0.5, 0.5, 0.5], [0.9, 0.9, 0.6]])
    _Run._put_texts(run, "rouge_l_reference", "v", overlap)
    _Run._put_texts(run, "degenerate", "v", run.collapsed["v"].double())
    told = ledger.described()
    kept = told["rouge_l_reference"]["curves"]["v"]
    assert [point["value"] for point in kept] == pytest.approx([0.5, (0.9 + 0.6) / 2])
    assert [point["n"] for point in kept] == [3, 2]
    worst = ledger.entries["rouge_l_reference"].metric.worst
    assert worst is not None
    assert told["rouge_l_reference"]["worst"] == pytest.approx([0.5, (0.9 + worst + 0.6) / 3])
    assert told["degenerate"]["curves"]["v"] == [
        wilson(0, 3, 3).json(), wilson(1, 3, 3).json(),
    ], "a share of three texts keeps its width at 0"  # fmt: skip

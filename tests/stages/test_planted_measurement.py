"""Planted truth through the stages: b after block ℓ is found, ℓ is named, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from measured import measure
from planted import planted_pair

from dsteer.data.jsonl import write_pairs
from dsteer.data.types import PreferencePair
from dsteer.store import read_json, read_tensors

SIZES = {"fit": 48, "tune": 16, "test": 24}
THINGS = ("tea", "bread", "rivers", "a lemma", "bees", "snow", "tin", "the moon")


def write_data(run: Path) -> None:
    """Benign pairs of different lengths, every prompt its own conversation."""
    (run / "data").mkdir(parents=True)
    number = 0
    for split, count in SIZES.items():
        pairs = []
        for _ in range(count):
            thing = THINGS[number % len(THINGS)]
            pairs.append(
                PreferencePair(
                    f"\n\nHuman: Say {number} words about {thing}.\n\nAssistant:",
                    f" Well, {thing}.",
                    " No.",
                    conversation=str(number),
                )
            )
            number += 1
        write_pairs(run / "data" / f"{split}.jsonl", pairs)


@pytest.mark.parametrize("block", range(4))
def test_the_program_names_the_planted_block(tmp_path: Path, block: int) -> None:
    planted = planted_pair(block)
    base, tuned = planted.save(tmp_path / "models")
    run = tmp_path / "run"
    write_data(run)
    settings = {
        "models": {"base": str(base), "tuned": str(tuned), "device": "cpu"},
        "activations": {"noise_floor_prompts": 8, "response_tokens": 4},
    }
    stages = ("activations", "vector", "cosine", "spectrum")
    for stage in stages:
        measure(run, stage, **settings)
    vector, cosine, spectrum = (read_json(run / s / "result.json") for s in stages[1:])
    site, sites = f"resid_post.{block}", [f"resid_post.{k}" for k in range(4)]

    assert cosine["chosen_site"] == cosine["headline"]["chosen_site"] == site
    v = read_tensors(run / "vector" / "vectors.safetensors")
    np.testing.assert_allclose(v[site], planted.b.numpy(), atol=1e-5)
    values = read_tensors(run / "cosine" / "cosines.safetensors")
    assert abs(values[f"{site}/leave_one_out"] - 1).max() < 1e-6
    assert spectrum["sites"][site]["delta"]["uncentred"]["sigma_ratio"]["value"] < 1e-5

    for before in sites[:block]:
        assert (v[before] == 0).all()
        results = (vector, cosine, spectrum)
        assert all(result["sites"][before]["undefined"] for result in results)
        assert cosine["sites"][before]["held_out"]["mean"] is None
        assert spectrum["sites"][before]["delta"]["uncentred"]["sigma_ratio"] is None
        assert all(any(before in note for note in result["notes"]) for result in results)
    for after in (*sites[block + 1 :], "final_norm"):
        # attention and norms of random weights bend b: far from 1 beside rounding
        assert cosine["sites"][after]["held_out"]["mean"]["value"] < 1 - 1e-4

    for panel in vector["kl_recovery"].values():
        assert panel["undefined"] is None
        assert panel["kl_tuned_base"] > 1e-3 > panel["kl_noise_floor"]
        assert panel["recovered_at_chosen"]["value"] < 1
    assert vector["kl_recovery"]["first_token"]["n"] == SIZES["test"]
    assert vector["kl_recovery"]["response"]["n"] == 4 * SIZES["test"]

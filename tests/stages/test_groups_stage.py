"""Groups of prompts with planted directions: found apart, and each removed alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from grouped import grouped_pair
from planted import byte_tokenizer

from dsteer.config import read_pipeline
from dsteer.data.types import PreferencePair
from dsteer.errors import DataError
from dsteer.models.pair import ModelPair
from dsteer.pipeline import run_pipeline
from dsteer.progress import SILENT
from dsteer.stages import groups
from dsteer.store import read_json, read_tensors

YAML = """
name: planted
data: {sources: [{format: synthetic, conversations: 170}], splits: {fit: 72, tune: 8, test: 48}}
models: {base: ./base, tuned: ./tuned, device: cpu}
activations: {batch_tokens: 4096, noise_floor_prompts: 2, response_tokens: 0}
vector: {bootstrap: 20, convergence_draws: 2}
groups: {sites: [resid_post.1], tokens: all, pairs: 6, response_tokens: 4, bootstrap: 100,
         random_directions: 20}
"""
SITE = "resid_post.1"


def test_planted_directions_are_told_apart_and_removed_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, tokenizer = grouped_pair(3, 1), byte_tokenizer()

    def label(_study: object, item: PreferencePair) -> str:
        return f"group {int(pair.group(torch.tensor([tokenizer(item.prompt)['input_ids']])))}"

    monkeypatch.setattr(
        ModelPair, "configured",
        lambda *_: ModelPair.load(pair.base, pair.tuned, tokenizer=tokenizer),
    )  # fmt: skip
    monkeypatch.setattr(groups._Study, "_label", label)
    monkeypatch.chdir(tmp_path)
    for name in ("base", "tuned"):
        (tmp_path / name).mkdir()
    run_pipeline(read_pipeline(YAML), YAML, tmp_path / "run", reporter=SILENT)
    result = read_json(tmp_path / "run" / "groups" / "result.json")
    assert [group["name"] for group in result["groups"]] == ["group 0", "group 1", "group 2"]
    vectors = read_tensors(tmp_path / "run" / "groups" / "vectors.safetensors")
    for number in range(3):  # float32 states
        error = vectors[f"{SITE}/{number}"] - pair.directions[number].numpy()
        assert np.linalg.norm(error) < 1e-4
    found = result["sites"][SITE]
    assert all(abs(cell["cosine"]["value"]) < 1e-4 for cell in found["cosines"])
    assert all(share["value"] == pytest.approx(1, abs=1e-4) for share in found["within"].values())
    sizes = np.array([group["n_fit"] for group in result["groups"]], dtype=float)
    expected = sizes.sum() ** 2 / (sizes**2).sum()  # orthogonal directions of one length
    assert found["displacements"]["participation"]["value"] == pytest.approx(expected, rel=1e-3)
    assert found["means"]["participation"]["value"] == pytest.approx(expected, rel=1e-3)
    removal = found["removal"]
    for own, row in removal["removed"].items():
        for group, taken in row.items():
            # nothing but its own direction tells a group's tuned states from the base's
            want = 1.0 if group == own else 0.0
            assert taken["kl_taken"]["value"] == pytest.approx(want, abs=1e-3), (own, group)
    assert removal["own"]["kl_taken"]["value"] == pytest.approx(1, abs=1e-3)
    assert removal["others"]["kl_taken"]["value"] == pytest.approx(0, abs=1e-3)
    assert all(band["kl_taken"]["high"] < 0.9 for band in removal["random"].values())


def test_a_tag_that_no_pair_has_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = grouped_pair(2, 1)
    monkeypatch.setattr(
        ModelPair, "configured",
        lambda *_: ModelPair.load(pair.base, pair.tuned, tokenizer=byte_tokenizer()),
    )  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for name in ("base", "tuned"):
        (tmp_path / name).mkdir()
    config = read_pipeline(YAML, ["groups.by=nosuch"])
    with pytest.raises(DataError, match="no fit pair has a tag 'nosuch'; expected source, topic"):
        run_pipeline(config, YAML, tmp_path / "run", reporter=SILENT)

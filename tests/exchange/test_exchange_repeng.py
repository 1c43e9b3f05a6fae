"""repeng's control vectors: read by repeng, and repeng's own read here steer the same."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planted import byte_tokenizer, tiny_llama

from dsteer import SteeringVector, SteeringVectorSet, steer
from dsteer.errors import ConfigError, MeasurementError
from dsteer.exchange import export, read
from dsteer.exchange.repeng import directions, from_control_vector

IDS = torch.tensor([[0, 5, 6, 7, 8, 9, 40]])


@pytest.fixture
def repeng(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("gguf")
    monkeypatch.setattr(np, "float_", np.float64, raising=False)  # numpy 2 has no such name
    return pytest.importorskip("repeng")


def make(*blocks: int) -> SteeringVectorSet:
    rng = np.random.default_rng(4)
    vectors = (SteeringVector(rng.standard_normal(32), f"resid_post.{k}") for k in blocks)
    return SteeringVectorSet(vectors, {"model_type": "llama"})


def under(repeng: Any, control: Any, coefficient: float = 1.0) -> torch.Tensor:
    """Logits of repeng's model under a control vector, at the layers that it has."""
    model = repeng.ControlModel(copy.deepcopy(tiny_llama()), sorted(control.directions))
    model.set_control(control, coefficient)
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_repeng_reads_the_file_and_steers_as_the_hook_does(repeng: Any, tmp_path: Path) -> None:
    vectors = make(0, 1, 3)
    notes = export(vectors, tmp_path / "v.gguf", "repeng", strength=0.7, model=tiny_llama())
    assert any("llama.cpp rejects the file" in note for note in notes)
    control = repeng.ControlVector.import_gguf(tmp_path / "v.gguf")
    assert control.model_type == "llama"
    assert sorted(control.directions) == [0, 1, 3]
    model = tiny_llama()
    with torch.no_grad(), steer(model, vectors, 0.7):
        expected = model(input_ids=IDS).logits
    # float32, and the strength is multiplied in before rounding rather than behind it
    assert torch.allclose(under(repeng, control), expected, atol=1e-4)
    assert not torch.allclose(under(repeng, control, 0.0), expected, atol=1e-1)


def test_a_vector_trained_by_repeng_steers_the_same_here(repeng: Any, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.padding_side = "right"
    pairs = [
        repeng.DatasetEntry(f"I am calm, {word}", f"I am cross, {word}")
        for word in ("so it goes", "and tired", "mostly", "as ever", "today")
    ]
    control = repeng.ControlVector.train(tiny_llama(), tokenizer, pairs)
    control.export_gguf(tmp_path / "theirs.gguf")
    vectors = read(tmp_path / "theirs.gguf", "repeng", model=tiny_llama())
    assert list(vectors) == ["resid_post.1", "resid_post.2", "resid_post.3"]
    assert vectors.metadata["model_hint"] == "llama"
    model = tiny_llama()
    with torch.no_grad(), steer(model, vectors, 3.0):
        found = model(input_ids=IDS).logits
    assert torch.allclose(found, under(repeng, control, 3.0), atol=1e-4)  # float32
    again = from_control_vector(control)
    for site, vector in vectors.items():
        assert torch.equal(vector.tensor, again[site].tensor)
    assert again.metadata["model_type"] == "llama"
    back = repeng.ControlVector("llama", directions(again, 2.0))
    assert back == control * 2.0


def test_what_is_refused(tmp_path: Path) -> None:
    for site in ("final_norm", "attn_out.1", "mlp_out.1"):
        vectors = SteeringVectorSet([SteeringVector(np.ones(32), site)])
        with pytest.raises(ConfigError, match=f"repeng can't express {site}"):
            export(vectors, tmp_path / "v.gguf", "repeng")
        with pytest.raises(ConfigError, match=f"repeng can't express {site}"):
            directions(vectors)
    with pytest.raises(MeasurementError, match="expected a repeng ControlVector"):
        from_control_vector({"directions": 1})

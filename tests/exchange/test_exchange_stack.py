"""The stacked tensor: rows as transformers counts hidden states."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from planted import planted_pair, tiny_llama

from dsteer import SteeringVector, SteeringVectorSet, steer
from dsteer.errors import ConfigError, ModelError, StoreError
from dsteer.exchange import export, read

IDS = torch.tensor([[0, 5, 6, 7, 8, 9, 40]])


def make(*sites: str, **metadata: object) -> SteeringVectorSet:
    rng = np.random.default_rng(5)
    return SteeringVectorSet(
        [SteeringVector(rng.standard_normal(32).astype(np.float32), site) for site in sites],
        metadata,
    )


def test_a_recipe_written_by_hand_steers_the_same(tmp_path: Path) -> None:
    """Row k + 1 by a hook on block k; the last row by a hook on the final norm."""
    model, vectors = tiny_llama(), make("resid_post.0", "resid_post.2", "final_norm")
    notes = export(vectors, tmp_path / "v.pt", "stack", strength=0.5, model=model)
    assert "2 of its 5 rows are zeros" in notes[-1]
    rows = torch.load(tmp_path / "v.pt", weights_only=True)
    assert rows.shape == (5, 32)
    assert rows.dtype == torch.float32
    assert not rows[[0, 2]].any()
    with torch.no_grad(), steer(model, vectors, 0.5):
        expected = model(IDS).logits
    places = [*model.model.layers[:-1], model.model.norm]
    handles = [
        module.register_forward_hook(lambda _m, _i, out, row=row: out + row)
        for module, row in zip(places, rows[1:], strict=True)
    ]
    with torch.no_grad():
        assert torch.allclose(model(IDS).logits, expected, atol=1e-5)  # float32
    for handle in handles:
        handle.remove()


def test_a_difference_of_hidden_states_is_read(tmp_path: Path) -> None:
    """The simplest recipe: the difference of both models' hidden states at the last token."""
    planted = planted_pair(1)
    states = []
    for model in (planted.base, planted.tuned):
        with torch.no_grad():
            found = model(IDS, output_hidden_states=True).hidden_states
        states.append(torch.stack([state[0, -1] for state in found]))
    torch.save(states[1] - states[0], tmp_path / "v.pt")
    vectors = read(tmp_path / "v.pt", "stack", model=planted.base)
    # nothing differs before block 1, and the last block's raw output has no row
    assert list(vectors) == ["resid_post.1", "resid_post.2", "final_norm"]
    # rounding of states of size 10 in float32
    assert torch.allclose(vectors["resid_post.1"].tensor.float(), planted.b, atol=1e-4)
    assert vectors.metadata["model_type"] == "llama"
    assert "left_out" not in vectors.metadata


def test_round_trip_without_a_model(tmp_path: Path) -> None:
    vectors = make("resid_post.1", "final_norm", model_blocks=4)
    export(vectors, tmp_path / "v.pt", "stack")
    again = read(tmp_path / "v.pt", "stack")
    assert list(again) == list(vectors)
    assert all(torch.equal(again[site].tensor, vectors[site].tensor) for site in vectors)
    assert again.metadata["model_blocks"] == 4
    export(vectors, tmp_path / "other name.pt", "stack")
    assert (tmp_path / "other name.pt").read_bytes() == (tmp_path / "v.pt").read_bytes()


def test_a_change_of_the_embeddings_is_said(tmp_path: Path) -> None:
    torch.save(torch.full((3, 4), 0.5), tmp_path / "v.pt")
    vectors = read(tmp_path / "v.pt", "stack")
    assert list(vectors) == ["resid_post.0", "final_norm"]
    assert vectors.metadata["left_out"].startswith("row 0")
    assert "norm 1)" in vectors.metadata["left_out"]


def test_what_it_can_not_express_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "v.pt"
    with pytest.raises(ConfigError, match="give the model"):
        export(make("resid_post.1"), path, "stack")
    for site, why in (
        ("resid_post.3", "the last row is the state after the final norm"),
        ("attn_out.1", "rows are states between blocks"),
        ("mlp_out.1", "rows are states between blocks"),
    ):
        with pytest.raises(ConfigError, match=why):
            export(make(site), path, "stack", model=tiny_llama())
    assert not list(tmp_path.iterdir())


class Danger:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("pwned"),))


def test_files_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "v.pt"

    def refused(message: str, **settings: object) -> None:
        with pytest.raises(StoreError, match=message) as caught:
            read(path, "stack")
        assert "\n" not in str(caught.value)

    for value in (torch.ones(4), torch.ones(1, 4), torch.ones(3, 4, dtype=torch.int64), [1, 2]):
        torch.save(value, path)
        refused(r"expected a tensor \(L \+ 1, d\)")
    torch.save(torch.zeros(3, 4), path)
    refused("every row behind the first is zero")
    torch.save(torch.full((3, 4), torch.nan), path)
    refused("not finite")
    torch.save(Danger(), path)
    refused("which may be code")
    assert not Path("pwned").exists()
    torch.save(torch.ones(3, 4), path)
    whole = path.read_bytes()
    for cut in (0, 10, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:cut])
        with pytest.raises(StoreError) as caught:
            read(path, "stack")
        assert "\n" not in str(caught.value)
    torch.save(torch.ones(4, 32), path)
    with pytest.raises(ModelError, match="4 rows, and the model has 4 blocks; expected 5"):
        read(path, "stack", model=tiny_llama())

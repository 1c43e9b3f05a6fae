"""The folder of layer_K.json and layer_K.pt: read and written by rotalabs-steer, and safely."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import rotalabs_steer
import torch

from dsteer import SteeringVector, SteeringVectorSet
from dsteer.errors import StoreError

BLOCKS = (0, 2, 11)


def make_set(**metadata: object) -> SteeringVectorSet:
    generator = torch.Generator().manual_seed(0)
    return SteeringVectorSet(
        [
            SteeringVector(torch.randn(5, generator=generator), f"resid_post.{block}", n=block)
            for block in BLOCKS
        ],
        metadata,
    )


def test_rotalabs_steer_reads_what_we_write(tmp_path: Path) -> None:
    ours = make_set(behavior="formality", model="some/model", method="contrast mean")
    ours.save(tmp_path / "set")
    theirs = rotalabs_steer.SteeringVectorSet.load(tmp_path / "set")
    assert (theirs.behavior, theirs.layers) == ("formality", list(BLOCKS))
    assert theirs.model_name == "some/model"
    for layer in BLOCKS:
        assert theirs[layer].vector.dtype == torch.float32
        assert torch.equal(theirs[layer].vector, ours[layer].vector)
        assert theirs[layer].extraction_method == "contrast mean"
        assert theirs[layer].metadata["n"] == layer
    ours[2].save(tmp_path / "one")
    assert torch.equal(rotalabs_steer.SteeringVector.load(tmp_path / "one").vector, ours[2].vector)


def test_we_read_what_rotalabs_steer_writes(tmp_path: Path) -> None:
    theirs = rotalabs_steer.SteeringVectorSet(
        "formality",
        [
            rotalabs_steer.SteeringVector(
                behavior="formality",
                layer_index=block,
                vector=torch.full((4,), float(block + 1)),
                model_name="some/model",
                metadata={"num_pairs": 3},
            )
            for block in BLOCKS
        ],
    )
    theirs.save(tmp_path / "set")
    ours = SteeringVectorSet.load(tmp_path / "set")
    assert list(ours) == [f"resid_post.{block}" for block in BLOCKS]
    assert (ours.behavior, ours.model_name) == ("formality", "some/model")
    for block in BLOCKS:
        assert ours[block].tensor.tolist() == [block + 1] * 4
        assert ours[block].extraction_method == "caa"
        assert ours[block].metadata["num_pairs"] == 3
    theirs[2].save(tmp_path / "one")
    for name in ("one", "one.json", "one.pt"):
        assert SteeringVector.load(tmp_path / name).tensor.tolist() == [3] * 4
    (tmp_path / "set" / "metadata.json").unlink()  # layers alone are enough
    assert SteeringVectorSet.load(tmp_path / "set").layers == list(BLOCKS)


def test_round_trips(tmp_path: Path) -> None:
    ours = make_set(behavior="formality", settings={"seed": 3})
    for path in (tmp_path / "set", tmp_path / "set.safetensors"):
        ours.save(path)
        again = SteeringVectorSet.load(path)
        assert again.metadata == ours.metadata
        assert list(again) == list(ours)
        for block in BLOCKS:
            assert torch.equal(again[block].tensor, ours[block].tensor)
            assert again[block].metadata["n"] == block
    vector = SteeringVector([1.0, 2.0], "resid_post.4", behavior="humour", n=3)
    for name in ("one", "two.pt", "three.json", "four.safetensors", "v1.5"):
        vector.save(tmp_path / name)
        loaded = SteeringVector.load(tmp_path / name)
        assert (loaded.site, loaded.tensor.tolist()) == ("resid_post.4", [1, 2])
        assert loaded.metadata == vector.metadata
    assert (tmp_path / "v1.5.pt").is_file()
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_same_vectors_give_the_same_bytes(tmp_path: Path) -> None:
    """Even under another name."""
    for name in ("a", "b"):
        make_set().save(tmp_path / name)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_a_set_takes_the_place_of_another(tmp_path: Path) -> None:
    make_set().save(tmp_path / "set")
    SteeringVectorSet([SteeringVector([1.0], "resid_post.1")]).save(tmp_path / "set")
    assert sorted(item.name for item in (tmp_path / "set").iterdir()) == [
        "layer_1.json",
        "layer_1.pt",
        "metadata.json",
    ]


def test_no_other_file_is_lost(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(StoreError, match=r"'thesis.tex' and would be replaced"):
        make_set().save(tmp_path)
    assert [item.name for item in tmp_path.iterdir()] == ["thesis.tex"]


def test_what_a_layer_cannot_express_is_refused(tmp_path: Path) -> None:
    for site in ("final_norm", "attn_out.2"):
        vector = SteeringVector([1.0], site)
        with pytest.raises(StoreError, match=f"no vector at {site}; save as .safetensors"):
            vector.save(tmp_path / "one")
        with pytest.raises(StoreError, match=f"no vector at {site}"):
            SteeringVectorSet([SteeringVector([1.0], "resid_post.0"), vector]).save(tmp_path / "s")
    assert not list(tmp_path.iterdir())


class Hostile:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("it-ran",)


def test_a_pickle_with_code_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_set().save("set")
    torch.save(Hostile(), "set/layer_2.pt")
    for load in (lambda: SteeringVectorSet.load("set"), lambda: SteeringVector.load("set/layer_2")):
        with pytest.raises(
            StoreError, match=r"layer_2.pt: its pickle holds more than tensors"
        ) as caught:
            load()
        assert "\n" not in str(caught.value)
    assert not Path("it-ran").exists()
    torch.load("set/layer_2.pt", weights_only=False)
    assert Path("it-ran").exists()  # so it was dangerous


def refused(path: Path, message: str) -> None:
    load = SteeringVectorSet.load if path.is_dir() else SteeringVector.load
    with pytest.raises(StoreError, match=message) as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_broken_files_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    make_set().save(folder)
    layer, tensor, index = (folder / f for f in ("layer_2.json", "layer_2.pt", "metadata.json"))
    said = json.loads(layer.read_text())
    whole = tensor.read_bytes()
    refused(tmp_path, "lists no layers")
    refused(tmp_path / "missing", "missing.json: no such file")
    tensor.write_bytes(whole[:100])
    refused(folder, "layer_2.pt: ")
    tensor.write_bytes(b"")
    refused(folder, "layer_2.pt: ")
    torch.save({"a": torch.ones(2)}, tensor)
    refused(folder, "holds a dict; expected a bare tensor")
    torch.save(torch.ones(2, 3), tensor)
    refused(folder, "no steering vector .*shape")
    torch.save(torch.ones(3), tensor)
    refused(folder, "no set of steering vectors .*width")
    tensor.write_bytes(whole)
    for broken, message in (
        ("{", "not JSON"),
        ("[1]", "no steering vector"),
        ("{}", "has no 'layer_index'"),
        (json.dumps({**said, "layer_index": "two"}), "layer_index 'two'"),
        (json.dumps({**said, "metadata": 5}), "no steering vector"),
    ):
        layer.write_text(broken)
        refused(folder / "layer_2", message)
    layer.write_text(json.dumps(said))
    for broken, message in (
        ("[]", "lists no layers"),
        ('{"layers": ["../../elsewhere"]}', "lists no layers"),
        ('{"layers": [2, 9]}', "layer_9.json: no such file"),
        ('{"layers": [2], "metadata": 5}', "no set of steering vectors"),
    ):
        index.write_text(broken)
        refused(folder, message)
    make_set().save(tmp_path / "set.safetensors")
    refused(tmp_path / "set.safetensors", "holds 3 vectors; load it as a SteeringVectorSet")

"""Folders as people have them: in shards, safetensors alone, pickled, and incomplete."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from planted import tiny_llama
from safetensors.torch import load_file, save_file

from dsteer.errors import ModelError
from dsteer.models.load import load_model, quiet


def same(folder: Path) -> bool:
    state = tiny_llama().state_dict()
    loaded = load_model(folder, device="cpu").state_dict()
    return loaded.keys() == state.keys() and all(
        torch.equal(loaded[key], state[key]) for key in state
    )


def sharded(folder: Path) -> Path:
    with quiet():
        tiny_llama().save_pretrained(folder, max_shard_size="40KB")
    return folder


def test_shards(tmp_path: Path) -> None:
    assert len(list(sharded(tmp_path).glob("model-*.safetensors"))) > 3
    assert same(tmp_path)


def test_safetensors_and_config_alone(tmp_path: Path) -> None:
    with quiet():
        tiny_llama().save_pretrained(tmp_path)
    for file in tmp_path.iterdir():
        if file.name not in {"config.json", "model.safetensors"}:
            file.unlink()
    assert same(tmp_path)


@pytest.mark.parametrize("harm", ["absent", "cut"])
def test_missing_or_broken_shard(tmp_path: Path, harm: str) -> None:
    shard = sorted(sharded(tmp_path).glob("model-*.safetensors"))[1]
    if harm == "absent":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:200])
    with pytest.raises(ModelError, match="can't be loaded") as caught:
        load_model(tmp_path, device="cpu")
    assert "\n" not in str(caught.value)
    if harm == "absent":
        assert shard.name in str(caught.value)


def test_index_that_leaves_a_weight_out(tmp_path: Path) -> None:
    path = sharded(tmp_path) / "model.safetensors.index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    gone = index["weight_map"].pop("model.layers.3.mlp.down_proj.weight")
    if gone not in index["weight_map"].values():
        (tmp_path / gone).unlink()
    path.write_text(json.dumps(index), encoding="utf-8")
    if (tmp_path / gone).exists():
        kept = load_file(tmp_path / gone)
        kept.pop("model.layers.3.mlp.down_proj.weight")
        save_file(kept, tmp_path / gone, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights are missing .such as model\.layers\.3"):
        load_model(tmp_path, device="cpu")


# ---------------------------------------------------------------------------------- pickles


def test_pickled_weights_are_read_as_weights(tmp_path: Path) -> None:
    model = tiny_llama()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert same(tmp_path)


class Payload:
    """What would make a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (self.path,)


def test_code_in_a_pickle_does_not_run(tmp_path: Path) -> None:
    model = tiny_llama()
    model.config.save_pretrained(tmp_path)
    mark = tmp_path / "ran"
    torch.save({**model.state_dict(), "more": Payload(mark)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"more than tensors, .*safetensors") as caught:
        load_model(tmp_path, device="cpu")
    assert "\n" not in str(caught.value)
    assert not mark.exists()

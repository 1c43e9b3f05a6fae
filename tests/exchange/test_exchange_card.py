"""Cards for the hub: what they say, that their code runs, and how they are pushed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from planted import tiny_llama

from dsteer import SteeringVector, SteeringVectorSet, steer
from dsteer.errors import StoreError
from dsteer.exchange import card, export, read

METADATA = {
    "method": "contrast mean",
    "model": "owner/model",
    "model_revision": "0123abc",
    "position": "prompt_last",
    "data_sha256": "feed",
    "seeds": [1, 2],
    "note": "a | b",
    "tuned_model_revision": None,
    "accuracy": 0.123456,
}


def make() -> SteeringVectorSet:
    rng = np.random.default_rng(9)
    vectors = [
        SteeringVector(rng.standard_normal(32).astype(np.float32), site, n=40)
        for site in ("resid_post.2", "final_norm")
    ]
    return SteeringVectorSet(vectors, METADATA)


def front_of(text: str) -> dict[str, Any]:
    """The YAML in front, as the hub's own reader sees it."""
    data: dict[str, Any] = huggingface_hub.ModelCard(
        text, ignore_metadata_errors=False
    ).data.to_dict()
    return data


def test_the_folder_and_what_the_card_says(tmp_path: Path) -> None:
    vectors = make()
    export(vectors, tmp_path / "card", "card", strength=0.5)
    assert sorted(file.name for file in (tmp_path / "card").iterdir()) == [
        "README.md",
        "vectors.safetensors",
    ]
    again = read(tmp_path / "card", "card")
    assert again.metadata == METADATA
    assert torch.equal(again["resid_post.2"].tensor, vectors["resid_post.2"].tensor)
    text = (tmp_path / "card" / "README.md").read_text("utf-8")
    assert front_of(text) == {
        "base_model": "owner/model",
        "library_name": "dsteer",
        "tags": ["steering-vector", "dsteer"],
    }
    for line in (
        "| method | contrast mean |",
        "| data_sha256 | feed |",
        "| seeds | [1, 2] |",
        r"| note | a \| b |",
        "| accuracy | 0.1235 |",
        f"| resid_post.2 | {vectors['resid_post.2'].norm:.4g} | n 40 |",
    ):
        assert line in text
    assert "tuned_model_revision" not in text
    assert [line for line in text.splitlines() if "contrast mean" in line or "a \\|" in line] == [
        "| method | contrast mean |",
        r"| note | a \| b |",
    ]  # by name


def test_the_card_s_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = make()
    export(vectors, tmp_path / "card", "card", strength=0.5)
    monkeypatch.chdir(tmp_path / "card")
    (code,) = re.findall(r"```python\n(.*?)```", Path("README.md").read_text("utf-8"), re.DOTALL)
    model, ids, seen = tiny_llama(), torch.tensor([[0, 5, 6]]), []
    model.generate = lambda input_ids: seen.append(model(input_ids).logits)
    with torch.no_grad():
        exec(code, {"model": model, "inputs": {"input_ids": ids}})
        with steer(model, vectors["resid_post.2"], 0.5):
            assert torch.equal(seen[0], model(ids).logits)


def test_little_is_known(tmp_path: Path) -> None:
    """A folder's name is no id on the hub, and no metadata is said to be none."""
    vectors = SteeringVectorSet([SteeringVector([1.0], "resid_post.0")], {"model": "dpo"})
    assert "base_model" not in front_of(card.text(vectors))
    bare = card.text(SteeringVectorSet([SteeringVector([1.0], "resid_post.0")]))
    assert "the file has no metadata" in bare
    assert yaml.safe_load(bare.split("---")[1])["library_name"] == "dsteer"


class Hub:
    """Stands in for the hub's client and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    def create_repo(self, repo_id: str, **settings: Any) -> Any:
        self.asked.append({"create": repo_id, **settings})
        return huggingface_hub.RepoUrl(f"https://huggingface.co/me/{repo_id}")

    def upload_folder(self, **settings: Any) -> None:
        self.asked.append(settings)


def test_pushing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new repository is private, and only the card and the vectors leave the machine."""
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    export(make(), tmp_path / "card", "card")
    (tmp_path / "card" / "secret.txt").write_text("of the machine")
    address = card.push(tmp_path / "card", "my-vectors")
    assert address == "https://huggingface.co/me/my-vectors"
    created, uploaded = hub.asked
    assert created == {"create": "my-vectors", "private": True, "exist_ok": True}
    assert uploaded["repo_id"] == "me/my-vectors"
    assert uploaded["folder_path"] == tmp_path / "card"
    assert uploaded["allow_patterns"] == ["README.md", "vectors.safetensors"]


@pytest.mark.parametrize("name", ["me/vectors", "no/such/name"])
def test_a_hub_that_takes_nothing(name: str, tmp_path: Path) -> None:
    """Tests are offline, which the client says; so it does of a name that can't be one."""
    export(make(), tmp_path / "card", "card")
    with pytest.raises(StoreError, match=f"{name}: the hub took nothing") as caught:
        card.push(tmp_path / "card", name)
    assert "\n" not in str(caught.value)
    assert "push again" in str(caught.value)
    assert (tmp_path / "card" / "README.md").is_file()


def test_pushing_what_is_no_card(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"it has no README.md"):
        card.push(tmp_path, "me/vectors")

"""lm-evaluation-harness runs a local task with the file, and scores as under the hook."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import build
from planted import Planted, planted_pair
from test_exchange_stack import Danger

from dsteer import SteeringVector, SteeringVectorSet, steer
from dsteer.errors import ConfigError, ModelError, StoreError
from dsteer.exchange import export, read

QUESTIONS = ("Is water wet?", "Can a stone swim?", "Is two an even number?")
CHOICES = ("yes", "no idea")


def vector(site: str, width: int = 32) -> SteeringVector:
    return SteeringVector(np.random.default_rng(6).standard_normal(width), site)


@pytest.fixture(scope="module")
def planted() -> Planted:
    return planted_pair(1)


@pytest.fixture(scope="module")
def folder(planted: Planted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and a task of two choices that lies beside it."""
    folder = tmp_path_factory.mktemp("harness")
    planted.save(folder)
    rows = [{"question": text, "choices": CHOICES, "answer": 0} for text in QUESTIONS]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"data_files": {"test": str(folder / "data.jsonl")}, "cache_dir": str(folder / "cache")}
    task = {
        "task": "local_choices",
        "dataset_path": "json",
        "dataset_kwargs": files,
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metadata": {"version": 1},
    }
    (folder / "tasks").mkdir()
    (folder / "tasks" / "local_choices.yaml").write_text(json.dumps(task))
    return folder


def scored(folder: Path, file: Path) -> list[float]:
    """log p of each choice after each question, as the harness measures it."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    result = lm_eval.simple_evaluate(
        model="steered",
        model_args={"pretrained": str(folder / "base"), "steer_path": str(file)}
        | {"dtype": "float32"},
        tasks=["local_choices"],
        task_manager=TaskManager(include_path=str(folder / "tasks"), include_defaults=False),
        bootstrap_iters=0,
        device="cpu",
    )
    samples: list[Any] = result["samples"]["local_choices"]
    return [answer[0][0] for sample in samples for answer in sample["resps"]]


def expected(planted: Planted, vectors: SteeringVector, strength: float) -> list[float]:
    """The same by hand: prompt and answer in one pass under the hook."""
    found = []
    for question in QUESTIONS:
        for choice in CHOICES:
            start = len(planted.tokenizer(question).input_ids)
            ids = torch.tensor([planted.tokenizer(f"{question} {choice}").input_ids])
            with torch.no_grad(), steer(planted.base, vectors, strength):
                logp = planted.base(input_ids=ids).logits[0].double().log_softmax(-1)
            found.append(float(logp[start - 1 : -1].gather(1, ids[0, start:, None]).sum()))
    return found


@pytest.mark.filterwarnings("ignore")  # the harness and its libraries warn of this and that
@pytest.mark.parametrize("site", ["resid_post.2", "attn_out.1", "final_norm"])
def test_the_harness_scores_as_the_hook_does(
    site: str, planted: Planted, folder: Path, tmp_path: Path
) -> None:
    what = vector(site)
    notes = export(what, tmp_path / "v.pt", "lm-eval", strength=1.5, model=planted.base)
    assert "steer_path=v.pt" in notes[0]
    found = scored(folder, tmp_path / "v.pt")
    # sums of up to 8 log-probabilities in float32
    assert found == pytest.approx(expected(planted, what, 1.5), abs=2e-3)
    assert found != pytest.approx(expected(planted, what, 0.0), abs=0.1)


@pytest.mark.parametrize(
    ("name", "module"),
    [("gpt2", "h.1"), ("opt", "decoder.layers.1"), ("gpt-neox", "layers.1")],
)
def test_modules_of_other_families(name: str, module: str, tmp_path: Path) -> None:
    model = build(name)
    export(vector("resid_post.1"), tmp_path / "v.pt", "lm-eval", model=model, strength=-2)
    entries = torch.load(tmp_path / "v.pt", weights_only=True)
    assert list(entries) == [module]
    assert dict(model.base_model.named_modules())[module]
    assert entries[module]["steering_coefficient"] == -2
    again = read(tmp_path / "v.pt", "lm-eval", model=model)
    expected = -2 * vector("resid_post.1").tensor.float().double()
    assert torch.equal(again["resid_post.1"].tensor, expected)
    assert list(read(tmp_path / "v.pt", "lm-eval")) == ["resid_post.1"]  # by its name alone


def test_what_it_can_not_express_is_refused(planted: Planted, tmp_path: Path) -> None:
    two = SteeringVectorSet([vector("resid_post.1"), vector("resid_post.2")])
    with pytest.raises(ConfigError, match=r"2 sites \(resid_post.1, resid_post.2\).*name one"):
        export(two, tmp_path / "v.pt", "lm-eval", model=planted.base)
    with pytest.raises(ConfigError, match="lm-eval needs the model"):
        export(two, tmp_path / "v.pt", "lm-eval", sites="resid_post.1")
    with pytest.raises(ConfigError, match=r"expected NAME.pt"):
        export(two, tmp_path / "v", "lm-eval", sites="resid_post.1", model=planted.base)
    assert not list(tmp_path.iterdir())
    model = build("bloom")  # its attention adds the residual stream
    with pytest.raises(ConfigError, match=r"can't express attn_out.1: the model has no module"):
        export(vector("attn_out.1"), tmp_path / "v.pt", "lm-eval", model=model)


def test_files_that_are_none(
    planted: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "v.pt"
    good = {"action": "add", "steering_vector": torch.ones(32), "steering_coefficient": 1.0}

    def refused(value: object, message: str, kind: type[Exception] = StoreError) -> None:
        torch.save(value, path)
        with pytest.raises(kind, match=message) as caught:
            read(path, "lm-eval", model=planted.base)
        assert "\n" not in str(caught.value)

    refused([1], "no dictionary")
    refused({}, "no steering vectors")
    refused({"layers.1": {**good, "steering_vector": [1.0]}}, "no dictionary")
    refused({"layers.1": {**good, "action": "clamp"}}, "action 'clamp'.*expected 'add'")
    refused({"layers.1": {**good, "head_index": 2}}, "head_index 2")
    refused({"layers.9": good}, "'layers.9' is no site's module", ModelError)
    refused({"layers.1": {**good, "steering_vector": torch.ones(2, 32)}}, "shape")
    refused({"layers.1": {**good, "steering_vector": torch.ones(16)}}, "width", ModelError)
    refused(Danger(), "which may be code")
    assert not Path("pwned").exists()
    torch.save({"odd.1": good}, path)
    with pytest.raises(ModelError, match="or the model"):
        read(path, "lm-eval")

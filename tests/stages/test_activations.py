"""The activations stage: rows in order, response states, noise floor, refusals, resuming."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from planted import planted_pair

from dsteer.activations.extract import PairedActivations
from dsteer.activations.storage import FileSink, States
from dsteer.config import PipelineConfig
from dsteer.data.jsonl import write_pairs
from dsteer.data.types import PreferencePair
from dsteer.errors import DataError, MeasurementError, StoreError
from dsteer.models.readout import Readout
from dsteer.progress import SILENT
from dsteer.stages import StageContext
from dsteer.stages.activations import run
from dsteer.store import to_json

SIZES = {"fit": 6, "tune": 2, "test": 3}
BLOCK = 1


def pairs_of(split: str, count: int, answers: bool = True) -> list[PreferencePair]:
    return [
        PreferencePair(
            prompt=f"\n\nHuman: {split} {'more ' * n}please\n\nAssistant:",
            chosen=" Gladly." if answers else None,
            rejected=" No." if answers else None,
            conversation=f"{split}{n // 2}",
        )
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return planted_pair(BLOCK).save(tmp_path_factory.mktemp("models"))


def context(folder: Path, models: tuple[Path, Path], answers: bool = True, **activations: Any):
    for split, count in SIZES.items():
        write_pairs(folder / "data" / f"{split}.jsonl", pairs_of(split, count, answers))
    config = PipelineConfig.model_validate(
        {
            "name": "t",
            "data": {"sources": [{"format": "synthetic"}]},
            "models": {"base": str(models[0]), "tuned": str(models[1]), "device": "cpu"},
            "activations": {"noise_floor_prompts": 4, "batch_tokens": 128, **activations},
        }
    )
    (folder / "activations").mkdir(parents=True, exist_ok=True)
    return StageContext("activations", config, folder, SILENT)


def test_rows_states_and_result(tmp_path: Path, models) -> None:
    result = run(context(tmp_path, models, response_tokens=5))
    json.loads(to_json(result))
    assert result["rows"] == {"fit": [0, 6], "tune": [6, 8], "test": [8, 11]}
    assert (result["n"], result["width"], result["blocks"]) == (11, 32, 4)
    assert result["sites"] == [*(f"resid_post.{k}" for k in range(4)), "final_norm"]
    assert {split: len(keys) for split, keys in result["conversations"].items()} == SIZES
    keys = result["conversations"]["fit"]
    assert keys[0] == keys[1] != keys[2]
    assert result["headline"] == {
        "prompts": 11, "tokens": result["tokens"], "sites": 5, "truncated": 0,
    }  # fmt: skip
    acts = PairedActivations.open(tmp_path / "activations")
    b = planted_pair(BLOCK).b.double()
    assert not acts.displacement("resid_post.0").any()
    delta = acts.displacement(f"resid_post.{BLOCK}")
    assert torch.allclose(delta, b.expand_as(delta), atol=1e-5)
    for site, noise in result["noise_floor"].items():
        assert 0 <= noise["mean_norm"] <= noise["rms"] < 1e-4, site
    assert str(tmp_path) not in to_json(result)  # no path of this machine
    assert result["notes"] == []


def test_response_states_predict_the_response_tokens(tmp_path: Path, models) -> None:
    result = run(context(tmp_path, models, response_tokens=5))
    folder = tmp_path / "activations"
    response = json.loads((folder / "response.json").read_text())
    assert response["offsets"] == [0, 5, 10, 15]
    assert result["response"] == {"pairs": 3, "tokens": 15}
    planted = planted_pair(BLOCK)
    for name, model in (("base", planted.base), ("tuned", planted.tuned)):
        states = States.open(folder / f"response_{name}.safetensors")["final_norm"]
        logits = Readout.of(model)(states)
        for number, pair in enumerate(pairs_of("test", 3)):
            ids = planted.tokenizer(f"{pair.prompt}{pair.chosen}")["input_ids"]
            start = len(planted.tokenizer(str(pair.prompt))["input_ids"])
            span = slice(*response["offsets"][number : number + 2])
            assert response["targets"][span] == ids[start : start + 5]
            with torch.no_grad():
                own = model(torch.tensor([ids])).logits[0, start - 1 : start + 4]
            assert torch.allclose(logits[span], own, atol=1e-4)


def test_prompts_without_answers_have_no_response(tmp_path: Path, models) -> None:
    result = run(context(tmp_path, models, answers=False))
    assert result["response"] is None
    assert not (tmp_path / "activations" / "response.json").exists()


def test_rows_of_all_tokens_have_a_key_each(tmp_path: Path, models) -> None:
    result = run(context(tmp_path, models, position="all", sites=("final_norm",)))
    assert result["rows"]["test"][1] == result["n"] == result["tokens"]
    for split, (start, stop) in result["rows"].items():
        assert len(result["conversations"][split]) == stop - start


def test_truncation_is_counted_and_said(tmp_path: Path, models) -> None:
    result = run(context(tmp_path, models, max_tokens=40, response_tokens=0))
    assert result["truncated"] == result["headline"]["truncated"] > 0
    assert any("were cut on the left" in note for note in result["notes"])


def test_two_identical_models_are_refused(tmp_path: Path, models) -> None:
    with pytest.raises(MeasurementError, match="identical states at every site"):
        run(context(tmp_path, (models[0], models[0])))


def test_an_empty_split_is_refused(tmp_path: Path, models) -> None:
    stage = context(tmp_path, models)
    write_pairs(tmp_path / "data" / "tune.jsonl", [])
    with pytest.raises(DataError, match="tune"):
        run(stage)


def test_cut_off_stage_ends_with_the_same_bytes(tmp_path: Path, models, monkeypatch) -> None:
    expected = run(context(tmp_path / "whole", models))
    put, calls = FileSink.put, []

    def full(self: FileSink, *rest: Any) -> None:
        calls.append(1)
        if len(calls) > 6:
            raise StoreError("the disk is full")
        put(self, *rest)

    monkeypatch.setattr(FileSink, "put", full)
    with pytest.raises(StoreError, match="full"):
        run(context(tmp_path / "cut", models))
    monkeypatch.setattr(FileSink, "put", put)
    assert run(context(tmp_path / "cut", models)) == expected
    whole, cut = tmp_path / "whole" / "activations", tmp_path / "cut" / "activations"
    names = sorted(item.name for item in whole.iterdir())
    assert sorted(item.name for item in cut.iterdir()) == names
    assert all((cut / name).read_bytes() == (whole / name).read_bytes() for name in names)

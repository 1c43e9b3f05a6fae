"""Recommended layers: what a run measured for this very model, else what is published."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from planted import byte_tokenizer, tiny_llama

from dsteer import MODEL_CONFIGS, recommended_layers
from dsteer.errors import StoreError
from dsteer.models.load import load_model, quiet
from dsteer.store import hash_file, identify


def saved(folder: Path, seed: int = 0) -> Any:
    with quiet():
        tiny_llama(seed).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return load_model(folder)


def site(norm: float, **recovered: float | None) -> dict[str, Any]:
    return {"norm": norm, "kl_recovered": recovered}


SITES = {
    "resid_post.0": site(1, all=-2.0, prompt_last=0.1),
    "resid_post.1": site(2, all=None, prompt_last=0.3),
    "resid_post.2": site(3, all=0.41, prompt_last=0.2),
    "resid_post.3": site(9, all=0.35, prompt_last=0.2),
    "final_norm": site(5, all=0.9, prompt_last=0.9),  # no layer
}


def write_run(folder: Path, manifest: dict[str, Any], sites: dict[str, Any]) -> None:
    (folder / "interpolation").mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "interpolation" / "result.json").write_text(json.dumps({"sites": sites}))


def test_a_run_that_was_given_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base, tuned, other = (saved(tmp_path / name, i) for i, name in enumerate("abc"))
    inputs = {"models.base": identify("a"), "models.tuned": identify("b")}
    write_run(tmp_path / "results" / "mine", {"inputs": inputs}, SITES)
    for model in (base, tuned):
        for runs in (None, "results", tmp_path / "results" / "mine", ["results"]):
            found = recommended_layers(model, runs=runs)
            assert (found.layers, found.kind) == ((2,), "measured")
            assert found.source == (
                "measured in run mine: KL recovered 0.41 on tune (λ = 1, positions all)"
            )
    assert recommended_layers(other).kind == "guess"
    assert recommended_layers(tiny_llama()).kind == "guess"  # from nowhere
    better = {"resid_post.0": site(1, all=0.5)}
    write_run(tmp_path / "runs" / "again", {"inputs": inputs}, better)
    assert recommended_layers(base).layers == (0,)
    assert recommended_layers(base, runs="results").layers == (2,)
    write_run(tmp_path / "none", {"inputs": inputs}, {"resid_post.0": site(1, all=-0.5)})
    useless = recommended_layers(base, runs="none")
    assert useless.kind == "guess"
    assert "run none measured no layer that recovers KL" in useless.source


def test_a_run_that_trained_the_model(tmp_path: Path) -> None:
    """Its manifest has the hash of each file that a stage wrote."""
    run = tmp_path / "trained"
    stages = {}
    for number, stage in enumerate(("base", "dpo")):
        saved(run / stage / "model", number)
        files = [path for path in (run / stage).rglob("*") if path.is_file()]
        stages[stage] = {
            "outputs": {str(path.relative_to(run / stage)): hash_file(path) for path in files}
        }
        stages[stage]["outputs"]["result.json"] = "0" * 64
    write_run(run, {"stages": stages}, SITES)
    for stage in stages:
        found = recommended_layers(load_model(run / stage / "model"), runs=run)
        assert (found.layers, found.kind) == ((2,), "measured")


def test_a_model_of_the_hub_is_told_by_its_commit(tmp_path: Path) -> None:
    model = tiny_llama()
    model.config.name_or_path, model.config._commit_hash = "owner/name", "abc"
    for commit, kind in (("abc", "measured"), ("other", "guess")):
        inputs = {"models.base": None, "models.tuned": f"hub:owner/name@{commit}"}
        write_run(tmp_path / commit, {"inputs": inputs}, SITES)
        assert recommended_layers(model, runs=tmp_path / commit).kind == kind


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_an_adapter_is_not_its_base(tmp_path: Path) -> None:
    import peft

    base = saved(tmp_path / "a")
    write_run(tmp_path / "run", {"inputs": {"models.base": identify(str(tmp_path / "a"))}}, SITES)
    assert recommended_layers(base, runs=tmp_path / "run").kind == "measured"
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert recommended_layers(adapted, runs=tmp_path / "run").kind == "guess"


def test_published_layers_and_the_guess() -> None:
    model = tiny_llama(num_hidden_layers=18)
    model.config.name_or_path = "google/gemma-2b-it"
    found = recommended_layers(model, runs=[])
    assert (found.layers, found.kind) == ((9,), "published")  # what enters block 10
    assert "arXiv:2406.11717" in found.source
    guess = recommended_layers(tiny_llama(), runs=[])
    assert guess.kind == "guess"
    assert guess.source.startswith("guess: 0.50 of 4 blocks, the median depth")
    assert guess.layers == (1,)
    model.config.name_or_path = "google/gemma-2-2b-it"  # of another depth than this model
    assert recommended_layers(model, runs=[]).kind == "guess"
    assert recommended_layers(tiny_llama(num_hidden_layers=1), runs=[]).layers == (0,)


def test_every_published_layer_has_its_source() -> None:
    for family, config in MODEL_CONFIGS.items():
        assert config.layers, family
        for entry in config.published:
            assert 0 <= entry.layer < config.blocks
            assert re.search(r"arXiv:\d{4}\.\d{5}", entry.source)
            assert entry.what
            counted = re.search(
                r"layer (\d+), the (output of|state that enters) block \1$", entry.source
            )
            assert counted
            assert entry.layer == int(counted[1]) - (counted[2] != "output of")


def test_folders_that_are_no_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = saved(tmp_path / "model")
    with pytest.raises(StoreError, match=r"nowhere: no such folder; expected a run"):
        recommended_layers(model, runs="nowhere")
    (tmp_path / "runs" / "broken").mkdir(parents=True)
    (tmp_path / "runs" / "broken" / "manifest.json").write_text("{")
    assert recommended_layers(model).kind == "guess"  # not asked for, so passed over
    with pytest.raises(StoreError, match="not JSON"):
        recommended_layers(model, runs="runs/broken")


@pytest.mark.parametrize("text", ["[]", '"x"', '{"inputs": null, "stages": {"dpo": null}}'])
def test_manifests_of_other_programs_say_nothing(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("results/other").mkdir(parents=True)
    Path("results/other/manifest.json").write_text(text)
    with quiet():
        tiny_llama().save_pretrained("model")
    found = recommended_layers(load_model("model"))
    assert found.kind == "guess"

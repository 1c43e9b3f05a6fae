"""Hub ids with revisions, read from a cache as the hub's client fills it; nothing is downloaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from planted import PROMPTS, byte_tokenizer, tiny_llama

from dsteer.activations.extract import extract
from dsteer.config import ModelsConfig, read_pipeline
from dsteer.errors import ConfigError, ModelError
from dsteer.models.load import load_config, load_model, load_tokenizer, quiet
from dsteer.models.pair import ModelPair
from dsteer.pipeline import outside_inputs

IDS = torch.tensor([[0, 5, 6, 7, 8, 9]])
PIPELINE = "name: x\ndata: {sources: [{format: synthetic}]}\nactivations: {}\n"
COMMITS = {"main": "a" * 40, "step2": "b" * 40}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """org/tiny with two revisions, whose weights are those of the seeds 0 and 1."""
    folder = tmp_path / "hub" / "models--org--tiny"
    for seed, (name, commit) in enumerate(COMMITS.items()):
        with quiet():
            tiny_llama(seed).save_pretrained(folder / "snapshots" / commit)
        byte_tokenizer().save_pretrained(folder / "snapshots" / commit)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / name).write_text(commit, encoding="utf-8")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return folder


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


@pytest.mark.usefixtures("hub")
def test_revision_in_the_name(tmp_path: Path) -> None:
    for name, seed in (("org/tiny", 0), ("org/tiny@main", 0), ("org/tiny@step2", 1)):
        model = load_model(name, device="cpu")
        assert torch.equal(logits(model), logits(tiny_llama(seed)))
    assert load_config("org/tiny@step2").hidden_size == 32
    assert load_tokenizer("org/tiny@step2")("a")["input_ids"][0] == 0
    apart = load_model("org/tiny", revision="step2", device="cpu")
    assert torch.equal(logits(apart), logits(tiny_llama(1)))
    with pytest.raises(ModelError, match=r"org/tiny@gone: the model can't be loaded"):
        load_model("org/tiny@gone", device="cpu")


@pytest.mark.usefixtures("hub")
def test_pair_of_two_revisions() -> None:
    pair = ModelPair.load("org/tiny", "org/tiny@step2", device="cpu")
    apart = ModelPair.load("org/tiny", "org/tiny", tuned_revision="step2", device="cpu")
    right = ModelPair.load(tiny_llama(0), tiny_llama(1), tokenizer=byte_tokenizer())
    acts = extract(pair, PROMPTS)
    for other in (extract(apart, PROMPTS), extract(right, PROMPTS)):
        for site in acts.sites:
            assert torch.equal(acts.displacement(site), other.displacement(site))
    assert pair.name("tuned") == "org/tiny@step2"
    with pytest.raises(ModelError, match="org/tiny@step2 names a revision, and main is another"):
        ModelPair.load("org/tiny", "org/tiny@step2", tuned_revision="main", device="cpu")


@pytest.mark.usefixtures("hub")
def test_pair_of_a_pipeline() -> None:
    config = read_pipeline(PIPELINE, ["models.base=org/tiny", "models.tuned=org/tiny@step2"])
    models = config.models
    assert (models.base, models.base_revision) == ("org/tiny", None)
    assert (models.tuned, models.tuned_revision) == ("org/tiny", "step2")
    assert config == read_pipeline(
        PIPELINE,
        ["models.base=org/tiny", "models.tuned=org/tiny", "models.tuned_revision=step2"],
    )
    pair = ModelPair.configured(models, "org/tiny", "org/tiny")
    assert torch.equal(logits(pair.tuned), logits(tiny_llama(1)))
    assert outside_inputs("activations", config) == {
        "models.base": f"hub:org/tiny@{COMMITS['main']}",
        "models.tuned": f"hub:org/tiny@{COMMITS['step2']}",
    }
    with pytest.raises(ConfigError, match=r"models: tuned org/tiny@step2 names a revision, and so"):
        read_pipeline(PIPELINE, ["models.tuned=org/tiny@step2", "models.tuned_revision=main"])


def test_identity_of_templates_tokenizers_and_gguf_files(hub: Path, tmp_path: Path) -> None:
    template = tmp_path / "t.jinja"
    template.write_text("{{ messages }}", encoding="utf-8")
    local = tmp_path / "model.gguf"
    local.write_bytes(b"GGUF")
    shutil.copy(local, hub / "snapshots" / COMMITS["step2"] / "q4.gguf")
    overrides = [
        f"models.base={local}", "models.tuned=org/tiny:q4.gguf@step2",
        "models.tokenizer=org/tiny@step2", f"models.chat_template={template}",
    ]  # fmt: skip
    config = read_pipeline(PIPELINE, overrides)
    assert config.models.tuned == "org/tiny:q4.gguf"
    found = outside_inputs("activations", config)
    assert found["models.base"].startswith("sha256:")
    assert found["models.tuned"] == f"hub:org/tiny@{COMMITS['step2']}"
    assert found["models.tokenizer"] == f"hub:org/tiny@{COMMITS['step2']}"
    before = found["models.chat_template"]
    template.write_text("{{ messages[0] }}", encoding="utf-8")
    assert outside_inputs("activations", config)["models.chat_template"] != before
    gone = (("base", "./a.gguf"), ("tuned", "runs/a.gguf"), ("chat_template", "a.jinja"))
    for key, path in gone:
        with pytest.raises(ConfigError, match=rf"models\.{key}: {path}: no such file"):
            outside_inputs(
                "activations", read_pipeline(PIPELINE, [*overrides, f"models.{key}={path}"])
            )


def test_identity_of_the_models_behind_adapters(hub: Path, tmp_path: Path) -> None:
    """A chain of adapters, a base that is changed in place, and one of the hub."""
    assert hub.is_dir()
    whole = tmp_path / "whole"
    whole.mkdir()
    (whole / "model.safetensors").write_bytes(b"one")
    chain = {"first": str(whole), "second": str(tmp_path / "first"), "online": "org/tiny@step2",
             "round": str(tmp_path / "round"), "broken": None}  # fmt: skip
    for name, base in chain.items():
        (tmp_path / name).mkdir()
        text = json.dumps({"base_model_name_or_path": base}) if base else "{"
        (tmp_path / name / "adapter_config.json").write_text(text, encoding="utf-8")

    def found(base: str, tuned: str) -> dict[str, str | None]:
        overrides = [f"models.base={tmp_path / base}", f"models.tuned={tmp_path / tuned}"]
        return outside_inputs("activations", read_pipeline(PIPELINE, overrides))

    before = found("second", "online")
    assert before["models.base.adapter_base"] == found("first", "online")["models.base"]
    assert before["models.tuned.adapter_base"] == f"hub:org/tiny@{COMMITS['step2']}"
    (whole / "model.safetensors").write_bytes(b"two")
    after = found("second", "online")
    changed = {key for key in before if before[key] != after[key]}
    assert changed == {"models.base.adapter_base.adapter_base"}
    assert set(found("round", "broken")) == {"models.base", "models.tuned"}


def test_gguf_file_on_the_hub(hub: Path) -> None:
    pytest.importorskip("gguf")
    with pytest.raises(ModelError, match=r"org/tiny:q4\.gguf: the model can't be loaded"):
        load_config("org/tiny:q4.gguf")
    (hub / "snapshots" / COMMITS["main"] / "q4.gguf").write_bytes(b"no such format")
    for name in ("org/tiny:q4.gguf", "org/tiny/q4.gguf@main"):
        with pytest.raises(ModelError, match="GGUF magic"):  # it was found, and read
            load_config(name)


@pytest.mark.usefixtures("hub")
def test_adapter_on_a_base_of_the_hub(hub: Path, tmp_path: Path) -> None:
    base = ModelsConfig(base="org/tiny@step2")
    assert base.base_revision == "step2"
    assert ModelsConfig.model_validate(base.model_dump()) == base
    adapter = hub.parent / "models--org--adapter"
    config = '{"peft_type": "LORA", "base_model_name_or_path": "org/tiny", "task_type": null}'
    (adapter / "snapshots" / COMMITS["main"]).mkdir(parents=True)
    (adapter / "snapshots" / COMMITS["main"] / "adapter_config.json").write_text(config)
    (adapter / "refs").mkdir()
    (adapter / "refs" / "main").write_text(COMMITS["main"])
    pair = ModelPair.load("org/tiny", "org/adapter@main", device="cpu")
    assert pair._base_is_inside
    with pytest.raises(ModelError, match="org/adapter@main: the model can't be loaded"):
        _ = pair.tuned  # an adapter without weights

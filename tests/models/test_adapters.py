"""Adapters: the base read with the adapter off, equal to two separate models, and untouched."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from planted import PROMPTS, byte_tokenizer, tiny_llama

from dsteer.activations.extract import PairedActivations, extract
from dsteer.activations.reading import sample_weights
from dsteer.errors import ModelError
from dsteer.models import pair as pair_module
from dsteer.models.adapters import adapter_off, other_base_note, restores_base
from dsteer.models.load import load_model, quiet
from dsteer.models.pair import ModelPair
from dsteer.models.readout import Readout
from dsteer.steering.build import mean_difference

# PEFT asks transformers for a name that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

IDS = torch.tensor([[0, 5, 6, 7, 8, 9]])
LORA = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)


def folder_hash(path: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def put_on(base: Path, config: object, folder: Path) -> Path:
    """An adapter on a base, saved; its random weights are drawn with a fixed seed."""
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        wrapped = get_peft_model(load_model(base, device="cpu"), config)
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name or "modules_to_save" in name or "ia3" in name:
                parameter.data += 0.1 * torch.randn_like(parameter)
        wrapped.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    with quiet():
        tiny_llama().save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return put_on(base, LORA, tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def merged(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("merged")
    with quiet():
        load_model(adapter, device="cpu").merge_and_unload().save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def states(acts: PairedActivations) -> dict[str, torch.Tensor]:
    return {
        f"{which}.{s}": getattr(acts, which)[s] for s in acts.sites for which in ("base", "tuned")
    }


def test_adapter_pair_equals_the_merged_pair(base: Path, adapter: Path, merged: Path) -> None:
    before = folder_hash(base)
    pair = ModelPair.load(base, adapter, device="cpu")
    acts = extract(pair, PROMPTS)
    whole = extract(ModelPair.load(base, merged, device="cpu"), PROMPTS)
    found, expected = states(acts), states(whole)
    for name, state in expected.items():
        # W + BA is rounded once in the merged weights, and W h + B A h at each step unmerged
        assert float((found[name] - state).norm() / state.norm()) < 1e-4, name
    assert all(torch.equal(acts.base[site], whole.base[site]) for site in acts.sites)
    vectors, direct = mean_difference(acts), mean_difference(whole)
    for site in acts.sites:
        change, right = acts.displacement(site), whole.displacement(site)
        assert float((change - right).norm() / right.norm()) < 1e-4
        off = vectors[site].tensor - direct[site].tensor
        assert float(off.norm() / direct[site].norm) < 1e-4
    assert all(vectors[site].norm > 0.01 for site in acts.sites)
    assert folder_hash(base) == before


def test_one_model_serves_both(base: Path, adapter: Path) -> None:
    pair = ModelPair.load(base, adapter, device="cpu")
    alone = load_model(base, device="cpu")
    with pair.using("base") as model:
        assert torch.equal(model(IDS).logits, alone(IDS).logits)
        assert torch.equal(Readout.of(model).weight, alone.lm_head.weight)
        first = model
    with pair.using("tuned") as model:
        assert model is first
        assert not torch.allclose(model(IDS).logits, alone(IDS).logits, atol=1e-3)
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert set(pair._models) == {"tuned"}
    pair.release()
    assert not pair._models


def test_objects_that_were_asked_for_keep_their_weights(base: Path, adapter: Path) -> None:
    pair = ModelPair.load(base, adapter, device="cpu")
    alone, tuned = load_model(base, device="cpu"), load_model(adapter, device="cpu")
    with pair.using("base") as shared:
        with pytest.raises(ModelError, match="adapter is off while the base is read"):
            _ = pair.tuned
        with pair.using("tuned") as other:  # one inside the other: each has its own weights
            assert other is not shared
            assert torch.equal(other(IDS).logits, tuned(IDS).logits)
            assert torch.equal(shared(IDS).logits, alone(IDS).logits)
    with pair.using("tuned") as own, pair.using("base") as other:
        assert other is not own
        assert torch.equal(own(IDS).logits, tuned(IDS).logits)
        assert torch.equal(other(IDS).logits, alone(IDS).logits)
    pair.release()
    with pair.using("base"):
        with pair.using("base") as model:
            assert torch.equal(model(IDS).logits, alone(IDS).logits)
        with pytest.raises(ModelError, match="adapter is off"):
            _ = pair.tuned
        assert torch.equal(model(IDS).logits, alone(IDS).logits)
    pair.release()
    held = pair.tuned
    with pair.using("base") as model:
        assert model is not held
        assert torch.equal(held(IDS).logits, tuned(IDS).logits)
        assert pair.base is model


def test_fingerprint_of_the_base_is_that_of_the_base(base: Path, adapter: Path) -> None:
    alone, tuned = load_model(base, device="cpu"), load_model(adapter, device="cpu")
    on = sample_weights(tuned)
    with adapter_off(tuned):
        assert sample_weights(tuned) == sample_weights(alone)
    assert sample_weights(tuned) == on != sample_weights(alone)


def test_trained_head_is_put_back(base: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    pair = ModelPair.load(base, put_on(base, config, tmp_path), device="cpu")
    alone = load_model(base, device="cpu")
    with pair.using("tuned") as model:
        assert not torch.equal(Readout.of(model).weight, alone.lm_head.weight)
    with pair.using("base") as model:
        assert torch.equal(Readout.of(model).weight, alone.lm_head.weight)
        assert sample_weights(model) == sample_weights(alone)


def test_trained_biases_are_no_part_of_the_base(base: Path, tmp_path: Path) -> None:
    """PEFT leaves them where they are: such a base has its own load."""
    config = LoraConfig(r=2, target_modules=["down_proj"], bias="lora_only")
    put_on(base, config, tmp_path)
    tuned = load_model(tmp_path, device="cpu")
    for name, parameter in tuned.named_parameters():
        if name.endswith("down_proj.base_layer.bias"):
            parameter.data += 1.0
    with quiet():
        tuned.save_pretrained(tmp_path)
    alone = load_model(base, device="cpu")
    pair = ModelPair.load(base, tmp_path, device="cpu")
    with pair.using("tuned") as model:
        assert not torch.allclose(model(IDS).logits, alone(IDS).logits, atol=1e-3)
    with pair.using("base") as model:
        assert not hasattr(model, "peft_config")
        assert torch.equal(model(IDS).logits, alone(IDS).logits)


@pytest.mark.parametrize(
    ("config", "restores"),
    [
        (LORA, True),
        (LoraConfig(), True),
        (LoraConfig(init_lora_weights="gaussian"), True),
        (LoraConfig(bias="all"), False),
        (LoraConfig(init_lora_weights="pissa_niter_4"), False),
        (LoraConfig(init_lora_weights="olora"), False),
        (IA3Config(), True),
    ],
)
def test_which_adapters_leave_the_base(config: object, restores: bool) -> None:
    assert restores_base(config) is restores


def test_start_that_changes_the_base_is_read_from_its_own_load(base: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")
    pair = ModelPair.load(base, put_on(base, config, tmp_path), device="cpu")
    with pair.using("tuned"), pair.using("base") as model:
        assert torch.equal(model(IDS).logits, load_model(base, device="cpu")(IDS).logits)


def test_adapter_whose_weights_were_moved_in_inference_mode(adapter: Path) -> None:
    """As accelerate's hooks do with weights that wait in memory."""
    model = load_model(adapter, device="cpu")
    with torch.inference_mode():
        for module in model.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    setattr(module, name, torch.nn.Parameter(parameter.clone(), False))
    with torch.inference_mode():
        on = model(IDS).logits
        with adapter_off(model):
            off = model(IDS).logits
    with adapter_off(model):
        pass
    with torch.inference_mode():
        assert torch.equal(model(IDS).logits, on)
    assert not torch.allclose(on, off, atol=1e-3)


def test_two_adapters(base: Path, adapter: Path, tmp_path: Path) -> None:
    """Each on its own load; one that was trained on the other's model is put on that."""
    with torch.no_grad():
        own = load_model(adapter, device="cpu")(IDS).logits
        other = put_on(base, LORA, tmp_path / "other")
        pair = ModelPair.load(adapter, other, device="cpu")
        with pair.using("base") as model:
            assert torch.equal(model(IDS).logits, own)
        with pair.using("tuned") as model:
            assert torch.equal(model(IDS).logits, load_model(other, device="cpu")(IDS).logits)
        path = other / "adapter_config.json"
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace(str(base), str(adapter)), encoding="utf-8")
        stacked = ModelPair.load(adapter, other, device="cpu")
        with stacked.using("tuned") as model, model.disable_adapter():
            # the first adapter is merged, the second one is off: one rounding of W + BA
            assert torch.allclose(model(IDS).logits, own, atol=1e-4)
        with stacked.using("tuned") as model:
            assert not torch.allclose(model(IDS).logits, own, atol=1e-2)


def test_adapter_in_memory_with_a_base_on_disk(base: Path, adapter: Path) -> None:
    wrapped = load_model(adapter, device="cpu")
    acts = extract(ModelPair.load(base, wrapped, device="cpu"), PROMPTS)
    stored = extract(ModelPair.load(base, adapter, device="cpu"), PROMPTS)
    assert all(torch.equal(state, states(stored)[name]) for name, state in states(acts).items())


# ---------------------------------------------------------------------------------- other bases


def test_adapter_on_another_base_is_told(base: Path, adapter: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    with quiet():
        tiny_llama(5).save_pretrained(other)
    byte_tokenizer().save_pretrained(other)
    copied = shutil.copytree(base, tmp_path / "copied")
    for right in (base, base / ".." / base.name, copied):  # the same weights elsewhere
        assert ModelPair.load(right, adapter, device="cpu").notes == []
    (note,) = ModelPair.load(other, adapter, device="cpu").notes
    assert f"was trained on {base} and is put on {other}: their weights differ" in note
    assert ModelPair.load(load_model(other, device="cpu"), adapter).notes == [note]
    assert ModelPair.load(tiny_llama(), adapter).notes == []  # where that is from is not known


@pytest.mark.parametrize(
    ("named", "given", "told"),
    [
        ("org/a", "org/a", None),
        ("org/a", "org/a@main", None),
        ("org/a", "/cache/models--org--a/snapshots/0123", None),
        (None, "org/a", None),
        ("org/a", "org/b", "trained on org/a and is put on org/b: whether they are one model is"),
        ("/gone/a", "org/b", "/gone/a is not there"),
        ("org/a", "/some/folder", "whether they are one model is not known"),
    ],
)
def test_names_of_an_adapters_base(named: str | None, given: str, told: str | None) -> None:
    note = other_base_note(named, given, "adapter")
    assert note is None if told is None else told in str(note)


def test_repeated_blocks_are_refused(base: Path, tmp_path: Path) -> None:
    """With its adapter off such a model is still deeper than the base."""
    config = LoraConfig(r=2, target_modules=["q_proj"], layer_replication=[[0, 3], [2, 4]])
    put_on(base, config, tmp_path)
    assert not restores_base(config)
    with pytest.raises(
        ModelError, match=r"repeats blocks.*\[\[0, 3\], \[2, 4\]\].*without layer_r"
    ):
        ModelPair.load(base, tmp_path, device="cpu")


def test_a_model_that_is_deeper_than_its_config_said(base: Path, monkeypatch) -> None:
    pair = ModelPair.load(base, base, device="cpu")
    deeper = tiny_llama(num_hidden_layers=5)
    monkeypatch.setattr(pair_module, "load_model", lambda *_args, **_options: deeper)
    with pytest.raises(ModelError, match="has 5 blocks once it is loaded, and its config said 4"):
        _ = pair.tuned


# ---------------------------------------------------------------------------------- parts of it


@pytest.mark.parametrize("saved", [["embed_tokens", "lm_head"], ["lm_head"]])
def test_adapter_with_more_tokens(base: Path, tmp_path: Path, saved: list[str]) -> None:
    wide, folder = tmp_path / "wide", tmp_path / "adapter"
    with quiet():
        model = load_model(base, device="cpu")
        model.resize_token_embeddings(266, mean_resizing=False)
        model.save_pretrained(wide)
    put_on(wide, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=saved), folder)
    right = load_model(folder, device="cpu")
    pair = ModelPair.load(base, folder, device="cpu")
    assert (pair.vocabulary, pair._base_is_inside) == (260, False)
    assert any("vocabularies differ (260 and 266 tokens)" in note for note in pair.notes)
    with pair.using("tuned") as tuned:
        assert torch.equal(tuned(IDS).logits, right(IDS).logits)
    with pair.using("base") as model:
        assert torch.equal(model(IDS).logits, load_model(base, device="cpu")(IDS).logits)
    acts = extract(pair, PROMPTS)
    whole = extract(ModelPair.load(base, right, device="cpu", tokenizer=base), PROMPTS)
    assert all(torch.equal(state, states(acts)[name]) for name, state in states(whole).items())


def test_what_an_adapter_can_not_be_put_on_is_named(adapter: Path) -> None:
    """PEFT heads such errors with a line that says nothing."""
    with pytest.raises(ModelError, match=r"size mismatch for .*lora_A") as caught:
        load_model(adapter, adapter_base=tiny_llama(hidden_size=16))
    assert "\n" not in str(caught.value)

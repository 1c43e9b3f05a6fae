"""Loading models and tokenizers: what is right, and one clear line for what is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as tf
from planted import byte_tokenizer, tiny_llama

from dsteer.errors import ModelError
from dsteer.models.load import (
    is_adapter,
    load_config,
    load_model,
    load_tokenizer,
    quiet,
    resolve_device,
    tokenizer_notes,
)

# PEFT asks transformers for a name that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


def save(model, folder: Path) -> Path:
    with quiet():
        model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = save(tiny_llama(), tmp_path_factory.mktemp("model"))
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    from peft import LoraConfig, get_peft_model

    base = tf.AutoModelForCausalLM.from_pretrained(folder)
    wrapped = get_peft_model(
        base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    path = tmp_path_factory.mktemp("adapter")
    with quiet():
        wrapped.save_pretrained(path)
    return path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_have_the_asked_dtype(folder: Path, dtype: str) -> None:
    model = load_model(folder, dtype=dtype, device="cpu")
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert not model.training


def test_loaded_weights_are_the_saved_ones(folder: Path) -> None:
    state = tiny_llama().state_dict()
    loaded = load_model(str(folder), device="cpu").state_dict()
    assert all(torch.equal(loaded[key], state[key]) for key in state)


def test_nothing_is_printed_and_verbosity_returns(folder: Path, capfd) -> None:
    from transformers.utils import logging

    before = (logging.get_verbosity(), logging.is_progress_bar_enabled())
    load_model(folder, device="cpu")
    load_tokenizer(folder)
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_adapter_sits_unmerged_on_its_own_base(folder: Path, adapter: Path) -> None:
    assert is_adapter(adapter)
    assert not is_adapter(folder)
    model = load_model(adapter, device="cpu")  # the base that its config names
    assert any("lora_" in name for name, _ in model.named_parameters())
    assert load_config(adapter).hidden_size == 32
    plain = load_model(folder, device="cpu")
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert not torch.allclose(model(ids).logits, plain(ids).logits, atol=1e-3)
        with model.disable_adapter():
            assert torch.equal(model(ids).logits, plain(ids).logits)


def broken_json(path: Path) -> None:
    (path / "config.json").write_text("{no json")


def no_type(path: Path) -> None:
    (path / "config.json").write_text("{}")


def no_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()


def broken_weights(path: Path) -> None:
    (path / "model.safetensors").write_bytes(b"x" * 64)


def other_shape(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "hidden_size": 16}))


def no_head(path: Path) -> None:
    save(tiny_llama().model, path)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (broken_json, "can't be loaded.*JSON"),
        (no_type, "can't be loaded.*model_type"),
        (no_weights, "can't be loaded.*model.safetensors"),
        (broken_weights, "can't be loaded.*header"),
        (other_shape, "can't be loaded"),
        (no_head, "1 weights are missing .such as lm_head.weight"),
    ],
)
def test_broken_folders_are_one_clear_line(tmp_path: Path, harm, message: str) -> None:
    save(tiny_llama(), tmp_path)
    harm(tmp_path)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(tmp_path, device="cpu")
    assert "\n" not in str(caught.value)


def test_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"without config\.json, so it holds no model"):
        load_config(tmp_path)


def test_unknown_hub_id_offline_and_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nobody/nothing: the model can't be loaded.*hub id"):
        load_model("nobody/nothing", device="cpu")
    with pytest.raises(ModelError, match="nobody/nothing at revision abc"):
        load_model("nobody/nothing", revision="abc", device="cpu")
    with pytest.raises(ModelError, match="expected a folder, or a hub id"):
        load_model(tmp_path / "absent", device="cpu")


def test_float16_gemma_is_refused_before_loading(tmp_path: Path) -> None:
    tf.Gemma2Config(hidden_size=16, num_hidden_layers=2).save_pretrained(tmp_path)  # no weights
    with pytest.raises(ModelError, match="float16 overflows in gemma2 models; use dtype bfloat16"):
        load_model(tmp_path, dtype="float16", device="cpu")


def test_tokenizer_without_pad_or_template(tmp_path: Path) -> None:
    byte_tokenizer(template=None, pad=False).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.pad_token == tokenizer.eos_token == "</s>"
    notes = tokenizer_notes(tokenizer)
    assert len(notes) == 2
    assert "no pad token of its own" in notes[0]
    assert "no chat template" in notes[1]
    assert tokenizer_notes(byte_tokenizer()) == []


def test_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no tokenizer could be loaded there"):
        load_tokenizer(save(tiny_llama(), tmp_path))


def test_devices() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type in {"cpu", "cuda", "mps"}
    with pytest.raises(ModelError, match=r"device 'gpu' can't be used here.*expected auto"):
        resolve_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match="device 'cuda' can't be used here"):
            resolve_device("cuda")

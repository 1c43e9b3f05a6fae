"""GGUF files: the model and its tokenizer from one file that the test writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf_llama import PLAIN, write
from planted import PROMPTS, TEMPLATE, byte_tokenizer, tiny_llama

from dsteer.activations.extract import extract
from dsteer.errors import MissingExtraError, ModelError
from dsteer.models import load as load_module
from dsteer.models.load import is_adapter, load_config, load_model, load_tokenizer, quiet
from dsteer.models.pair import ModelPair

gguf = pytest.importorskip("gguf")

IDS = torch.tensor([[0, 5, 6, 7, 8, 9]])


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tiny_llama(**PLAIN), tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def test_weights_are_those_that_were_written(file: Path, capfd) -> None:
    model = load_model(file, device="cpu")
    state = tiny_llama(**PLAIN).state_dict()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
    with torch.no_grad():
        # the norm's ε is written in float32
        assert torch.allclose(model(IDS).logits, tiny_llama(**PLAIN)(IDS).logits, atol=1e-5)
    assert load_config(file).num_hidden_layers == 4
    assert not is_adapter(file)
    assert capfd.readouterr() == ("", "")


def test_tokenizer_of_the_file(file: Path) -> None:
    own, given = load_tokenizer(file), byte_tokenizer()
    assert own.chat_template == TEMPLATE
    assert (own.bos_token, own.eos_token, own.pad_token) == ("<s>", "</s>", "<pad>")
    text = "Human: Which bread keeps?"  # without the file's one merge
    assert own(text)["input_ids"] == given(text)["input_ids"]


def test_pair_with_a_folder(file: Path, tmp_path: Path) -> None:
    base = tiny_llama(**PLAIN)
    with quiet():
        base.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    changed = tiny_llama(**PLAIN)
    with torch.no_grad():
        changed.model.layers[1].mlp.down_proj.weight += 0.3
    pair = ModelPair.load(tmp_path / "base", write(changed, tmp_path / "tuned.gguf"), device="cpu")
    assert pair.notes == [
        "The models are not quantised alike (base: not quantised, tuned: GGUF, unpacked on load): "
        "a part of every displacement is rounding of weights, not training."
    ]
    acts = extract(pair, PROMPTS)
    right = extract(ModelPair.load(base, changed, tokenizer=byte_tokenizer()), PROMPTS)
    for site in acts.sites:
        change, expected = acts.displacement(site), right.displacement(site)
        # float32 states; ε again
        assert float((change - expected).norm()) <= 1e-4 * float(right.tuned[site].norm())
    assert float(acts.displacement("resid_post.1").norm()) > 1


def test_quantised_file_is_unpacked(tmp_path: Path) -> None:
    shape = {**PLAIN, "hidden_size": 64, "intermediate_size": 64}  # Q8_0 has blocks of 32
    full = tiny_llama(**shape)
    path = write(full, tmp_path / "q8.gguf", quantize=True)
    model = load_model(path, device="cpu")
    weight = model.model.layers[0].mlp.up_proj.weight
    blocks = full.model.layers[0].mlp.up_proj.weight.detach().reshape(-1, 32)
    step = blocks.abs().amax(1, keepdim=True) / 127
    assert weight.dtype == torch.float32
    # half a step of the block, and its size in float16
    error = (weight.detach().reshape(-1, 32) - blocks).abs()
    assert bool((error <= 0.5 * step + 127 * step * 2**-11).all())
    assert float(error.max()) > 0
    pair = ModelPair.load(path, path, device="cpu")
    assert "Both models are quantised (GGUF, unpacked on load)" in pair.notes[0]


# PEFT asks transformers for a name that transformers has deprecated.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_adapter_on_a_file(file: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    with quiet():
        get_peft_model(tiny_llama(**PLAIN), config).save_pretrained(tmp_path)
    pair = ModelPair.load(file, tmp_path, device="cpu")
    assert "Both models are quantised (GGUF, unpacked on load)" in pair.notes[0]
    acts = extract(pair, PROMPTS)
    assert all(acts.displacement(site).any() for site in acts.sites)
    alone = load_model(file, device="cpu")
    with pair.using("base") as model, torch.no_grad():
        assert torch.equal(model(IDS).logits, alone(IDS).logits)


# ---------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./absent.gguf", r"absent\.gguf: no such file; expected a GGUF file, or owner/name:file"),
        ("models/absent.gguf", "no such file"),
        ("absent.gguf", "no such file"),
        ("nobody/nothing:tiny.gguf", r"nobody/nothing:tiny\.gguf: the model can't be loaded"),
        ("nobody/nothing/tiny.gguf", "the model can't be loaded"),
    ],
)
def test_files_that_are_nowhere(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        load_model(name, device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"no such format", b"GGUF\x03\0\0\0", b"GGUF"])
def test_broken_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    for load in (load_config, load_tokenizer):
        with pytest.raises(ModelError) as caught:
            load(path)
        assert "\n" not in str(caught.value)


def test_cut_file(file: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    whole = file.read_bytes()
    for share in (0.01, 0.2, 0.9):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(ModelError) as caught:
            load_model(path, device="cpu")
        assert "\n" not in str(caught.value)


def test_other_files_are_no_models(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"x")
    with pytest.raises(ModelError, match="is a file; expected a folder that save_pretrained"):
        load_model(path, device="cpu")


def test_quantised_twice(file: Path) -> None:
    with pytest.raises(ModelError, match=r"can't be quantised to 4bit again; drop"):
        load_model(file, device="cpu", quantization="4bit")


def test_without_the_package(file: Path, monkeypatch) -> None:
    monkeypatch.setattr(load_module, "find_spec", lambda _name: None)
    with pytest.raises(MissingExtraError, match=r"tiny\.gguf needs .*'dsteer\[gguf\]'"):
        load_config(file)
    with pytest.raises(MissingExtraError, match=r"dsteer\[gguf\]"):
        load_tokenizer(file)

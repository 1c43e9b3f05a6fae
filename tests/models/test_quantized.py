"""Quantised models: loaded by bitsandbytes, read and steered; and what is said of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from planted import PROMPTS, byte_tokenizer, planted_pair, tiny_llama

from dsteer.activations.extract import extract
from dsteer.activations.reading import sample_weights, workers_for
from dsteer.errors import MissingExtraError, ModelError
from dsteer.models import load as load_module
from dsteer.models.anatomy import Anatomy
from dsteer.models.load import load_model, quantization_of, quiet
from dsteer.models.pair import ModelPair
from dsteer.models.readout import Readout
from dsteer.steering.decode import sweep
from dsteer.steering.intervene import steer
from dsteer.steering.vector import SteeringVector

IDS = torch.tensor([[0, 5, 6, 7, 8, 9]])
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}  # blocks of 64


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return planted_pair(0, **SHAPE).save(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def needs_bnb() -> None:
    with quiet():
        pytest.importorskip("bitsandbytes")


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """A weight after nf4: blocks of 64 values, each the nearest of 16 levels times the largest."""
    levels = torch.tensor([
        -1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
        0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0,
    ])  # fmt: skip
    blocks = weight.reshape(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    nearest = ((blocks / largest)[..., None] - levels).abs().argmin(-1)
    return (levels[nearest] * largest).reshape(weight.shape)


@pytest.mark.usefixtures("needs_bnb")
def test_four_bits_are_the_rounded_weights(folders) -> None:
    from bitsandbytes.functional import dequantize_4bit

    model = load_model(folders[0], device="cpu", quantization="4bit")
    full = tiny_llama(**SHAPE)
    held = dict(model.named_parameters())
    for name, parameter in full.named_parameters():
        if "proj.weight" in name:
            parameter.data = rounded(parameter.data)
            own = dequantize_4bit(held[name].data, held[name].quant_state)
            assert torch.allclose(own, parameter, rtol=1e-5)  # the levels have 7 digits
        else:
            assert torch.equal(held[name], parameter)
    before = sample_weights(model)
    with torch.inference_mode():
        expected, found = full(IDS).logits, model(IDS).logits
    # The levels above have 7 digits; products are summed in another order.
    assert float((found - expected).norm() / expected.norm()) < 1e-4
    assert sample_weights(model) == before
    assert torch.equal(Readout.of(model).weight, full.lm_head.weight)  # left as it is
    assert workers_for(model, Anatomy.of(model)) == 1


@pytest.mark.usefixtures("needs_bnb")
@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_pair_is_read_and_steered(folders, bits) -> None:
    pair = ModelPair.load(*folders, device="cpu", quantization=bits)
    acts = extract(pair, PROMPTS)
    b = planted_pair(0, **SHAPE).b.double()
    change = acts.displacement("resid_post.0")
    # b is a bias, which stays as it is: the state's own rounding is all that is left (float32).
    assert float((change - b).norm(dim=1).max() / b.norm()) < 1e-4
    assert any(f"Both models are quantised (bitsandbytes, {bits} on load)" in n for n in pair.notes)
    vector = SteeringVector(b.float(), site="resid_post.1")
    with pair.using("base") as model:
        base = sample_weights(model)
        with torch.inference_mode():
            with steer(model, vector, 4.0):
                steered = model(IDS).logits
            assert not torch.allclose(steered, model(IDS).logits, atol=1e-2)
        made = sweep(model, pair.tokenizer, PROMPTS[:2], vector, [0.0, 4.0], 3)
        assert len(made.texts) == 2
    with pair.using("tuned") as model:
        assert sample_weights(model) != base


@pytest.mark.usefixtures("needs_bnb")
def test_quantised_checkpoint_beside_a_full_one(folders, tmp_path: Path) -> None:
    with quiet():
        load_model(folders[1], device="cpu", quantization="4bit").save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    pair = ModelPair.load(folders[0], tmp_path, device="cpu")
    assert pair.notes == [
        "The models are not quantised alike (base: not quantised, tuned: bitsandbytes): a part of "
        "every displacement is rounding of weights, not training."
    ]
    asked = load_model(folders[1], device="cpu", quantization="4bit")
    with pair.using("tuned") as model, torch.inference_mode():
        assert torch.equal(model(IDS).logits, asked(IDS).logits)
    again = ModelPair.load(folders[0], tmp_path, device="cpu", quantization="8bit")
    with again.using("tuned") as model:  # a checkpoint that is quantised stays as it is
        assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    assert "base: bitsandbytes, 8bit on load, tuned: bitsandbytes" in again.notes[0]


@pytest.mark.usefixtures("needs_bnb")
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT asks for it
def test_adapter_on_a_quantised_base(folders, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    with quiet():
        get_peft_model(tiny_llama(**SHAPE), config).save_pretrained(tmp_path)
    pair = ModelPair.load(folders[0], tmp_path, device="cpu", quantization="4bit")
    alone = load_model(folders[0], device="cpu", quantization="4bit")
    with torch.inference_mode():
        with pair.using("tuned") as model:
            assert not torch.allclose(model(IDS).logits, alone(IDS).logits, atol=1e-2)
        with pair.using("base") as model:
            assert torch.equal(model(IDS).logits, alone(IDS).logits)
            assert sample_weights(model) == sample_weights(alone)
    assert "Both models are quantised" in pair.notes[0]


# ---------------------------------------------------------------------------------- missing


@pytest.mark.parametrize("own", [True, False])
def test_without_bitsandbytes(folders, tmp_path: Path, monkeypatch, own: bool) -> None:
    monkeypatch.setattr(load_module, "find_spec", lambda _name: None)
    folder, options = folders[0], {"quantization": "4bit"}
    if own:
        folder, options = checkpoint(tmp_path, quant_method="bitsandbytes", load_in_4bit=True), {}
    with pytest.raises(MissingExtraError, match=r"pip install 'dsteer\[bnb\]'") as caught:
        load_model(folder, device="cpu", **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "package"),
    [
        ({"quant_method": "gptq", "bits": 4}, "optimum|gptqmodel"),
        ({"quant_method": "aqlm"}, "aqlm"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
    ],
)
def test_other_quantisers_are_named(tmp_path: Path, settings, package) -> None:
    folder = checkpoint(tmp_path, **settings)
    with pytest.raises(ModelError, match=f"({package}).*install the package") as caught:
        load_model(folder, device="cpu")
    assert "\n" not in str(caught.value)


def checkpoint(folder: Path, **settings: object) -> Path:
    """A folder whose config says that its weights are quantised."""
    with quiet():
        tiny_llama().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_how_a_config_says_that_it_is_quantised(tmp_path: Path) -> None:
    assert quantization_of(tiny_llama().config) is None
    config = tiny_llama().config
    config.quantization_config = {"quant_method": "gptq"}
    assert quantization_of(config) == "gptq"
